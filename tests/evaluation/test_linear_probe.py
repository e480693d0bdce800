"""The linear probe against scikit-learn's logistic regression, at the same penalty and on its own choice."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from training.evaluation.finetuning.heads import (
    PENALTIES,
    LinearHead,
    _minimize,
    balanced_weights,
    fit_linear_probe,
)


def correlated_features(num_rows: int, num_classes: int, seed: int, width: int = 30):
    """Features of very unequal spread along hidden axes, as an encoder's are, and labels that depend on some."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(np.random.default_rng(99).normal(size=(width, width)))[0]
    hidden = rng.normal(size=(num_rows, width)) * np.arange(1, width + 1) ** -1.5
    logits = 3 * hidden[:, :num_classes] / hidden[:, :num_classes].std(axis=0)
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return (10 * hidden @ axes + 5).astype(np.float32), labels


@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_minimum_is_that_of_scikit_learn(num_classes):
    features, labels = correlated_features(600, num_classes, seed=0)
    scaler = StandardScaler().fit(features)
    standardized = scaler.transform(features).astype(np.float32)
    weights = balanced_weights(labels, num_classes)
    curvature, axes = np.linalg.eigh(standardized.T @ standardized / len(labels))
    for penalty in (1.0, 0.01, 1e-4):
        theirs = LogisticRegression(C=1 / (penalty * len(labels)), class_weight="balanced", tol=1e-8, max_iter=5000)
        theirs.fit(standardized, labels)
        weight, bias = _minimize(
            standardized @ axes.astype(np.float32), np.eye(num_classes, dtype=np.float32)[labels],
            weights[labels].astype(np.float32)[:, None], penalty, curvature,
            np.zeros((features.shape[1], num_classes)), np.zeros(num_classes),
        )  # fmt: skip
        ours = LinearHead((axes @ weight).T, bias).probabilities(standardized)
        expected = theirs.predict_proba(standardized)
        if num_classes == 2:  # scikit-learn has one weight vector then: half the difference of ours costs half of its
            theirs.set_params(C=2 / (penalty * len(labels))).fit(standardized, labels)
            expected = theirs.predict_proba(standardized)
        np.testing.assert_allclose(ours, expected, atol=5e-3)


def test_the_penalty_is_that_of_the_least_validation_loss_and_the_head_takes_features_as_they_come():
    features, labels = correlated_features(400, 3, seed=1)
    held_out, held_out_labels = correlated_features(200, 3, seed=2)
    probe = fit_linear_probe(features, labels, held_out, held_out_labels, np.ones(3))
    probabilities = probe.head.probabilities(held_out)
    loss = -np.log(probabilities[np.arange(200), held_out_labels]).mean()
    assert loss == pytest.approx(min(probe.validation_losses.values()), rel=1e-3)
    assert probe.validation_losses[probe.penalty] == min(probe.validation_losses.values())
    assert set(probe.validation_losses) <= set(PENALTIES.tolist())
    assert (probabilities.argmax(axis=1) == held_out_labels).mean() > 0.8


def test_noise_gets_the_strongest_penalty_and_constant_features_none_of_the_weight():
    rng = np.random.default_rng(0)
    features = np.hstack((rng.normal(size=(200, 20)), np.full((200, 1), 7.0))).astype(np.float32)
    labels = rng.integers(2, size=200)
    probe = fit_linear_probe(features, labels, features[:100][::-1].copy(), labels[100:], np.ones(2))
    assert probe.penalty == PENALTIES[0] and len(probe.validation_losses) == 3  # then the search ends
    assert np.abs(probe.head.weight[:, -1]).max() < 1e-9


def test_balanced_weights():
    labels = np.array([0] * 8 + [1] * 2)
    weights = balanced_weights(labels, 3)
    assert weights[0] * 8 == pytest.approx(weights[1] * 2)
    assert weights[labels].mean() == pytest.approx(1)


def test_the_layer_of_a_head_is_the_head():
    head = LinearHead(np.random.default_rng(0).normal(size=(3, 5)), np.arange(3.0))
    again = LinearHead.of(head.layer())
    np.testing.assert_allclose(again.weight, head.weight, rtol=1e-6)
    np.testing.assert_allclose(again.bias, head.bias)
