"""One queue of jobs that several processes share: each job is done once, and a process that dies loses only its own."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from .run_files import RESULT_FILE

logger = logging.getLogger(__name__)

WAIT_SECONDS = 2.0


class QueuedJob(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def output_dir(self) -> Path: ...  # holds RESULT_FILE once the job is done


def run_jobs(jobs: Sequence[QueuedJob], run: Callable) -> dict[str, str]:
    """Runs `run(job)` for each job without a result, and waits for those that other processes hold.

    A job is held by an operating-system lock on a file beside its folder, which the death of its process releases. A
    job that raises ValueError or OSError is named once, and the others go on.

    Returns: reasons of the jobs that failed here, by name.
    """
    failed: dict[str, str] = {}
    while True:
        waiting = False
        for job in jobs:
            if job.name in failed or is_done(job):
                continue
            job.output_dir.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(job.output_dir.with_name(job.output_dir.name + ".lock"))
            try:
                with lock.acquire(blocking=False):
                    if not is_done(job):  # another process may have finished it a moment ago
                        failed |= _run_one(job, run, 1 + sum(map(is_done, jobs)), len(jobs))
            except Timeout:
                waiting = True  # another process is at it
        if not waiting:
            return failed
        time.sleep(WAIT_SECONDS)


def is_done(job: QueuedJob) -> bool:
    return (job.output_dir / RESULT_FILE).is_file()


def _run_one(job: QueuedJob, run: Callable, number: int, total: int) -> dict[str, str]:
    started = time.monotonic()
    try:
        run(job)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        logger.error("failed: %s: %s", job.name, reason)
        return {job.name: reason}
    logger.info("%d of %d: %s, %.1f s", number, total, job.name, time.monotonic() - started)
    return {}
