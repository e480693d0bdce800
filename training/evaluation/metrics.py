"""Scores with intervals: the patient is the unit that is resampled.

A score takes the weight of each image, so that a resample is a row of weights, how often each image was drawn, and a
thousand resamples are one pass over sorted arrays. Weights of one give scikit-learn's scores.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .reports import format_interval

SENSITIVITY, SPECIFICITY = "sensitivity_at_90_specificity", 0.9
MAX_WEIGHTS = 2_000_000  # of a block of resamples at once: 16 MB


class Interval(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return format_interval(self)

    def signed(self) -> str:
        """Return the interval as a difference is written."""
        return format_interval(self, signed=True)


# labels (n,) int 0..C-1, probabilities (n, C), weights (R, n) -> (R,), NaN where a resample leaves it undefined
Score = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def weighted_auc(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve; of more than two classes the macro average of one class against the rest."""
    return _one_against_rest(_binary_auc, labels, probabilities, weights)


def weighted_average_precision(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean precision over recall, without interpolation; of more than two classes the macro average."""
    return _one_against_rest(_binary_average_precision, labels, probabilities, weights)


def weighted_sensitivity(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Largest sensitivity of any threshold with a specificity of 0.9 at least; two classes."""
    hits, false_alarms = _along_thresholds(labels == 1, probabilities[:, 1], weights)
    allowed = (1 - SPECIFICITY) * false_alarms[:, -1:] * (1 + 1e-9)
    sensitivity = _ratio(np.where(false_alarms <= allowed, hits, 0).max(axis=1), hits[:, -1])
    return np.where(false_alarms[:, -1] > 0, sensitivity, np.nan)


def weighted_macro_f1(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur in labels or predictions, which are the most probable class."""
    f1, _ = _f1(labels, probabilities, weights)
    return _mean_of_defined(f1)


def weighted_support_f1(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes, each weighing as many images as it has."""
    f1, support = _f1(labels, probabilities, weights)
    return _ratio((np.nan_to_num(f1) * support).sum(axis=1), support.sum(axis=1))


def weighted_balanced_accuracy(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that occur."""
    confusion = _confusion(labels, probabilities, weights)
    return _mean_of_defined(_ratio(np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=2)))


def weighted_quadratic_kappa(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Cohen's kappa in which a confusion of classes i and j costs (i - j)^2 (Cohen 1968)."""
    confusion = _confusion(labels, probabilities, weights)  # (R, C, C)
    number = np.arange(confusion.shape[1])
    cost = (number[:, None] - number) ** 2
    by_chance = confusion.sum(axis=2)[:, :, None] * confusion.sum(axis=1)[:, None, :]
    expected = _ratio((by_chance * cost).sum(axis=(1, 2)), confusion.sum(axis=(1, 2)))
    return 1 - _ratio((confusion * cost).sum(axis=(1, 2)), expected)


METRICS: dict[str, Score] = {
    "auc": weighted_auc,
    "average_precision": weighted_average_precision,
    "macro_f1": weighted_macro_f1,
    "weighted_f1": weighted_support_f1,
    "balanced_accuracy": weighted_balanced_accuracy,
    "quadratic_kappa": weighted_quadratic_kappa,
    SENSITIVITY: weighted_sensitivity,
}


def score(labels: np.ndarray, probabilities: np.ndarray, metric: str) -> float:
    """One of METRICS of all images: labels (n,) int 0..C-1, probabilities (n, C). NaN where it is undefined."""
    return float(METRICS[metric](labels, probabilities, np.ones((1, len(labels))))[0])


def metric_names(num_classes: int, ordered: bool) -> list[str]:
    """The metrics that a task has: kappa where its classes are ordered, sensitivity where they are two."""
    has = {"quadratic_kappa": ordered, SENSITIVITY: num_classes == 2}
    return [name for name in METRICS if has.get(name, True)]


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve, NaN where a class is missing; see `weighted_auc`."""
    return score(labels, probabilities, "auc")


def bootstrap(
    labels: np.ndarray,
    probabilities: np.ndarray,
    patients: np.ndarray,
    metrics: Sequence[str],
    num_resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """Each metric with its 95 % interval over resamples of patients."""
    resampled = resample({"": probabilities}, labels, patients, metrics, num_resamples, seed)[""]
    return {name: interval(score(labels, probabilities, name), resampled[name]) for name in metrics}


def bootstrap_weights(patients: np.ndarray, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each image is in each resample, (R, n) float64 in blocks of R that fit in memory. A resample
    draws as many patients as there are, with replacement, each with all of their images."""
    rng = np.random.default_rng(seed)
    names, patient = np.unique(patients, return_inverse=True)
    block = max(1, MAX_WEIGHTS // len(patients))
    for start in range(0, num_resamples, block):
        drawn = rng.integers(len(names), size=(min(block, num_resamples - start), len(names)))
        yield np.stack([np.bincount(each, minlength=len(names)) for each in drawn])[:, patient].astype(float)


def joint_bootstrap_weights(patients: Mapping[int, np.ndarray], num_resamples: int) -> dict[int, np.ndarray]:
    """Return how often each image of several tests (by seed, patient names (n,) each) is in each resample, (R, n) each.

    A resample draws as many patients as some test has, with replacement, for all tests jointly.
    """
    names = np.unique(np.concatenate(list(patients.values())))
    rng = np.random.default_rng(0)  # the same draws for every task of so many patients
    times_drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=num_resamples)  # (R, P)
    return {test: times_drawn[:, np.searchsorted(names, of)].astype(float) for test, of in patients.items()}


def resample(
    probabilities: dict[str, np.ndarray],
    labels: np.ndarray,
    patients: np.ndarray,
    metrics: Sequence[str],
    num_resamples: int,
    seed: int,
) -> dict[str, dict[str, np.ndarray]]:
    """{model: {metric: (R,)}}: every model and metric on the same resamples."""
    parts: dict[str, dict[str, list]] = {name: {metric: [] for metric in metrics} for name in probabilities}
    for weights in bootstrap_weights(patients, num_resamples, seed):
        for name, each in probabilities.items():
            for metric in metrics:
                parts[name][metric].append(METRICS[metric](labels, each, weights))
    return {
        name: {metric: np.concatenate(values) for metric, values in of_model.items()}
        for name, of_model in parts.items()
    }


def interval(value: float, resampled: np.ndarray) -> Interval:
    """95 % percentile bootstrap interval; resamples in which the score is undefined do not count."""
    if np.isnan(resampled).all():
        return Interval(value, float("nan"), float("nan"))
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def score_resamples(
    score: Score, labels: np.ndarray, probabilities: np.ndarray, blocks: Iterable[np.ndarray]
) -> tuple[float, np.ndarray]:
    """Return a score of all images, and (R,) of the resamples whose weights come in blocks (of R, n)."""
    value = float(score(labels, probabilities, np.ones((1, len(labels))))[0])
    return value, np.concatenate([score(labels, probabilities, weights) for weights in blocks])


def bootstrap_auc(
    labels: np.ndarray, probabilities: dict[str, np.ndarray], patients: np.ndarray, num_resamples: int, seed: int
) -> tuple[dict[str, Interval], dict[tuple[str, str], Interval]]:
    """AUC of each model, and the difference a - b of each ordered pair on the same resamples."""
    values = {name: auc(labels, each) for name, each in probabilities.items()}
    resampled = resample(probabilities, labels, patients, ["auc"], num_resamples, seed)
    scores = {name: interval(values[name], resampled[name]["auc"]) for name in values}
    differences = {
        (a, b): interval(values[a] - values[b], resampled[a]["auc"] - resampled[b]["auc"])
        for a in values
        for b in values
        if a != b
    }
    return scores, differences


def _one_against_rest(binary: Score, labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean over classes; of two classes that of the second. NaN where a class is missing."""
    num_classes = probabilities.shape[1]
    wanted = [1] if num_classes == 2 else range(num_classes)
    return np.mean([binary(labels == number, probabilities[:, number], weights) for number in wanted], axis=0)


def _binary_auc(is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    hits, false_alarms = _along_thresholds(is_positive, scores, weights)
    area = (np.diff(false_alarms, axis=1) * (hits[:, 1:] + hits[:, :-1])).sum(axis=1) / 2
    return _ratio(area, hits[:, -1] * false_alarms[:, -1])


def _binary_average_precision(is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    hits, false_alarms = _along_thresholds(is_positive, scores, weights)
    precision = _ratio(hits, hits + false_alarms)
    return _ratio((np.diff(hits, axis=1) * np.nan_to_num(precision[:, 1:])).sum(axis=1), hits[:, -1])


def _along_thresholds(
    is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positives and of negatives at or above each threshold, (R, T + 1), from none to all; T distinct scores,
    falling."""
    order = np.argsort(-scores, kind="stable")
    last_of_equals = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    sides = []
    for side in (is_positive, ~is_positive):
        above = np.cumsum(weights[:, order] * side[order], axis=1)[:, last_of_equals]
        sides.append(np.concatenate((np.zeros((len(weights), 1)), above), axis=1))
    return sides[0], sides[1]


def _confusion(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R, C, C) float: weight of the images of a class (rows) that were given a class (columns)."""
    num_classes = probabilities.shape[1]
    cell = labels * num_classes + probabilities.argmax(axis=1)
    return (weights @ np.eye(num_classes**2)[cell]).reshape(-1, num_classes, num_classes)


def _f1(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F1 of each class, NaN where it occurs nowhere, and its support: (R, C) each."""
    confusion = _confusion(labels, probabilities, weights)
    support, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
    return _ratio(2 * np.diagonal(confusion, axis1=1, axis2=2), support + predicted), support


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """NaN where the denominator is 0."""
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below != 0)


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis, less NaN."""
    return _ratio(np.nansum(values, axis=-1), np.isfinite(values).sum(axis=-1))
