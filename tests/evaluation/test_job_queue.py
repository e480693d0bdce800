"""The queue of a suite: once each, several processes, a death, a failure."""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from training.evaluation.runs import RESULT_FILE, run_jobs


@dataclass(frozen=True)
class Job:
    name: str
    output_dir: Path


def jobs(folder: Path, count: int = 6) -> list[Job]:
    return [Job(f"job {number}", folder / f"job-{number}") for number in range(count)]


def finish(job: Job) -> None:
    """Notes that it ran, then leaves a result."""
    job.output_dir.mkdir(exist_ok=True)
    with open(job.output_dir.parent / "ran.txt", "a") as log:
        log.write(f"{job.name} {os.getpid()}\n")
    time.sleep(0.05)
    (job.output_dir / RESULT_FILE).write_text("{}")


def die_at_the_third(job: Job) -> None:
    if job.name == "job 2":
        job.output_dir.mkdir(exist_ok=True)
        os.kill(os.getpid(), signal.SIGKILL)
    finish(job)


def ran(folder: Path) -> list[str]:
    return sorted(line.rsplit(" ", 1)[0] for line in (folder / "ran.txt").read_text().splitlines())


def test_each_job_is_done_once_and_not_again(tmp_path):
    assert run_jobs(jobs(tmp_path), finish) == {}
    assert run_jobs(jobs(tmp_path), finish) == {}
    assert ran(tmp_path) == [f"job {number}" for number in range(6)]


def test_several_processes_share_the_queue(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=run_jobs, args=(jobs(tmp_path, 12), finish)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert ran(tmp_path) == sorted(f"job {number}" for number in range(12))
    assert len({line.rsplit(" ", 1)[1] for line in (tmp_path / "ran.txt").read_text().splitlines()}) > 1


def test_a_killed_process_loses_its_own_job_only(tmp_path):
    worker = multiprocessing.get_context("fork").Process(target=run_jobs, args=(jobs(tmp_path), die_at_the_third))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL and ran(tmp_path) == ["job 0", "job 1"]
    assert run_jobs(jobs(tmp_path), finish) == {}
    assert ran(tmp_path) == [f"job {number}" for number in range(6)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("task x: class B\nis empty"), "task x: class B is empty"),
        (FileNotFoundError("no file y.dcm"), "no file y.dcm"),
        (ImportError("install open_clip"), "install open_clip"),
        (RuntimeError("CUDA out of memory.\nTried to"), "RuntimeError: CUDA out of memory. Tried to"),
        (KeyError("a bug"), "KeyError: 'a bug'"),
    ],
)
def test_a_failing_job_is_named_and_the_others_go_on(tmp_path, caplog, error, reason):
    def run(job: Job) -> None:
        if job.name == "job 1":
            raise error
        finish(job)

    failed = run_jobs(jobs(tmp_path), run)
    assert failed == {"job 1": reason}
    assert ran(tmp_path) == [f"job {number}" for number in (0, 2, 3, 4, 5)]
    (said,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert bool(said.exc_info) == isinstance(error, (RuntimeError, KeyError))  # with its traceback: it may be a bug
