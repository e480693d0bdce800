"""Stages of a build on datatrove's executors: processes of this machine, Slurm or Ray. Finished tasks are skipped."""
# MERGED: One build of a corpus: what all its tasks know, and its two folders.
#
# `output` is the corpus. `work`, beside it and for its owner's eyes alone, holds what names the files of the archive: the
# listing, the headers found, the plan, what was refused, the engine's logs. It is what a stopped build goes on from.
#

import ctypes
import importlib
import inspect
import json
import logging
import os
import re
import secrets
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import loguru
import multiprocess
import yaml

from modeling_mammodino.dicom import keyed_hash
from modeling_mammodino.image_processing_mammodino import MammoDinoImageProcessor

logger = logging.getLogger(__name__)

HASH_KEY_VARIABLE = "MAMMODINO_HASH_KEY"
SHORT_KEY_BYTES = 16
README = """\
This folder names files of an archive, and so perhaps patients: do not share it. From it a stopped build of the corpus
beside it goes on. refused.csv says which files were left out, and why. Once the corpus is complete, nothing else in
here is needed.
"""


@dataclass(frozen=True)
class Job:
    """
    Attributes:
        fit: (height, width) in pixels that images are fitted into, never enlarged.
        image_processor: settings of the MammoDinoImageProcessor.
        hash_key_file: holds the key of the hashes; else it is in $MAMMODINO_HASH_KEY. The key itself stands nowhere.
        bcs_dbt_paths: BCS-DBT's BCS-DBT-file-paths-*.csv, which correct wrong headers.
        tasks: in which the work is shared out; fixed for the life of a build.
    """

    output: str
    sources: tuple[str, ...]
    fit: tuple[int, int]
    image_processor: dict[str, Any]
    collection: str
    hash_key_file: str | None
    bcs_dbt_paths: tuple[str, ...]
    rows_per_shard: int
    tasks: int

    @property
    def work(self) -> Path:
        return Path(f"{self.output}.private")

    @property
    def listing(self) -> Path:
        return self.work / "files.jsonl"

    @property
    def plan(self) -> Path:
        """Written last: tells that the shards' own plans are there."""
        return self.work / "plan.json"

    def headers(self, task: int) -> Path:
        return self.work / "headers" / f"{task:05d}.jsonl"

    def shard_plan(self, shard: int) -> Path:
        return self.work / "plan" / f"{shard:05d}.jsonl"

    def shard_record(self, shard: int) -> Path:
        return self.work / "shards" / f"{shard:05d}.json"

    @property
    def hash_key(self) -> bytes:
        return read_hash_key(self.hash_key_file)

    def processor(self) -> MammoDinoImageProcessor:
        return MammoDinoImageProcessor(**self.image_processor)

    def settings(self) -> dict[str, Any]:
        """What shapes the rows. One corpus has one set of these."""
        kept = ("sources", "fit", "image_processor", "collection", "bcs_dbt_paths")
        settings = {name: value for name, value in asdict(self).items() if name in kept}
        settings["hash_key_check"] = keyed_hash("corpus", self.hash_key)  # tells two keys apart, reveals neither
        return json.loads(json.dumps(settings))


def read_hash_key(path: str | Path | None) -> bytes:
    """The key of the patient hashes, from a file or the environment; empty where there is none."""
    return Path(path).read_bytes().strip() if path else os.environ.get(HASH_KEY_VARIABLE, "").encode()


def provide_hash_key(path: str | Path | None) -> None:
    """Sees to it that there is a key, for this process and its children; a made-up one is said."""
    key = read_hash_key(path)
    if key and len(key) < SHORT_KEY_BYTES:
        logger.warning(
            "the key of the patient hashes is short (%d bytes): it can be guessed, give 16 or more", len(key)
        )
    if not key and path:
        raise ValueError(f"--hash_key_file {path}: the file is empty; write a secret of 16 bytes or more into it")
    if not key:
        logger.warning(
            "no key for the patient hashes (--hash_key_file or $%s): a random one is used, so this corpus can neither "
            "be continued after a stop nor linked to another",
            HASH_KEY_VARIABLE,
        )
        os.environ[HASH_KEY_VARIABLE] = secrets.token_hex(16)


