"""Features made by hand, of the pictures that the encoders see: a yardstick of how much there is to see.

Brightness in the region and about it, differences of Gaussians, gradients along and across the radius, brightness by
distance from the middle. Which figures is our choice; nothing here is learned.
"""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from .features import Example, mean_of_rows

PERCENTILES = (1, 10, 50, 90, 99)
SCALES_PX = (0.7, 1.4, 2.8, 5.6, 11.0)  # standard deviations of the Gaussians
GRADIENT_SCALES = 3  # the picture and its first two Gaussians
NUM_RINGS, RING_PX = 5, 4
MIN_WEIGHT = 0.3  # of the largest: patches that are the region


def hand_made_features(examples: Sequence[Example]) -> np.ndarray:
    """(n, 57) float32, a row a row of the table, the mean over its examples."""
    return mean_of_rows(examples, np.array([list(_figures(each)) for each in examples]))


def _figures(example: Example) -> Iterator[float]:
    picture = example.pixel_values[0].astype(np.float32)
    patch = picture.shape[0] // example.weights.shape[0]
    region = np.kron(example.weights > MIN_WEIGHT * example.weights.max(), np.ones((patch, patch), bool))
    rest = ~region if not region.all() else region
    inside = picture[region]
    yield from (inside.mean(), inside.std(), *np.percentile(inside, PERCENTILES))
    yield from (picture[rest].mean(), inside.mean() - picture[rest].mean(), region.sum())

    smooth = [picture, *(cv2.GaussianBlur(picture, (0, 0), scale) for scale in SCALES_PX)]
    for finer, coarser in zip(smooth[:-1], smooth[1:], strict=True):
        band = finer - coarser
        of_region = band[region]
        spread = of_region.std() + 1e-6
        yield from (spread, of_region.max(), of_region.min(), np.percentile(of_region, 99))
        yield from (np.mean(of_region**4) / spread**4, spread / (band[rest].std() + 1e-6))

    down, right = (
        index - middle
        for index, middle in zip(np.indices(picture.shape), np.argwhere(region).mean(axis=0), strict=True)
    )
    radius = np.hypot(down, right) + 1e-3
    for level in smooth[:GRADIENT_SCALES]:
        by_row, by_column = np.gradient(level)
        along = ((by_row * down + by_column * right) / radius)[region]
        across = ((by_column * down - by_row * right) / radius)[region]
        yield from (along.mean(), np.abs(along).mean(), np.abs(across).mean())
        yield np.log((np.mean(across**2) + 1e-6) / (np.mean(along**2) + 1e-6))
    for ring in range(NUM_RINGS):
        yield picture[(radius >= ring * RING_PX) & (radius < (ring + 1) * RING_PX)].mean()
