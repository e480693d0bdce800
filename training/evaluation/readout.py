"""One readout for every row: encoders, trained or not, hand-crafted features and baselines are asked in one way.

A whole image is read by the class token, or what stands for it. A region is read around its center: patch tokens at a
fine stride, by encoding the canvas shifted by fractions of a patch, and of those the mean in rings about the center.
One breast against the other is the difference of their features in one view. What makes features is a `Reader`;
everything else is common. Fixed on learning patients (docs/trials.md).
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedGroupKFold
from torch import nn

from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.rendering import Placement
from modeling_mammodino.tools.features import read_files
from modeling_mammodino.tools.files import atomic_file
from training.evaluation.detection.data import LesionImageRenderer

from .probes import logistic_regression

BATCH_SIZE = 32
FOLDS = 5
RING_FRACTION = 1 / 64  # of the canvas' height: width of a ring
NUM_RINGS = 5
WINDOW_FRACTION = 1 / 4  # side of the square around a center that is encoded
SHIFTS_PER_PATCH = 2  # along each axis
MIN_TISSUE_FRACTION = 0.9  # of a box without lesion


class Canvas(NamedTuple):
    """One image as encoders see it."""

    image: np.ndarray  # (H, W) uint8 or uint16
    tissue: np.ndarray  # (h, w) float32, the breast fraction of each patch
    placement: Placement  # of the source


class Reader(Protocol):
    """What makes features of canvases (B, 1, H, W) float32 in 0..1, of which tissue (B, h, w) is the breast fraction of
    each patch."""

    patch_size: int

    def whole(self, pixels: torch.Tensor, tissue: torch.Tensor) -> torch.Tensor:
        """Return (B, F), a feature an image."""

    def places(self, pixels: torch.Tensor, tissue: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Return (B, h, w, D), a feature a patch, of those `wanted` (B, h, w) bool, which alone may be seen."""


