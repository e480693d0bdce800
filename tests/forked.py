"""Processes forked from one that has imported the commands: imports take longer than what is tried."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["training.pretrain", "training.benchmark", "training.predict"])


def start(work: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    """Call `work(*arguments)` in a process that knows nothing of this one."""
    process = CONTEXT.Process(target=_work, args=(work, *arguments))
    process.start()
    return process


def run(work: Callable[..., Any], *arguments: Any) -> None:
    process = start(work, *arguments)
    process.join()
    assert process.exitcode == 0


def _work(work: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    work(*arguments)
