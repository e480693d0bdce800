"""Frozen features on disk: every image goes through an encoder once, however many tasks ask.

A folder of CACHE/DATASET holds the features of one encoder as it is, one preprocessing and one choice of slices, in
Parquet shards, a row a slice. Shards are written whole, so that a killed run loses the one at work and no more; a lock
lets processes take turns, and the second finds done what the first did.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas
import pyarrow
import torch
from filelock import FileLock
from pyarrow import parquet
from torch.utils.data import DataLoader, Dataset

from modeling_mammodino import InvalidImageError
from training.evaluation.backbones.registry import Backbone, Images
from training.evaluation.run_files import write_json, write_whole

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
    table: pandas.DataFrame
    refused: dict[str, str]


@dataclass(frozen=True)
class Encoding:
    """How features are made, beside the backbone itself."""

    slices_per_volume: int = 4
    batch_size: int = 32
    num_workers: int = 0
    bf16: bool = False


def cached_features(
    backbone: Backbone, table: pandas.DataFrame, cache: Path, dataset: str, encoding: Encoding
) -> SliceFeatures:
    """Features of the rows of a table (image_id, file), from the cache or made and kept there.

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
        shards = encode_images(backbone, missing["file"].tolist(), encoding)
        names = missing["image_id"].tolist()
        for number, (features, of_shard) in enumerate(shards):
            refused |= {names[position]: reason for position, reason in of_shard.items()}
            if features:
                _write_shard(folder, {names[position]: rows for position, rows in features.items()}, wanted)
            logger.info(
                "features of %s: %d of %d images",
                backbone.kind,
                min(len(names), (number + 1) * IMAGES_PER_SHARD),
                len(names),
            )
    for reason in refused.values():
        logger.warning("left out: %s", reason)
    return _gather(folder, table, wanted, refused)


def encode_images(
    backbone: Backbone, files: Sequence[str], encoding: Encoding
) -> Iterator[tuple[dict[int, np.ndarray], dict[int, str]]]:
    """Features (S, F) float32 of the slices of each file by its position, and why others were refused: shard by shard.

    A batch stays within a shard, so that a shard that is made later is the same to the last bit.
    """
    if not files:
        return
    device = next(backbone.parameters()).device
    backbone.eval()
    loader = iter(
        image_loader(ImageFiles(backbone.lesion_image_renderer, list(files), encoding.slices_per_volume), encoding)
    )
    for _ in range(0, len(files), IMAGES_PER_SHARD):
        features: dict[int, list[np.ndarray]] = {}
        refused: dict[int, str] = {}
        for batch in _batches(islice(loader, IMAGES_PER_SHARD), encoding.batch_size, refused):
            inputs = {
                name: torch.from_numpy(np.stack([slice_[name] for _, slice_ in batch])).to(device)
                for name in batch[0][1]
            }
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=encoding.bf16):
                values = backbone(**inputs).float().cpu().numpy()  # (B, F)
            for (position, _), row in zip(batch, values, strict=True):
                if not np.isfinite(row).all():
                    raise ValueError(
                        f"{files[position]}: features of {backbone.source} are not finite; its weights are damaged, or "
                        "bf16 is too coarse for them"
                    )
                features.setdefault(position, []).append(row)
        yield {position: np.stack(rows) for position, rows in features.items()}, refused


class ImageFiles(Dataset):
    """Files as the images of their slices; picklable, for workers."""

    def __init__(self, images: Images, files: list[str], slices_per_volume: int):
        self.images, self.files, self.slices_per_volume = images, files, slices_per_volume

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> tuple[int, list[dict[str, np.ndarray]] | str]:
        """Its position and its slices, or why it was refused."""
        try:
            return position, list(self.images(self.files[position], slices_per_volume=self.slices_per_volume))
        except (InvalidImageError, OSError) as refusal:
            return position, " ".join(str(refusal).split())


def image_loader(files: ImageFiles, encoding: Encoding) -> DataLoader:
    """Items one by one, in order."""
    num_workers = min(encoding.num_workers, len(files))
    ahead = {"prefetch_factor": max(2, -(-encoding.batch_size // num_workers))} if num_workers else {}
    return DataLoader(files, batch_size=None, collate_fn=unchanged, **worker_options(num_workers), **ahead)


def worker_options(num_workers: int) -> dict[str, Any]:
    """Of a DataLoader: a fork of a process in which OpenCV or torch has run threads can hang, so they are spawned."""
    if not num_workers:
        return {"num_workers": 0}
    return {"num_workers": num_workers, "multiprocessing_context": "spawn", "worker_init_fn": use_one_thread}


def unchanged(item: Any) -> Any:
    return item


def use_one_thread(worker: int) -> None:
    cv2.setNumThreads(1)


Slice = tuple[int, dict[str, np.ndarray]]


def _batches(items: Iterable[Any], batch_size: int, refused: dict[int, str]) -> Iterator[list[Slice]]:
    """Slices of whichever files in batches, in order; refusals are noted."""
    batch: list[Slice] = []
    for position, slices in items:
        if isinstance(slices, str):
            refused[position] = slices
            continue
        for each in slices:
            batch.append((position, each))
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch


def _fingerprint(file: Path) -> str:
    """What changes when a file is replaced. Raises ValueError where there is no such file."""
    try:
        status = file.stat()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); fetch it again, or take its row out") from error
    return f"{status.st_size}-{status.st_mtime_ns}"


def _write_shard(folder: Path, features: dict[str, np.ndarray], fingerprints: dict[str, str]) -> None:
    names = [name for name, values in features.items() for _ in values]
    values = np.concatenate(list(features.values()))  # (N, F)
    table = pyarrow.table(
        {
            "image_id": names,
            "fingerprint": [fingerprints[name] for name in names],
            "slice": [number for values_of in features.values() for number in range(len(values_of))],
            "feature": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), values.shape[1]),
        }
    )
    digest = hashlib.sha256("\n".join(f"{name} {fingerprints[name]}" for name in features).encode()).hexdigest()[:16]
    write_whole(folder / f"features-{digest}.parquet", lambda temporary: parquet.write_table(table, temporary))


def _shards(folder: Path, columns: Sequence[str]) -> Iterator[pyarrow.Table]:
    """A shard that is damaged is removed, to be made again."""
    for path in sorted(folder.glob("features-*.parquet")):
        try:
            yield parquet.read_table(path, columns=list(columns))
        except (pyarrow.ArrowException, OSError) as error:
            logger.warning("%s: damaged, its features are made again (%s)", path, str(error).splitlines()[0])
            path.unlink()


def _stored(folder: Path, wanted: dict[str, str]) -> set[str]:
    """The images whose features are there, of the files as they are now."""
    found = set()
    for shard in _shards(folder, ("image_id", "fingerprint")):
        names = zip(shard["image_id"].to_pylist(), shard["fingerprint"].to_pylist(), strict=True)
        found |= {name for name, fingerprint in names if wanted.get(name) == fingerprint}
    return found


def _gather(folder: Path, table: pandas.DataFrame, wanted: dict[str, str], refused: dict[str, str]) -> SliceFeatures:
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
    return SliceFeatures(np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(each) for each in rows]), usable,
                         refused)  # fmt: skip