class EncoderReader:
    """A MammoDINO encoder. Background is dropped; of a region the tokens of its window are encoded, in their places."""

    def __init__(self, encoder: MammoDinoModel, processor: MammoDinoImageProcessor, bf16: bool = False):
        self.encoder, self.patch_size, self.bf16 = encoder.eval(), processor.patch_size, bf16
        self.mean, self.std = processor.mean_and_std

    def whole(self, pixels: torch.Tensor, tissue: torch.Tensor) -> torch.Tensor:
        return self._states(pixels, tissue)[:, 0]

    def places(self, pixels: torch.Tensor, tissue: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        states = self._states(pixels, wanted.float())
        return states[:, 1 + self.encoder.config.num_register_tokens :].unflatten(1, tuple(wanted.shape[1:]))

    def _states(self, pixels: torch.Tensor, tissue: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            return self.encoder((pixels - self.mean) / self.std, tissue_mask=tissue).last_hidden_state


def render(
    files: Sequence[Path], processor: MammoDinoImageProcessor, frames: Sequence[int | None] | None = None
) -> list[Canvas | str]:
    """Render of each file one frame, the middle slice where it is None; or why the file cannot be used."""
    renderer = LesionImageRenderer(processor)

    def read(item: tuple[Path, int | None]):
        file, frame = item
        return renderer(str(file), None if frame is None else [frame], slices_per_volume=1)

    found = read_files(list(zip(files, frames or [None] * len(files), strict=True)), read)
    return [each if isinstance(each, str) else Canvas(each[0].image, each[0].tissue, each[0].placement)
            for each in found]  # fmt: skip


def render_once(
    files: Sequence[Path],
    processor: MammoDinoImageProcessor,
    cache: Path | None,
    frames: Sequence[int | None] | None = None,
) -> list[Canvas | str]:
    """Like `render`, kept in a folder for the next encoder with an equal image processor."""
    if cache is None:
        return render(files, processor, frames)
    key = json.dumps([processor.to_dict(), file_stamps(files), frames], sort_keys=True, default=str)
    path = cache / f"canvases-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if not path.is_file():
        found = render(files, processor, frames)
        usable = [each for each in found if isinstance(each, Canvas)]
        if not usable:
            return found
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream,
                image=np.stack([each.image for each in usable]),
                tissue=np.stack([each.tissue for each in usable]),
                placement=np.stack([each.placement for each in usable]),
                refused=np.array([each if isinstance(each, str) else "" for each in found]),
            )
    with np.load(path) as kept:
        parts = zip(*(kept[name] for name in ("image", "tissue", "placement")), strict=True)
        canvases = (Canvas(image, tissue, Placement(*place.tolist())) for image, tissue, place in parts)
        return [str(reason) if reason else next(canvases) for reason in kept["refused"]]


def file_stamps(files: Sequence[Path]) -> list[tuple[str | int, ...]]:
    """Return what changes where one of several files, or their order, does: for the name of what is made of them."""
    found = [(file, file.stat() if file.is_file() else None) for file in files]
    return [(str(file), at.st_size, at.st_mtime_ns) if at else (str(file),) for file, at in found]


def _batches(canvases: Sequence[Canvas]):
    """Yield a slice of the canvases, their pixels (B, 1, H, W) in 0..1 and tissue (B, h, w)."""
    for start in range(0, len(canvases), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        images = np.stack([each.image for each in canvases[part]])
        unit = images.astype(np.float32) * np.float32(1 / np.iinfo(images.dtype).max)
        yield (
            part,
            torch.from_numpy(unit)[:, None],
            torch.from_numpy(np.stack([each.tissue for each in canvases[part]])),
        )


@torch.inference_mode()
def whole_features(reader: Reader, canvases: Sequence[Canvas]) -> np.ndarray:
    """Return (n, F) float32."""
    return torch.cat([reader.whole(pixels, tissue).float() for _, pixels, tissue in _batches(canvases)]).numpy()


@torch.inference_mode()
def region_features(reader: Reader, canvases: Sequence[Canvas], centers: np.ndarray) -> np.ndarray:
    """Return (n, NUM_RINGS * D) float32: the mean of the patch tokens in each ring around a center, from the middle.

    centers (n, 2) float64, y and x on the canvas in pixels. A token lies where the middle of its patch lies.
    """
    found, stride = [], max(1, reader.patch_size // SHIFTS_PER_PATCH)
    for part, pixels, tissue in _batches(canvases):
        here = torch.from_numpy(centers[part]).float()
        parts, counts = [], []
        for down, right in product(range(0, reader.patch_size, stride), repeat=2):
            shift = torch.tensor([down, right])
            rings, wanted = _rings(tissue.shape[1:], pixels.shape[2], reader.patch_size, here - shift)
            features = reader.places(_shifted(pixels, down, right), tissue, wanted).float()  # (B, h, w, D)
            parts.append(torch.einsum("brhw,bhwd->brd", rings, features))
            counts.append(rings.sum((2, 3)))
        means = torch.stack(parts).sum(0) / torch.stack(counts).sum(0).clamp_min(1)[..., None]  # (B, NUM_RINGS, D)
        found.append(means.flatten(1))
    return torch.cat(found).numpy()


def _shifted(pixels: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Move the canvas up and left, black coming in."""
    height, width = pixels.shape[2:]
    return nn.functional.pad(pixels[:, :, down:, right:], (0, right, 0, down))[:, :, :height, :width]


def _rings(grid: Sequence[int], height: int, patch: int, centers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tokens lie in which ring, (B, NUM_RINGS, h, w) float32, and in the window, (B, h, w) bool."""
    y, x = (torch.arange(side) * patch + patch / 2 for side in grid)
    down = (y - centers[:, :1])[:, :, None]  # (B, h, 1)
    right = (x - centers[:, 1:])[:, None]  # (B, 1, w)
    radius = torch.hypot(down, right) / (RING_FRACTION * height)
    rings = torch.stack([(radius >= ring) & (radius < ring + 1) for ring in range(NUM_RINGS)], dim=1)
    wanted = torch.maximum(down.abs(), right.abs()) <= WINDOW_FRACTION * height / 2
    return rings.float(), wanted | rings.any(dim=1)


def place_centers(canvases: Sequence[Canvas], boxes: Sequence[np.ndarray | None]) -> np.ndarray:
    """Return centers (n, 2), y and x on the canvas, of boxes (4,) x0, y0, x1, y1 in pixels of the source. An image
    without a box gets the place of another's, in an order drawn once: the first at which it has tissue."""
    rng, placed = np.random.default_rng(0), {
        row: canvases[row].placement.boxes(box[None])[0] for row, box in enumerate(boxes) if box is not None
    }  # fmt: skip
    sites = list(placed.values())
    for row in range(len(boxes)):
        if row not in placed:
            order = [sites[number] for number in rng.permutation(len(sites))]
            fit = (box for box in order if tissue_in_box(canvases[row], box) >= MIN_TISSUE_FRACTION)
            placed[row] = next(fit, order[0])
    corners = np.array([placed[row] for row in range(len(boxes))])
    return (corners[:, [1, 0]] + corners[:, [3, 2]]) / 2


def tissue_in_box(canvas: Canvas, box: np.ndarray) -> float:
    """Return the breast fraction of the patches that a box (4,) on the canvas touches, by the area in it."""
    patch = canvas.image.shape[0] // canvas.tissue.shape[0]
    inside = [
        np.clip(np.minimum((np.arange(n) + 1) * patch, high) - np.maximum(np.arange(n) * patch, low), 0, None)
        for n, low, high in zip(canvas.tissue.shape, box[[1, 0]], box[[3, 2]], strict=True)
    ]
    weights = np.outer(*inside)
    return float((weights * canvas.tissue).sum() / max(weights.sum(), 1e-6))


def breast_differences(features: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Subtract from features (n, F) the mean of their group (n,), such as a patient's images in one view."""
    return features - pd.DataFrame(features).groupby(groups).transform("mean").to_numpy()


class Answers(NamedTuple):
    """What was asked and answered of held-out images."""

    labels: np.ndarray  # (n,) int from 0
    probabilities: np.ndarray  # (n, classes)
    patients: np.ndarray  # (n,)


def held_out_answers(
    features: np.ndarray, labels: np.ndarray, patients: np.ndarray, is_train: np.ndarray | None = None
) -> Answers:
    """Learn a linear head from features (n, F), labels (n,) int from 0, and answer for other patients: for all images
    in folds of patients, or, where is_train (n,) says from which to learn, for the others.

    Raises ValueError where fewer than two classes or fewer patients than folds are there.
    """
    if len(np.unique(labels)) < 2 or len(np.unique(patients)) < FOLDS:
        raise ValueError(f"{len(np.unique(labels))} classes of {len(np.unique(patients))} patients; too few")
    if is_train is None:
        drawn = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0).split(features, labels, patients)
        tested = np.ones(len(labels), bool)
    else:
        drawn, tested = iter([(np.flatnonzero(is_train), np.flatnonzero(~is_train))]), ~is_train
        if shared := set(patients[is_train]) & set(patients[tested]):
            raise ValueError(f"patient {min(shared)} is in train and test; give each patient one split")
        if len(np.unique(labels[is_train])) < 2:
            raise ValueError("one class to learn from; give others the split train, too")
    predicted = np.zeros((len(labels), labels.max() + 1))
    for learn, test in drawn:
        head = logistic_regression(labels[learn], patients[learn]).fit(features[learn], labels[learn])
        predicted[np.ix_(test, head.classes_)] = head.predict_proba(features[test])
    return Answers(labels[tested], predicted[tested], patients[tested])
