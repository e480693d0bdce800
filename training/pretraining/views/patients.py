"""Which images stand together in a batch: several views of one patient, patients of one source."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from training.settings import PATIENT_STREAM, SOURCE_STREAM, generator

Column = Sequence[str | None] | np.ndarray  # by volume, by its place in the corpus; None where unknown
STEPS_PER_BLOCK = 256  # in which each source has its share of the steps


class Place(NamedTuple):
    """What a sample shows."""

    volume: int  # by its place in the corpus
    patient: int  # number of the patient, equal for all views of one
    breast: int  # number of the breast, equal for all views of one
    repeat: int  # how often this patient's volume came earlier in the group: another slice, another transform


def number_groups(is_alone: np.ndarray, *columns: Column) -> np.ndarray:
    """Number the volumes (n,) by what they are in all columns, in order of first appearance; each of `is_alone` is a
    group of its own."""
    codes = np.zeros(len(is_alone), int)
    for column in columns:
        values, distinct = pd.factorize(np.asarray(column), use_na_sentinel=False)
        codes = codes * len(distinct) + values
    codes[is_alone] = -1 - np.flatnonzero(is_alone)
    return pd.factorize(codes)[0]


def is_unknown(column: Column) -> np.ndarray:
    return ~np.asarray(column, object).astype(bool)  # None, or empty


def number_breasts(patients: Column, lateralities: Column, sources: Column) -> np.ndarray:
    """Return a number for the breast of each volume: equal for all images of one breast of one patient of a source; of
    an unknown patient or side each volume is a breast of its own."""
    return number_groups(is_unknown(patients) | is_unknown(lateralities), sources, patients, lateralities)


def run_starts(values: np.ndarray) -> np.ndarray:
    """Return where each run of equal values begins, and where the last one ends."""
    return np.r_[np.flatnonzero(np.r_[True, values[1:] != values[:-1]]), len(values)]


class PatientOrder:
    """The volume of each sample where patients are grouped, a pure function of (seed, index).

    Sample `index` is view `index % views_per_patient` of patient slot `index // views_per_patient`; half of a patient's
    views are of one breast where there are two, and within a breast no volume comes twice before all came once. Images
    of unknown patients stand alone, those of unknown side are a breast of their own. With `single_source` a step's
    patients are of one source, sources in proportion to their patients, so that the source is not what agrees; within
    a source (or all of them) an epoch is a permutation of its patients.

    patients, lateralities, views, sources: of each volume, by its place in the corpus; None where unknown.
    patients_per_step: over all processes. Raises ValueError for an odd number of views.
    """

    def __init__(
        self,
        seed: int,
        patients: Column,
        lateralities: Column,
        views: Column,
        sources: Column,
        views_per_patient: int,
        patients_per_step: int,
        single_source: bool = True,
    ):
        if views_per_patient % 2:
            raise ValueError(f"views_per_patient={views_per_patient}: must be even, half of them of each breast")
        self.seed, self.views_per_patient, self.patients_per_step = seed, views_per_patient, patients_per_step
        numbers = number_groups(is_unknown(patients), sources, patients)  # of the patient of each volume
        breasts = number_groups(is_unknown(lateralities), numbers, lateralities)
        self.volumes = np.lexsort((breasts, numbers))  # by patient, then by breast
        numbers, breasts = numbers[self.volumes], breasts[self.volumes]
        self.first_volume = run_starts(breasts)  # of each breast, among `volumes`
        self.first_breast = run_starts(numbers[self.first_volume[:-1]])  # of each patient
        self.num_patients = len(self.first_breast) - 1
        self.views = np.where(is_unknown(views), "", np.asarray(views, object))
        source = np.asarray(sources, object)[self.volumes[self.first_volume[self.first_breast[:-1]]]]
        of_patient = number_groups(np.zeros(self.num_patients, bool), *([source] if single_source else []))
        self.groups = [np.flatnonzero(of_patient == group) for group in range(of_patient.max() + 1)]
        shares = np.array([len(group) for group in self.groups]) * STEPS_PER_BLOCK / self.num_patients
        counts = np.floor(shares).astype(int)
        counts[np.argsort(counts - shares, kind="stable")[: STEPS_PER_BLOCK - counts.sum()]] += 1  # largest remainders
        self.block = np.repeat(np.arange(len(self.groups)), counts)  # source of each step, sorted
        self.per_block = counts
        self._mix: tuple[int, np.ndarray, np.ndarray] = (-1, self.block, self.block)  # of the last block asked for
        self._epochs = [(-1, group) for group in self.groups]

    def __getitem__(self, index: int) -> Place:
        slot, view = divmod(index, self.views_per_patient)
        patient = self.patient_of(slot)
        rng = generator(self.seed, PATIENT_STREAM, slot)
        first, end = map(int, self.first_breast[patient : patient + 2])
        breasts = [first + int(each) for each in rng.permutation(end - first)[:2]]
        sides = [self.volumes[self.first_volume[each] : self.first_volume[each + 1]] for each in breasts]
        drawn: list[tuple[int, int]] = []  # every view of the slot, to know what this one repeats
        for number in range(self.views_per_patient):
            side = number * 2 // self.views_per_patient % len(sides)
            done = len([each for each, _ in drawn if each == side])
            if done % len(sides[side]) == 0:
                order = rng.permutation(len(sides[side]))
            drawn.append((side, int(sides[side][order[done % len(order)]])))
        drawn.sort(key=lambda each: (each[0], self.views[each[1]]))  # the same view of both breasts at the same place
        side, volume = drawn[view]
        repeat = len([each for _, each in drawn[:view] if each == volume])
        return Place(volume, patient, breasts[side], repeat)

    def patient_of(self, slot: int) -> int:
        """The patient of a slot."""
        step, place = divmod(slot, self.patients_per_step)
        block, step_in_block = divmod(step, STEPS_PER_BLOCK)
        if self._mix[0] != block:
            sources = generator(self.seed, SOURCE_STREAM, block).permutation(self.block)
            earlier = np.empty_like(sources)  # steps of the same source before each, within the block
            for source in range(len(self.groups)):
                earlier[sources == source] = np.arange(self.per_block[source])
            self._mix = (block, sources, earlier)
        source = int(self._mix[1][step_in_block])
        number = block * int(self.per_block[source]) + int(self._mix[2][step_in_block])  # of the source's steps
        epoch, position = divmod(number * self.patients_per_step + place, len(self.groups[source]))
        if self._epochs[source][0] != epoch:
            rng = generator(self.seed, PATIENT_STREAM, ((source + 1) << 40) + epoch)
            self._epochs[source] = (epoch, rng.permutation(self.groups[source]))
        return int(self._epochs[source][1][position])
