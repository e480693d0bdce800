"""What tissue is drawn with: power-law noise, structures that run toward the nipple, tubes, specks of known volume.

Sources by number: `dataset_scripts.phantom_breast`.
"""

from functools import lru_cache

import cv2
import numpy as np
from scipy import fft


@lru_cache(maxsize=8)
def _power_law_gain(shape: tuple, spacing: tuple, exponent: float, longest_mm: float, shortest_mm: float):
    axes = [fft.fftfreq(n, d) for n, d in zip(shape[:2], spacing[:2], strict=True)] + [
        fft.rfftfreq(shape[2], spacing[2])
    ]
    square = sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij", sparse=True))  # (cycles/mm)^2
    gain = (square + longest_mm**-2) ** (-exponent / 4) * np.exp(-square * shortest_mm**2)
    count = np.prod(shape)  # values; unit variance, from numbers of variance 1/12 for real and imaginary part
    waves = 2 * (gain**2).sum() - (gain[..., 0] ** 2).sum() - (shape[2] % 2 == 0) * (gain[..., -1] ** 2).sum()
    return (gain * count / np.sqrt(waves / 6)).astype(np.float32)


def power_law_noise(rng, shape, spacing_mm, exponent: float, longest_mm: float, shortest_mm: float):
    """Gaussian noise (D, H, W) float32 of unit variance; power falls as frequency^-exponent between two wavelengths.

    Periodic along rows and columns; along the slices not, for the ends of a breast must not meet.
    """
    padded = (fft.next_fast_len(shape[0] * 5 // 4), *shape[1:])
    gain = _power_law_gain(padded, spacing_mm, exponent, longest_mm, shortest_mm)
    # Uniform numbers will do, and cost a third: each value is a sum over all waves, which makes it Gaussian.
    spectrum = rng.random((*gain.shape, 2), dtype=np.float32)
    spectrum -= np.float32(0.5)
    spectrum *= gain[..., None]
    return fft.irfftn(spectrum.view(np.complex64)[..., 0], s=padded, workers=1, overwrite_x=True)[: shape[0]]


def fan(shape, apex, stretch: float, grid: float):
    """Where in noise, on a grid that is `grid` times as coarse, to look for each pixel: structures run to the apex.

    Ducts and ligaments do so. Two maps (H, W) for cv2.remap.
    """
    y, x = np.indices(shape, np.float32)
    along = np.hypot(y - apex[0], x - apex[1]) / stretch
    across = np.arctan2(y - apex[0], apex[1] - x) * (shape[0] / 2.5)
    return along / grid, across / grid


def bend(noise, maps):
    return cv2.remap(noise, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def fall(negative):
    """exp of what is negative, without the denormal numbers that cost so much."""
    return cv2.exp(np.maximum(negative, np.float32(-20)))


def deposit(canvas, points_mm, volumes_mm3, voxel_mm) -> None:
    """Add specks of matter to shares of voxels (D, H, W), each spread over its eight neighbours: volume is kept.

    points_mm: (N, 3), z, y, x from the centre of the first voxel; what falls outside the canvas is left out.
    """
    position = np.asarray(points_mm, np.float64) / voxel_mm
    low = np.floor(position).astype(int)
    offset = position - low
    share = np.broadcast_to(volumes_mm3, len(position)) / np.prod(voxel_mm)
    for corner in np.ndindex(2, 2, 2):
        at = low + corner
        weight = share * np.prod(np.where(corner, offset, 1 - offset), axis=1)
        kept = ((at >= 0) & (at < canvas.shape)).all(axis=1)
        np.add.at(canvas, tuple(at[kept].T), weight[kept].astype(canvas.dtype))


def tube(rng, start_mm, heading: float, length_mm: float, wander: float, rise: float, step_mm: float):
    """Points (N, 3) of a tube that wanders in the plane from `start_mm` (z, y, x)."""
    steps = max(int(length_mm / step_mm), 2)
    angle = heading + np.cumsum(rng.normal(0, wander * np.sqrt(step_mm), steps))
    level = rise * np.cumsum(rng.normal(0, np.sqrt(step_mm), steps))
    return np.asarray(start_mm) + np.stack(
        [level, np.cumsum(np.sin(angle)) * step_mm, np.cumsum(np.cos(angle)) * step_mm], 1
    )
