"""From slices to images, breasts and patients: labels, probabilities and scores of each level.

A volume is one image: the mean over its slices. Where classes are ordered (`Definition.is_ordered`), a group
has the highest class of its images: a breast with one positive view is positive. Of unordered classes it has the
commonest, the first of equals. Our choice; the paper does not say.
"""

import numpy as np
import pandas as pd
import torch

from dataset_scripts.benchmarks.index import SPLITS
from training.evaluation.metrics import bootstrap, metric_names

from .feature_cache import SliceFeatures
from .heads import AttentionPooling, Bags, LinearHead, attention_probabilities, balanced_weights, fit_attention

IDENTIFIERS = ["image_id", "breast_id", "patient_id"]
GROUPS = {"breast": "breast_id", "patient": "patient_id"}  # level: column of the index


def mean_probabilities(probabilities: np.ndarray, group: np.ndarray, num_groups: int) -> np.ndarray:
    """Return the mean over the rows of a group: probabilities (n, C), group (n,) int 0..G-1 -> (G, C)."""
    sums = np.zeros((num_groups, probabilities.shape[1]))
    np.add.at(sums, group, probabilities)
    return sums / np.bincount(group, minlength=num_groups)[:, None]


def most_suspicious(probabilities: torch.Tensor, group: torch.Tensor, num_groups: int, ordered: bool) -> torch.Tensor:
    """Return the most suspicious row of a group: probabilities (n, C), group (n,) int64 -> (G, C).

    Of ordered classes, the probability of at most class c is the least of any row's: the law of the highest class where
    rows agree as far as they can. Of two classes this is the largest positive probability. Of unordered classes each
    has its largest probability, scaled to a sum of 1.
    """
    wide, shape = group[:, None].expand_as(probabilities), (num_groups, probabilities.shape[1])
    if ordered:
        at_most = probabilities.new_ones(shape).scatter_reduce(0, wide, probabilities.cumsum(1), "amin")
        at_most = torch.cat((at_most[:, :-1], at_most.new_ones(num_groups, 1)), dim=1)
        return at_most.diff(dim=1, prepend=at_most.new_zeros(num_groups, 1))
    largest = probabilities.new_zeros(shape).scatter_reduce(0, wide, probabilities, "amax")
    return largest / largest.sum(dim=1, keepdim=True)


def max_probabilities(probabilities: np.ndarray, group: np.ndarray, num_groups: int, ordered: bool) -> np.ndarray:
    """Return `most_suspicious` of arrays."""
    return most_suspicious(torch.from_numpy(probabilities), torch.from_numpy(group), num_groups, ordered).numpy()


def group_labels(labels: np.ndarray, group: np.ndarray, num_groups: int, ordered: bool) -> np.ndarray:
    """Return the highest class of each group, of unordered classes the commonest: labels (n,) int, group (n,) ->
    (G,)."""
    if ordered:
        highest = np.zeros(num_groups, labels.dtype)
        np.maximum.at(highest, group, labels)
        return highest
    counts = np.zeros((num_groups, labels.max() + 1), int)
    np.add.at(counts, (group, labels), 1)
    return counts.argmax(axis=1)


def groups_of(table: pd.DataFrame, level: str) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the groups of a level of GROUPS, a row each with breast_id and patient_id, and the group of each row of
    `table`, (n,) int, -1 where the data set does not say."""
    number, names = pd.factorize(table[GROUPS[level]], sort=True)
    first = table.drop_duplicates(GROUPS[level]).set_index(GROUPS[level], drop=False).loc[names]
    columns = ["breast_id", "patient_id"] if level == "breast" else ["patient_id"]
    return first[columns].reset_index(drop=True), number


def fit_image_attention(
    features: SliceFeatures, head: LinearHead, class_weights: np.ndarray, seed: int
) -> AttentionPooling:
    """Return attention pooling of the slices of an image, which starts as their mean under `head`."""
    label, split = features.table["label"].to_numpy(), features.table["split"].to_numpy()
    bags = {}
    for name in ("train", "validation"):
        own = np.flatnonzero(split[features.image] == name)
        images, group = np.unique(features.image[own], return_inverse=True)
        bags[name] = Bags(features.values[own], group, label[images])
    return fit_attention(bags["train"], bags["validation"], head.weight, head.bias, class_weights, seed)


def predict_levels(
    features: SliceFeatures,
    head: LinearHead,
    num_classes: int,
    ordered: bool,
    balanced: bool,
    seed: int,
    pooling: AttentionPooling | None = None,
) -> pd.DataFrame:
    """Return a row a test image (level `image`), and for each way of aggregation (`breast_mean`, `breast_max`,
    `breast_attention`, `patient_mean`, ...) a row a group; columns level, IDENTIFIERS, label, p_0 .. p_{C-1}.

    An image is the mean of its slices, or what `pooling` makes of them. Attention pooling of groups learns from the
    training part; `balanced`: with classes that weigh the same.
    """
    table = features.table
    if pooling is None:
        of_slices = head.probabilities(features.values)
        probabilities = mean_probabilities(of_slices, features.image, len(table))  # (n, C)
    else:
        probabilities = attention_probabilities(pooling, features.values, features.image)
    test = (table["split"] == "test").to_numpy()
    levels = [level_rows("image", table[test], table["label"].to_numpy()[test], probabilities[test])]
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
        of_groups = fit_attention(bags["train"], bags["validation"], head.weight, head.bias, weights, seed)
        ways = {
            "mean": mean_probabilities(chosen, group, len(names)),
            "max": max_probabilities(chosen, group, len(names), ordered),
            "attention": attention_probabilities(of_groups, bag.features, bag.group),
        }
        levels += [level_rows(f"{level}_{way}", names, bag.labels, each) for way, each in ways.items()]
    return pd.concat(levels, ignore_index=True)


def score_levels(
    predictions: pd.DataFrame, ordered: bool, num_resamples: int, seed: int
) -> dict[str, dict[str, list[float]]]:
    """Return {level: {metric: [value, low, high]}}; intervals over patients. A function of predictions.parquet
    alone."""
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


def _bags(features: SliceFeatures, rows: np.ndarray, level: str, ordered: bool) -> tuple[pd.DataFrame, Bags]:
    """Return the groups of some images, and their slices."""
    table = features.table.iloc[rows]
    names, group = groups_of(table, level)
    labels = group_labels(table["label"].to_numpy(), group, len(names), ordered)
    group_of_image = np.full(len(features.table), -1)
    group_of_image[rows] = group
    of_slice = group_of_image[features.image]
    return names, Bags(features.values[of_slice >= 0], of_slice[of_slice >= 0], labels)


def level_rows(level: str, names: pd.DataFrame, labels: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """Return rows of predictions: names with some of IDENTIFIERS, labels (n,), probabilities (n, C)."""
    rows = names.reindex(columns=IDENTIFIERS).astype("string").reset_index(drop=True)
    rows.insert(0, "level", level)
    rows["label"] = labels
    for number in range(probabilities.shape[1]):
        rows[f"p_{number}"] = probabilities[:, number]
    return rows
