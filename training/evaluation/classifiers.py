"""Classifiers on frozen features."""

from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

NUM_NEIGHBOURS = 20


def nearest_neighbours(num_examples: int) -> Pipeline:
    """k-NN on standardised features by cosine distance, near ones weighing more; k = 20, or all of fewer examples."""
    return make_pipeline(
        StandardScaler(),
        KNeighborsClassifier(min(NUM_NEIGHBOURS, num_examples), metric="cosine", weights="distance"),
    )
