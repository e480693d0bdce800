"""Stages of work over files on datatrove's executors: processes of this machine, Slurm or Ray. Finished tasks are
skipped. A corpus is built so, and a large archive embedded."""

import ctypes
import importlib
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .command import show_progress

try:
    import loguru
    import multiprocess
    import yaml

    loguru.logger.disable("datatrove")  # its tracebacks print the values of variables, and so paths
except ImportError:  # comes with datatrove; said where an engine is asked for
    multiprocess = None

ENGINES = {
    "local": ("datatrove.executor.local", "LocalPipelineExecutor"),
    "slurm": ("datatrove.executor.slurm", "SlurmPipelineExecutor"),
    "ray": ("datatrove.executor.ray", "RayPipelineExecutor"),
}
OURS = ("self", "pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed", "start_method", "job_name")
CHECKOUT = Path(__file__).parents[2]
PR_SET_PDEATHSIG = 1  # linux/prctl.h
WATCH_SECONDS = 0.5


class Stage(NamedTuple):
    name: str
    step: Callable[[Any, int, int], None]  # called with (data, rank, world_size); of a module that can be imported
    tasks: int
    progress: Callable[[], None] = lambda: None  # called now and then while a local stage runs


def executor(engine: str) -> Any:
    """Return datatrove's class of executor. Raises ImportError where it needs what is not installed."""
    if multiprocess is None:
        raise ImportError("--engine needs datatrove: pip install 'mammodino[train]'")
    module, name = ENGINES[engine]
    return getattr(importlib.import_module(module), name)


def parse_arguments(engine: str, given: Sequence[str]) -> dict[str, Any]:
    """Parse NAME=VALUE arguments of datatrove's executor. Raises ValueError where it has none of that name."""
    known = [name for name in inspect.signature(executor(engine)).parameters if name not in OURS]
    arguments = {}
    for each in given:
        name, separator, value = each.partition("=")
        if not separator or name not in known:
            raise ValueError(f"--engine_args {each}: {engine} takes NAME=VALUE, where NAME is {', '.join(known)}")
        arguments[name] = yaml.safe_load(value)
    return arguments


def progress_bar(name: str, unit: str, folder: Path, count: Callable[[], int]) -> Callable[[], None]:
    """Return what shows a bar by the files of `folder`, so that it begins where a stopped run was."""
    bars: list[Any] = []

    def show() -> None:
        done = len(list(folder.glob("[!.]*")))
        if not bars:
            bars.append(show_progress(total=count(), initial=done, unit=unit, desc=name))
        bars[0].update(done - bars[0].n)
        if done == bars[0].total:
            bars[0].close()

    return show


def run_stages(stages: Sequence[Stage], engine: str, workers: int, logs: Path, arguments: dict[str, Any]) -> bool:
    """Run each stage when the one before it is done. Return whether all is done: Slurm's jobs are only sent off.

    Raises ChildProcessError where a local worker process died, and whatever a task raised.
    """
    before = None
    for stage in stages:
        options: dict[str, Any] = {}
        if engine == "local":
            options["start_method"] = "spawn"  # a fork of a process in which OpenCV or torch ran threads can hang
        elif engine == "slurm":
            paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": CHECKOUT}
            environment = "export " + " ".join(f"{name}={path}:${name}" for name, path in paths.items())
            environment += " SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"  # which srun takes from nowhere else
            options |= {"depends": before, "job_name": f"mammodino_{stage.name}", "env_command": environment}
        before = executor(engine)(
            pipeline=[stage.step],
            tasks=stage.tasks,
            workers=min(workers, stage.tasks),
            logging_dir=str(logs / stage.name),
            **options,
            **arguments,
        )
        if engine == "slurm":
            before.run()
        else:
            with _watched(stage.progress):
                before.run()
    return engine != "slurm"


def is_complete(logs: Path) -> bool:
    """Tell whether a stage of one task, which logs there, was run to its end."""
    return (logs / "completions" / "00000").exists()


@contextmanager
def _watched(progress: Callable[[], None]) -> Iterator[None]:
    """While a local stage runs, show progress, and stop where a worker dies, for which a pool would wait forever."""
    done = threading.Event()
    died: list[int] = []

    def watch() -> None:
        children: set[Any] = set()
        while not done.wait(WATCH_SECONDS):
            progress()
            children.update(multiprocess.active_children())
            died.extend(child.exitcode for child in children if child.exitcode not in (None, 0, -signal.SIGTERM))
            if died and is_main:
                os.kill(os.getpid(), signal.SIGUSR1)  # not SIGINT, which a shell's background jobs ignore
                return

    def stop(*_: Any) -> None:
        raise ChildProcessError(f"a worker process died (signal {-died[0]}; 9 is often a lack of memory)")

    # elsewhere no signal arrives; there `build_corpus` starts no workers that could die
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGUSR1, stop) if is_main else None
    watcher = threading.Thread(target=watch, daemon=True)
    _helpers_are_bound.set()
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        if is_main:
            signal.signal(signal.SIGUSR1, before)
        _helpers_are_bound.clear()
    progress()


_helpers_are_bound = threading.Event()


def die_with_parent() -> None:
    """Bind the life of a worker process to that of the process that started it, so that none goes on alone."""
    if sys.platform == "linux" and multiprocess and multiprocess.parent_process() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _bind_helper() -> None:
    """Do the same for datatrove's own helper process, which is forked."""
    if sys.platform == "linux" and _helpers_are_bound.is_set():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


os.register_at_fork(after_in_child=_bind_helper)
