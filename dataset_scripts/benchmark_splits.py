"""Splits by patient: official ones stay, what is missing is held out of train, with every class in its share.

Who is held out is a function of seed, patients and their labels: patients of a class are ordered by a hash of seed and
id, so that neither the order of rows nor the version of a library matters, and a patient more moves few others.
"""

import hashlib

import pandas

from .benchmark_index import SPLITS


def complete_splits(
    patients: pandas.Series,
    labels: pandas.Series,
    official: pandas.Series,
    *,
    seed: int,
    validation_fraction: float,
    test_fraction: float,
) -> pandas.Series:
    """The split of each row, one of SPLITS.

    official: split of a row, all missing where the data set has none. test_fraction is of all patients, or of those in
    train where only test is missing; validation_fraction is of the patients that then are in train.

    Raises ValueError for a fraction outside 0..1, for rows with and without an official split, and where an official
    split has a patient twice.
    """
    fractions = {"test": test_fraction, "validation": validation_fraction}
    for name, fraction in fractions.items():
        if not 0 < fraction < 1:
            raise ValueError(f"{name}_fraction={fraction}: must be between 0 and 1")
    if official.notna().any() and official.isna().any():
        raise ValueError(f"split: {int(official.isna().sum())} rows without one beside rows with one; fill all or none")
    split = official.astype("string").fillna("train")
    for name, fraction in fractions.items():
        if not (split == name).any():
            rest = split == "train"
            held_out = _held_out(patients[rest], labels[rest], fraction, seed)
            split = split.mask(rest & patients.isin(held_out), name)
    of_patient = split.groupby(patients).nunique()
    if (of_patient > 1).any():
        shared = of_patient.index[of_patient > 1]
        raise ValueError(
            f"split: {len(shared)} patients are in more than one of {', '.join(SPLITS)}, first {shared[0]}; "
            "a patient belongs in one"
        )
    return split


def _held_out(patients: pandas.Series, labels: pandas.Series, fraction: float, seed: int) -> set[str]:
    """The share of each class' patients, at least one but never the last; a patient counts for its rarest class."""
    by_label = patients.groupby(labels).nunique()
    rarity = by_label.sort_index().sort_values(kind="stable").index
    held_out: set[str] = set()
    free = set(patients)
    for label in rarity:
        of_class = sorted(free & set(patients[labels == label]), key=lambda patient: _rank(seed, patient))
        free -= set(of_class)
        held_out.update(of_class[: min(max(1, round(fraction * len(of_class))), len(of_class) - 1)])
    return held_out


def _rank(seed: int, patient: str) -> bytes:
    return hashlib.sha256(f"{seed} {patient}".encode()).digest()
