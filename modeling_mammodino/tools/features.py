"""Features of files in Python: `embed_files`. Research use only.

Worker processes read and render an image at a time, the encoder takes them in batches across files, and each file's
features come out in its turn: a volume of any length streams through.
"""
# MERGED: Files in, images out: what the encoder needs of many files, read and rendered by worker processes.

import inspect
import os
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedModel

from ..dicom import is_dicom
from ..image_io import DICOM_SUFFIXES, IMAGE_SUFFIXES, InvalidImageError
from ..image_processing_mammodino import MammoDinoImageProcessor
from ..modeling_mammodino import pool_tokens
from ..rendering import place_on_canvas

try:
    import cv2
except ImportError:  # refused by name where an image is rendered
    cv2 = None  # type: ignore[assignment]


class RenderedImage(NamedTuple):
    """One image ready for the encoder, and its place."""

    file: int  # its number in the stream
    volume_id: str | None  # where the file is one slice of a volume: equal for its files, meaningless elsewhere
    slice_index: int
    num_slices: int  # of the file
    pixel_values: np.ndarray  # (1, H, W) float32
    tissue_mask: np.ndarray  # (h, w) float32


class FileEnd(NamedTuple):
    """Follows the last image of a file, or stands where its images break off."""

    file: int
    refused: str | None = None  # the reason


class ImageStream(IterableDataset):
    """The images of many files. In a `DataLoader` each worker takes its share of the files."""

    def __init__(self, paths: Sequence[Path], image_processor: MammoDinoImageProcessor, slices_per_volume: int):
        self.paths, self.image_processor, self.slices_per_volume = paths, image_processor, slices_per_volume
        self.hash_key = secrets.token_bytes(32)

    def __iter__(self) -> Iterator[RenderedImage | FileEnd]:
        worker = get_worker_info()
        for file in share(len(self.paths), *((worker.id, worker.num_workers) if worker else (0, 1))):
            try:
                yield from self.read(file)
                yield FileEnd(file)
            except (InvalidImageError, OSError) as refusal:
                yield FileEnd(file, " ".join(str(refusal).split()))

    def read(self, file: int, chosen: Sequence[int] | None = None) -> Iterator[RenderedImage]:
        """The images of one file, bit for bit as `image_processor(path)` makes them; `chosen` names slices."""
        settings = self.image_processor.render_settings
        slices = self.image_processor.render_source(
            self.paths[file],
            settings.canvas,
            hash_key=self.hash_key,
            slices_per_volume=self.slices_per_volume,
            slices=chosen,
        )
        for mammogram, rendered in slices:
            placed = place_on_canvas(rendered.image, rendered.tissue, settings, rendered.placement)
            is_one_of_many = mammogram.kind == "dbt" and mammogram.num_slices == 1
            yield RenderedImage(
                file,
                mammogram.volume_id if is_one_of_many else None,
                mammogram.slice_index,
                mammogram.num_slices,
                placed.pixel_values,
                placed.tissue_mask,
            )


def share(num_files: int, worker: int, num_workers: int) -> Iterator[int]:
    """The files of one worker: one of each round of `num_workers`, another place each round, so that where mammograms
    and volumes alternate no worker gets all the volumes."""
    for turn, first in enumerate(range(0, num_files, num_workers)):
        file = first + (worker + turn) % num_workers
        if file < num_files:
            yield file


