"""From images to breasts and patients, against loops; attention pooling against its equation."""

import numpy as np
import pandas as pd
import torch

from training.evaluation.finetuning.aggregation import group_labels, groups_of, max_probabilities, mean_probabilities
from training.evaluation.finetuning.heads import (
    AttentionPooling,
    Bags,
    attention_probabilities,
    fit_attention,
)
from training.evaluation.metrics import auc

RNG = np.random.default_rng(0)
GROUP = np.array([0, 1, 1, 0, 2, 2, 2])
PROBABILITIES = RNG.dirichlet((1, 1, 1), 7)


def test_the_mean_is_over_the_images_of_a_group():
    found = mean_probabilities(PROBABILITIES, GROUP, 3)
    for number in range(3):
        np.testing.assert_allclose(found[number], PROBABILITIES[number == GROUP].mean(axis=0))


def test_the_highest_class_of_images_that_agree_as_far_as_they_can():
    """One draw decides for all images of a group: each takes its quantile, and the highest class is counted."""
    found = max_probabilities(PROBABILITIES, GROUP, 3, ordered=True)
    draws = (np.arange(200_000) + 0.5) / 200_000
    for number in range(3):
        quantiles = [np.searchsorted(np.cumsum(row), draws) for row in PROBABILITIES[number == GROUP]]
        highest = np.max(quantiles, axis=0)
        np.testing.assert_allclose(found[number], np.bincount(highest, minlength=3) / len(draws), atol=1e-4)
    two = PROBABILITIES[:, :2] / PROBABILITIES[:, :2].sum(axis=1, keepdims=True)
    positive = max_probabilities(two, GROUP, 3, ordered=True)[:, 1]
    np.testing.assert_allclose(positive, [two[number == GROUP, 1].max() for number in range(3)])


def test_of_unordered_classes_each_has_its_largest_probability():
    found = max_probabilities(PROBABILITIES, GROUP, 3, ordered=False)
    for number in range(3):
        largest = PROBABILITIES[number == GROUP].max(axis=0)
        np.testing.assert_allclose(found[number], largest / largest.sum())


def test_labels_of_groups():
    labels = np.array([0, 2, 1, 1, 2, 2, 0])
    assert group_labels(labels, GROUP, 3, ordered=True).tolist() == [1, 2, 2]
    assert group_labels(labels, GROUP, 3, ordered=False).tolist() == [0, 1, 2]  # the first of equals


def test_images_without_a_breast_belong_to_none():
    table = pd.DataFrame({"breast_id": ["b", None, "a", "b"], "patient_id": ["P", "P", "Q", "P"]}, dtype="string")
    names, group = groups_of(table, "breast")
    assert names["breast_id"].tolist() == ["a", "b"] and names["patient_id"].tolist() == ["Q", "P"]
    assert group.tolist() == [1, -1, 0, 1]
    names, group = groups_of(table, "patient")
    assert names.columns.tolist() == ["patient_id"] and group.tolist() == [0, 0, 1, 0]


def make_pooling(width: int = 6, num_classes: int = 3) -> AttentionPooling:
    torch.manual_seed(0)
    weight, bias = RNG.normal(size=(num_classes, width)), RNG.normal(size=num_classes)
    pooling = AttentionPooling(weight, bias, RNG.normal(size=width), RNG.random(width) + 0.5).eval()
    pooling.start = (weight, bias)
    return pooling


def test_attention_is_that_of_the_equation():
    """Equation 9 of Ilse et al., bag by bag in numpy."""
    pooling = make_pooling()
    with torch.no_grad():
        pooling.attention.weight.normal_()
    features = RNG.normal(size=(7, 6)).astype(np.float32)
    found = attention_probabilities(pooling, features, GROUP)
    part = {name: tensor.double().numpy() for name, tensor in pooling.state_dict().items()}
    for number in range(3):
        h = (features[number == GROUP] - part["mean"]) / part["std"]
        gate = 1 / (1 + np.exp(-(h @ part["gate.weight"].T + part["gate.bias"])))
        scores = (np.tanh(h @ part["tanh.weight"].T + part["tanh.bias"]) * gate) @ part["attention.weight"][0]
        a = np.exp(scores) / np.exp(scores).sum()
        logits = part["classifier.weight"] @ (a @ h) + part["classifier.bias"]
        np.testing.assert_allclose(found[number], np.exp(logits) / np.exp(logits).sum(), rtol=1e-4)


def test_attention_starts_as_the_linear_layer_of_the_mean():
    pooling = make_pooling()
    features = RNG.normal(size=(7, 6)).astype(np.float32)
    weight, bias = pooling.start
    logits = np.stack([features[number == GROUP].mean(axis=0) for number in range(3)]) @ weight.T + bias
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(attention_probabilities(pooling, features, GROUP), expected, rtol=1e-4)


def needles(num_bags: int, seed: int) -> Bags:
    """Bags of 3 to 9 slices. One slice of each is marked, and says by its sign what the bag is; the sign of all other
    slices is noise."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 10, num_bags)
    group = np.repeat(np.arange(num_bags), sizes)
    features = rng.normal(size=(len(group), 8)).astype(np.float32)
    labels = rng.integers(2, size=num_bags)
    marked = np.cumsum(sizes) - 1
    features[:, 0] = 0
    features[marked, 0] = 5
    features[marked, 1] = 2.0 * (2 * labels - 1)
    features[:, 1] += 0.5 * rng.normal(size=len(group))
    return Bags(features, group, labels)


def test_attention_learns_which_slice_to_look_at_and_repeats_itself():
    train, validation, test = needles(400, 0), needles(150, 1), needles(300, 2)
    weight, bias = np.zeros((2, 8)), np.zeros(2)
    weight[:, 1] = (-1, 1)  # the linear layer of the images
    fitted = [fit_attention(train, validation, weight, bias, np.ones(2), seed=0) for _ in range(2)]
    found, again = (attention_probabilities(each, test.features, test.group) for each in fitted)
    np.testing.assert_array_equal(found, again)
    mean = mean_probabilities(test.features[:, [1]], test.group, 300)
    assert auc(test.labels, np.hstack((-mean, mean))) < 0.9 < 0.97 < auc(test.labels, found)


def test_attention_that_does_not_help_leaves_the_mean():
    """Labels that nothing says: the validation part confirms no epoch by much, and the start is kept if by none."""
    rng = np.random.default_rng(3)
    train, validation = (
        Bags(each.features, each.group, rng.integers(2, size=len(each.labels)))
        for each in (needles(60, 0), needles(200, 1))
    )
    weight, bias = np.zeros((2, 8)), np.zeros(2)
    fitted = fit_attention(train, validation, weight, bias, np.ones(2), seed=0)
    probabilities = attention_probabilities(fitted, validation.features, validation.group)
    loss = -np.log(probabilities[np.arange(200), validation.labels]).mean()
    assert loss <= np.log(2) + 1e-6  # never worse than the start there


def test_a_class_that_no_group_has_does_no_harm():
    bags = needles(30, 0)
    fitted = fit_attention(bags, bags, np.zeros((3, 8)), np.zeros(3), np.ones(3), seed=0)
    assert np.isfinite(attention_probabilities(fitted, bags.features, bags.group)).all()
