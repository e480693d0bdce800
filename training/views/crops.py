"""Tissue-aware random resized crops, by summed-area tables (Crow 1984) over the breast mask."""

from typing import NamedTuple

import cv2
import numpy as np

CANDIDATES_PER_ROUND = 64


class Crop(NamedTuple):
    """A crop of a picture. `box` (4,) int: y0, x0, y1, x1 in pixels, half-open."""

    box: np.ndarray
    tissue_fraction: float
    fits: bool  # False: no candidate held the minimum, and the one of most tissue was taken


class TissueTable:
    """Breast area inside any box, in constant time.

    tissue (h, w): breast fraction 0..1 of each cell of a regular grid over a picture of (H, W) pixels. Box sides may
    cut cells: the interpolated table is exact for fractions constant within a cell.
    """

    def __init__(self, tissue: np.ndarray, picture_shape: tuple[int, int]):
        self.shape = picture_shape
        self.cells_per_px = (tissue.shape[0] / picture_shape[0], tissue.shape[1] / picture_shape[1])
        self.table = np.zeros((tissue.shape[0] + 1, tissue.shape[1] + 1))
        tissue.cumsum(0, dtype=np.float64).cumsum(1, out=self.table[1:, 1:])

    def area_above_left(self, y_px: np.ndarray, x_px: np.ndarray) -> np.ndarray:
        """Breast area, in cells, of the rectangle from the origin to (y, x); the arrays broadcast."""
        y, x = y_px * self.cells_per_px[0], x_px * self.cells_per_px[1]
        top = np.minimum(y.astype(int), self.table.shape[0] - 2)
        left = np.minimum(x.astype(int), self.table.shape[1] - 2)
        down, right = y - top, x - left
        table = self.table
        upper = table[top, left] * (1 - right) + table[top, left + 1] * right
        lower = table[top + 1, left] * (1 - right) + table[top + 1, left + 1] * right
        return upper * (1 - down) + lower * down

    def fraction(self, boxes: np.ndarray) -> np.ndarray:
        """Breast fraction (n,) of each box (n, 4) = y0, x0, y1, x1 in pixels."""
        y, x = boxes[:, 0::2].T, boxes[:, 1::2].T  # (2, n) each: y0, y1 and x0, x1
        corners = self.area_above_left(y[:, None], x[None, :])  # (2, 2, n)
        cells = corners[1, 1] - corners[0, 1] - corners[1, 0] + corners[0, 0]
        box_cells = (y[1] - y[0]) * (x[1] - x[0]) * self.cells_per_px[0] * self.cells_per_px[1]
        return np.clip(cells / box_cells, 0, 1)

    def grid(self, box: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Breast fraction (h, w) float32 of each cell of a patch grid laid over one box."""
        y0, x0, y1, x1 = (float(value) for value in box)
        corners = self.area_above_left(
            np.linspace(y0, y1, grid[0] + 1)[:, None], np.linspace(x0, x1, grid[1] + 1)[None, :]
        )
        cells = np.diff(np.diff(corners, axis=0), axis=1)
        cell_size = (y1 - y0) * (x1 - x0) * self.cells_per_px[0] * self.cells_per_px[1] / (grid[0] * grid[1])
        return np.clip(cells / cell_size, 0, 1).astype(np.float32)


def sample_boxes(
    rng: np.random.Generator,
    count: int,
    shape: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """`count` boxes of RandomResizedCrop: area uniform in `scale` of the picture, aspect log-uniform in `ratio`.

    Returns (n, 4) int, 1 <= n <= count: boxes that do not fit into `shape` are left out, and where none fits one is
    cut to the picture.
    """
    height, width = shape
    area = height * width * rng.uniform(*scale, size=count)
    aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1]), size=count))
    place = rng.uniform(size=(2, count))
    box_height = np.maximum(1, np.rint(np.sqrt(area / aspect))).astype(int)
    box_width = np.maximum(1, np.rint(np.sqrt(area * aspect))).astype(int)
    fits = (box_height <= height) & (box_width <= width)
    if not fits.any():
        fits[0], box_height[0], box_width[0] = True, min(height, box_height[0]), min(width, box_width[0])
    box_height, box_width, place = box_height[fits], box_width[fits], place[:, fits]
    y0 = np.floor(place[0] * (height - box_height + 1)).astype(int)
    x0 = np.floor(place[1] * (width - box_width + 1)).astype(int)
    return np.stack((y0, x0, y0 + box_height, x0 + box_width), axis=1)


def tissue_aware_crop(
    rng: np.random.Generator,
    table: TissueTable,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    min_tissue_fraction: float,
    rounds: int = 16,
) -> Crop:
    """A random resized crop with at least `min_tissue_fraction` of breast: the first candidate that holds it, so its
    law is that of the plain crop given the minimum. Where none of all rounds does, the one of most tissue.

    A minimum of 0 gives the plain crop. The article publishes the idea, not the rule.
    """
    best: Crop | None = None
    for _ in range(rounds):
        boxes = sample_boxes(rng, CANDIDATES_PER_ROUND, table.shape, scale, ratio)
        fractions = table.fraction(boxes)
        holds = fractions >= min_tissue_fraction
        chosen = int(holds.argmax() if holds.any() else fractions.argmax())
        if best is None or fractions[chosen] > best.tissue_fraction:
            best = Crop(boxes[chosen], float(fractions[chosen]), bool(holds[chosen]))
        if best.fits:
            break
    assert best is not None
    return best


def cut(picture: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """The box of a picture (H, W) resized to (size, size), same dtype; area-averaged where it shrinks."""
    y0, x0, y1, x1 = box
    crop = picture[y0:y1, x0:x1]
    shrinks = crop.shape[0] >= size and crop.shape[1] >= size
    return cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
