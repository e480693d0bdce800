"""Which sample comes when: indices of each forward, the volume of a sample, and the neighbor of a slice."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from training.pretraining.recipe import SAMPLES_PER_BLOCK, Recipe, ViewsRecipe
from training.settings import KIND_STREAM, ORDER_STREAM, generator


class StepSampler:
    """Global sample indices of each forward of one process, from a step on.

    Process r of W takes the r-th part of each forward's W * B indices, so the samples of a step do not depend on W.
    """

    def __init__(self, recipe: Recipe, first_step: int, process_index: int, num_processes: int):
        run = recipe.run
        self.per_process = run.per_device_train_batch_size
        self.forwards = range(
            first_step * run.gradient_accumulation_steps, run.max_steps * run.gradient_accumulation_steps
        )
        self.process_index, self.num_processes = process_index, num_processes

    def __len__(self) -> int:
        return len(self.forwards)

    def __iter__(self) -> Iterator[list[int]]:
        for forward in self.forwards:
            start = (forward * self.num_processes + self.process_index) * self.per_process
            yield list(range(start, start + self.per_process))


class VolumeOrder:
    """The volume of each sample, a pure function of (seed, index).

    kinds: kind of image of each volume, by its place in the corpus. weights: share of the samples of each kind, in any
    unit; kinds without one are left out; empty: kinds as they come. Each block of SAMPLES_PER_BLOCK samples has the
    shares exactly, in an order of its own, and within a kind an epoch is a permutation of its volumes, so that all of
    them are seen equally often. Raises ValueError naming the kind that the corpus lacks.
    """

    def __init__(self, seed: int, kinds: Sequence[str] | np.ndarray, weights: Mapping[str, float]):
        present = np.asarray(kinds)
        if lacking := sorted(set(weights) - set(present.tolist())):
            found = ", ".join(sorted(set(present.tolist())))
            raise ValueError(
                f"kind_weights names {', '.join(lacking)}, which the corpus lacks; it has {found}: take the weight out"
            )
        self.seed = seed
        self.groups = [np.flatnonzero(present == kind) for kind in weights] or [np.arange(len(present))]
        ends = np.cumsum(list(weights.values()) or [1.0])
        ends = np.rint(ends / ends[-1] * SAMPLES_PER_BLOCK).astype(int)  # so that rounded shares add up
        self.per_block = np.diff(ends, prepend=0)  # samples of each group
        self.block = np.repeat(np.arange(len(ends)), self.per_block)  # group of each sample, sorted
        self._mix: tuple[int, np.ndarray, np.ndarray] = (-1, self.block, self.block)  # of the last block asked for
        self._epochs = [(-1, group) for group in self.groups]

    def __getitem__(self, index: int) -> int:
        if len(self.groups) == 1:
            return self._visit(0, index)
        block, place = divmod(index, len(self.block))
        if self._mix[0] != block:
            groups = generator(self.seed, KIND_STREAM, block).permutation(self.block)
            numbers = np.empty_like(groups)  # of each sample among those of its group
            for group in range(len(self.groups)):
                numbers[groups == group] = np.arange(self.per_block[group])
            self._mix = (block, groups, numbers)
        group, number = int(self._mix[1][place]), int(self._mix[2][place])
        return self._visit(group, block * int(self.per_block[group]) + number)

    def _visit(self, group: int, visit: int) -> int:
        volumes = self.groups[group]
        epoch, place = divmod(visit, len(volumes))
        if self._epochs[group][0] != epoch:
            rng = generator(self.seed, ORDER_STREAM, (group << 48) + epoch)
            self._epochs[group] = (epoch, rng.permutation(volumes))
        return int(self._epochs[group][1][place])


def neighbor_reach(recipe: ViewsRecipe, slice_spacing_mm: float | None) -> int:
    """Return how many slices away a neighbor may lie, by the recipe's `slice_pairing`; 0: none is near enough.

    `within_reach`, for tomosynthesis, whose slices blur into one another: `slice_max_distance_mm` in slices, at least
    one; `slice_max_distance_slices` where the spacing is unknown. The paper says "nearby"; the distance is our choice.
    `axial`, for CT and MR, whose slices are sharp: one; 0 where that is farther than `slice_max_distance_mm`.
    """
    if recipe.slice_pairing == "axial":
        return 0 if slice_spacing_mm and slice_spacing_mm > recipe.slice_max_distance_mm else 1
    if not slice_spacing_mm:
        return recipe.slice_max_distance_slices
    return max(1, int(recipe.slice_max_distance_mm / slice_spacing_mm))


def sample_neighbor(rng: np.random.Generator, slice_indices: np.ndarray, position: int, reach: int) -> int | None:
    """Draw a neighbor of a slice, uniformly among the others at most `reach` slices away; None where there is none.

    slice_indices (n,) int: place of each stored slice in its volume, ascending; position: the slice's row in it.
    Returns another row.
    """
    distance = np.abs(slice_indices - slice_indices[position])
    candidates = np.flatnonzero((distance > 0) & (distance <= reach))
    return int(candidates[rng.integers(len(candidates))]) if len(candidates) else None
