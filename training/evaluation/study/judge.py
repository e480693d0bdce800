"""Judging one encoder of the study: probes on held-out phantom patients, and what it makes of real slices."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel

from ..classifiers import logistic_regression, nearest_neighbours
from ..labels import read_labels
from ..metrics import auc
from .features import Example, whole_slices
from .neighbours import RealSlices
from .regions import regions

HEADS = ("knn", "linear")


class StudyTask(NamedTuple):
    name: str
    column: str  # of the phantom's labels
    seen: str  # "breast": slices of the whole volume, or "region": the lesion's own place
    of_lesions: bool = False  # whether breasts without a lesion are left out
    is_main: bool = True  # whether differences are shown


TASKS = {
    task.name: task
    for task in (
        StudyTask("density", "density", "breast"),
        StudyTask("lesion", "lesion", "region"),
        StudyTask("cancer", "cancer", "region", of_lesions=True),
        StudyTask("lesion_type", "lesion_type", "region", of_lesions=True),
        StudyTask("lesion, whole breast", "lesion", "breast", is_main=False),
        StudyTask("cancer, whole breast", "cancer", "breast", is_main=False),
    )
}
COLUMNS = ["kind", "lesion_slice", "x0", "y0", "x1", "y1", *dict.fromkeys(task.column for task in TASKS.values())]


class Judge:
    """Reads and renders the pictures once; `predictions` and `on_real_slices` then take any encoder of the recipe.

    Volumes count, their 2D views do not. Density is asked of whole breasts; of regions, lesion or none, and of lesions
    malignant or benign and the type. Whole breasts are asked for lesion and cancer, too.
    """

    def __init__(
        self,
        learn: Path,
        test: Path,
        image_processor: MammoDinoImageProcessor,
        slices_per_volume: int,
        real_slices: Path | None,
    ):
        self.tables, self.examples = {}, {}
        for part, labels in (("learn", learn), ("test", test)):
            table = read_labels(labels, COLUMNS)
            self.tables[part] = table = table[table["kind"] == "dbt"].reset_index(drop=True)
            paths = [labels.parent / file for file in table["file"]]
            self.examples[part, "breast"] = whole_slices(paths, image_processor, slices_per_volume)
            self.examples[part, "region"] = regions(table, labels.parent, image_processor)
        self.real = (
            RealSlices(real_slices / "slices.csv", real_slices / "slices", image_processor) if real_slices else None
        )

    def predictions(self, features_of: Callable[[Sequence[Example]], np.ndarray]) -> pandas.DataFrame:
        """A row a task, head and test volume: image_id, patient_id, label and p_0 .. p_3."""
        features = {which: features_of(each) for which, each in self.examples.items()}
        found = [
            self._of_task(task, features["learn", task.seen], features["test", task.seen]) for task in TASKS.values()
        ]
        return pandas.concat([each for task in found for each in task], ignore_index=True)

    def _of_task(self, task: StudyTask, learn: np.ndarray, test: np.ndarray) -> Iterator[pandas.DataFrame]:
        seen, held_out = (self.tables[part]["lesion"].to_numpy() >= int(task.of_lesions) for part in ("learn", "test"))
        table = self.tables["learn"][seen]
        classes, y = np.unique(table[task.column].astype(str), return_inverse=True)
        heads = {
            "knn": nearest_neighbours(len(y)),
            "linear": logistic_regression(y, table["patient"].to_numpy()),
        }
        rows = self.tables["test"][held_out]
        for head in HEADS:
            probabilities = heads[head].fit(learn[seen], y).predict_proba(test[held_out])
            yield pandas.DataFrame(
                {
                    "task": task.name,
                    "head": head,
                    "image_id": rows["file"].to_numpy(),
                    "patient_id": rows["patient"].to_numpy(),
                    "label": np.searchsorted(classes, rows[task.column].astype(str)),
                }
                | {f"p_{number}": probabilities[:, number] for number in range(len(classes))}
            )

    def on_real_slices(self, encoder: MammoDinoModel, drops_background: bool) -> dict[str, Any]:
        """Orderings of true neighbours, and AUC of slices with a lesion box against those without, each predicted from
        other patients; few as they are."""
        if self.real is None:
            return {}
        features, table = self.real.features(encoder, drops_background), self.real.table
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
