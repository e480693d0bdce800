"""Judging one encoder of the study: probes on held-out phantom patients, and what it makes of real slices."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel

from .classifiers import logistic_regression, nearest_neighbours
from .metrics import auc
from .study_features import LabelledPictures
from .study_neighbours import RealSlices

TASKS = ("density", "lesion", "cancer", "lesion_type")
HEADS = ("knn", "linear")
NO_LESION = "none"  # of lesion_type, which is asked of breasts with a lesion


class Judge:
    """Reads and renders the pictures once; `predictions` and `real` then take any encoder of the same recipe."""

    def __init__(
        self,
        learn: Path,
        test: Path,
        image_processor: MammoDinoImageProcessor,
        slices_per_volume: int,
        real_slices: Path | None,
    ):
        read = (list(TASKS), image_processor, slices_per_volume)
        self.learn, self.test = (LabelledPictures.read(labels, *read) for labels in (learn, test))
        self.real = (
            RealSlices(real_slices / "slices.csv", real_slices / "slices", image_processor) if real_slices else None
        )

    def predictions(self, encoder: MammoDinoModel) -> pandas.DataFrame:
        """A row a task, head and test file: image_id, patient_id, label and p_0 .. p_3."""
        learn, test = self.learn.features(encoder), self.test.features(encoder)
        return pandas.concat([each for task in TASKS for each in self._of_task(task, learn, test)], ignore_index=True)

    def _of_task(self, task: str, learn: np.ndarray, test: np.ndarray) -> Iterator[pandas.DataFrame]:
        seen, held_out = (labelled(each.table, task) for each in (self.learn, self.test))
        classes, y = np.unique(self.learn.table[task][seen].astype(str), return_inverse=True)
        heads = {
            "knn": nearest_neighbours(len(y)),
            "linear": logistic_regression(y, self.learn.table["patient"][seen].to_numpy()),
        }
        rows = self.test.table[held_out]
        for head in HEADS:
            probabilities = heads[head].fit(learn[seen], y).predict_proba(test[held_out])
            yield pandas.DataFrame(
                {
                    "task": task,
                    "head": head,
                    "image_id": rows["file"].to_numpy(),
                    "patient_id": rows["patient"].to_numpy(),
                    "label": np.searchsorted(classes, rows[task].astype(str)),
                }
                | {f"p_{number}": probabilities[:, number] for number in range(len(classes))}
            )

    def on_real_slices(self, encoder: MammoDinoModel) -> dict[str, Any]:
        """Orderings of true neighbours, and AUC of slices with a lesion box against those without, each predicted from
        other patients; few as they are."""
        if self.real is None:
            return {}
        features, table = self.real.features(encoder), self.real.table
        lesion = table["X"].notna().to_numpy().astype(int)
        patients = table["PatientID"].to_numpy()
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(features, lesion, patients)
        predicted = cross_val_predict(
            nearest_neighbours(len(lesion) // 2), features, lesion, cv=list(folds), method="predict_proba"
        )
        return {
            "neighbours": self.real.orderings(features).to_dict("list"),
            "lesion_auc": auc(lesion, predicted),
            "num_slices": len(table),
            "num_with_lesion": int(lesion.sum()),
        }


def labelled(table: pandas.DataFrame, task: str) -> np.ndarray:
    return (table[task].notna() & (table[task] != NO_LESION)).to_numpy()
