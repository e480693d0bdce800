"""Atomic writes: a file or folder appears under its name when all of it is on disk, or not at all."""

import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np


def readable(name: object) -> str:
    """Return a name or path as it can be drawn and written: what is not UTF-8 is escaped, as in K\\udcf6ln."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def check_output(path: str | Path, *suffixes: str) -> None:
    """Make the folder of a file that is to be written, before any work.

    Raises ValueError where the name has another suffix than those, OSError where the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"--output {path}: is a folder; give a file in it")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"--output {path}: give a name that ends in {' or '.join(suffixes)}, as that is written")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there replaces `path` when the block ends without error.

    Missing parent folders are made. Raises OSError where the file cannot be written; `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | Path, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that takes its name when the block ends without error.

    Raises FileExistsError, before any work, where `folder` holds files already and `replace` is not set.
    """
    folder = Path(folder).resolve()
    if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not an empty folder; give another output, or remove it first")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _flush(path)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically; numpy scalars become numbers, NaN and infinities null."""
    write_text(path, json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def read_lines(path: Path, first: int = 0, step: int = 1) -> Iterator[Any]:
    """Yield the values of a JSON lines file, of every `step`-th line from `first` on."""
    with path.open() as stream:
        yield from map(json.loads, islice(stream, first, None, step))


class Lines:
    """The values of a JSON lines file by the number of the line; held in memory is only where each begins."""

    def __init__(self, path: Path):
        with path.open("rb") as stream:
            self.ends = np.fromiter(accumulate(map(len, stream)), int)
            self.content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def __getitem__(self, number: int) -> Any:
        start = self.ends[number - 1] if number else 0
        return json.loads(self.content[start : self.ends[number]])


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write a JSON lines file, atomically."""
    with atomic_file(path) as temporary, temporary.open("w") as stream:
        stream.writelines(json.dumps(value) + "\n" for value in values)


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    if hasattr(content, "item"):  # a numpy scalar
        content = content.item()
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