def open_stream(stream: ImageStream, num_workers: int, num_ahead: int) -> Iterable[RenderedImage | FileEnd]:
    """The stream's items, from `num_workers` processes that read about `num_ahead` images ahead; 0: from this one.

    Images of a file come in order, and its end behind them; the files of several workers alternate, one item each.
    """
    if num_workers == 0:
        return stream
    return DataLoader(
        stream,
        batch_size=None,  # items one by one: batches are made across workers
        collate_fn=_unchanged,  # arrays travel through pipes; tensors would need /dev/shm, which containers keep small
        num_workers=num_workers,
        prefetch_factor=max(2, -(-num_ahead // num_workers)),
        multiprocessing_context="spawn",  # a fork of a process in which OpenCV or torch has run threads can hang
        worker_init_fn=_use_one_thread,
    )


def _unchanged(item: Any) -> Any:
    return item


def _use_one_thread(worker: int) -> None:
    if cv2 is not None:
        cv2.setNumThreads(1)


def find_files(sources: Iterable[Path]) -> tuple[list[Path], Counter[str]]:
    """Every file that may be an image, by an image's or DICOM's suffix or by its content, sorted; and how many others
    were ignored, by suffix. A file named as a source is always taken; linked folders are not entered.

    Raises OSError where a source or a folder in it cannot be read.
    """
    found: set[Path] = set()
    ignored: Counter[str] = Counter()
    for source in sources:
        if not source.is_dir():
            source.stat()  # raises where there is nothing
            found.add(source)
            continue
        for folder, _, names in os.walk(source, onerror=_raise):
            for path in (Path(folder, name) for name in names):
                suffix = path.suffix.lower()
                if suffix in (*IMAGE_SUFFIXES, *DICOM_SUFFIXES) or path.is_file() and is_dicom(path):
                    found.add(path)
                else:
                    ignored[suffix or "no suffix"] += 1
    return sorted(found), ignored


def _raise(error: OSError) -> None:
    raise error


POOLS = ("class", "patches", "both")


class FileEmbeddings(NamedTuple):
    """Features of one file, S rows; or why it was refused, and none. A pooled volume has one row, its slice None."""

    path: str
    refused: str | None = None
    volume: str = ""  # path of the volume's first file, its own for a 2-D image or a volume in one file
    slices: list[int | None] = []  # (S,) 0-based in order of position
    num_slices: int = 0  # of the file, or of the pooled volume
    embeddings: np.ndarray = np.empty((0, 0), np.float32)  # (S, F) float32
    tissue_fraction: np.ndarray = np.empty(0, np.float32)  # (S,) float32: mean of `tissue_mask`


def embed_files(
    paths: Sequence[str | os.PathLike[str]],
    model: PreTrainedModel | Sequence[PreTrainedModel],
    image_processor: MammoDinoImageProcessor,
    *,
    pool: str = "class",
    batch_size: int = 8,
    slices_per_volume: int | None = None,
    num_workers: int = 0,
) -> Iterator[FileEmbeddings]:
    """Features of DICOM, PNG, JPEG, PGM and TIFF files, a `FileEmbeddings` each, in the order of `paths`.

    A file that cannot be used comes in its turn too, with the reason in `refused` and without rows: also where only a
    later slice is broken, so that a file counts whole or not at all.

    Args:
        model: a MammoDINO encoder, or several whose features stand side by side; each file is read once for all.
        pool: "class", the class token, F = D; "patches", the mean of the patch tokens weighted by breast tissue, F = D;
            "both", one beside the other, F = 2 * D.
        batch_size: images that an encoder takes at a time, of whichever files.
        slices_per_volume: evenly spaced slices of a multi-frame file; 0 takes all, None what `image_processor` says.
        num_workers: processes that read and render; 0 does it in this one. They are spawned: a script that asks for
            them keeps its own work under `if __name__ == "__main__":`.

    Raises ValueError for arguments out of range, and for a model that does not fit the image processor.
    """
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r}: must be one of {', '.join(POOLS)}")
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    count = image_processor.slices_per_volume if slices_per_volume is None else slices_per_volume
    if count < 0:
        raise ValueError(f"slices_per_volume={count}: must be at least 0, which takes all slices")
    models = [model] if isinstance(model, torch.nn.Module) else list(model)
    for each in models:
        check_fit(each, image_processor)
    stream = ImageStream([Path(path) for path in paths], image_processor, count)
    return _embed_stream(stream, models, pool, batch_size, min(num_workers, len(stream.paths)))


def check_fit(model: PreTrainedModel, image_processor: MammoDinoImageProcessor) -> None:
    """Raises ValueError where the encoder cannot take what the image processor returns."""
    if "tissue_mask" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} takes no tissue_mask; give a MammoDINO encoder")
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode, where features are random; call model.eval()")
    if model.config.num_channels != 1:
        raise ValueError(
            f"the encoder takes {model.config.num_channels} channels, mammograms have 1; `mammodino convert` folds them"
        )
    if model.config.patch_size != image_processor.patch_size:
        raise ValueError(
            f"patch_size: {model.config.patch_size} in the encoder, {image_processor.patch_size} in the image "
            "processor; use the image processor that was saved with the encoder"
        )


