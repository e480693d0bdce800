"""How far a score can be trusted: one headline, the same score in subgroups, and whether features tell the source.

Groups are of what is known of the images: density, view, machine or site, age. A gap is a group's score less that of
all others, on the same resamples of patients. That features tell which machine made an image does no harm by itself,
but where the label goes with the machine, a score may be the machine's.
"""

from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import softmax

from .finetuning.aggregation import GROUPS, mean_probabilities
from .finetuning.feature_cache import SliceFeatures
from .finetuning.heads import balanced_weights, fit_linear_probe
from .metrics import METRICS, bootstrap_weights, interval, score_resamples

# what the tables show of a task. The paper gives AUC for cancer and lesion and F1 for BI-RADS; for density it names
# no metric, and lesion type has no published figure: macro AUC is our choice there
HEADLINE_METRICS = {"cancer": "auc", "lesion": "auc", "birads": "macro_f1", "density": "auc", "lesion_type": "auc"}
# and which level, before any result is seen: a cancer is of a breast, a density of a patient, all else of an image;
# the first that a run has. Our choice
HEADLINE_LEVELS = {
    "cancer": ("breast_max",),
    "birads": ("breast_max",),
    "density": ("patient_mean", "patient_max"),
}
SOURCES = ("machine", "site")  # the first of which two values are there is what features are asked for
COLUMNS = ("density", "view", *SOURCES, "age")
AGES = {0: "under 50", 50: "50 to 59", 60: "60 to 69", 70: "70 and over"}
MAX_AGE = 120  # years; -1 and 999 stand for unknown
IN_ORDER = {name: start for start, name in AGES.items()}
MIN_PATIENTS = 10  # of a group that is scored
MIN_OF_CLASS = 3  # patients of each class in it
MIN_OF_SOURCE = {"train": 5, "validation": 2, "test": 5}  # patients of a source


def headline_level(task: str, levels: list[str]) -> str:
    return next((level for level in HEADLINE_LEVELS.get(task, ()) if level in levels), "image")


def level_in_words(level: str) -> str:
    unit, _, how = level.partition("_")
    return f"one score {'an' if unit == 'image' else 'a'} {unit}" + (f", {how} over its images" if how else "")


def at_level(predictions: pd.DataFrame, level: str, columns: str) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Return the rows of a level, their labels (n,) and probabilities (n, C), of the `columns` p_ or calibrated_."""
    rows = predictions[predictions["level"] == level].reset_index(drop=True)
    names = [name for name in rows if name.startswith(columns)]
    return rows, rows["label"].to_numpy(int), rows[names].to_numpy(float)


def score_headline(
    predictions: pd.DataFrame, others: dict[str, pd.DataFrame], level: str, metric: str, num_resamples: int, seed: int
) -> tuple[list[float], dict[str, dict[str, list[float]]]]:
    """Return the score as [value, low, high], and of each other model, tested on the same rows, its own and the
    difference to it."""
    rows, labels, probabilities = at_level(predictions, level, "p_")
    key = ["patient_id", "breast_id", "image_id"]
    blocks = list(bootstrap_weights(rows["patient_id"].to_numpy(str), num_resamples, seed))
    value, resampled = score_resamples(METRICS[metric], labels, probabilities, blocks)
    compared = {}
    for name, each in others.items():
        their_rows, _, theirs = at_level(each, level, "p_")
        place = rows[key].fillna("").merge(their_rows[key].fillna("").reset_index(), on=key, how="left")["index"]
        theirs = theirs[place.to_numpy(int)]
        their_value, their_resampled = score_resamples(METRICS[metric], labels, theirs, blocks)
        compared[name] = {
            "score": list(interval(their_value, their_resampled)),
            "gap": list(interval(value - their_value, resampled - their_resampled)),
        }
    return list(interval(value, resampled)), compared


def groups_known(table: pd.DataFrame, task: str) -> pd.DataFrame:
    """Return the group of each image, of type string, a column a kind of group; none of what the task itself is."""
    found = pd.DataFrame(index=table.index)
    for name in COLUMNS:
        if name in table and name != task and table[name].notna().any():
            found[name] = _age_bands(table[name]) if name == "age" else table[name].astype("string")
    return found


def _age_bands(ages: pd.Series) -> pd.Series:
    years = ages.astype("Float64").to_numpy(float, na_value=np.nan)
    return pd.Series(pd.cut(years, [*AGES, MAX_AGE], right=False, labels=list(AGES.values())), ages.index, "string")


def score_subgroups(
    predictions: pd.DataFrame, table: pd.DataFrame, task: str, level: str, metric: str, num_resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Return a dict a group: column, group, level, units, patients, score and gap as [value, low, high].

    At `level`, or at that of images where a breast or patient has images of several groups, as views are. Groups of
    few patients, altogether or of one of the classes, have no score, and beside such others no gap.
    """
    found = []
    for column, group in groups_known(table, task).items():
        of_level, names = level, _of_level(group, table, level)
        if names is None:
            of_level, names = "image", group.set_axis(table["image_id"])
        rows, labels, probabilities = at_level(predictions, of_level, "p_")
        own = rows[identifier_of(of_level)].map(names)
        if own.nunique() < 2:
            continue
        patients = rows["patient_id"].to_numpy(str)
        blocks = list(bootstrap_weights(patients, num_resamples, seed))
        are_enough = partial(_are_enough, labels, patients, probabilities.shape[1])
        for name in sorted(own.dropna().unique(), key=lambda name: (IN_ORDER.get(name, 0), name)):
            inside = (own == name).fillna(False).to_numpy(bool)
            outside = own.notna().to_numpy() & ~inside
            about = {"column": column, "group": name, "level": of_level, "units": int(inside.sum())}
            about["patients"] = len(set(patients[inside]))
            scored = [
                score_resamples(METRICS[metric], labels[part], probabilities[part], [each[:, part] for each in blocks])
                for part in takewhile(are_enough, (inside, outside))
            ]
            if scored:
                about["score"] = list(interval(*scored[0]))
            if len(scored) == 2:
                about["gap"] = list(interval(scored[0][0] - scored[1][0], scored[0][1] - scored[1][1]))
            found.append(about)
    return found


