"""A run's folder, which one process has for itself and which says when the run is done; and a queue of runs."""

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from accelerate import PartialState
from filelock import FileLock, Timeout

import modeling_mammodino
from modeling_mammodino.tools.files import atomic_file, write_json

from .run_settings import LABEL_TABLE, RunSettings

logger = logging.getLogger(__name__)

RESULT_FILE = "result.json"  # written last: where it exists, a run is done
MODEL_FOLDER = "model"
SETTINGS_FILE, PREDICTIONS_FILE = "settings.json", "predictions.parquet"
PACKAGES = ("torch", "transformers", "peft", "datasets", "numpy", "scipy", "pandas")
NOTICE = "Research use only: not a medical device."
WAIT_SECONDS = 2.0


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    """Write a table without its index, atomically."""
    with atomic_file(path) as temporary:
        table.to_parquet(temporary, index=False)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the content, None where there is no such file. Raises ValueError where it is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}); remove it to have it made again") from error


def how_it_was_run(settings: RunSettings, *packages: str) -> dict[str, Any]:
    """Return all that it takes to repeat a run: settings, versions of PACKAGES and `packages`, command line."""
    return {
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "mammodino": modeling_mammodino.__version__,
            **{name: version(name) for name in (*PACKAGES, *packages)},
        },
        "command": settings.command(),
    }


def this_process() -> PartialState:
    """Return which of the processes that share this run it is, and with what device, joined with the others."""
    # others wait as long as the main one encodes
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def refuse_torchrun(what: str) -> None:
    """Raise ValueError where several processes are at one run that is not shared."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{what} is one process: start it without accelerate launch or torchrun, others beside it")


def run_once(settings: RunSettings, run: Callable[[], dict[str, Any]], leftovers: Sequence[str]) -> Any:
    """Return the content of result.json: of `run()`, or, where the same settings were run before, of the file. Of
    several processes the main one writes; the others have what `run()` returned.

    `leftovers`, folders that a run needs to resume after a kill, are removed when the result is written.
    Raises ValueError where another process has the folder, or where it holds a run of other settings.
    """
    output = Path(settings.output_dir)
    if not this_process().is_main_process:
        return read_json(output / RESULT_FILE) or run()
    output.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(output / ".lock").acquire(timeout=0)  # released by the system when the process dies
    except Timeout as error:
        raise ValueError(f"output_dir={output}: another run is at work there; wait for it, or give another") from error
    with lock:
        check_same_settings(output / SETTINGS_FILE, settings.what_is_computed())
        if read_json(output / RESULT_FILE) is None:
            write_json(output / RESULT_FILE, run())
        for name in leftovers:
            shutil.rmtree(output / name, ignore_errors=True)
        return read_json(output / RESULT_FILE)


def check_same_settings(path: Path, wanted: dict[str, Any]) -> None:
    """Raise ValueError where the settings in `path`, if it exists, differ from `wanted`."""
    if (noted := read_json(path)) is None:
        return
    if LABEL_TABLE not in wanted:  # of a finished run it may be gone
        noted.pop(LABEL_TABLE, None)
    if changed := [
        f"{name} ({noted.get(name)!r} -> {wanted.get(name)!r})"
        for name in sorted(set(wanted) | set(noted))
        if noted.get(name) != wanted.get(name)
    ]:
        raise ValueError(
            f"output_dir={path.parent}: holds a run of other settings: {', '.join(changed)}; give the same to go on, "
            "or another output_dir"
        )


class QueuedJob(Protocol):
    """What `run_jobs` needs of a job."""

    @property
    def name(self) -> str: ...
    @property
    def output_dir(self) -> Path: ...  # holds RESULT_FILE once the job is done


def run_jobs(jobs: Sequence[QueuedJob], run: Callable[[Any], Any]) -> dict[str, str]:
    """Call `run(job)` for each job without a result, and wait for those that other processes hold.

    A job is held by an operating-system lock on a file beside its folder, which the death of its process releases. A
    job that fails is named once, and the others go on; what is not said in one line for the user, such as memory that
    is out or a fault of ours, is logged with its traceback.

    Returns: the reasons of jobs that failed here, by name.
    """
    failed: dict[str, str] = {}
    while True:
        waiting = False
        for job in jobs:
            if job.name in failed or is_done(job):
                continue
            job.output_dir.parent.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(job.output_dir.with_name(job.output_dir.name + ".lock")).acquire(blocking=False):
                    if not is_done(job):  # another process may have finished it a moment ago
                        failed |= _run_one(job, run, 1 + sum(map(is_done, jobs)), len(jobs))
            except Timeout:
                waiting = True  # another process is at it
        if not waiting:
            return failed
        time.sleep(WAIT_SECONDS)


def is_done(job: QueuedJob) -> bool:
    return (job.output_dir / RESULT_FILE).is_file()


def _run_one(job: QueuedJob, run: Callable[[Any], Any], number: int, total: int) -> dict[str, str]:
    started = time.monotonic()
    try:
        run(job)
    except Exception as error:
        is_said = isinstance(error, (ImportError, OSError, ValueError))
        reason = " ".join((str(error) if is_said else f"{type(error).__name__}: {error}").split())
        logger.error("failed: %s: %s", job.name, reason, exc_info=not is_said)
        return {job.name: reason}
    logger.info("%d of %d: %s, %.1f s", number, total, job.name, time.monotonic() - started)
    return {}
