"""The pictures of a labelled data set as lossless PNG: what the reader makes of a file, before crop, contrast and size.

DICOM: modality LUT, padding, VOI, MONOCHROME1 inversion, as `modeling_mammodino.dicom` does them. A picture after a
window is a fraction of full scale and goes into 16 bits; stored values of 8 to 16 bits stay as they are. Of other
pictures the one grey plane is kept, at its depth. Nothing else of a file travels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modeling_mammodino.dicom import frame_order, is_dicom, iter_slices
from modeling_mammodino.errors import ImageRefused
from modeling_mammodino.pictures import read_picture

from .bcs_dbt import BcsDbtViews
from .benchmark_index import Box
from .corpus_reader import encode_png

FULL_SCALE = 65535


class SlicePicture(NamedTuple):
    png: bytes  # grey, 8 or 16 bits
    slice_index: int  # as boxes count: frames of the file from 0; -1 in a file of one picture
    num_slices: int
    boxes: list[Box] | None  # of this slice; None where nobody looked


@dataclass(frozen=True)
class PictureReader:
    """Pictures of files.

    Attributes:
        slices_per_volume: evenly spaced through a volume; 0 takes all.
        boxed_slices: of a volume with boxes the slices that have one, in place of evenly spaced ones.
        views: sets BCS-DBT's sides and orientations right, in whose coordinates its boxes are.
    """

    slices_per_volume: int = 4
    boxed_slices: bool = False
    views: BcsDbtViews | None = field(default=None, repr=False)

    def read(self, file: str | Path, boxes: list[Box] | None = None) -> list[SlicePicture]:
        """All pictures of a file, or none. Raises ImageRefused or OSError where one cannot be read."""
        if not is_dicom(file):
            return [SlicePicture(as_png(read_picture(file), str(file)), -1, 1, boxes)]
        order = frame_order(file)
        wanted = self._positions(str(file), order, boxes or ())
        slices = iter_slices(file, indices=wanted)
        if self.views is not None:
            slices = self.views.correct(file, slices)
        return list(_pictures(str(file), slices, order, boxes))

    def _positions(self, file: str, order: tuple[int, ...], boxes: Iterable[Box]) -> list[int]:
        """Which slices, counted in order of position."""
        boxed = sorted({box["slice"] for box in boxes})
        if len(order) > 1 and (outside := [place for place in boxed if not 0 <= place < len(order)]):
            raise ImageRefused(file, f"a box is on slice {outside[0]} of {len(order)}; correct the boxes")
        if self.boxed_slices and boxed and len(order) > 1:
            return sorted(order.index(place) for place in boxed)
        count = min(self.slices_per_volume or len(order), len(order))
        return ((np.arange(count) + 0.5) * len(order) / count).astype(int).tolist()


def _pictures(file: str, slices: Iterable, order: tuple[int, ...], boxes: list[Box] | None) -> Iterator[SlicePicture]:
    for mammogram in slices:
        place = order[mammogram.slice_index] if len(order) > 1 else -1
        of_slice = boxes if boxes is None or place == -1 else [box for box in boxes if box["slice"] == place]
        yield SlicePicture(as_png(mammogram.pixels, file), place, len(order), of_slice)


def as_png(pixels: np.ndarray, name: str = "image") -> bytes:
    """A grey plane (H, W): uint8 and uint16 as they are, float32 in 0..1 in 16 bits, to the nearest 1/65535.

    Raises ImageRefused for other values: without a window they have no full scale.
    """
    if pixels.dtype not in (np.uint8, np.uint16):
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:
            raise ImageRefused(
                name, f"values from {low:g} to {high:g} without a window or VOI LUT; give it one, or stored values"
            )
        pixels = np.rint(pixels.astype(np.float64) * FULL_SCALE).astype(np.uint16)
    return encode_png(pixels)
