"""What an archive of simulated breasts asks of features: density of whole breasts, lesions of regions.

A whole breast's feature says little of a lesion, so what is known of lesions is asked where they are, as a detection
head does: of a lesion the place of its box at its own slice, of a breast without one the place of another's.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dataset_scripts.benchmarks.labels import read_labels
from modeling_mammodino import MammoDinoImageProcessor
from training.evaluation.probes import logistic_regression, nearest_neighbors
from training.evaluation.readout import Canvas, Reader, place_centers, region_features, render_once, whole_features

HEADS = ("knn", "linear")


class PhantomTask(NamedTuple):
    """One question."""

    column: str  # of the phantom's labels
    seen: str  # "breast": the middle slice of a volume, or "region": the lesion's own place
    of_lesions: bool = False  # whether breasts without a lesion are left out


TASKS = {
    "density": PhantomTask("density", "breast"),
    "lesion": PhantomTask("lesion", "region"),
    "cancer": PhantomTask("cancer", "region", of_lesions=True),
    "lesion_type": PhantomTask("lesion_type", "region", of_lesions=True),
}
BOX = ["x0", "y0", "x1", "y1"]
COLUMNS = ["kind", "lesion_slice", *BOX, *dict.fromkeys(task.column for task in TASKS.values())]


class PhantomImages:
    """The images of an archive, one volume a patient (of several views in turn), rendered once for all readers."""

    def __init__(self, labels: Path, processor: MammoDinoImageProcessor, cache: Path | None = None):
        table = read_labels(labels, COLUMNS)
        table = table[table["kind"] == "dbt"]
        views = table.groupby("patient", sort=False)
        turn = (views.ngroup() % views["file"].transform("size")) == views.cumcount()
        self.table = table = table[turn].reset_index(drop=True)
        files = [labels.parent / file for file in table["file"]]
        slices = table["lesion_slice"].dropna().to_numpy(int)
        drawn = iter(np.random.default_rng(0).choice(slices, len(table)).tolist())  # for breasts without a lesion
        frames = [next(drawn) if np.isnan(each) else int(each) for each in table["lesion_slice"]]
        boxes = [np.array(box, float) if has else None
                 for box, has in zip(table[BOX].to_numpy(), table["lesion"] == 1, strict=True)]  # fmt: skip
        self.files, self.processor, self.cache = files, processor, cache
        self.regions = usable(render_once(files, processor, cache, frames))
        self.centers = place_centers(self.regions, boxes)

    @cached_property
    def breasts(self) -> list[Canvas]:
        """The middle slices."""
        return usable(render_once(self.files, self.processor, self.cache))

    def features(self, reader: Reader) -> dict[str, np.ndarray]:
        """Return features (n, F) of whole breasts and of regions."""
        regions = region_features(reader, self.regions, self.centers)
        return {"breast": whole_features(reader, self.breasts), "region": regions}

    def of_task(self, task: PhantomTask, features: dict[str, np.ndarray]) -> tuple[pd.DataFrame, np.ndarray]:
        """Return the rows that a task asks of, and their features."""
        asked = self.table["lesion"].to_numpy() >= int(task.of_lesions)
        return self.table[asked], features[task.seen][asked]


def usable(canvases: list[Canvas | str]) -> list[Canvas]:
    """Return all. Raises ValueError for a file that cannot be used: scores of other files are others."""
    if refused := [each for each in canvases if isinstance(each, str)]:
        raise ValueError(f"{len(refused)} of {len(canvases)} files cannot be used: {refused[0]}")
    return canvases  # type: ignore[return-value]


def predictions(reader: Reader, learn: PhantomImages, test: PhantomImages) -> pd.DataFrame:
    """Return a row a task, head and test volume: image_id, patient_id, label and p_0 .. p_3."""
    of_learn, of_test = learn.features(reader), test.features(reader)
    parts = (_of_task(name, learn.of_task(task, of_learn), test.of_task(task, of_test)) for name, task in TASKS.items())
    return pd.concat([each for task in parts for each in task], ignore_index=True)


def _of_task(
    name: str, learn: tuple[pd.DataFrame, np.ndarray], test: tuple[pd.DataFrame, np.ndarray]
) -> Iterator[pd.DataFrame]:
    (table, seen), (rows, held_out), column = learn, test, TASKS[name].column
    classes, y = np.unique(table[column].astype(str), return_inverse=True)
    heads = (nearest_neighbors(len(y)), logistic_regression(y, table["patient"].to_numpy()))
    for kind, head in zip(HEADS, heads, strict=True):
        probabilities = head.fit(seen, y).predict_proba(held_out)
        columns = {
            "task": name,
            "head": kind,
            "image_id": rows["file"].to_numpy(),
            "patient_id": rows["patient"].to_numpy(),
            "label": np.searchsorted(classes, rows[column].astype(str)),
        }
        yield pd.DataFrame(columns | {f"p_{number}": each for number, each in enumerate(probabilities.T)})
