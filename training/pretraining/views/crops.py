"""Tissue-aware random resized crops, by summed-area tables (Crow 1984) over the breast mask."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

FIRST_CANDIDATES = 64  # of a round; each round after it draws twice as many


class Crops(NamedTuple):
    """Crops of one image."""

    boxes: np.ndarray  # (n, 4) int: y0, x0, y1, x1 in pixels, half-open
    tissue_fractions: np.ndarray  # (n,)
    fit: np.ndarray  # (n,) bool; False: no candidate held the minimum, and one of much tissue was taken


class TissueTable:
    """Breast area inside any box, in constant time.

    tissue (h, w): breast fraction 0..1 of each cell of a regular grid over an image of (H, W) pixels. Box sides may
    cut cells: the interpolated table is exact for fractions constant within a cell.
    """

    def __init__(self, tissue: np.ndarray, image_shape: tuple[int, int]):
        self.shape = image_shape
        self.cells_per_px = (tissue.shape[0] / image_shape[0], tissue.shape[1] / image_shape[1])
        self.table = cv2.integral(tissue.astype(np.float32, copy=False))  # (h + 1, w + 1) float64

    def area_above_left(self, y_px: np.ndarray, x_px: np.ndarray) -> np.ndarray:
        """Return the breast area, in cells, of the rectangle from the origin to (y, x); the arrays broadcast."""
        y, x = y_px * self.cells_per_px[0], x_px * self.cells_per_px[1]
        top = np.minimum(y.astype(int), self.table.shape[0] - 2)
        left = np.minimum(x.astype(int), self.table.shape[1] - 2)
        down, right = y - top, x - left
        table = self.table
        upper = table[top, left] * (1 - right) + table[top, left + 1] * right
        lower = table[top + 1, left] * (1 - right) + table[top + 1, left + 1] * right
        return upper * (1 - down) + lower * down

    def fraction(self, boxes: np.ndarray) -> np.ndarray:
        """Return the breast fraction (n,) of each box (n, 4) = y0, x0, y1, x1 in pixels."""
        y, x = boxes[:, 0::2].T, boxes[:, 1::2].T  # (2, n) each: y0, y1 and x0, x1
        corners = self.area_above_left(y[:, None], x[None, :])  # (2, 2, n)
        cells = corners[1, 1] - corners[0, 1] - corners[1, 0] + corners[0, 0]
        box_cells = (y[1] - y[0]) * (x[1] - x[0]) * self.cells_per_px[0] * self.cells_per_px[1]
        return np.clip(cells / box_cells, 0, 1)

    def grids(self, boxes: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Return the breast fraction (n, h, w) float32 of each cell of a patch grid laid over each box (n, 4)."""
        y0, x0, y1, x1 = boxes.T[:, :, None].astype(float)  # (n, 1) each
        y = y0 + (y1 - y0) * (np.arange(grid[0] + 1) / grid[0])  # (n, h + 1)
        x = x0 + (x1 - x0) * (np.arange(grid[1] + 1) / grid[1])  # (n, w + 1)
        corners = self.area_above_left(y[:, :, None], x[:, None, :])  # (n, h + 1, w + 1)
        cells = corners[:, 1:, 1:] - corners[:, :-1, 1:] - corners[:, 1:, :-1] + corners[:, :-1, :-1]
        px_per_patch = (y1 - y0) * (x1 - x0) / (grid[0] * grid[1])  # (n, 1)
        area = px_per_patch * (self.cells_per_px[0] * self.cells_per_px[1])
        return np.clip(cells / area[:, :, None], 0, 1).astype(np.float32)


def sample_boxes(
    rng: np.random.Generator,
    count: int,
    shape: tuple[int, int],
    scale: Sequence[float],
    ratio: Sequence[float],
) -> np.ndarray:
    """Draw `count` boxes of RandomResizedCrop: area uniform in `scale` of the image, aspect log-uniform in `ratio`.

    Returns (n, 4) int, 1 <= n <= count: boxes that do not fit into `shape` are left out, and where none fits all are
    cut to the image.
    """
    height, width = shape
    draws = rng.random((4, count))
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + (high - low) * draws[1])
    box_height = np.maximum(1, np.rint(np.sqrt(area / aspect))).astype(int)
    box_width = np.maximum(1, np.rint(np.sqrt(area * aspect))).astype(int)
    fits = (box_height <= height) & (box_width <= width)
    if fits.any():
        box_height, box_width, place = box_height[fits], box_width[fits], draws[2:, fits]
    else:
        box_height, box_width, place = np.minimum(box_height, height), np.minimum(box_width, width), draws[2:]
    y0 = (place[0] * (height - box_height + 1)).astype(int)
    x0 = (place[1] * (width - box_width + 1)).astype(int)
    return np.stack((y0, x0, y0 + box_height, x0 + box_width), axis=1)


def tissue_aware_crops(
    rng: np.random.Generator,
    table: TissueTable,
    scale: Sequence[float],
    ratio: Sequence[float],
    min_tissue_fraction: float,
    count: int = 1,
    rounds: int = 7,
) -> Crops:
    """Draw `count` random resized crops with at least `min_tissue_fraction` of breast: the first candidates that hold
    it, so their law is that of plain crops given the minimum. Where all rounds have too few, those of most tissue fill
    up.

    A minimum of 0 gives plain crops. The paper publishes the idea, not the rule.
    """
    boxes, fractions = np.empty((0, 4), int), np.empty(0)
    for doublings in range(rounds):
        more = sample_boxes(rng, max(FIRST_CANDIDATES, count) << doublings, table.shape, scale, ratio)
        boxes, fractions = np.concatenate((boxes, more)), np.concatenate((fractions, table.fraction(more)))
        chosen = np.flatnonzero(fractions >= min_tissue_fraction)[:count]
        if len(chosen) == count:
            break
    if missing := count - len(chosen):
        rest = np.flatnonzero(fractions < min_tissue_fraction)
        most = rest[np.argsort(-fractions[rest], kind="stable")] if len(rest) else chosen
        chosen = np.concatenate((chosen, np.resize(most, missing)))
    return Crops(boxes[chosen], fractions[chosen], fractions[chosen] >= min_tissue_fraction)


def downsample_2x(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W) at half its size, (H // 2, W // 2), each pixel the mean of four; an odd last line is left
    out. An image one pixel wide or high stays as it is."""
    height, width = (side // 2 for side in image.shape)
    if not (height and width):
        return image
    return cv2.resize(image[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)


def cut(image: np.ndarray, box: np.ndarray, size: int, half: np.ndarray | None = None) -> np.ndarray:
    """Return the box of an image (H, W) resized to (size, size), same dtype; area-averaged where it shrinks.

    half: the image by `downsample_2x`. A box of twice the size or more is read from it, at a fourth of the cost; its
    sides may then move by one pixel.
    """
    y0, x0, y1, x1 = box.tolist()
    if half is not None and min(y1 - y0, x1 - x0) >= 2 * size:
        image, y0, x0, y1, x1 = half, y0 // 2, x0 // 2, y1 // 2, x1 // 2
    crop = image[y0:y1, x0:x1]
    shrinks = crop.shape[0] >= size and crop.shape[1] >= size
    return cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
