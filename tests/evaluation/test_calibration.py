"""Calibration: parameters that are known, measures against scikit-learn and loops."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss

from training.evaluation.calibration import (
    MAX_BINS,
    Calibration,
    fit_calibration,
    measure,
    undo_weights,
    weighted_brier,
    weighted_calibration_error,
)

RNG = np.random.default_rng(0)


def drawn(num: int, num_classes: int, temperature: float, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities that are wrong by a temperature and biases."""
    logits = RNG.normal(size=(num, num_classes)) * 2
    right = softmax(logits / temperature + bias, axis=1)
    labels = (RNG.random((num, 1)) > right.cumsum(axis=1)[:, :-1]).sum(axis=1)
    return labels, softmax(logits, axis=1)


@pytest.mark.parametrize("bias", [(1.0, -1.0), (0.5, -1.5, 1.0)])
def test_the_temperature_and_biases_that_made_the_labels_are_found(bias):
    labels, probabilities = drawn(40_000, len(bias), 2.5, np.array(bias))
    found = fit_calibration(labels, probabilities, Calibration(1.0, (0.0,) * len(bias)))
    assert found.temperature == pytest.approx(2.5, rel=0.05)
    np.testing.assert_allclose(found.bias, bias, atol=0.06)
    assert Calibration.of({"temperature": found.temperature, "bias": list(found.bias)}) == found
    assert log_loss(labels, found.apply(probabilities)) < log_loss(labels, probabilities) - 0.05


def test_few_images_that_are_all_right_do_not_make_certainty():
    probabilities = np.array([[0.7, 0.3], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    found = fit_calibration(np.array([0, 0, 1, 1]), probabilities, Calibration(1.0, (0.0, 0.0))).apply(probabilities)
    assert found.max() < 0.98 and (np.argsort(found[:, 1]) == np.argsort(probabilities[:, 1])).all()


def test_equal_weights_are_undone_and_few_images_do_not_move_it():
    """Of a rare class that a head took for common: Bayes' rule with the other prior."""
    labels = np.array([0] * 950 + [1] * 50)
    prior = undo_weights(labels, 2)
    p = np.array([[0.5, 0.5], [0.2, 0.8]])
    expected = p * [950, 50] / (p * [950, 50]).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(prior.apply(p), expected, rtol=0.02)
    np.testing.assert_allclose(fit_calibration(np.array([0, 0]), p, prior).apply(p), expected, atol=0.05)


def test_measures_are_those_of_loops_and_of_scikit_learn():
    labels, probabilities = drawn(501, 2, 1.5, np.zeros(2))
    weights = RNG.integers(0, 3, size=(2, 501)).astype(float)
    errors, briers = (
        weighted_calibration_error(labels, probabilities, weights),
        weighted_brier(labels, probabilities, weights),
    )
    edges = np.quantile(probabilities[:, 1], np.linspace(0, 1, MAX_BINS + 1)[1:-1])
    number = np.searchsorted(edges, probabilities[:, 1], side="right")
    for error, brier, weight in zip(errors, briers, weights, strict=True):
        apart = 0.0
        for each in range(MAX_BINS):
            own = weight * (number == each)
            apart += abs((own * probabilities[:, 1]).sum() - (own * labels).sum()) / weight.sum()
        assert error == pytest.approx(apart)
        assert brier == pytest.approx(brier_score_loss(labels, probabilities[:, 1], sample_weight=weight))


@pytest.mark.parametrize("num_classes", [2, 4])
def test_right_probabilities_measure_as_right_ones_would(num_classes):
    labels, right = drawn(600, num_classes, 1.0, np.zeros(num_classes))
    wrong = softmax(3 * np.log(right), axis=1)
    patients = np.repeat(np.arange(200), 3)
    of_right, of_wrong = (measure(labels, each, patients, 100, 0) for each in (right, wrong))
    mean, most = of_right["ece_if_perfect"]
    assert mean < most < of_wrong["ece"][0] and of_right["ece"][0] < most
    assert of_right["brier"][1] < of_right["brier"][0] < of_right["brier"][2] < of_wrong["brier"][2]
    assert sum(count for _, _, count in of_right["bins"]) == 600
