"""What an encoder of the study knows: probes on held-out phantom patients, and neighbors and lesions of real slices.

Images are read and rendered once, then seen by every encoder, as whole breasts and as regions: a whole breast's feature
is a mean over hundreds of patches, of which a lesion has a few, so what an encoder knows of lesions is asked where they
are, as a detection head does. Hand-crafted features of the same images say how much there is to see.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from modeling_mammodino import InvalidImageError, MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.rendering import standardize
from modeling_mammodino.tools.features import SliceReader, extract_features, read_files
from training.evaluation.detection.data import LesionImage, LesionImageRenderer
from training.evaluation.metrics import auc
from training.evaluation.probes import logistic_regression, nearest_neighbors, read_labels

BATCH_SIZE = 64
HEADS = ("knn", "linear")


class StudyTask(NamedTuple):
    """One question of the study."""

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


class Example(NamedTuple):
    """What an encoder sees of one row of a table, and which patches its feature is of."""

    row: int
    pixel_values: np.ndarray  # (1, H, W) float32
    tissue_mask: np.ndarray  # (h, w) float32
    weights: np.ndarray  # (h, w) float32, of the mean over patches


class Evaluator:
    """Evaluates encoders of one recipe by `predictions` and `on_real_slices`. Volumes count, their 2D views do not."""

    def __init__(
        self,
        learn: Path,
        test: Path,
        image_processor: MammoDinoImageProcessor,
        slices_per_volume: int,
        real_slices: Path | None,
    ):
        self.tables: dict[str, pd.DataFrame] = {}
        self.examples: dict[tuple[str, str], list[Example]] = {}
        for part, labels in (("learn", learn), ("test", test)):
            table = read_labels(labels, COLUMNS)
            self.tables[part] = table = table[table["kind"] == "dbt"].reset_index(drop=True)
            paths = [labels.parent / file for file in table["file"]]
            self.examples[part, "breast"] = whole_slices(paths, image_processor, slices_per_volume)
            self.examples[part, "region"] = regions(table, labels.parent, image_processor)
        self.real = (
            RealSlices(real_slices / "slices.csv", real_slices / "slices", image_processor) if real_slices else None
        )

    def predictions(self, features_of: Callable[[Sequence[Example]], np.ndarray]) -> pd.DataFrame:
        """Return a row a task, head and test volume: image_id, patient_id, label and p_0 .. p_3."""
        features = {which: features_of(each) for which, each in self.examples.items()}
        found = (self._of_task(task, features["learn", task.seen], features["test", task.seen])
                 for task in TASKS.values())  # fmt: skip
        return pd.concat([each for task in found for each in task], ignore_index=True)

    def _of_task(self, task: StudyTask, learn: np.ndarray, test: np.ndarray) -> Iterator[pd.DataFrame]:
        seen, held_out = (self.tables[part]["lesion"].to_numpy() >= int(task.of_lesions) for part in ("learn", "test"))
        table, rows = self.tables["learn"][seen], self.tables["test"][held_out]
        classes, y = np.unique(table[task.column].astype(str), return_inverse=True)
        heads = (nearest_neighbors(len(y)), logistic_regression(y, table["patient"].to_numpy()))
        for name, head in zip(HEADS, heads, strict=True):
            probabilities = head.fit(learn[seen], y).predict_proba(test[held_out])
            columns = {
                "task": task.name,
                "head": name,
                "image_id": rows["file"].to_numpy(),
                "patient_id": rows["patient"].to_numpy(),
                "label": np.searchsorted(classes, rows[task.column].astype(str)),
            }
            yield pd.DataFrame(columns | {f"p_{number}": each for number, each in enumerate(probabilities.T)})

    def on_real_slices(self, encoder: MammoDinoModel, drops_background: bool) -> dict[str, Any]:
        """Return orderings of true neighbors, and the AUC of slices with a lesion box against those without, predicted
        from other patients; empty without real slices."""
        if self.real is None:
            return {}
        features, table = self.real.features(encoder, drops_background), self.real.table
        lesion = table["X"].notna().to_numpy().astype(int)
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(features, lesion, table["PatientID"])
        head = nearest_neighbors(len(lesion) // 2)
        predicted = cross_val_predict(head, features, lesion, cv=list(folds), method="predict_proba")
        return {
            "neighbors": self.real.orderings(features).to_dict("list"),
            "lesion_auc": auc(lesion, predicted),
            "num_slices": len(table),
            "num_with_lesion": int(lesion.sum()),
        }


def whole_slices(paths: Sequence[Path], image_processor: MammoDinoImageProcessor, slices: int) -> list[Example]:
    """Return so many evenly spaced slices of each file, 0: all; patches weigh as much as there is breast in them.

    Raises ValueError for a file that cannot be used: scores of other files are others.
    """
    examples, refused = [], []
    for row, images in enumerate(read_files(paths, SliceReader(image_processor, slices))):
        if isinstance(images, str):
            refused.append(images)
        else:
            examples += [Example(row, each.pixel_values, each.tissue_mask, each.tissue_mask) for each in images]
    if refused:
        raise ValueError(f"{len(refused)} of {len(paths)} files cannot be used: {refused[0]}")
    return examples


def features_of(encoder: MammoDinoModel, examples: Sequence[Example], drops_background: bool) -> np.ndarray:
    """Return (n, 3 * D) float32, a row a row of the table, the mean over its examples.

    A feature is the class token, the weighted mean of the patch tokens and their maximum where the weight is not 0.
    drops_background: as in the encoder's pretraining.
    """
    seen = ("pixel_values", "weights", "tissue_mask") if drops_background else ("pixel_values", "weights")
    keyed = ((each.row, {name: getattr(each, name) for name in seen}) for each in examples)
    features = extract_features(encoder, keyed, pool="all", batch_size=BATCH_SIZE)
    return mean_of_rows(examples, np.stack([feature for _, feature in features]))  # type: ignore[misc]  # no FileEnd


def mean_of_rows(examples: Sequence[Example], features: np.ndarray) -> np.ndarray:
    """Return (n, D) float32 of (examples, D): the mean over the examples of each row."""
    rows = np.array([each.row for each in examples])
    sums = np.zeros((rows.max() + 1, features.shape[1]))
    np.add.at(sums, rows, features.astype(np.float64))
    return (sums / np.bincount(rows)[:, None]).astype(np.float32)


# Regions: each lesion in its box at its own slice, and like places of breasts that have none.

WINDOW_FRACTION = 0.25  # of the canvas' height: side of what is seen around a box
MIN_TISSUE_FRACTION = 0.9  # of the box in a breast without a lesion


def regions(table: pd.DataFrame, folder: Path, image_processor: MammoDinoImageProcessor) -> list[Example]:
    """Return one for each volume of a phantom's table. A breast without a lesion gets place, size and slice from
    lesions of other patients, in an order drawn once: the first at whose place it has tissue.

    Raises ValueError for a file that cannot be used.
    """
    renderer = LesionImageRenderer(image_processor)
    found: dict[int, Example] = {}
    sites: list[tuple[int, np.ndarray]] = []  # slice of the file; box (4,) x0, y0, x1, y1 on the canvas
    for row in map(int, np.flatnonzero(table["lesion"] == 1)):
        here = table.iloc[row]
        image = _slice(renderer, folder / here["file"], int(here["lesion_slice"]))
        sites.append((image.frame, image.placement.boxes(here[["x0", "y0", "x1", "y1"]].to_numpy(float))[0]))
        found[row] = _window(row, renderer, image, sites[-1][1])
    rng = np.random.default_rng(0)
    for row in map(int, np.flatnonzero(table["lesion"] != 1)):
        order = [sites[number] for number in rng.permutation(len(sites))]
        image = _slice(renderer, folder / table["file"].iloc[row], order[0][0])
        windows = (_window(row, renderer, image, box) for _, box in order)
        fit = (each for each in windows if np.average(each.tissue_mask, weights=each.weights) >= MIN_TISSUE_FRACTION)
        found[row] = next(fit, None) or _window(row, renderer, image, order[0][1])
    return [found[row] for row in range(len(table))]


def _slice(renderer: LesionImageRenderer, file: Path, frame: int) -> LesionImage:
    try:
        return next(renderer(str(file), [frame]))
    except (InvalidImageError, OSError) as refusal:
        raise ValueError(str(refusal)) from refusal


def _window(row: int, renderer: LesionImageRenderer, image: LesionImage, box: np.ndarray) -> Example:
    """Return the window about a box, moved into the canvas where it reaches beyond; patches weigh as many pixels of
    the box as they hold."""
    patch, (height, width) = renderer.processor.patch_size, renderer.canvas
    x0, y0, x1, y1 = box
    grid = round(WINDOW_FRACTION * height / patch)
    # on the patch grid of the canvas, so that tissue is cut with the pixels
    row_, column = (
        int(np.clip(round((low + high) / 2 / patch - grid / 2), 0, side // patch - grid))
        for low, high, side in ((y0, y1, height), (x0, x1, width))
    )
    top, left = row_ * patch, column * patch
    edges = np.arange(grid + 1) * patch
    inside = [
        np.clip(np.minimum(edges[1:], high - start) - np.maximum(edges[:-1], low - start), 0, None)
        for low, high, start in ((y0, y1, top), (x0, x1, left))
    ]
    weights = np.outer(*inside).astype(np.float32)
    pixels = image.image[top : top + grid * patch, left : left + grid * patch]
    tissue = image.tissue[row_ : row_ + grid, column : column + grid]
    return Example(row, standardize(pixels, *renderer.processor.mean_and_std)[None], tissue, weights)


# Neighbor consistency: are the features of two slices of one volume closer than those of slices of other patients, of
# like density, so that density alone does not tell them apart?

LIKE_DENSITY_FRACTION = 0.5  # of the slices of other patients, those of the nearest density


class SlicePair(NamedTuple):
    """Two slices of one volume."""

    a: int  # rows of the table
    b: int
    distance_slices: int


class RealSlices:
    """Single slices of BCS-DBT with a table: file, PatientID, StudyUID, View, Slice (empty where it is not known)."""

    def __init__(self, table: Path, images: Path, image_processor: MammoDinoImageProcessor):
        self.table = pd.read_csv(table)
        self.slices = whole_slices([images / file for file in self.table["file"]], image_processor, 0)
        self.density = np.array([dense_fraction(each) for each in self.slices])
        number = self.table["Slice"]
        self.pairs = [
            SlicePair(int(a), int(b), int(abs(number[a] - number[b])))
            for _, rows in self.table.dropna(subset=["Slice"]).groupby(["PatientID", "StudyUID", "View"])
            for a, b in combinations(rows.index, 2)
            if number[a] != number[b]  # two lesions of one slice are one image
        ]

    def features(self, encoder: MammoDinoModel, drops_background: bool) -> np.ndarray:
        """Return (n, 2 * D) float32: class token and mean, as of `mammodino embed`; one patch sets a maximum."""
        return features_of(encoder, self.slices, drops_background)[:, : 2 * encoder.config.hidden_size]

    def others(self, row: int) -> np.ndarray:
        """Return the rows of other patients, those half of them whose density is nearest."""
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


def dense_fraction(image: Example) -> float:
    """Return a stand-in for density, which BCS-DBT does not give: the share of the breast's pixels that are brighter
    than half way between its 5th and 95th percentile; our choice."""
    patch = image.pixel_values.shape[-1] // image.tissue_mask.shape[-1]
    inside = np.kron(image.tissue_mask > 0.5, np.ones((patch, patch), bool))
    values = image.pixel_values[0][inside]
    low, high = np.percentile(values, [5, 95])
    return float(np.mean(values > (low + high) / 2))


# Hand-crafted features, of which we chose the list; nothing here is learned.

PERCENTILES = (1, 10, 50, 90, 99)
SCALES_PX = (0.7, 1.4, 2.8, 5.6, 11.0)  # standard deviations of the Gaussians
GRADIENT_SCALES = 3  # the image and its first two Gaussians
NUM_RINGS, RING_PX = 5, 4
MIN_WEIGHT = 0.3  # of the largest: patches that are the region


def hand_crafted_features(examples: Sequence[Example]) -> np.ndarray:
    """Return (n, 57) float32, a row a row of the table, the mean over its examples: brightness in the region and around
    it, differences of Gaussians, gradients along and across the radius, brightness by distance from the middle."""
    return mean_of_rows(examples, np.array([list(_measurements(each)) for each in examples]))


def _measurements(example: Example) -> Iterator[float]:
    image = example.pixel_values[0].astype(np.float32)
    patch = image.shape[0] // example.weights.shape[0]
    region = np.kron(example.weights > MIN_WEIGHT * example.weights.max(), np.ones((patch, patch), bool))
    rest = ~region if not region.all() else region
    inside = image[region]
    yield from (inside.mean(), inside.std(), *np.percentile(inside, PERCENTILES))
    yield from (image[rest].mean(), inside.mean() - image[rest].mean(), region.sum())

    smooth = [image, *(cv2.GaussianBlur(image, (0, 0), scale) for scale in SCALES_PX)]
    for finer, coarser in zip(smooth[:-1], smooth[1:], strict=True):
        band = finer - coarser
        of_region = band[region]
        spread = of_region.std() + 1e-6
        yield from (spread, of_region.max(), of_region.min(), np.percentile(of_region, 99))
        yield from (np.mean(of_region**4) / spread**4, spread / (band[rest].std() + 1e-6))

    down, right = (
        index - middle for index, middle in zip(np.indices(image.shape), np.argwhere(region).mean(axis=0), strict=True)
    )
    radius = np.hypot(down, right) + 1e-3
    for level in smooth[:GRADIENT_SCALES]:
        by_row, by_column = np.gradient(level)
        along = ((by_row * down + by_column * right) / radius)[region]
        across = ((by_column * down - by_row * right) / radius)[region]
        yield from (along.mean(), np.abs(along).mean(), np.abs(across).mean())
        yield np.log((np.mean(across**2) + 1e-6) / (np.mean(along**2) + 1e-6))
    for ring in range(NUM_RINGS):
        yield image[(radius >= ring * RING_PX) & (radius < (ring + 1) * RING_PX)].mean()
