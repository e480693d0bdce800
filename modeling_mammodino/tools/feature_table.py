"""Features in a Parquet table, and the parts of one whose run was stopped. Research use only.

Columns of the table, a row an image:

- path, volume (string): the file, and the first file of its volume, its own for a 2-D image or a volume in one file
- slice, num_slices (int32): place of the slice in its volume, 0-based, null in a pooled volume; slices of the volume
- embedding (F float32): the feature; with --patches the features of all patches, F = h * w * D, row by row, of the
  grid (h, w) that the table's metadata give
- tissue_fraction (float32): share of the canvas that is breast
- mask_confidence (float32): of the breast mask, 0 to 1; look at files below 0.5 with `mammodino inspect`
- laterality, view (string): L or R, CC, MLO and so on, of the header; null where it does not say
- patient (string): keyed hash of PatientID, the same as in a corpus of that key, with $MAMMODINO_HASH_KEY; else null

The table's own metadata say what the features come from, the SHA-256 of the weights among it.
"""

import csv
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from .features import FileEmbeddings
from .files import atomic_file, readable, write_json

try:
    import pyarrow
    import pyarrow.parquet
except ImportError:
    pyarrow = None

logger = logging.getLogger(__name__)

ROW_GROUP_BYTES = 16 * 2**20  # of features
PART_SECONDS = 60  # of work at most are lost with a run
PART_BYTES = 256 * 2**20  # of features are held in memory
ABOUT_FILE = ("laterality", "view", "patient")
NO_ROWS = FileEmbeddings("", embeddings=np.empty((0, 1), np.float32))


def require_pyarrow() -> None:
    if pyarrow is None:
        raise ImportError("writing a table of features needs pyarrow: pip install mammodino[embed]")


def write_table(results: Iterable[FileEmbeddings], output: Path, metadata: Mapping[str, str]) -> int:
    """Write the rows of all files to `output`, atomically, and return their number; without any nothing is written.

    Columns: see the module."""
    require_pyarrow()
    tables = _row_groups(results)
    if (first := next(tables, None)) is None:
        return 0
    num_rows, schema = 0, first.schema.with_metadata(dict(metadata))
    with (
        atomic_file(output) as temporary,
        pyarrow.parquet.ParquetWriter(temporary, schema, use_dictionary=["path", "volume"]) as writer,
    ):
        for table in chain((first,), tables):
            writer.write_table(table)
            num_rows += len(table)
    return num_rows


def _row_groups(results: Iterable[FileEmbeddings]):
    """Yield Arrow tables of about ROW_GROUP_BYTES of features, files whole."""
    held: list[FileEmbeddings] = []
    for result in results:
        if result.refused is None:
            held.append(result)
        if sum(each.embeddings.nbytes for each in held) >= ROW_GROUP_BYTES:
            yield _to_arrow(held)
            held = []
    if held:
        yield _to_arrow(held)


def _to_arrow(results: list[FileEmbeddings]):
    embeddings = np.concatenate([each.embeddings for each in results])  # (n, F)
    counts = [len(each.slices) for each in results]
    columns = {
        "path": np.repeat([each.path for each in results], counts),
        "volume": np.repeat([each.volume for each in results], counts),
        "slice": pyarrow.array([index for each in results for index in each.slices], pyarrow.int32()),
        "num_slices": pyarrow.array(np.repeat([each.num_slices for each in results], counts), pyarrow.int32()),
        "embedding": pyarrow.FixedSizeListArray.from_arrays(embeddings.ravel(), embeddings.shape[1]),
        "tissue_fraction": np.concatenate([each.tissue_fraction for each in results]),
        "mask_confidence": np.concatenate([each.mask_confidence for each in results]),
    }
    for name in ABOUT_FILE:
        values = [getattr(each, name) for each, count in zip(results, counts, strict=True) for _ in range(count)]
        columns[name] = pyarrow.array(values, pyarrow.string())
    return pyarrow.table(columns)


