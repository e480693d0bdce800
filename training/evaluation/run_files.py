"""Files of a run: each whole or not there, and a folder for one run alone."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas
from filelock import FileLock, Timeout

RESULT_FILE = "result.json"  # written last: where it stands, a run is done
SETTINGS_FILE, PREDICTIONS_FILE = "settings.json", "predictions.parquet"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """NaN, which JSON lacks, becomes null."""
    write_whole(
        path, lambda temporary: temporary.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")
    )


def write_parquet(path: Path, table: pandas.DataFrame) -> None:
    write_whole(path, lambda temporary: table.to_parquet(temporary, index=False))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """By a temporary name, renamed when all is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    if hasattr(content, "item"):  # a number of numpy
        content = content.item()
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file. Raises ValueError where it is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}); remove it to have it made again") from error


@contextmanager
def one_run_alone(folder: Path) -> Iterator[None]:
    """The folder is this process' own; the lock falls with the process. Raises ValueError where another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"output_dir={folder}: another run is at work there; wait for it, or give another") from error


def check_same_settings(path: Path, wanted: dict[str, Any]) -> None:
    """A run that is started again is the run that was started: refuses other settings than those noted in `path`."""
    noted = read_json(path)
    names = sorted(set(wanted) | set(noted or {}))
    changed = [
        f"{name} ({noted.get(name)!r} -> {wanted.get(name)!r})"
        for name in names
        if noted and noted.get(name) != wanted.get(name)
    ]
    if changed:
        raise ValueError(
            f"output_dir={path.parent}: holds a run of other settings: {', '.join(changed)}; give the same to go on, "
            "or another output_dir"
        )


def run_once(output: Path, wanted: dict[str, Any], run: Callable[[], dict[str, Any]], leftovers: Sequence[str]) -> Any:
    """The result of `run`, by its file: run now, or, where the same `wanted` settings were run before, found there.

    `leftovers`, folders that a run needs to go on after a kill, are gone when the result stands.
    """
    with one_run_alone(output):
        check_same_settings(output / SETTINGS_FILE, wanted)
        if read_json(output / RESULT_FILE) is None:
            write_json(output / RESULT_FILE, run())
        for name in leftovers:
            shutil.rmtree(output / name, ignore_errors=True)
        return read_json(output / RESULT_FILE)
