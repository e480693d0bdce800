"""Scores against scikit-learn on resamples that are really drawn."""

import time

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from training.evaluation.finetuning.tuning import MammographyScores
from training.evaluation.metrics import METRICS, bootstrap, bootstrap_weights, metric_names, score


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
    for counts, found in zip(weights, METRICS[metric](labels, probabilities, weights), strict=True):
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
    with pytest.raises(ValueError, match="training diverged"):
        metric.of_trainer((np.full_like(logits, np.nan), labels))
    with pytest.raises(ValueError, match="not 0 to 2"):
        metric.compute(predictions=probabilities, references=labels + 1)
