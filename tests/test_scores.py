"""Scores against scikit-learn on resamples that are really drawn; tests of significance against DeLong's formula."""

import time

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from training.evaluation.evaluate_metrics import MammographyScores
from training.evaluation.metrics import METRICS, WEIGHTED, bootstrap, bootstrap_weights, metric_names, score
from training.evaluation.significance import paired_difference


def sensitivity_by_hand(labels, probabilities):
    """Every threshold is tried."""
    scores, best = probabilities[:, 1], 0.0
    for threshold in [*scores, np.inf]:
        called = scores >= threshold
        if (~called[labels == 0]).mean() >= 0.9 - 1e-12:
            best = max(best, called[labels == 1].mean())
    return best


def one_against_rest(binary):
    def mean(labels, probabilities):
        if probabilities.shape[1] == 2:
            return binary(labels == 1, probabilities[:, 1])
        return np.mean([binary(labels == c, probabilities[:, c]) for c in range(probabilities.shape[1])])

    return mean


def of_classes(function, **options):
    return lambda labels, probabilities: function(labels, probabilities.argmax(axis=1), **options)


ORACLES = {
    "auc": one_against_rest(sklearn_metrics.roc_auc_score),
    "average_precision": one_against_rest(sklearn_metrics.average_precision_score),
    "macro_f1": of_classes(sklearn_metrics.f1_score, average="macro"),
    "weighted_f1": of_classes(sklearn_metrics.f1_score, average="weighted"),
    "balanced_accuracy": of_classes(sklearn_metrics.balanced_accuracy_score),
    "quadratic_kappa": of_classes(sklearn_metrics.cohen_kappa_score, weights="quadratic"),
    "sensitivity_at_90_specificity": sensitivity_by_hand,
}


def predictions(num_images: int, num_classes: int, seed: int = 0):
    """Labels, somewhat informed probabilities with many ties, and patients of one to six images."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=num_images)
    probabilities = np.round(rng.dirichlet(np.ones(num_classes), num_images) + 0.4 * np.eye(num_classes)[labels], 1)
    patients = np.sort(rng.integers(num_images // 3, size=num_images)).astype(str)
    return labels, probabilities / probabilities.sum(axis=1, keepdims=True), patients


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("metric", METRICS)
def test_a_weight_is_an_image_that_is_drawn_so_often(metric, num_classes):
    """Every score, plain and of each resample, is scikit-learn's on the rows themselves, repeated."""
    assert set(ORACLES) == set(METRICS)
    if metric not in metric_names(num_classes, ordered=True):
        return
    labels, probabilities, patients = predictions(90, num_classes)
    assert score(labels, probabilities, metric) == pytest.approx(ORACLES[metric](labels, probabilities))
    weights = np.concatenate(list(bootstrap_weights(patients, 30, seed=1)))
    for counts, found in zip(weights, WEIGHTED[metric](labels, probabilities, weights), strict=True):
        rows = np.repeat(np.arange(len(labels)), counts.astype(int))
        assert found == pytest.approx(ORACLES[metric](labels[rows], probabilities[rows]))


def test_scores_are_undefined_where_a_class_is_missing_and_such_resamples_do_not_count():
    labels, probabilities, _ = predictions(30, 2)
    for metric in ("auc", "average_precision", "sensitivity_at_90_specificity"):
        assert np.isnan(score(np.zeros(30, int), probabilities, metric))
    labels = np.array([1] + [0] * 29)  # the one positive patient is in 63 % of the resamples
    found = bootstrap(labels, probabilities, np.arange(30), ["auc", "macro_f1"], 200, seed=0)["auc"]
    assert 0 <= found.low <= found.value <= found.high <= 1
    nothing = bootstrap(np.zeros(30, int), probabilities, np.arange(30), ["auc"], 20, seed=0)["auc"]
    assert np.isnan(nothing).all()


def test_the_metrics_of_a_task():
    assert "quadratic_kappa" not in metric_names(3, ordered=False)
    assert "sensitivity_at_90_specificity" not in metric_names(3, ordered=True)
    assert metric_names(2, ordered=True) == list(METRICS)


def test_a_thousand_resamples_of_four_thousand_images_take_seconds():
    labels, probabilities, patients = predictions(4000, 4)
    started = time.process_time()
    found = bootstrap(labels, probabilities, patients, metric_names(4, True), 1000, seed=0)
    assert time.process_time() - started < 20
    assert all(each.low < each.value < each.high for each in found.values())


