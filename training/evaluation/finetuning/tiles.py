"""Tissue tiles: overlapping squares of the breast, rendered larger than an encoder sees the whole view.

As in MIL-PF (arXiv 2603.09374), whose canvas is 4096 px high; a tile then goes to the encoder as an image of its own.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from modeling_mammodino.tools.features import Inputs
from training.evaluation.backbones.preprocessing import Preprocessing


class Place(NamedTuple):
    """Where a feature comes from: a tile on the canvas, in pixels, or a whole view (size 0)."""

    slice: int  # 0 is the first that was taken of the file
    x: int = 0
    y: int = 0
    size: int = 0
    tissue: float = 1.0  # the share of the tile that is breast


@dataclass(frozen=True)
class Tiling:
    """What tiles an image has.

    Attributes:
        canvas_height: side in pixels of the square into which the breast is fitted, at its aspect.
        tile_size: side of a tile in pixels of it.
        tile_overlap: share of its side that a tile at least shares with the next.
        min_tissue: share of breast under which a tile is left out; of an image without any other the best one stays.
    """

    canvas_height: int = 2048
    tile_size: int = 518
    tile_overlap: float = 0.25
    min_tissue: float = 0.05

    def places(self, tissue: np.ndarray, number: int = 0) -> list[Place]:
        """Return the tiles, row by row, of a breast mask (H, W) bool, of slice `number`."""
        area = cv2.integral(tissue.astype(np.uint8))  # (H + 1, W + 1)
        found = []
        for y in self._starts(tissue.shape[0]):
            for x in self._starts(tissue.shape[1]):
                bottom, right = (min(at + self.tile_size, side) for at, side in zip((y, x), tissue.shape, strict=True))
                inside = int(area[bottom, right]) - int(area[y, right]) - int(area[bottom, x]) + int(area[y, x])
                found.append(Place(number, x, y, self.tile_size, inside / self.tile_size**2))
        enough = [each for each in found if each.tissue >= self.min_tissue]
        return enough or [max(found, key=lambda each: each.tissue)]

    def _starts(self, side: int) -> list[int]:
        """Return where tiles begin along a side, evenly, the last one at its end."""
        room, step = max(0, side - self.tile_size), max(1, math.floor(self.tile_size * (1 - self.tile_overlap)))
        return np.linspace(0, room, 1 + math.ceil(room / step)).round().astype(int).tolist()


class TiledSlice(NamedTuple):
    """One rendered slice and its tiles."""

    image: np.ndarray  # (H, W) uint8 or uint16
    tissue: np.ndarray  # (H, W) bool
    places: list[Place]

    def inputs(self, preprocess: Preprocessing) -> Iterator[tuple[Place, Inputs]]:
        """Yield each tile as the backbone takes it; what lies beyond the image is black."""
        for place in self.places:
            across, down = slice(place.x, place.x + place.size), slice(place.y, place.y + place.size)
            image, tissue = self.image[down, across], self.tissue[down, across]
            beyond = [(0, place.size - side) for side in image.shape]
            yield place, preprocess.tile(np.pad(image, beyond), np.pad(tissue, beyond))


@dataclass(frozen=True)
class TileReader:
    """From files to slices with their tiles; picklable, for workers. The tiles are cut later, one after another."""

    preprocess: Preprocessing
    tiling: Tiling
    slices_per_volume: int = 4

    def __call__(self, file: str | Path, slices: Sequence[int] | None = None) -> Iterator[TiledSlice]:
        """Yield slices of a file; see `Backbone.preprocess`."""
        side = self.tiling.canvas_height
        rendered = self.preprocess.renderer.render_source(
            file, (side, side), slices_per_volume=self.slices_per_volume, slices=slices
        )
        for number, (_, each) in enumerate(rendered):
            yield TiledSlice(each.image, each.tissue, self.tiling.places(each.tissue, number))
