"""Frozen features on disk: every image goes through an encoder once, however many tasks need it.

A folder of CACHE/DATASET holds the features of one encoder as it is, one preprocessing and one choice of slices, in
Parquet shards, a row a slice. Shards are written atomically, so that a killed run loses only the one at work; a lock
lets processes take turns, and the second finds done what the first did.
"""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
from filelock import FileLock
from pyarrow import parquet

from modeling_mammodino.tools.features import Inputs, extract_features, read_files
from modeling_mammodino.tools.files import atomic_file, write_json
from training.evaluation.backbones.registry import Backbone

logger = logging.getLogger(__name__)

IMAGES_PER_SHARD = 256
COLUMNS = ("image_id", "fingerprint", "slice", "feature")


@dataclass(frozen=True)
class SliceFeatures:
    """Features of the slices of images, in the order of a table less what was refused.

    Attributes:
        values: (N, F) float32, the slices of an image together.
        image: (N,) int, the row of `table` that a slice belongs to.
        table: the rows that could be read, numbered anew.
        refused: why the others could not, by image_id.
    """

    values: np.ndarray
    image: np.ndarray
    table: pd.DataFrame
    refused: dict[str, str]


@dataclass(frozen=True)
class Encoding:
    """How features are made, beside the backbone itself."""

    slices_per_volume: int = 4
    batch_size: int = 32
    num_workers: int = 0
    bf16: bool = False


def cached_features(
    backbone: Backbone, table: pd.DataFrame, cache: Path, dataset: str, encoding: Encoding
) -> SliceFeatures:
    """Return features of the rows of a table (image_id, file), from the cache or computed and kept there.

    A file that cannot be used is left out and named in `refused`, and tried again the next time.
    """
    settings = {**backbone.settings(), "slices_per_volume": encoding.slices_per_volume, "bf16": encoding.bf16}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / dataset / f"{backbone.kind}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {row.image_id: _fingerprint(Path(row.file)) for row in table.itertuples()}
    with FileLock(folder / ".lock"):
        write_json(folder / "settings.json", settings)
        missing = table[~table["image_id"].isin(_stored(folder, wanted))].sort_values("image_id")
        refused: dict[str, str] = {}
        names = missing["image_id"].tolist()
        for number, (features, of_shard) in enumerate(encode_images(backbone, missing["file"].tolist(), encoding)):
            refused |= {names[position]: reason for position, reason in of_shard.items()}
            if features:
                _write_shard(folder, {names[position]: rows for position, rows in features.items()}, wanted)
            done = min(len(names), (number + 1) * IMAGES_PER_SHARD)
            logger.info("features of %s: %d of %d images", backbone.kind, done, len(names))
    for reason in refused.values():
        logger.warning("left out: %s", reason)
    return _gather(folder, table, wanted, refused)


def encode_images(
    backbone: Backbone, files: Sequence[str], encoding: Encoding
) -> Iterator[tuple[dict[int, list[np.ndarray]], dict[int, str]]]:
    """Yield, shard by shard, features (F,) float32 of the slices of each file by its position, and why others were
    refused.

    A batch stays within a shard, so that a shard that is made later is the same to the last bit.
    """
    read = partial(backbone.preprocess, slices_per_volume=encoding.slices_per_volume)
    of_files = enumerate(read_files(files, read, encoding.num_workers, num_ahead=encoding.batch_size))
    backbone.eval()
    for _ in range(0, len(files), IMAGES_PER_SHARD):
        features: dict[int, list[np.ndarray]] = defaultdict(list)
        refused: dict[int, str] = {}
        slices = _usable(islice(of_files, IMAGES_PER_SHARD), refused)
        extracted: Any = extract_features(
            backbone, slices, pool=None, batch_size=encoding.batch_size, bf16=encoding.bf16
        )
        for position, feature in extracted:
            if not np.isfinite(feature).all():
                raise ValueError(
                    f"{files[position]}: features of {backbone.source} are not finite; its weights are damaged, or "
                    "bf16 is too coarse for them"
                )
            features[position].append(feature)
        yield features, refused


def _usable(files: Iterable[tuple[int, list[Inputs] | str]], refused: dict[int, str]) -> Iterator[tuple[int, Inputs]]:
    """Yield the slices of files by position; refusals are added to `refused`."""
    for position, slices in files:
        if isinstance(slices, str):
            refused[position] = slices
        else:
            yield from ((position, each) for each in slices)


def _fingerprint(file: Path) -> str:
    """Return what changes when a file is replaced. Raises ValueError where there is no such file."""
    try:
        status = file.stat()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); fetch it again, or take its row out") from error
    return f"{status.st_size}-{status.st_mtime_ns}"


def _write_shard(folder: Path, features: dict[str, list[np.ndarray]], fingerprints: dict[str, str]) -> None:
    names = [name for name, slices in features.items() for _ in slices]
    values = np.array([each for slices in features.values() for each in slices])  # (N, F)
    table = pyarrow.table(
        {
            "image_id": names,
            "fingerprint": [fingerprints[name] for name in names],
            "slice": [number for slices in features.values() for number in range(len(slices))],
            "feature": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), values.shape[1]),
        }
    )
    digest = hashlib.sha256("\n".join(f"{name} {fingerprints[name]}" for name in features).encode()).hexdigest()[:16]
    with atomic_file(folder / f"features-{digest}.parquet") as temporary:
        parquet.write_table(table, temporary)


def _shards(folder: Path, columns: Sequence[str]) -> Iterator[pyarrow.Table]:
    """Yield the shards; one that is damaged is removed, to be made again."""
    for path in sorted(folder.glob("features-*.parquet")):
        try:
            yield parquet.read_table(path, columns=list(columns))
        except (pyarrow.ArrowException, OSError) as error:
            logger.warning("%s: damaged, its features are made again (%s)", path, str(error).splitlines()[0])
            path.unlink()


def _stored(folder: Path, wanted: dict[str, str]) -> set[str]:
    """Return the images whose features are there, of the files as they are now."""
    found = set()
    for shard in _shards(folder, ("image_id", "fingerprint")):
        names = zip(shard["image_id"].to_pylist(), shard["fingerprint"].to_pylist(), strict=True)
        found |= {name for name, fingerprint in names if wanted.get(name) == fingerprint}
    return found


def _gather(folder: Path, table: pd.DataFrame, wanted: dict[str, str], refused: dict[str, str]) -> SliceFeatures:
    by_image: dict[str, np.ndarray] = {}
    for shard in _shards(folder, COLUMNS):
        feature = shard["feature"].combine_chunks()
        values = feature.flatten().to_numpy().reshape(len(shard), -1)  # (N, F)
        names, fingerprints = shard["image_id"].to_numpy(), shard["fingerprint"].to_numpy()
        starts = np.flatnonzero(np.append(True, names[1:] != names[:-1]))
        for start, end in zip(starts, np.append(starts[1:], len(names)), strict=True):
            if wanted.get(names[start]) == fingerprints[start]:
                by_image[names[start]] = values[start:end]
    usable = table[table["image_id"].isin(by_image)].reset_index(drop=True)
    if not len(usable):
        first = next(iter(refused.values()), "")
        raise ValueError(f"none of {len(table)} images can be used; the first: {first}")
    rows = [by_image[name] for name in usable["image_id"]]
    image = np.repeat(np.arange(len(rows)), [len(each) for each in rows])
    return SliceFeatures(np.concatenate(rows), image, usable, refused)
