"""From slices to images, breasts and patients: labels, probabilities and scores of each level.

A volume is one image: the mean over its slices. Where classes are ordered (`Definition.is_ordered`), a group
has the highest class of its images: a breast with one positive view is positive. Of unordered classes it has the
commonest, the first of equals. Our choice; the paper does not say.
"""

import numpy as np
import pandas as pd
import torch

from training.evaluation.metrics import bootstrap, metric_names

from .feature_cache import SliceFeatures
from .heads import Bags

IDENTIFIERS = ["image_id", "breast_id", "patient_id"]
GROUPS = {"breast": "breast_id", "patient": "patient_id"}  # level: column of the index


def levels_of(head: str) -> list[str]:
    """Return the levels that a run with such a head predicts, of breasts and patients where the data set names them."""
    ways = ("max",) if head == "mil" else ("mean", "max", "attention")
    return ["image", *(f"{group}_{way}" for group in GROUPS for way in ways)]


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


def bags_of(features: SliceFeatures, level: str, ordered: bool) -> tuple[pd.DataFrame, Bags]:
    """Return the groups of a level of GROUPS, and their slices; without labels where the images have none."""
    names, group = groups_of(features.table, level)
    labels = np.zeros(len(names), int)
    if "label" in features.table:
        labels = group_labels(features.table["label"].to_numpy()[group >= 0], group[group >= 0], len(names), ordered)
    of_slice = group[features.image]
    return names, Bags(features.values[of_slice >= 0], of_slice[of_slice >= 0], labels)


def level_rows(level: str, names: pd.DataFrame, labels: np.ndarray | None, probabilities: np.ndarray) -> pd.DataFrame:
    """Return rows of predictions: names with some of IDENTIFIERS, labels (n,) where they are known, probabilities
    (n, C)."""
    rows = names.reindex(columns=IDENTIFIERS).astype("string").reset_index(drop=True)
    rows.insert(0, "level", level)
    if labels is not None:
        rows["label"] = labels
    for number in range(probabilities.shape[1]):
        rows[f"p_{number}"] = probabilities[:, number]
    return rows
