"""Block masks for iBOT (BEiT's generator, as DINOv2 samples it), kept to breast tissue."""

import math
from collections.abc import Sequence

import numpy as np

MIN_BLOCK_PATCHES = 4
BLOCK_ASPECT = (0.3, 1 / 0.3)  # height over width
ATTEMPTS_PER_BLOCK = 10
_LOG_ASPECT = (math.log(BLOCK_ASPECT[0]), math.log(BLOCK_ASPECT[1]))


def stratified_mask_ratios(
    rng: np.random.Generator, num_crops: int, probability: float, ratio: Sequence[float]
) -> np.ndarray:
    """Draw the mask ratio of each global crop of a batch: int(probability * num_crops) of them are masked, one drawn
    from each of as many equal bins of `ratio`, in random order (dinov2/data/collate.py). Returns (num_crops,), 0 = no
    mask."""
    num_masked = int(num_crops * probability)
    edges = np.linspace(ratio[0], ratio[1], num_masked + 1)
    ratios = np.zeros(num_crops)
    ratios[:num_masked] = rng.uniform(edges[:-1], edges[1:])
    return rng.permutation(ratios)


def maskable_patches(tissue: np.ndarray, tissue_aware: bool) -> np.ndarray:
    """Return the patches that a mask may cover, (h, w) bool, of breast fractions (h, w): those with breast, where masks
    keep to it and there is any; else all."""
    breast = tissue > 0
    return breast if tissue_aware and breast.any() else np.ones_like(breast)


def block_mask(rng: np.random.Generator, ratio: float, allowed: np.ndarray, max_ratio: float = 0.5) -> np.ndarray:
    """Add rectangular blocks until int(ratio * n) of the n allowed patches are masked; never outside `allowed`.

    allowed (h, w) bool: the patches that may be masked, breast tissue or everything. A block is taken where it adds
    at least one patch and no more than are missing, at most max_ratio * n; after ten failures in a row the mask stops
    short of its ratio. Where everything is allowed this is DINOv2's generator (dinov2/data/masking.py, after BEiT).
    Returns (h, w) bool.
    """
    height, width = allowed.shape
    num_allowed = int(np.count_nonzero(allowed))
    missing, largest = int(ratio * num_allowed), max_ratio * num_allowed
    # blocks are drawn in units of the grid: where tissue is sparse they must be larger to cover as much of it
    cells_per_patch = allowed.size / max(1, num_allowed)
    free = allowed.copy()
    while missing > 0:
        most = min(missing, largest)
        for draws in rng.random((ATTEMPTS_PER_BLOCK, 4)).tolist():
            # where fewer are missing than a block's least, areas lie between the two, as in Python's random.uniform
            area = (MIN_BLOCK_PATCHES + (most - MIN_BLOCK_PATCHES) * draws[0]) * cells_per_patch
            aspect = math.exp(_LOG_ASPECT[0] + (_LOG_ASPECT[1] - _LOG_ASPECT[0]) * draws[1])
            block_height, block_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (block_height < height and block_width < width):
                continue
            top, left = int(draws[2] * (height - block_height + 1)), int(draws[3] * (width - block_width + 1))
            block = free[top : top + block_height, left : left + block_width]
            added = int(np.count_nonzero(block))
            if 0 < added <= most:
                block[:] = False
                missing -= added
                break
        else:
            break
    return allowed & ~free
