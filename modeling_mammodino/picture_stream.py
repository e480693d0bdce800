"""Files in, pictures out: what the encoder needs of many files, read and rendered by worker processes."""

import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .dicom import is_dicom
from .errors import ImageRefused
from .image_file import DICOM_SUFFIXES, PICTURE_SUFFIXES
from .image_processing_mammodino import MammoDinoImageProcessor
from .rendering import place_on_canvas, standardize
from .tissue import patch_tissue

try:
    import cv2
except ImportError:  # refused by name where a picture is rendered
    cv2 = None  # type: ignore[assignment]


class Picture(NamedTuple):
    """One picture ready for the encoder, and its place."""

    file: int  # its number in the stream
    volume_id: str | None  # where the file is one slice of a volume: equal for its files, meaningless elsewhere
    slice_index: int
    num_slices: int  # of the file
    pixel_values: np.ndarray  # (1, H, W) float32
    tissue_mask: np.ndarray  # (h, w) float32


class FileEnd(NamedTuple):
    """Follows the last picture of a file, or stands where its pictures break off."""

    file: int
    refused: str | None = None  # the reason


class PictureStream(IterableDataset):
    """The pictures of many files. In a `DataLoader` each worker takes its share of the files."""

    def __init__(self, paths: Sequence[Path], image_processor: MammoDinoImageProcessor, slices_per_volume: int):
        self.paths, self.image_processor, self.slices_per_volume = paths, image_processor, slices_per_volume
        self.hash_key = secrets.token_bytes(32)

    def __iter__(self) -> Iterator[Picture | FileEnd]:
        worker = get_worker_info()
        for file in share(len(self.paths), *((worker.id, worker.num_workers) if worker else (0, 1))):
            try:
                yield from self.read(file)
                yield FileEnd(file)
            except (ImageRefused, OSError) as refusal:
                yield FileEnd(file, " ".join(str(refusal).split()))

    def read(self, file: int, chosen: Sequence[int] | None = None) -> Iterator[Picture]:
        """The pictures of one file, bit for bit as `image_processor(path)` makes them; `chosen` names slices."""
        path, processor = self.paths[file], self.image_processor
        settings, patch_size = processor.render_settings, processor.patch_size
        canvas = (processor.size["height"], processor.size["width"])
        mean, std = processor.mean_and_std
        slices = processor.render_source(
            path, canvas, hash_key=self.hash_key, slices_per_volume=self.slices_per_volume, slices=chosen
        )
        for mammogram, rendered in slices:
            placed = place_on_canvas(rendered, canvas, settings.chest_wall_side)
            is_one_of_many = mammogram.kind == "dbt" and mammogram.num_slices == 1
            yield Picture(
                file,
                mammogram.volume_id if is_one_of_many else None,
                mammogram.slice_index,
                mammogram.num_slices,
                standardize(placed.picture, mean, std)[None],
                patch_tissue(placed.tissue, (canvas[0] // patch_size, canvas[1] // patch_size)),
            )


def share(num_files: int, worker: int, num_workers: int) -> Iterator[int]:
    """The files of one worker: one of each round of `num_workers`, another place each round, so that where mammograms
    and volumes alternate no worker gets all the volumes."""
    for turn, first in enumerate(range(0, num_files, num_workers)):
        file = first + (worker + turn) % num_workers
        if file < num_files:
            yield file


def open_stream(stream: PictureStream, num_workers: int, num_ahead: int) -> Iterable[Picture | FileEnd]:
    """The stream's items, from `num_workers` processes that read about `num_ahead` pictures ahead; 0: from this one.

    Pictures of a file come in order, and its end behind them; the files of several workers alternate, one item each.
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
    """Every file that may be an image, by a picture's or DICOM's suffix or by its content, sorted; and how many others
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
                if suffix in (*PICTURE_SUFFIXES, *DICOM_SUFFIXES) or path.is_file() and is_dicom(path):
                    found.add(path)
                else:
                    ignored[suffix or "no suffix"] += 1
    return sorted(found), ignored


def _raise(error: OSError) -> None:
    raise error
