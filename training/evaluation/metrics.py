"""Scores with intervals: the patient is the unit that is resampled."""

from typing import NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score


class Interval(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve: labels (n,) int 0..C-1, probabilities (n, C). More than two classes: macro average of
    one class against the rest. NaN where only one class is present or, with more classes, one is missing."""
    num_classes = probabilities.shape[1]
    if len(np.unique(labels)) < num_classes:
        return float("nan")
    if num_classes == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    each = [roc_auc_score(labels == number, probabilities[:, number]) for number in range(num_classes)]
    return float(np.mean(each))


def bootstrap_resamples(patients: np.ndarray, num_resamples: int, seed: int) -> list[np.ndarray]:
    """Rows of each bootstrap resample, drawn patient by patient with replacement."""
    rng = np.random.default_rng(seed)
    names, inverse = np.unique(patients, return_inverse=True)
    rows = [np.flatnonzero(inverse == number) for number in range(len(names))]
    return [
        np.concatenate([rows[number] for number in rng.integers(len(names), size=len(names))])
        for _ in range(num_resamples)
    ]


def interval(value: float, resampled: np.ndarray) -> Interval:
    """95 % percentile bootstrap interval; resamples in which the score is undefined do not count."""
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def bootstrap_auc(
    labels: np.ndarray, probabilities: dict[str, np.ndarray], patients: np.ndarray, num_resamples: int, seed: int
) -> tuple[dict[str, Interval], dict[tuple[str, str], Interval]]:
    """AUC of each model, and the difference a - b of each ordered pair on the same resamples."""
    resamples = bootstrap_resamples(patients, num_resamples, seed)
    values = {name: auc(labels, each) for name, each in probabilities.items()}
    resampled = {
        name: np.array([auc(labels[rows], each[rows]) for rows in resamples]) for name, each in probabilities.items()
    }
    scores = {name: interval(values[name], resampled[name]) for name in values}
    differences = {
        (a, b): interval(values[a] - values[b], resampled[a] - resampled[b]) for a in values for b in values if a != b
    }
    return scores, differences


METRICS = {"auc": auc}
