"""Neighbouring slices of a DBT volume."""

import numpy as np


def sample_neighbour(
    rng: np.random.Generator,
    slice_indices: np.ndarray,
    position: int,
    slice_spacing_mm: float | None,
    max_distance_mm: float,
    max_distance_slices: int,
) -> int | None:
    """Another slice of the same volume, uniform among those within reach; None where there is none.

    slice_indices (n,) int: place of each stored slice in its volume, ascending; position: the anchor's row in it. The
    reach is `max_distance_mm` where the spacing is known (at least one slice), else `max_distance_slices`. The article
    says "nearby"; the distance is our choice. Returns a row of `slice_indices`.
    """
    reach = max(1, int(max_distance_mm / slice_spacing_mm)) if slice_spacing_mm else max_distance_slices
    distance = np.abs(slice_indices - slice_indices[position])
    candidates = np.flatnonzero((distance > 0) & (distance <= reach))
    return int(rng.choice(candidates)) if len(candidates) else None