def _embed_stream(
    stream: ImageStream, models: list[PreTrainedModel], pool: str, batch_size: int, num_workers: int
) -> Iterator[FileEmbeddings]:
    rows: dict[int, list[tuple[RenderedImage, np.ndarray]]] = defaultdict(list)  # of files that are not out yet
    ends: dict[int, FileEnd] = {}
    first_paths: dict[str, str] = {}
    turn = 0
    for images, ended in _batches(open_stream(stream, num_workers, num_ahead=batch_size), batch_size):
        for image, features in zip(images, encode(models, images, pool) if images else (), strict=True):
            rows[image.file].append((image._replace(pixel_values=np.empty(0)), features))  # pixels are let go
        ends.update((end.file, end) for end in ended)
        while turn in ends:
            # a name that is not UTF-8 is escaped: no table holds it otherwise
            path = str(stream.paths[turn]).encode("utf-8", "backslashreplace").decode()
            yield _gather(path, rows.pop(turn, []), ends.pop(turn).refused, first_paths)
            turn += 1


def _batches(
    items: Iterable[RenderedImage | FileEnd], batch_size: int
) -> Iterator[tuple[list[RenderedImage], list[FileEnd]]]:
    """Batches of `batch_size` images, the last of what is left, each with the ends of files that it reached."""
    images: list[RenderedImage] = []
    ended: list[FileEnd] = []
    for item in items:
        if isinstance(item, FileEnd):
            ended.append(item)
            continue
        images.append(item)
        if len(images) == batch_size:
            yield images, ended
            images, ended = [], []
    yield images, ended


@torch.inference_mode()
def encode(models: Sequence[PreTrainedModel], images: Sequence[RenderedImage], pool: str) -> np.ndarray:
    """(B, F) float32: the pooled tokens of each image, the models side by side."""
    pixel_values = torch.from_numpy(np.stack([each.pixel_values for each in images]))  # (B, 1, H, W)
    tissue_mask = torch.from_numpy(np.stack([each.tissue_mask for each in images]))  # (B, h, w)
    features = []
    for model in models:
        tissue, width = tissue_mask.to(model.device), model.config.hidden_size
        sequence = model(pixel_values.to(model.device, model.dtype), tissue_mask=tissue).last_hidden_state
        registers, threshold = model.config.num_register_tokens, model.config.tissue_threshold
        pooled = pool_tokens(sequence.float(), registers, tissue, threshold)  # (B, 2 * D)
        features.append({"class": pooled[:, :width], "patches": pooled[:, width:], "both": pooled}[pool].cpu())
    return torch.cat(features, dim=1).numpy()


def _gather(
    path: str, rows: list[tuple[RenderedImage, np.ndarray]], refused: str | None, first_paths: dict[str, str]
) -> FileEmbeddings:
    if refused is not None:
        return FileEmbeddings(path, refused)
    images = [image for image, _ in rows]
    series = images[0].volume_id
    return FileEmbeddings(
        path,
        volume=path if series is None else first_paths.setdefault(series, path),
        slices=[image.slice_index for image in images],
        num_slices=images[0].num_slices,
        embeddings=np.stack([features for _, features in rows]),
        tissue_fraction=np.array([image.tissue_mask.mean() for image in images], np.float32),
    )


def pool_volumes(results: Iterable[FileEmbeddings]) -> Iterator[FileEmbeddings]:
    """One row a volume, the mean over its slices, in the order of their first files; refused files come first.

    A volume that is stored as one file a slice may go on in any later file, so nothing comes out before all are read:
    one row a volume is held until then.
    """
    sums: dict[str, FileEmbeddings] = {}  # of the slices so far, in float64
    counts: dict[str, int] = defaultdict(int)
    for result in results:
        if result.refused is not None:
            yield result
            continue
        counts[result.volume] += len(result.slices)
        total = result._replace(
            slices=result.slices if result.num_slices == 1 else [None],
            embeddings=result.embeddings.sum(axis=0, keepdims=True, dtype=np.float64),
            tissue_fraction=result.tissue_fraction.sum(keepdims=True, dtype=np.float64),
        )
        if before := sums.get(result.volume):
            total = before._replace(
                slices=[None],
                num_slices=before.num_slices + total.num_slices,
                embeddings=before.embeddings + total.embeddings,
                tissue_fraction=before.tissue_fraction + total.tissue_fraction,
            )
        sums[result.volume] = total
    for volume, total in sums.items():
        yield total._replace(
            embeddings=(total.embeddings / counts[volume]).astype(np.float32),
            tissue_fraction=(total.tissue_fraction / counts[volume]).astype(np.float32),
        )
