"""From images to breasts and patients: labels and probabilities of groups.

A volume is one image before this: the mean over its slices. Where classes are ordered (all tasks but the type of a
lesion), a group has the highest class of its images: a breast with one positive view is positive. Of unordered classes
it has the commonest, the first of equals. Our choice; the paper does not say.
"""

import numpy as np
import pandas

UNORDERED_TASKS = ("lesion_type",)
GROUPS = {"breast": "breast_id", "patient": "patient_id"}  # level: column of the index


def is_ordered(task: str) -> bool:
    return task not in UNORDERED_TASKS


def mean_probabilities(probabilities: np.ndarray, group: np.ndarray, num_groups: int) -> np.ndarray:
    """Mean over the rows of a group: probabilities (n, C), group (n,) int 0..G-1 -> (G, C)."""
    sums = np.zeros((num_groups, probabilities.shape[1]))
    np.add.at(sums, group, probabilities)
    return sums / np.bincount(group, minlength=num_groups)[:, None]


def max_probabilities(probabilities: np.ndarray, group: np.ndarray, num_groups: int, ordered: bool) -> np.ndarray:
    """The most suspicious row of a group: probabilities (n, C), group (n,) -> (G, C).

    Of ordered classes, the probability of at most class c is the least of any row's: the law of the highest class where
    rows agree as far as they can. Of two classes this is the largest positive probability. Of unordered classes each
    has its largest probability, scaled to a sum of 1.
    """
    if ordered:
        at_most = np.ones((num_groups, probabilities.shape[1]))
        np.minimum.at(at_most, group, np.cumsum(probabilities, axis=1))
        at_most[:, -1] = 1
        return np.diff(at_most, axis=1, prepend=0)
    largest = np.zeros((num_groups, probabilities.shape[1]))
    np.maximum.at(largest, group, probabilities)
    return largest / largest.sum(axis=1, keepdims=True)


def group_labels(labels: np.ndarray, group: np.ndarray, num_groups: int, ordered: bool) -> np.ndarray:
    """labels (n,) int, group (n,) -> (G,): the highest class, or of unordered classes the commonest."""
    if ordered:
        highest = np.zeros(num_groups, labels.dtype)
        np.maximum.at(highest, group, labels)
        return highest
    counts = np.zeros((num_groups, labels.max() + 1), int)
    np.add.at(counts, (group, labels), 1)
    return counts.argmax(axis=1)


def groups_of(table: pandas.DataFrame, level: str) -> tuple[pandas.DataFrame, np.ndarray]:
    """The groups of a level of GROUPS, a row each with breast_id and patient_id, and the group of each row of `table`
    (n,) int, -1 where the data set does not say."""
    number, names = pandas.factorize(table[GROUPS[level]], sort=True)
    first = table.drop_duplicates(GROUPS[level]).set_index(GROUPS[level], drop=False).loc[names]
    columns = ["breast_id", "patient_id"] if level == "breast" else ["patient_id"]
    return first[columns].reset_index(drop=True), number
