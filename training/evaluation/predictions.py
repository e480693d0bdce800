"""What a model says of the test images, breasts and patients, and its scores."""

import numpy as np
import pandas

from dataset_scripts.benchmarks.index import SPLITS
from training.evaluation.finetuning.aggregation import (
    GROUPS,
    group_labels,
    groups_of,
    max_probabilities,
    mean_probabilities,
)
from training.evaluation.finetuning.attention_pooling import Bags, attention_probabilities, fit_attention
from training.evaluation.finetuning.feature_cache import SliceFeatures
from training.evaluation.finetuning.linear_probe import LinearHead, balanced_weights

from .metrics import bootstrap, metric_names

IDENTIFIERS = ["image_id", "breast_id", "patient_id"]


def predict_levels(
    features: SliceFeatures, head: LinearHead, num_classes: int, ordered: bool, balanced: bool, seed: int
) -> pandas.DataFrame:
    """A row a test image (level `image`), and for each way of aggregation (`breast_mean`, `breast_max`,
    `breast_attention`, `patient_mean`, ...) a row a group; columns level, IDENTIFIERS, label, p_0 .. p_{C-1}.

    Attention pooling learns from the training part; `balanced`: with classes that weigh the same.
    """
    table, of_slices = features.table, head.probabilities(features.values)
    probabilities = mean_probabilities(of_slices, features.image, len(table))  # (n, C)
    test = (table["split"] == "test").to_numpy()
    levels = [_rows("image", table[test], table["label"].to_numpy()[test], probabilities[test])]
    for level in GROUPS:
        bags, groups, rows = {}, {}, {}
        for split in SPLITS:
            rows[split] = np.flatnonzero((table["split"] == split) & table[GROUPS[level]].notna())
            groups[split], bags[split] = _bags(features, rows[split], level, ordered)
        if not all(len(each.labels) for each in bags.values()):
            continue  # the data set does not say which breast
        names, bag, chosen = groups["test"], bags["test"], probabilities[rows["test"]]
        _, group = groups_of(table.iloc[rows["test"]], level)
        of_train = bags["train"].labels
        weights = balanced_weights(of_train, num_classes) if balanced else np.ones(num_classes)
        pooling = fit_attention(bags["train"], bags["validation"], head.weight, head.bias, weights, seed)
        ways = {
            "mean": mean_probabilities(chosen, group, len(names)),
            "max": max_probabilities(chosen, group, len(names), ordered),
            "attention": attention_probabilities(pooling, bag.features, bag.group),
        }
        levels += [_rows(f"{level}_{way}", names, bag.labels, each) for way, each in ways.items()]
    return pandas.concat(levels, ignore_index=True)


def score_levels(
    predictions: pandas.DataFrame, ordered: bool, num_resamples: int, seed: int
) -> dict[str, dict[str, list[float]]]:
    """{level: {metric: [value, low, high]}}; intervals over patients. A function of predictions.parquet alone."""
    columns = [name for name in predictions if name.startswith("p_")]
    return {
        level: {
            metric: list(found)
            for metric, found in bootstrap(
                rows["label"].to_numpy(),
                rows[columns].to_numpy(),
                rows["patient_id"].to_numpy(),
                metric_names(len(columns), ordered),
                num_resamples,
                seed,
            ).items()
        }
        for level, rows in predictions.groupby("level", sort=False)
    }


def _bags(features: SliceFeatures, rows: np.ndarray, level: str, ordered: bool) -> tuple[pandas.DataFrame, Bags]:
    """The groups of some images, and their slices."""
    table = features.table.iloc[rows]
    names, group = groups_of(table, level)
    labels = group_labels(table["label"].to_numpy(), group, len(names), ordered)
    group_of_image = np.full(len(features.table), -1)
    group_of_image[rows] = group
    of_slice = group_of_image[features.image]
    return names, Bags(features.values[of_slice >= 0], of_slice[of_slice >= 0], labels)


def _rows(level: str, names: pandas.DataFrame, labels: np.ndarray, probabilities: np.ndarray) -> pandas.DataFrame:
    rows = names.reindex(columns=IDENTIFIERS).astype("string").reset_index(drop=True)
    rows.insert(0, "level", level)
    rows["label"] = labels
    for number in range(probabilities.shape[1]):
        rows[f"p_{number}"] = probabilities[:, number]
    return rows
