"""Probabilities that can be read as frequencies: fitted on the validation part, measured on held-out patients.

A head that learned with classes of equal weight speaks of a world in which they are equally common. Bias-corrected
temperature scaling, softmax(log p / T + b), brings it back (Alexandari et al., ICML 2020, arXiv 1901.06852; with b = 0
the temperature of Guo et al., ICML 2017). Our choice: T and b have a prior, for validation parts of few images, around
what undoes the equal weights (Saerens et al. 2002) or around the calibration of images; bins of equal counts.
"""

from typing import Any, NamedTuple, Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from .metrics import Score, bootstrap_weights, interval, score_resamples

MAX_BINS, SCORES_PER_BIN = 10, 15
LEAST = 1e-12  # probability under a logarithm
PRIOR_STD = 0.5  # of log T and of each of b
NUM_SIMULATIONS = 200


class Calibration(NamedTuple):
    temperature: float
    bias: tuple[float, ...]  # (C,), their mean is 0

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """Return (n, C) of probabilities (n, C)."""
        logits = np.log(np.maximum(probabilities, LEAST))
        return softmax(logits / self.temperature + np.array(self.bias), axis=1)

    @classmethod
    def of(cls, noted: dict[str, Any]) -> Self:
        """Return what `_asdict` and JSON made of one."""
        return cls(noted["temperature"], tuple(noted["bias"]))


def undo_weights(labels: np.ndarray, num_classes: int) -> Calibration:
    """Return what brings a head that learned from labels (n,) with classes of equal weight back to their shares."""
    share = np.log(np.bincount(labels, minlength=num_classes) + 0.5)
    return Calibration(1.0, tuple((share - share.mean()).tolist()))


def fit_calibration(labels: np.ndarray, probabilities: np.ndarray, prior: Calibration) -> Calibration:
    """Return the most probable calibration by labels (n,) int 0..C-1 and probabilities (n, C) that nothing was learned
    from, and by what it should be about."""
    center = np.array([np.log(prior.temperature), *prior.bias])
    logits = np.log(np.maximum(probabilities, LEAST))
    wanted = np.eye(logits.shape[1])[labels]

    def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, bias = np.exp(-parameters[0]), parameters[1:]
        log_p = log_softmax(slope * logits + bias, axis=1)
        apart = np.exp(log_p) - wanted
        moved = (parameters - center) / PRIOR_STD
        loss = -(wanted * log_p).sum() + (moved**2).sum() / 2
        gradient = np.array([-slope * (apart * logits).sum(), *apart.sum(axis=0)]) + moved / PRIOR_STD
        return float(loss), gradient

    found = minimize(loss_and_gradient, center, jac=True, method="L-BFGS-B").x
    return Calibration(float(np.exp(found[0])), tuple((found[1:] - found[1:].mean()).tolist()))


def confidence_and_hit(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what a calibrated probability says, (n,), and whether it was so, (n,) float: of two classes the second, of
    more the most probable one."""
    if probabilities.shape[1] == 2:
        return probabilities[:, 1], (labels == 1).astype(float)
    return probabilities.max(axis=1), (probabilities.argmax(axis=1) == labels).astype(float)


def bins_of(confidence: np.ndarray) -> np.ndarray:
    """Return the bin of each confidence (n,), int from 0: of equal counts, equal values in one, and no
    more than MAX_BINS of SCORES_PER_BIN."""
    num_bins = min(MAX_BINS, max(2, len(confidence) // SCORES_PER_BIN))
    edges = np.unique(np.quantile(confidence, np.linspace(0, 1, num_bins + 1)[1:-1]))
    return np.searchsorted(edges, confidence, side="right")


def weighted_calibration_error(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error: the mean distance of mean confidence and frequency over the bins. A `Score`."""
    confidence, hit = confidence_and_hit(labels, probabilities)
    in_bin = np.eye(MAX_BINS)[bins_of(confidence)]
    return np.abs((weights * (confidence - hit)) @ in_bin).sum(axis=1) / weights.sum(axis=1)


def weighted_brier(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Brier score, the mean squared error of the probabilities, of two classes of the second, of more their sum. A
    `Score`."""
    wanted = np.eye(probabilities.shape[1])[labels]
    squares = ((probabilities - wanted) ** 2).sum(axis=1) / (2 if probabilities.shape[1] == 2 else 1)
    return weights @ squares / weights.sum(axis=1)


MEASURES: dict[str, Score] = {"ece": weighted_calibration_error, "brier": weighted_brier}


def measure(
    labels: np.ndarray, probabilities: np.ndarray, patients: np.ndarray, num_resamples: int, seed: int
) -> dict[str, Any]:
    """Return each of MEASURES as [value, low, high], the intervals over patients; `ece_if_perfect`, what probabilities
    that are right show at this size, the mean and the 95th percentile; and the `bins` of a reliability plot: mean
    confidence, frequency, count."""
    blocks = list(bootstrap_weights(patients, num_resamples, seed))
    found: dict[str, Any] = {}
    for name, score in MEASURES.items():
        found[name] = list(interval(*score_resamples(score, labels, probabilities, blocks)))
    rng = np.random.default_rng(seed)
    cumulative = probabilities.cumsum(axis=1)[:, :-1]
    draws = [(rng.random((len(labels), 1)) > cumulative).sum(axis=1) for _ in range(NUM_SIMULATIONS)]
    ones, error = np.ones((1, len(labels))), weighted_calibration_error
    errors = [error(each, probabilities, ones)[0] for each in draws]
    found["ece_if_perfect"] = [float(np.mean(errors)), float(np.quantile(errors, 0.95))]
    confidence, hit = confidence_and_hit(labels, probabilities)
    number = bins_of(confidence)
    found["bins"] = [
        [float(confidence[number == each].mean()), float(hit[number == each].mean()), int((number == each).sum())]
        for each in np.unique(number)
    ]
    return found