def _are_enough(labels: np.ndarray, patients: np.ndarray, num_classes: int, part: np.ndarray) -> bool:
    """Tell whether a part (n,) bool has patients enough, altogether and of the class that has the fewest."""
    of_class = [len(set(patients[part & (labels == number)])) for number in range(num_classes)]
    return len(set(patients[part])) >= MIN_PATIENTS and min(of_class) >= MIN_OF_CLASS


def identifier_of(level: str) -> str:
    return {"image": "image_id", **GROUPS}[level.partition("_")[0]]


def _of_level(group: pd.Series, table: pd.DataFrame, level: str) -> pd.Series | None:
    """Return the group of each unit of a level by its name; None where a unit has several."""
    known = pd.DataFrame({"unit": table[identifier_of(level)], "group": group}).dropna().drop_duplicates()
    return None if known["unit"].duplicated().any() else known.set_index("unit")["group"]


def probe_source(features: SliceFeatures, num_resamples: int, seed: int) -> dict[str, Any]:
    """Return how well a linear probe of the features tells the machine, or else the site, of held-out patients: column,
    classes, images, patients, AUC as [value, low, high], and the AUC of the label alone. Or `missing`: why not."""
    table = features.table
    if not (known := [name for name in SOURCES if name in table and table[name].nunique() > 1]):
        return {"missing": "no column `machine` or `site` with two values"}
    column = known[0]
    patients = table.groupby([column, "split"])["patient_id"].nunique().unstack(fill_value=0)
    enough = [
        name for name in patients.index if all(patients.loc[name].get(of, 0) >= n for of, n in MIN_OF_SOURCE.items())
    ]
    classes = [str(name) for name in enough]
    if len(classes) < 2:
        needs = ", ".join(f"{number} in {of}" for of, number in MIN_OF_SOURCE.items())
        return {"missing": f"of `{column}` fewer than two have patients enough ({needs})"}
    source = pd.Categorical(table[column], classes).codes.astype(int)
    means = mean_probabilities(features.values, features.image, len(table)).astype(np.float32)  # (n, F), of the slices
    parts = {name: np.flatnonzero((table["split"] == name) & (source >= 0)) for name in ("train", "validation", "test")}
    train, validation, test = parts.values()
    weights = balanced_weights(source[train], len(classes))
    head = fit_linear_probe(means[train], source[train], means[validation], source[validation], weights).head
    label = table["label"].to_numpy(int)
    counts = np.ones((label.max() + 1, len(classes)))  # one is added to each
    np.add.at(counts, (label[train], source[train]), 1)
    by_label = softmax(np.log(counts / counts.sum(axis=0)), axis=1)[label[test]]
    names = table["patient_id"].to_numpy(str)[test]
    blocks = list(bootstrap_weights(names, num_resamples, seed))
    scores = [
        list(interval(*score_resamples(METRICS["auc"], source[test], each, blocks)))
        for each in (head.probabilities(means[test]), by_label)
    ]
    about = {"column": column, "classes": classes, "images": len(test), "patients": len(set(names))}
    return {**about, "auc": scores[0], "auc_of_label": scores[1]}
