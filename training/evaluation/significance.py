"""Whether one model is better than another on the same patients."""

from typing import NamedTuple

import numpy as np

from .metrics import Interval, interval, resample, score


class PairedDifference(NamedTuple):
    """Score of a less score of b: its 95 % interval, and the two-sided p-value of no difference."""

    interval: Interval
    p_value: float


def paired_difference(
    labels: np.ndarray,
    probabilities_a: np.ndarray,
    probabilities_b: np.ndarray,
    patients: np.ndarray,
    metric: str,
    num_resamples: int = 1000,
    seed: int = 0,
) -> PairedDifference:
    """Bootstrap of patients, both models on the same resamples.

    labels (n,) int 0..C-1, probabilities (n, C) of the same images in the same order, patients (n,). The p-value is the
    level at which the percentile interval would just touch 0: twice the share of the resamples on the rarer side of 0,
    the observed one counted in (Davison and Hinkley 1997, sections 4.2 and 5.2), so never below 2 / (resamples + 1). No
    correction for many comparisons. Raises ValueError where the arrays do not match.
    """
    if not len(labels) == len(probabilities_a) == len(probabilities_b) == len(patients):
        raise ValueError(
            f"a comparison needs the same images: {len(labels)} labels, {len(probabilities_a)} and "
            f"{len(probabilities_b)} predictions, {len(patients)} patients"
        )
    models = {"a": probabilities_a, "b": probabilities_b}
    resampled = resample(models, labels, patients, [metric], num_resamples, seed)
    differences = resampled["a"][metric] - resampled["b"][metric]
    value = score(labels, probabilities_a, metric) - score(labels, probabilities_b, metric)
    defined = differences[~np.isnan(differences)]
    rarer = min((defined <= 0).sum(), (defined >= 0).sum())
    p_value = min(1.0, 2 * (1 + rarer) / (1 + len(defined))) if len(defined) else float("nan")
    return PairedDifference(interval(value, differences), float(p_value))
