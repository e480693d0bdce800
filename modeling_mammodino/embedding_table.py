"""Features out: a Parquet file that pandas, datasets and pyarrow open, whole or absent, and a list of refused files."""

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from .file_embeddings import FileEmbeddings

try:
    import pyarrow
    import pyarrow.parquet
except ImportError:
    pyarrow = None

ROW_GROUP_BYTES = 16 * 2**20  # of features


def require_pyarrow() -> None:
    if pyarrow is None:
        raise ImportError("writing a table of features needs pyarrow: pip install mammodino[embed]")


def write_table(results: Iterable[FileEmbeddings], output: Path, metadata: Mapping[str, str]) -> int:
    """Writes the rows of all files to `output` and returns their number; without any row nothing is written.

    Columns: path, volume (string), slice (int32, null in a pooled volume), num_slices (int32), embedding (F float32),
    tissue_fraction (float32). Row groups go to a temporary name, which is renamed when all are there.
    """
    require_pyarrow()
    temporary = output.with_name(f".{output.name}.tmp")
    num_rows, writer = 0, None
    try:
        for table in _row_groups(results):
            if writer is None:
                schema = table.schema.with_metadata(dict(metadata))
                writer = pyarrow.parquet.ParquetWriter(temporary, schema, use_dictionary=["path", "volume"])
            writer.write_table(table)
            num_rows += len(table)
        if writer is not None:
            writer.close()
            os.replace(temporary, output)
    except BaseException:
        if writer is not None:
            writer.close()
        temporary.unlink(missing_ok=True)
        raise
    return num_rows


def _row_groups(results: Iterable[FileEmbeddings]):
    """Arrow tables of about ROW_GROUP_BYTES of features, files whole."""
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
    }
    return pyarrow.table(columns)


def write_refused(path: Path, refused: Mapping[str, str]) -> None:
    """A CSV of files and reasons, whole or absent; without any an earlier run's list goes."""
    if not refused:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        csv.writer(stream).writerows([("file", "reason"), *refused.items()])
    os.replace(temporary, path)