@contextmanager
def unfinished(output: Path, run: dict[str, str], stands: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield the folder beside `output` in which a run that was stopped goes on; where the block raises before anything
    `stands` in it, it goes.

    Raises ValueError where that of another `run` is there, or where another process is at work on it.
    """
    folder = output.with_name(f"{output.name}.parts")
    folder.mkdir(exist_ok=True)
    try:
        with FileLock(folder / "lock").acquire(timeout=0):
            noted = folder / "run.json"
            if stands(folder) and json.loads(noted.read_text()) != run:
                raise ValueError(
                    f"{folder}: holds the beginning of a run with other files or options; give the same to "
                    "go on, or remove the folder"
                )
            write_json(noted, run)
            try:
                yield folder
            except BaseException:
                if stands(folder):
                    logger.warning("what is finished stands in %s; the same command goes on", folder)
                else:
                    shutil.rmtree(folder)
                raise
    except Timeout as error:
        raise ValueError(f"{output}: another process is writing it; wait for it, or give another") from error


@dataclass(frozen=True)
class Parts:
    """The finished files of a run, in a folder beside the table that they will become, so that a run that was stopped
    goes on: each part, whole or not at all, holds the next files of the list."""

    folder: Path

    @classmethod
    @contextmanager
    def open(cls, output: Path, run: dict[str, str]) -> Iterator["Parts"]:
        """Yield the parts of a table; they go when the block ends without error. Raises as `unfinished`."""
        with unfinished(output, run, lambda folder: any(folder.glob("[0-9]*.parquet"))) as folder:
            yield cls(folder)
        shutil.rmtree(folder)

    @property
    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.parquet"))

    @property
    def num_files(self) -> int:
        return sum(int(pyarrow.parquet.read_schema(path).metadata[b"files"]) for path in self._paths)

    def keep(self, results: Iterable[FileEmbeddings]) -> None:
        """Write all results, every PART_SECONDS or PART_BYTES, and what there is where they break off."""
        held: list[FileEmbeddings] = []
        written, num_bytes = time.monotonic(), 0
        try:
            for result in results:
                held.append(result)
                num_bytes += result.embeddings.nbytes
                if time.monotonic() - written > PART_SECONDS or num_bytes > PART_BYTES:
                    self._write(held)
                    held, written, num_bytes = [], time.monotonic(), 0
        finally:
            if held:
                self._write(held)

    def _write(self, results: list[FileEmbeddings]) -> None:
        refused = {result.path: readable(result.refused) for result in results if result.refused is not None}
        rows = [result for result in results if result.refused is None]
        table = _to_arrow(rows or [NO_ROWS])
        table = table.replace_schema_metadata({"files": str(len(results)), "refused": json.dumps(refused)})
        with atomic_file(self.folder / f"{len(self._paths):06d}.parquet") as temporary:
            pyarrow.parquet.write_table(table, temporary)

    def read(self, refused: dict[str, str]) -> Iterator[FileEmbeddings]:
        """Yield the results of all parts in order; refused files are noted in `refused`."""
        for path in self._paths:
            table = pyarrow.parquet.read_table(path)
            refused |= json.loads(table.schema.metadata[b"refused"])
            columns = {name: table[name].to_pylist() for name in ("path", "volume", "slice", "num_slices", *ABOUT_FILE)}
            width = table.schema.field("embedding").type.list_size
            embeddings = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, width)
            fractions, confidences = (table[name].to_numpy() for name in ("tissue_fraction", "mask_confidence"))
            starts = [row for row, path in enumerate(columns["path"]) if not row or path != columns["path"][row - 1]]
            for start, end in pairwise([*starts, len(table)]):
                yield FileEmbeddings(
                    columns["path"][start],
                    volume=columns["volume"][start],
                    slices=columns["slice"][start:end],
                    num_slices=columns["num_slices"][start],
                    embeddings=embeddings[start:end],
                    tissue_fraction=fractions[start:end],
                    mask_confidence=confidences[start:end],
                    **{name: columns[name][start] for name in ABOUT_FILE},
                )


def stamp(files: Iterable[Path]) -> str:
    """Return what changes with a list of files, their sizes and their times."""
    digest = hashlib.sha256()
    for file in files:
        found = file.stat()
        digest.update(f"{readable(file)}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def write_refused(path: Path, refused: Mapping[str, str]) -> None:
    """Write a CSV of files and reasons; without any an earlier run's list goes."""
    if not refused:
        path.unlink(missing_ok=True)
        return
    with (
        atomic_file(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as stream,
    ):
        rows = ((readable(file), readable(reason)) for file, reason in refused.items())
        csv.writer(stream).writerows([("file", "reason"), *rows])
