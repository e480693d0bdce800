"""Real DBT slices: are neighbors of one volume alike, and are places of lesions told from others?"""

from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from modeling_mammodino import MammoDinoImageProcessor
from training.evaluation.readout import Canvas, Reader, place_centers, region_features, render_once, whole_features

from .phantom_tasks import usable

BOX = ["X", "Y", "Width", "Height"]
LIKE_DENSITY_FRACTION = 0.5  # of the slices of other patients, those of the nearest density


class SlicePair(NamedTuple):
    """Two slices of one volume."""

    a: int  # rows of the table
    b: int
    distance_slices: int


class RealSlices:
    """Single slices of BCS-DBT with a table: file, PatientID, StudyUID, View, Slice (empty where it is not known), and
    X, Y, Width, Height of a lesion's box in pixels (empty where there is none)."""

    def __init__(self, folder: Path, processor: MammoDinoImageProcessor, cache: Path | None = None):
        self.table = pd.read_csv(folder / "slices.csv")
        files = [folder / "slices" / file for file in self.table["file"]]
        self.canvases = usable(render_once(files, processor, cache))
        self.density = np.array([dense_fraction(each) for each in self.canvases])
        x, y, width, height = self.table[BOX].to_numpy(float).T
        corners = np.stack((x, y, x + width, y + height), axis=1)
        self.has_lesion = ~np.isnan(corners).any(axis=1)
        boxes = [box if has else None for box, has in zip(corners, self.has_lesion, strict=True)]
        self.centers = place_centers(self.canvases, boxes)
        number = self.table["Slice"]
        self.pairs = [
            SlicePair(int(a), int(b), int(abs(number[a] - number[b])))
            for _, rows in self.table.dropna(subset=["Slice"]).groupby(["PatientID", "StudyUID", "View"])
            for a, b in combinations(rows.index, 2)
            if number[a] != number[b]  # two lesions of one slice are one image
        ]

    def features(self, reader: Reader) -> dict[str, np.ndarray]:
        """Return features (n, F) of whole slices and of regions."""
        regions = region_features(reader, self.canvases, self.centers)
        return {"whole": whole_features(reader, self.canvases), "region": regions}

    def others(self, row: int) -> np.ndarray:
        """Return the rows of other patients, those half of them whose density is nearest, so that density alone does
        not tell them apart."""
        other = np.flatnonzero((self.table["PatientID"] != self.table["PatientID"][row]).to_numpy())
        order = np.argsort(np.abs(self.density[other] - self.density[row]), kind="stable")
        return other[order[: max(1, round(LIKE_DENSITY_FRACTION * len(other)))]]

    def orderings(self, features: np.ndarray) -> pd.DataFrame:
        """Return a row a true pair: its distance in slices, its cosine similarity, the highest of a slice of another
        breast, and the share of other slices that are less alike than the pair, seen from both ends. Features (n, F)
        are centered over all slices first: else what all breasts share hides the rest."""
        centered = features - features.mean(axis=0)
        unit = centered / np.linalg.norm(centered, axis=1, keepdims=True)
        rows = []
        for a, b, distance in self.pairs:
            alike = float(unit[a] @ unit[b])
            other = np.concatenate([unit[self.others(end)] @ unit[end] for end in (a, b)])
            below = float(np.mean((other < alike) + 0.5 * (other == alike)))
            rows.append((self.table["PatientID"][a], distance, alike, float(other.max()), below))
        return pd.DataFrame(rows, columns=["patient", "distance_slices", "similarity", "nearest_other", "ordering_auc"])


def dense_fraction(canvas: Canvas) -> float:
    """Return a stand-in for density, which BCS-DBT does not give: the share of the breast's pixels that are brighter
    than half way between its 5th and 95th percentile; our choice."""
    patch = canvas.image.shape[0] // canvas.tissue.shape[0]
    values = canvas.image[np.kron(canvas.tissue > 0.5, np.ones((patch, patch), bool))]
    low, high = np.percentile(values, [5, 95])
    return float(np.mean(values > (low + high) / 2))
