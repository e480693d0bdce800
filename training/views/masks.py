"""Block masks for iBOT (BEiT's generator, as DINOv2 samples it), kept to breast tissue."""

import math

import numpy as np

MIN_BLOCK_PATCHES = 4
BLOCK_ASPECT = (0.3, 1 / 0.3)
ATTEMPTS_PER_BLOCK = 10


def stratified_mask_ratios(
    rng: np.random.Generator, num_crops: int, probability: float, ratio: tuple[float, float]
) -> np.ndarray:
    """Mask ratio of each global crop of a batch: int(probability * num_crops) of them are masked, one drawn from each
    of as many equal bins of `ratio`, in random order (dinov2/data/collate.py). Returns (num_crops,), 0 = no mask."""
    num_masked = int(num_crops * probability)
    edges = np.linspace(*ratio, num_masked + 1)
    ratios = np.zeros(num_crops)
    ratios[:num_masked] = rng.uniform(edges[:-1], edges[1:])
    return rng.permutation(ratios)


def maskable_patches(tissue: np.ndarray, tissue_aware: bool) -> np.ndarray:
    """(h, w) bool, the patches that a mask may cover, of breast fractions (h, w): those with breast, where masks keep
    to it and there is any; else all."""
    breast = tissue > 0
    return breast if tissue_aware and breast.any() else np.ones_like(breast)


def block_mask(rng: np.random.Generator, ratio: float, allowed: np.ndarray, max_ratio: float = 0.5) -> np.ndarray:
    """Rectangular blocks, added until `ratio` of the allowed patches is masked; never outside `allowed`.

    allowed (h, w) bool: the patches that may be masked, breast tissue or everything. A block is taken where it adds
    at least one and at most the missing number of patches; after ten failures in a row the mask stops short of its
    ratio (dinov2/data/masking.py). Returns (h, w) bool.
    """
    height, width = allowed.shape
    num_allowed = int(allowed.sum())
    target, largest = int(ratio * num_allowed), max(MIN_BLOCK_PATCHES, max_ratio * num_allowed)
    # blocks are drawn in units of the grid: where tissue is sparse they must be larger to cover as much of it
    density = num_allowed / allowed.size
    mask = np.zeros_like(allowed)
    missing = target
    while missing > 0:
        for _ in range(ATTEMPTS_PER_BLOCK):
            upper = max(min(missing, largest), MIN_BLOCK_PATCHES)
            area = rng.uniform(MIN_BLOCK_PATCHES, upper) / density if upper > MIN_BLOCK_PATCHES else upper
            aspect = math.exp(rng.uniform(*np.log(BLOCK_ASPECT)))
            block_height, block_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < block_height < height and 0 < block_width < width):
                continue
            top, left = rng.integers(0, height - block_height + 1), rng.integers(0, width - block_width + 1)
            block = (slice(top, top + block_height), slice(left, left + block_width))
            added = int((allowed[block] & ~mask[block]).sum())
            if 0 < added <= missing:
                mask[block] |= allowed[block]
                missing -= added
                break
        else:
            break
    return mask
