"""What the processes of a run agree on beside their gradients: to wait for a slow one, and to stop at the same step."""

import os
import signal
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=7)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # of Ctrl-C; of a scheduler at its limit; of sbatch --signal
STOPPED = 130  # exit code of a run that a signal stopped, as a shell has it for Ctrl-C


class Processes:
    """All processes of a run, joined by gloo: they wait for the slowest however long it takes, where NCCL gives up
    after ten minutes, and for no device."""

    def __init__(self) -> None:
        is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        self.group = None if is_alone else dist.new_group(backend="gloo", timeout=PATIENCE)
        self.index, self.count = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
        self.is_main = self.index == 0

    def wait(self) -> None:
        """Return when every process has called it."""
        if self.group is not None:
            dist.barrier(self.group)

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """Return the items of all processes, in their order; every process calls it."""
        if self.group is None:
            return list(items)
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, list(items), group=self.group)
        return [item for part in parts for item in part]


class StopSignals:
    """Within `with`, a signal of SIGNALS lets a run finish its step and save; a second Ctrl-C breaks it off.

    Of several processes one signal to one of them stops all, at the same step: the one after the next.
    """

    def __init__(self, processes: Processes):
        self.group, self.asked = processes.group, threading.Event()
        self.votes, self.counting = torch.zeros(1), None  # how many were asked; the count of the last step

    def __enter__(self) -> "StopSignals":
        is_main_thread = threading.current_thread() is threading.main_thread()
        before = {each: signal.getsignal(each) for each in SIGNALS if is_main_thread}
        # ignored is Ctrl-C in a shell's background; None is what Python did not set, so cannot set again
        self.before = {each: handler for each, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        for each in self.before:
            signal.signal(each, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def _ask(self, number: int, _: Any) -> None:
        if self.asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt("stopped; the same command goes on from the last checkpoint")
        self.asked.set()

    def is_agreed(self) -> bool:
        """Return whether a signal came, the same in all processes, which call it once a step. Of several the answer is
        that of the call before, so that none waits for it."""
        if self.group is None:
            return self.asked.is_set()
        is_agreed = False
        if self.counting is not None:
            self.counting.wait()
            is_agreed = self.votes.item() > 0
        self.votes = torch.full((1,), float(self.asked.is_set()))
        self.counting = dist.all_reduce(self.votes, group=self.group, async_op=True)
        return is_agreed


def leave_process_group(worker: int) -> None:
    """Start a data worker in a process group of its own: signals to the run's group, of a terminal or torchrun, are the
    run's to act on, and a worker that died of one would end it unsaved."""
    os.setpgid(0, 0)
