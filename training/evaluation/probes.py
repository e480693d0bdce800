"""What probes of frozen features share: the label table, and the classifiers."""

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

NUM_NEIGHBORS = 20
INVERSE_PENALTIES = np.logspace(-4, 1, 6)


def read_labels(labels: Path, tasks: list[str]) -> pd.DataFrame:
    """Return the table of a CSV with the columns `file` (relative to it), `patient` and the tasks; empty cells are NaN.

    Raises ValueError for a missing column, OSError where there is no such file.
    """
    table = pd.read_csv(labels, dtype={"patient": str}, keep_default_na=True)
    if missing := [column for column in ("file", "patient", *tasks) if column not in table]:
        raise ValueError(f"{labels}: no column {', '.join(missing)}; it has {', '.join(table.columns)}")
    return table


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
            cv=list(GroupKFold(4).split(labels, labels, patients)),
            scoring="neg_log_loss",
            max_iter=2000,
            l1_ratios=(0,),
            use_legacy_attributes=False,
        ),
    )