class Notes(logging.Handler):
    """What the reader guesses and doubts, file by file into a private log, and by kind as a count.

    Takes the place of the console in a task: a million files may have as many notes.
    """

    def __init__(self, path: Path):
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a")

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self._stream.write(message + "\n")
        name = str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
        self.counts[re.sub(r"\d[\d.]*", "#", message.removeprefix(f"{name}: "))] += 1

    def __enter__(self) -> "Notes":
        package = logging.getLogger("modeling_mammodino")
        self._before = package.handlers[:], package.propagate
        package.handlers[:], package.propagate = [self], False
        return self

    def __exit__(self, *_: object) -> None:
        package = logging.getLogger("modeling_mammodino")
        package.handlers[:], package.propagate = self._before
        self._stream.close()


def write_json(path: Path, content: Any) -> None:
    write_lines(path, [json.dumps(content, indent=2)])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as stream:
            stream.writelines(f"{line}\n" for line in lines)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_lines(path: Path) -> Iterator[Any]:
    """Of a JSON lines file."""
    with path.open() as stream:
        for line in stream:
            yield json.loads(line)


loguru.logger.disable("datatrove")  # its tracebacks print the values of variables, and so paths

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


def parse_arguments(engine: str, given: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE arguments of datatrove's executor. Raises ValueError where it has none of that name."""
    known = [name for name in inspect.signature(_executor(engine)).parameters if name not in OURS]
    arguments = {}
    for each in given:
        name, separator, value = each.partition("=")
        if not separator or name not in known:
            raise ValueError(f"--engine_args {each}: {engine} takes NAME=VALUE, where NAME is {', '.join(known)}")
        arguments[name] = yaml.safe_load(value)
    return arguments


def run_stages(stages: Sequence[Stage], engine: str, workers: int, logs: Path, arguments: dict[str, Any]) -> bool:
    """Each stage when the one before it is done. Whether all is done at the return: Slurm's jobs are only sent off.

    Raises ChildProcessError where a local worker process died, and whatever a task raised.
    """
    before = None
    for stage in stages:
        executor = _executor(engine)(
            pipeline=[stage.step],
            tasks=stage.tasks,
            workers=min(workers, stage.tasks),
            logging_dir=str(logs / stage.name),
            **{"slurm": _slurm, "local": _local, "ray": _ray}[engine](stage, before),
            **arguments,
        )
        if engine == "slurm":
            executor.run()
            before = executor
        else:
            with _watched(stage.progress):
                executor.run()
    return engine != "slurm"


def _local(stage: Stage, before: Any) -> dict[str, Any]:
    return {"start_method": "spawn"}  # a fork of a process in which OpenCV or torch has run threads can hang


def _slurm(stage: Stage, before: Any) -> dict[str, Any]:
    paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": CHECKOUT}
    environment = "export " + " ".join(f"{name}={path}:${name}" for name, path in paths.items())
    return {"depends": before, "job_name": f"mammodino_{stage.name}", "env_command": environment}


def _ray(stage: Stage, before: Any) -> dict[str, Any]:
    return {}


def _executor(engine: str) -> Any:
    module, name = ENGINES[engine]
    return getattr(importlib.import_module(module), name)


@contextmanager
def _watched(progress: Callable[[], None]) -> Iterator[None]:
    """While a local stage runs: shows progress, and stops where a worker dies, for which a pool would wait forever."""
    done, died = threading.Event(), []

    def watch() -> None:
        children: set[Any] = set()
        while not done.wait(WATCH_SECONDS):
            progress()
            children.update(multiprocess.active_children())
            died.extend(child.exitcode for child in children if child.exitcode not in (None, 0, -signal.SIGTERM))
            if died:
                os.kill(os.getpid(), signal.SIGUSR1)  # not SIGINT, which a shell's background jobs ignore
                return

    def stop(*_: Any) -> None:
        raise ChildProcessError(f"a worker process died (signal {-died[0]}; 9 is often a lack of memory)")

    before = signal.signal(signal.SIGUSR1, stop)
    watcher = threading.Thread(target=watch, daemon=True)
    _helpers_are_bound.set()
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        signal.signal(signal.SIGUSR1, before)
        _helpers_are_bound.clear()
    progress()


_helpers_are_bound = threading.Event()


def die_with_parent() -> None:
    """Called in a worker process: binds its life to that of the process that started it, so that none goes on alone."""
    if sys.platform == "linux" and multiprocess.parent_process() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _bind_helper() -> None:
    """The same for datatrove's own helper process, which is forked."""
    if sys.platform == "linux" and _helpers_are_bound.is_set():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


os.register_at_fork(after_in_child=_bind_helper)
