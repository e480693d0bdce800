"""Frozen features on disk: every image goes through an encoder once, however many tasks need it.

A folder of CACHE/DATASET holds the features of one encoder as it is, one preprocessing and one choice of slices or
tiles, in shards: features-*.npy, a row a slice (float32) or a tile (float16), which is memory-mapped, and its index
features-*.parquet, a row an image: its rows (start, end), and of each its place on the canvas. Files are written
atomically, the index last, so that a killed run loses only the shard at work; a lock lets processes take turns, and the
second finds done what the first did.
"""

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow
from filelock import FileLock
from pyarrow import parquet

from modeling_mammodino.tools.features import Inputs, extract_features, read_files
from modeling_mammodino.tools.files import atomic_file, write_json
from training.evaluation.backbones.preprocessing import Prepared
from training.evaluation.backbones.registry import Backbone

from .tiles import Place, TiledSlice, TileReader, Tiling

logger = logging.getLogger(__name__)

IMAGES_PER_SHARD = 256
FILES_PER_WORKER = 32  # at least: a process takes seconds to start
LAYOUT = 2  # of the shards


@dataclass(frozen=True)
class SliceFeatures:
    """Features of the slices, or of the tiles, of images, in the order of a table less what was refused.

    Attributes:
        rows: of each row of `table`, (S, F) memory-mapped, of slices float32, of tiles float16.
        table: the rows that could be read, numbered anew.
        refused: why the others could not, by image_id.
    """

    rows: list[np.ndarray]
    table: pd.DataFrame
    refused: dict[str, str]

    @cached_property
    def values(self) -> np.ndarray:
        """All of them in memory, (N, F), the slices of an image together."""
        return np.concatenate(self.rows)

    @cached_property
    def image(self) -> np.ndarray:
        """(N,) int, the row of `table` that a slice belongs to."""
        return np.repeat(np.arange(len(self.rows)), [len(each) for each in self.rows])

    def of(self, split: str) -> "SliceFeatures":
        """Return those of one split."""
        chosen = np.flatnonzero(self.table["split"] == split)
        return SliceFeatures([self.rows[row] for row in chosen], self.table.iloc[chosen].reset_index(drop=True), {})


@dataclass(frozen=True)
class Encoding:
    """How features are made, beside the backbone itself; `tiling`: of tiles in place of whole slices."""

    slices_per_volume: int = 4
    batch_size: int = 32
    num_workers: int = 0
    bf16: bool = False
    tiling: Tiling | None = None

    def settings(self) -> dict[str, Any]:
        """Return all that the features depend on."""
        tiling = {"tiling": asdict(self.tiling)} if self.tiling else {}
        return {"layout": LAYOUT, "slices_per_volume": self.slices_per_volume, "bf16": self.bf16, **tiling}


def cached_features(
    backbone: Backbone, table: pd.DataFrame, cache: Path, dataset: str, encoding: Encoding
) -> SliceFeatures:
    """Return features of the rows of a table (image_id, file), from the cache or computed and kept there.

    A file that cannot be used is left out and named in `refused`, and tried again the next time.
    """
    settings = {**backbone.settings(), **encoding.settings()}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / dataset / f"{backbone.kind}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {row.image_id: _fingerprint(Path(row.file)) for row in table.itertuples()}
    with FileLock(folder / ".lock"):
        missing = table[~table["image_id"].isin(_stored(folder, wanted))].sort_values("image_id")
        if len(missing):
            write_json(folder / "settings.json", settings)
        refused: dict[str, str] = {}
        names = missing["image_id"].tolist()
        for number, shard in enumerate(encode_images(backbone, missing["file"].tolist(), encoding)):
            refused |= {names[position]: reason for position, reason in shard.refused.items()}
            if shard.features:
                _write_shard(folder, {names[position]: rows for position, rows in shard.features.items()}, wanted)
            done = min(len(names), (number + 1) * IMAGES_PER_SHARD)
            logger.info("features of %s: %d of %d images", backbone.kind, done, len(names))
    for reason in refused.values():
        logger.warning("left out: %s", reason)
    return _gather(folder, table, wanted, refused)


class Encoded(NamedTuple):
    """A shard of images, by their position among the files."""

    features: dict[int, list[tuple[Place, np.ndarray]]]  # of the slices or tiles, (F,) each
    refused: dict[int, str]
    masks: dict[int, tuple[float, str]]  # how far the breast mask can be trusted, and why not; of tiles none


