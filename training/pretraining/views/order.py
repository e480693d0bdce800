"""Which volume a sample shows: epochs over the volumes, and kinds of image mixed by weight."""

from collections.abc import Mapping, Sequence

import numpy as np

from training.settings import KIND_STREAM, ORDER_STREAM, generator

SAMPLES_PER_BLOCK = 4096  # in which each kind has its exact share


class VolumeOrder:
    """The volume of each sample, a pure function of (seed, index).

    kinds: kind of image of each volume, by its place in the corpus. weights: share of the samples of each kind, in any
    unit; kinds without one are left out; empty: kinds as they come. Each block of SAMPLES_PER_BLOCK samples has the
    shares exactly, in an order of its own, and within a kind an epoch is a permutation of its volumes, so that all of
    them are seen equally often. Raises ValueError naming the kind that the corpus lacks.
    """

    def __init__(self, seed: int, kinds: Sequence[str], weights: Mapping[str, float]):
        present = np.asarray(kinds)
        if lacking := sorted(set(weights) - set(present.tolist())):
            found = ", ".join(sorted(set(present.tolist())))
            raise ValueError(
                f"kind_weights names {', '.join(lacking)}, which the corpus lacks; it has {found}: take the weight out"
            )
        self.seed = seed
        self.groups = [np.flatnonzero(present == kind) for kind in weights] or [np.arange(len(present))]
        self.block = _block(weights or {"": 1.0})  # group of each sample, sorted
        self.per_block = np.bincount(self.block)
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


def parse_kind_weights(pairs: Sequence[str]) -> dict[str, float]:
    """["dbt=2", "ffdm=1"] -> {"dbt": 2.0, "ffdm": 1.0}. Raises ValueError naming the field."""
    weights: dict[str, float] = {}
    for pair in pairs:
        kind, _, number = pair.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = np.nan
        if not kind or kind in weights or not 0 < weight < np.inf:
            raise ValueError(
                f"kind_weights={list(pairs)}: {pair!r} must be KIND=WEIGHT, each kind once and its weight above 0, "
                "such as dbt=2 ffdm=1"
            )
        weights[kind] = weight
    shares = np.array(list(weights.values())) / sum(weights.values(), 0.0)
    if (shares * SAMPLES_PER_BLOCK < 1).any():
        raise ValueError(
            f"kind_weights={list(pairs)}: a kind has less than one sample in {SAMPLES_PER_BLOCK}; raise its weight, or "
            "take it out"
        )
    return weights


def _block(weights: Mapping[str, float]) -> np.ndarray:
    """Group of each sample of a block, sorted: shares rounded so that they add up (by cumulative sums)."""
    ends = np.cumsum(list(weights.values()))
    ends = np.rint(ends / ends[-1] * SAMPLES_PER_BLOCK).astype(int)
    return np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
