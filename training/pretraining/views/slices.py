"""Neighboring slices of a volume: the student sees one, the teacher the other."""

from typing import Protocol

import numpy as np


class PairSlices(Protocol):
    """A rule for the neighbor of a slice, by name in SLICE_PAIRINGS.

    slice_indices (n,) int: place of each stored slice in its volume, ascending; position: the anchor's row in it.
    Returns another row of `slice_indices`, None where there is no neighbor.
    """

    def __call__(
        self,
        rng: np.random.Generator,
        slice_indices: np.ndarray,
        position: int,
        slice_spacing_mm: float | None,
        max_distance_mm: float,
        max_distance_slices: int,
    ) -> int | None: ...


def sample_neighbor(
    rng: np.random.Generator,
    slice_indices: np.ndarray,
    position: int,
    slice_spacing_mm: float | None,
    max_distance_mm: float,
    max_distance_slices: int,
) -> int | None:
    """For tomosynthesis, whose slices blur into one another: uniform among all slices within reach.

    The reach is `max_distance_mm` where the spacing is known (at least one slice), else `max_distance_slices`. The
    paper says "nearby"; the distance is our choice.
    """
    reach = max(1, int(max_distance_mm / slice_spacing_mm)) if slice_spacing_mm else max_distance_slices
    return _within(rng, slice_indices, position, reach)


def axial_neighbor(
    rng: np.random.Generator,
    slice_indices: np.ndarray,
    position: int,
    slice_spacing_mm: float | None,
    max_distance_mm: float,
    max_distance_slices: int,
) -> int | None:
    """For CT and MR, whose slices are sharp: the one directly above or below; none where both lie farther away than
    `max_distance_mm`. Without a spacing they count as near."""
    if slice_spacing_mm and slice_spacing_mm > max_distance_mm:
        return None
    return _within(rng, slice_indices, position, 1)


def _within(rng: np.random.Generator, slice_indices: np.ndarray, position: int, reach: int) -> int | None:
    distance = np.abs(slice_indices - slice_indices[position])
    candidates = np.flatnonzero((distance > 0) & (distance <= reach))
    return int(candidates[rng.integers(len(candidates))]) if len(candidates) else None


SLICE_PAIRINGS: dict[str, PairSlices] = {"within_reach": sample_neighbor, "axial": axial_neighbor}