def delong(labels, scores_a, scores_b):
    """Difference of two correlated AUCs and its standard error (DeLong et al. 1988), from their placement values."""
    placements = []
    for scores in (scores_a, scores_b):
        pairs = scores[labels == 1][:, None] - scores[labels == 0]
        wins = (pairs > 0) + 0.5 * (pairs == 0)
        placements.append((wins.mean(axis=1), wins.mean(axis=0)))
    of_positives, of_negatives = (placements[0][side] - placements[1][side] for side in (0, 1))
    variance = of_positives.var(ddof=1) / len(of_positives) + of_negatives.var(ddof=1) / len(of_negatives)
    return of_positives.mean(), np.sqrt(variance)


def two_models(seed, gain, num_patients=300):
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=num_patients)
    shared = rng.normal(size=num_patients) + labels
    a, b = (shared + rng.normal(size=num_patients) + extra * labels for extra in (gain, 0))
    return labels, a, b


def as_probabilities(scores):
    positive = 1 / (1 + np.exp(-scores))
    return np.stack((1 - positive, positive), axis=1)


@pytest.mark.parametrize("gain", [0.0, 0.5])
def test_the_paired_bootstrap_agrees_with_delong(gain):
    labels, a, b = two_models(3, gain)
    found = paired_difference(labels, as_probabilities(a), as_probabilities(b), np.arange(300), "auc", 2000, seed=0)
    difference, error = delong(labels, a, b)
    assert found.interval.value == pytest.approx(difference)
    assert found.interval.high - found.interval.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    p_value = 2 * stats.norm.sf(abs(difference) / error)
    assert found.p_value == pytest.approx(p_value, abs=0.03)
    assert (found.p_value < 0.05) == (not found.interval.low <= 0 <= found.interval.high)


def test_no_difference_is_found_as_seldom_as_the_level_says():
    found = 0
    for seed in range(60):
        labels, a, b = two_models(seed, 0.0, num_patients=80)
        result = paired_difference(labels, as_probabilities(a), as_probabilities(b), np.arange(80), "auc", 200, seed)
        found += result.p_value < 0.1
    assert 1 <= found <= 14  # of 60 at the level 0.1: 6 expected, within four standard deviations


def test_images_of_a_patient_are_no_news():
    """Each image four times over, under one patient, changes neither interval nor p-value."""
    labels, a, b = two_models(4, 0.3)
    one = paired_difference(labels, as_probabilities(a), as_probabilities(b), np.arange(300), "auc", 300, 0)
    four = (np.repeat(each, 4, axis=0) for each in (labels, as_probabilities(a), as_probabilities(b), np.arange(300)))
    assert np.allclose(one.interval, paired_difference(*four, "auc", 300, 0).interval)
    same = paired_difference(labels, as_probabilities(a), as_probabilities(a), np.arange(300), "auc", 300, 0)
    assert same.p_value == 1 and same.interval == (0, 0, 0)
    with pytest.raises(ValueError, match="needs the same images"):
        paired_difference(labels, as_probabilities(a)[1:], as_probabilities(b), np.arange(300), "auc")


def test_scores_as_a_metric_of_evaluate():
    labels = predictions(50, 3)[0]
    probabilities = np.random.default_rng(1).dirichlet((1, 1, 1), 50)  # no ties, which logarithms could break
    metric = MammographyScores(3)
    found = metric.compute(predictions=probabilities, references=labels)
    assert found == pytest.approx({name: ORACLES[name](labels, probabilities) for name in metric_names(3, True)})
    for start in (0, 25):
        metric.add_batch(predictions=probabilities[start : start + 25], references=labels[start : start + 25])
    assert metric.compute() == pytest.approx(found)
    logits = np.log(probabilities) + 3
    assert MammographyScores(3).of_trainer((logits, labels)) == pytest.approx(found)
    assert MammographyScores(3, ordered=False, metrics=["auc"]).of_trainer((logits, labels)).keys() == {"auc"}
    with pytest.raises(ValueError, match="must be one of auc"):
        MammographyScores(3, metrics=["accuracy"])
    with pytest.raises(ValueError, match="not 0 to 2"):
        metric.compute(predictions=probabilities, references=labels + 1)
