"""Regions of the study: each lesion in its box at its own slice, and like places of breasts that have none.

A whole breast's feature is a mean over hundreds of patches, in which a lesion is a few: what an encoder knows of
lesions is asked where they are, as a detection head does.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas

from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.errors import ImageRefused
from modeling_mammodino.rendering import standardize

from ..detection.data import LesionPicture, PictureMaker
from .features import Example

WINDOW_FRACTION = 0.25  # of the canvas' height: side of what is seen around a box
MIN_TISSUE_FRACTION = 0.9  # of the box in a breast without a lesion


class Site(NamedTuple):
    frame: int  # slice of the file
    box: np.ndarray  # (4,) float: x0, y0, x1, y1 on the canvas


def regions(table: pandas.DataFrame, folder: Path, image_processor: MammoDinoImageProcessor) -> list[Example]:
    """One for each volume of a phantom's table. A breast without a lesion lends its place, size and slice from lesions
    of other patients, in an order drawn once: the first at whose place it has tissue.

    Raises ValueError for a file that cannot be used.
    """
    maker = PictureMaker(image_processor)
    found: dict[int, Example] = {}
    sites: list[Site] = []
    with_lesion = np.flatnonzero(table["lesion"] == 1)
    for row in map(int, with_lesion):
        here = table.iloc[row]
        picture = _picture(maker, folder / here["file"], int(here["lesion_slice"]))
        box = here[["x0", "y0", "x1", "y1"]].to_numpy(float)
        sites.append(Site(picture.frame, picture.placement.boxes(box)[0]))
        found[row] = _window(row, maker, picture, sites[-1].box)
    rng = np.random.default_rng(0)
    for row in map(int, np.flatnonzero(table["lesion"] != 1)):
        order = rng.permutation(len(sites))
        picture = _picture(maker, folder / table["file"].iloc[row], sites[order[0]].frame)
        windows = (_window(row, maker, picture, sites[place].box) for place in order)
        fit = (each for each in windows if np.average(each.tissue_mask, weights=each.weights) >= MIN_TISSUE_FRACTION)
        found[row] = next(fit, None) or _window(row, maker, picture, sites[order[0]].box)
    return [found[row] for row in range(len(table))]


def _picture(maker: PictureMaker, file: Path, frame: int) -> LesionPicture:
    try:
        return next(maker(str(file), [frame]))
    except (ImageRefused, OSError) as refusal:
        raise ValueError(str(refusal)) from refusal


def _window(row: int, maker: PictureMaker, picture: LesionPicture, box: np.ndarray) -> Example:
    """The window about a box, moved into the canvas where it reaches beyond; patches weigh as much of the box as they
    hold."""
    patch, (height, width) = maker.processor.patch_size, maker.canvas
    x0, y0, x1, y1 = box
    grid = round(WINDOW_FRACTION * height / patch)
    # on the patch grid of the canvas, so that tissue is cut with the pixels
    rows, columns = (
        int(np.clip(round((low + high) / 2 / patch - grid / 2), 0, side // patch - grid))
        for low, high, side in ((y0, y1, height), (x0, x1, width))
    )
    top, left = rows * patch, columns * patch
    pixels = picture.picture[top : top + grid * patch, left : left + grid * patch]
    edges = np.arange(grid + 1) * patch
    inside = [
        np.clip(np.minimum(edges[1:], high - start) - np.maximum(edges[:-1], low - start), 0, None)
        for low, high, start in ((y0, y1, top), (x0, x1, left))
    ]
    weights = np.outer(*inside).astype(np.float32)
    tissue = picture.tissue[rows : rows + grid, columns : columns + grid]
    return Example(row, standardize(pixels, *maker.processor.mean_and_std)[None], tissue, weights)
