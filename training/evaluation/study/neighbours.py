"""Neighbour consistency: are the features of two slices of one volume closer than those of slices of other breasts?

The other slices are of other patients and of like density, so that density alone does not tell them apart.
"""

from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas

from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel

from .features import Example, features_of, whole_slices

LIKE_DENSITY_FRACTION = 0.5  # of the slices of other patients, those of the nearest density


class SlicePair(NamedTuple):
    a: int  # rows of the table
    b: int
    distance_slices: int


class RealSlices:
    """Single slices of BCS-DBT with a table: file, PatientID, StudyUID, View, Slice (empty where it is not known)."""

    def __init__(self, table: Path, images: Path, image_processor: MammoDinoImageProcessor):
        self.table = pandas.read_csv(table)
        self.slices = whole_slices([images / file for file in self.table["file"]], image_processor, 0)
        self.density = np.array([dense_fraction(each) for each in self.slices])
        self.pairs = [
            SlicePair(int(a), int(b), int(abs(self.table["Slice"][a] - self.table["Slice"][b])))
            for _, rows in self.table.dropna(subset=["Slice"]).groupby(["PatientID", "StudyUID", "View"])
            for a, b in combinations(rows.index, 2)
            if self.table["Slice"][a] != self.table["Slice"][b]  # two lesions of one slice are one picture
        ]

    def features(self, encoder: MammoDinoModel, drops_background: bool) -> np.ndarray:
        """(n, 2 * D) float32: class token and mean, as `mammodino embed` gives them; one patch sets a maximum."""
        return features_of(encoder, self.slices, drops_background)[:, : 2 * encoder.config.hidden_size]

    def others(self, row: int) -> np.ndarray:
        """Rows of other patients, those half of them whose density is nearest."""
        other = np.flatnonzero((self.table["PatientID"] != self.table["PatientID"][row]).to_numpy())
        order = np.argsort(np.abs(self.density[other] - self.density[row]), kind="stable")
        return other[order[: max(1, round(LIKE_DENSITY_FRACTION * len(other)))]]

    def orderings(self, features: np.ndarray) -> pandas.DataFrame:
        """A row a true pair: its distance in slices, its cosine similarity, the highest of a slice of another breast,
        and the share of other slices that are less alike than the pair, seen from both ends. Features are centred over
        all slices first: else what all breasts share hides the rest."""
        centred = features - features.mean(axis=0)
        unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        rows = []
        for a, b, distance in self.pairs:
            alike = float(unit[a] @ unit[b])
            other = np.concatenate([unit[self.others(end)] @ unit[end] for end in (a, b)])
            below = float(np.mean((other < alike) + 0.5 * (other == alike)))
            rows.append((self.table["PatientID"][a], distance, alike, float(other.max()), below))
        return pandas.DataFrame(
            rows, columns=["patient", "distance_slices", "similarity", "nearest_other", "ordering_auc"]
        )


def dense_fraction(picture: Example) -> float:
    """A stand-in for density, which BCS-DBT does not give: the share of the breast's pixels that are brighter than half
    way between its 5th and 95th percentile; our choice."""
    patch = picture.pixel_values.shape[-1] // picture.tissue_mask.shape[-1]
    inside = np.kron(picture.tissue_mask > 0.5, np.ones((patch, patch), bool))
    values = picture.pixel_values[0][inside]
    low, high = np.percentile(values, [5, 95])
    return float(np.mean(values > (low + high) / 2))