def encode_images(backbone: Backbone, files: Sequence[str], encoding: Encoding) -> Iterator[Encoded]:
    """Yield files shard by shard.

    A batch stays within a shard, and of tiles within a file: float16 is a coarse step for what differs by batch in the
    last bits, and what is made later, or predicted elsewhere, is the same.
    """
    dtype = np.finfo(np.float16 if encoding.tiling else np.float32)
    read: Any = partial(backbone.preprocess, slices_per_volume=encoding.slices_per_volume)
    if encoding.tiling:
        read = TileReader(backbone.preprocess, encoding.tiling, encoding.slices_per_volume)
    num_ahead = 1 if encoding.tiling else encoding.batch_size  # a large canvas has some 20 MB
    num_workers = min(encoding.num_workers, len(files) // FILES_PER_WORKER, os.cpu_count() or 1)
    of_files = enumerate(read_files(files, read, num_workers, num_ahead))
    backbone.eval()
    for _ in range(0, len(files), IMAGES_PER_SHARD):
        features: dict[int, list[tuple[Place, np.ndarray]]] = defaultdict(list)
        shard = Encoded(features, {}, {})
        images = _usable(islice(of_files, IMAGES_PER_SHARD), backbone, shard)
        extract: Any = partial(extract_features, pool=None, batch_size=encoding.batch_size, bf16=encoding.bf16)
        parts = (of_file for _, of_file in groupby(images, lambda item: item[0][0])) if encoding.tiling else [images]
        for (position, place), feature in chain.from_iterable(extract(backbone, part) for part in parts):
            if not np.isfinite(feature).all():
                raise ValueError(
                    f"{files[position]}: features of {backbone.source} are not finite; its weights are damaged, or "
                    "bf16 is too coarse for them"
                )
            features[position].append((place, feature.clip(dtype.min, dtype.max).astype(dtype.dtype)))
        yield shard


def _usable(
    files: Iterable[tuple[int, list[Inputs | TiledSlice] | str]], backbone: Backbone, shard: Encoded
) -> Iterator[tuple[tuple[int, Place], Inputs]]:
    """Yield the slices or tiles of files by position and place; refusals and masks are added to `shard`."""
    for position, slices in files:
        if isinstance(slices, str):
            shard.refused[position] = slices
            continue
        if masks := [each.mask for each in slices if isinstance(each, Prepared)]:
            shard.masks[position] = min(masks)
        for number, each in enumerate(slices):
            if isinstance(each, TiledSlice):
                yield from (((position, place), tile) for place, tile in each.inputs(backbone.preprocess))
            else:
                yield (position, Place(number)), each


def _fingerprint(file: Path) -> str:
    """Return what tells a file from others, and changes when it is replaced. Raises ValueError where there is none."""
    try:
        status = file.stat()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); fetch it again, or take its row out") from error
    place = hashlib.sha256(os.fsencode(file.absolute())).hexdigest()[:16]  # of tables whose images have the same names
    return f"{place}-{status.st_size}-{status.st_mtime_ns}"


def _write_shard(
    folder: Path, features: dict[str, list[tuple[Place, np.ndarray]]], fingerprints: dict[str, str]
) -> None:
    counts = [len(rows) for rows in features.values()]
    index = {
        "image_id": list(features),
        "fingerprint": [fingerprints[name] for name in features],
        "start": np.cumsum([0, *counts[:-1]]),
        "end": np.cumsum(counts),
        **{
            field: [[getattr(place, field) for place, _ in rows] for rows in features.values()]
            for field in Place._fields
        },
    }
    digest = hashlib.sha256("\n".join(f"{name} {fingerprints[name]}" for name in features).encode()).hexdigest()[:16]
    with atomic_file(folder / f"features-{digest}.npy") as temporary, temporary.open("wb") as stream:
        np.save(stream, np.array([feature for rows in features.values() for _, feature in rows]))  # (N, F)
    with atomic_file(folder / f"features-{digest}.parquet") as temporary:
        parquet.write_table(pyarrow.table(index), temporary)


def _shards(folder: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield name, fingerprint and features of each image; a shard that is damaged is removed, to be made again."""
    for path in sorted(folder.glob("features-*.parquet")):
        try:
            index = parquet.read_table(path, columns=["image_id", "fingerprint", "start", "end"]).to_pylist()
            values = np.load(path.with_suffix(".npy"), mmap_mode="r")
            if len(values) != index[-1]["end"]:
                raise ValueError(f"{len(values)} rows, not {index[-1]['end']}")
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            logger.warning("%s: damaged, its features are made again (%s)", path, str(error).splitlines()[0])
            path.unlink()
            continue
        for row in index:
            yield row["image_id"], row["fingerprint"], values[row["start"] : row["end"]]


def _stored(folder: Path, wanted: dict[str, str]) -> set[str]:
    """Return the images whose features are there, of the files as they are now."""
    return {name for name, fingerprint, _ in _shards(folder) if wanted.get(name) == fingerprint}


def _gather(folder: Path, table: pd.DataFrame, wanted: dict[str, str], refused: dict[str, str]) -> SliceFeatures:
    by_image = {name: rows for name, fingerprint, rows in _shards(folder) if wanted.get(name) == fingerprint}
    usable = table[table["image_id"].isin(by_image)].reset_index(drop=True)
    if not len(usable):
        first = next(iter(refused.values()), "")
        raise ValueError(f"none of {len(table)} images can be used; the first: {first}")
    return SliceFeatures([by_image[name] for name in usable["image_id"]], usable, refused)
