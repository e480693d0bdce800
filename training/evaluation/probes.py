"""What probes of frozen features share: the label table, and the classifiers."""

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from dataset_scripts.benchmarks.index import MetadataTable

NUM_NEIGHBORS = 20
INVERSE_PENALTIES = np.logspace(-4, 1, 6)
FOLDS_OF_PENALTY = 4  # of the learning patients
NEEDED = ("file", "patient")  # columns of a label table


def read_labels(labels: Path, tasks: list[str]) -> pd.DataFrame:
    """Return the table of a CSV with the columns `file` (relative to it), `patient` and the tasks; a task's empty cells
    are NaN.

    Raises ValueError for a missing column, and for a row without file or patient, OSError where there is no such file.
    """
    table = pd.read_csv(labels, dtype=dict.fromkeys(NEEDED, str), keep_default_na=True)
    if missing := [column for column in (*NEEDED, *tasks) if column not in table]:
        raise ValueError(f"{labels}: no column {', '.join(missing)}; it has {', '.join(table.columns)}")
    cells = MetadataTable(labels, table[list(NEEDED)].fillna(""), "fill it, or take the row out")
    return table.assign(**{column: cells.text(column, required=True).astype(object) for column in NEEDED})


def nearest_neighbors(num_examples: int) -> Pipeline:
    """Make k-NN on standardized features by cosine distance, near ones weighing more; k = 20, or all of fewer."""
    return make_pipeline(
        StandardScaler(),
        KNeighborsClassifier(min(NUM_NEIGHBORS, num_examples), metric="cosine", weights="distance"),
    )


def logistic_regression(labels: np.ndarray, patients: np.ndarray) -> Pipeline:
    """Make logistic regression on standardized features, its penalty chosen by log loss on held-out patients, four
    folds."""
    return make_pipeline(
        StandardScaler(),
        LogisticRegressionCV(
            Cs=INVERSE_PENALTIES,
            cv=list(GroupKFold(FOLDS_OF_PENALTY).split(labels, labels, patients)),
            scoring="neg_log_loss",
            max_iter=2000,
            l1_ratios=(0,),
            use_legacy_attributes=False,
        ),
    )
