"""k-NN on a labeled set while pretraining runs: whether features become useful, long before the losses say so."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.tools.features import RenderedSlice, SliceReader, extract_features, read_files
from training.evaluation.classifiers import nearest_neighbors
from training.evaluation.labels import read_labels
from training.evaluation.metrics import auc

MAX_CACHE_BYTES = 2 * 2**30  # images kept in memory; of a larger set they are read and rendered each time
MAX_FOLDS = 5
BATCH_SIZE = 8


class KnnProbe:
    """The labeled files of one task; a volume is its middle slice.

    labels: CSV with the columns `file` (relative to it), `patient` and the task; rows without a label are left out.
    Raises ValueError for what cannot be used, a file included: a curve of other files is another curve.
    """

    def __init__(self, labels: Path, task: str, image_processor: MammoDinoImageProcessor):
        if not labels.is_file():
            raise ValueError(f"knn_labels={labels}: no such file; give a CSV with the columns file, patient, {task}")
        table = read_labels(labels, [task])
        table = table[table[task].notna()]
        paths = [labels.parent / file for file in table["file"]]
        if missing := [path for path in paths if not path.is_file()]:
            raise ValueError(f"knn_labels={labels}: {len(missing)} of its files do not exist, {missing[0]} first")
        self.labels, self.patients = labels, table["patient"].to_numpy()
        classes, self.y = np.unique(table[task].astype(str), return_inverse=True)
        num_patients = [len(set(self.patients[self.y == number])) for number in range(len(classes))]
        if len(classes) < 2 or min(num_patients) < 2:
            raise ValueError(
                f"knn_task={task}: {labels} has {dict(zip(classes.tolist(), num_patients, strict=True))} patients of "
                "each class; at least two classes are needed, with two patients each"
            )
        folds = StratifiedGroupKFold(min(MAX_FOLDS, *num_patients), shuffle=True, random_state=0)
        self.folds = list(folds.split(self.y, self.y, self.patients))
        self.paths, self.reader = paths, SliceReader(image_processor, slices_per_volume=1)
        fits = 4 * len(paths) * image_processor.size["height"] * image_processor.size["width"] <= MAX_CACHE_BYTES
        self.images = list(self._images()) if fits else None
        if not fits:  # all are read once, so that a bad file is refused now
            for _ in self._images():
                pass

    def auc(self, encoder: MammoDinoModel) -> float:
        """Return the AUC over all files, each predicted from other patients' files (of several classes the macro
        average)."""
        images = self._images() if self.images is None else self.images
        keyed = ((None, image.inputs) for image in images)
        features = np.stack([row for _, row in extract_features(encoder, keyed, pool="both", batch_size=BATCH_SIZE)])
        classifier = nearest_neighbors(min(len(learn) for learn, _ in self.folds))
        probabilities = cross_val_predict(classifier, features, self.y, cv=self.folds, method="predict_proba")
        return auc(self.y, probabilities)

    def _images(self) -> Iterator[RenderedSlice]:
        for images in read_files(self.paths, self.reader):
            if isinstance(images, str):
                raise ValueError(f"knn_labels={self.labels}: {images}; take that row out")
            yield from images
