"""What probes of frozen features share: the classifiers."""

import numpy as np
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

NUM_NEIGHBORS = 20
INVERSE_PENALTIES = np.logspace(-4, 1, 6)
FOLDS_OF_PENALTY = 4  # of the learning patients


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
