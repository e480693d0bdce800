"""Images with boxes for a detector: files rendered as the encoder sees them, boxes of lesions moved with them."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from dataset_scripts.corpus.bcs_dbt_volumes import BcsDbtViews
from dataset_scripts.corpus.reader import decode_png, encode_png
from modeling_mammodino import InvalidImageError, MammoDinoImageProcessor
from modeling_mammodino.dicom import frame_order, is_dicom
from modeling_mammodino.rendering import Placement, place_on_canvas, standardize
from training.settings import generator

from .boxes import BoxedImage

logger = logging.getLogger(__name__)

DETECTION_AUGMENT_STREAM = 18
MAX_SCALE, MAX_SHIFT_FRACTION, MAX_LOG_GAMMA = 0.15, 0.05, 0.3  # our choice, mild
MIN_VISIBLE_FRACTION = 0.25  # a box of which less is on the canvas is no target


class LesionImage(NamedTuple):
    """One mammogram or slice on the encoder's canvas."""

    frame: int  # as boxes count: frames of the file from 0
    num_frames: int
    image: np.ndarray  # (H, W) uint8 or uint16
    tissue: np.ndarray  # (h, w) float32, the breast fraction of each patch
    placement: Placement  # of the source
    source_shape: tuple[int, int]
    mask: tuple[float, str] = (float("nan"), "")  # confidence of the breast mask, 0 to 1, and what limits it


@dataclass(frozen=True)
class LesionImageRenderer:
    """Files to images, by a checkpoint's image processor; picklable, for workers.

    Attributes:
        views: corrects the orientation of BCS-DBT's volumes.
    """

    processor: MammoDinoImageProcessor
    views: BcsDbtViews | None = None

    @property
    def canvas(self) -> tuple[int, int]:
        return self.processor.size["height"], self.processor.size["width"]

    def __call__(
        self, file: str, frames: Sequence[int] | None = None, slices_per_volume: int = 0
    ) -> Iterator[LesionImage]:
        """Yield those `frames` of a volume, or so many evenly spaced slices, 0: all. Raises InvalidImageError or
        OSError."""
        processor, settings = self.processor, self.processor.render_settings
        order = frames_in_order(file, frames or ())
        wanted = None if frames is None else [order.index(frame) for frame in frames]
        correct = self.views.correction(file) if self.views else None
        for mammogram, rendered in processor.render_source(
            file, settings.canvas, slices_per_volume=slices_per_volume, correct=correct, slices=wanted
        ):
            placed = place_on_canvas(rendered.image, rendered.tissue, settings, rendered.placement)
            frame = order[mammogram.slice_index] if len(order) > 1 else 0
            small, tissue = rendered.small, placed.tissue_mask
            mask = (small.confidence, small.warning)
            yield LesionImage(frame, len(order), placed.image, tissue, placed.placement, small.source_shape, mask)

    def inputs(self, image: np.ndarray, tissue: np.ndarray) -> np.ndarray:
        """Return what a detector takes, (2, H, W) float32: the standardized image, and its tissue patch by patch."""
        spread = np.kron(tissue, np.ones((self.processor.patch_size,) * 2, np.float32))
        return np.stack((standardize(image, *self.processor.mean_and_std), spread))


def frames_in_order(file: str, wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the frames of a file in order of position. Raises InvalidImageError where one that is wanted is none."""
    order = frame_order(file) if is_dicom(file) else (0,)
    if outside := [frame for frame in wanted if not 0 <= frame < len(order)]:
        raise InvalidImageError(file, f"has {len(order)} slices, from 0; slice {outside[0]} was asked for")
    return order


def render_training_images(
    images: list[BoxedImage],
    renderer: LesionImageRenderer,
    slices_per_volume: int,
    lesion_slice_reach: int,
    cache_dir: Path,
    num_proc: int,
) -> tuple[datasets.Dataset, dict[str, str]]:
    """Render each image once and keep it, losslessly; return the rows, and why images were refused by image_id.

    Of a volume with lesions the slices of its boxes and so many before and after, which then have the box, too; of one
    without, evenly spaced slices. Rows are memory-mapped; made again by the same call, they are found in `cache_dir`.
    """
    plane = datasets.Value("binary")
    boxes = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
    features = datasets.Features(
        {
            **{name: datasets.Value("string") for name in ("image_id", "patient_id", "refused")},
            **{name: datasets.Value("int64") for name in ("frame", "hidden")},
            **{"image": plane, "tissue": datasets.Sequence(datasets.Value("float32")), "boxes": boxes},
        }
    )
    rows = datasets.Dataset.from_generator(
        _training_rows,
        features=features,
        cache_dir=str(cache_dir),
        gen_kwargs={
            "images": images,
            "stamps": [_stamp(each.file) for each in images],  # a file that was changed is rendered anew
            "renderer": renderer,
            "slices_per_volume": slices_per_volume,
            "lesion_slice_reach": lesion_slice_reach,
        },
        num_proc=min(num_proc, len(images)) if num_proc > 1 else None,
    )
    reasons = rows["refused"][:]
    refused = {rows[row]["image_id"]: why for row, why in enumerate(reasons) if why}
    for why in refused.values():
        logger.warning("left out: %s", why)
    if hidden := sum(rows["hidden"][:]):
        logger.warning("%d boxes lie mostly outside the image, which is cropped to the breast: no targets", hidden)
    return rows.select([row for row, why in enumerate(reasons) if not why]), refused


def _training_rows(
    images: list[BoxedImage],
    stamps: list,
    renderer: LesionImageRenderer,
    slices_per_volume: int,
    lesion_slice_reach: int,
) -> Iterator[dict[str, Any]]:
    for image in images:
        about = {"image_id": image.image_id, "patient_id": image.patient_id, "refused": ""}
        try:
            for each in renderer(image.file, _lesion_frames(image, lesion_slice_reach), slices_per_volume):
                near = (each.num_frames == 1) | (np.abs(image.lesion_slices - each.frame) <= lesion_slice_reach)
                lesions = image.lesions[near]
                boxes = visible_boxes(each.placement.boxes(lesions), renderer.canvas)
                yield about | {
                    "frame": each.frame,
                    "hidden": len(lesions) - len(boxes),
                    "image": encode_png(each.image),
                    "tissue": each.tissue.ravel(),
                    "boxes": boxes.tolist(),
                }
        except (InvalidImageError, OSError) as refusal:
            empty = {"frame": 0, "hidden": 0, "image": b"", "tissue": [], "boxes": []}
            yield about | empty | {"refused": " ".join(str(refusal).split())}


def _lesion_frames(image: BoxedImage, reach: int) -> list[int] | None:
    """Return the slices with boxes and those within reach, of a volume; None of a mammogram or where there is no
    lesion."""
    if not len(image.lesions) or not is_dicom(image.file) or (depth := len(frame_order(image.file))) == 1:
        return None
    if (image.lesion_slices < 0).any():
        raise InvalidImageError(image.file, "a box of a volume has no slice; add it to the boxes")
    boxed = set(image.lesion_slices.tolist())  # one beyond the volume stays, to be refused
    near = {frame + step for frame in boxed for step in range(-reach, reach + 1)}
    return sorted(boxed | {frame for frame in near if 0 <= frame < depth})


def _stamp(file: str) -> tuple[int, int]:
    status = Path(file).stat()
    return status.st_size, status.st_mtime_ns


def visible_boxes(boxes: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Cut boxes (n, 4) at the canvas (height, width); those of which too little is left are dropped."""
    cut = np.clip(boxes, 0, [canvas[1], canvas[0], canvas[1], canvas[0]])
    before, after = (np.prod(each[:, 2:] - each[:, :2], axis=1) for each in (boxes, cut))
    return cut[after >= np.maximum(MIN_VISIBLE_FRACTION * before, 1e-6)]


class DetectionImages(Dataset):
    """Rows of `render_training_images` for training. An item is asked for by position, or by (position, draw) to be
    changed at random: `pixel_values` (2, H, W) and `labels` as transformers' detectors take them."""

    def __init__(self, rows: datasets.Dataset, renderer: LesionImageRenderer, seed: int):
        self.rows, self.renderer, self.seed = rows, renderer, seed
        self.has_lesion = np.array([len(boxes) > 0 for boxes in rows["boxes"][:]], bool)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        position, draw = index if isinstance(index, tuple) else (index, None)
        row, (height, width) = self.rows[position], self.renderer.canvas
        image = decode_png(row["image"])
        patch_size = self.renderer.processor.patch_size
        tissue = np.array(row["tissue"], np.float32).reshape(height // patch_size, width // patch_size)
        boxes = np.array(row["boxes"], float).reshape(-1, 4)
        if draw is not None:
            image, tissue, boxes = augment(generator(self.seed, DETECTION_AUGMENT_STREAM, draw), image, tissue, boxes)
        return {
            "pixel_values": torch.from_numpy(self.renderer.inputs(image, tissue)),
            "labels": {
                "class_labels": torch.zeros(len(boxes), dtype=torch.long),
                "boxes": torch.from_numpy(to_centers(boxes, (height, width))).float(),
            },
        }


def collate_images(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return pixel_values (B, 2, H, W), labels: a list of B dicts."""
    return {
        "pixel_values": torch.stack([each["pixel_values"] for each in items]),
        "labels": [each["labels"] for each in items],
    }


def augment(
    rng: np.random.Generator, image: np.ndarray, tissue: np.ndarray, boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an image (H, W), its tissue (h, w) and boxes (n, 4) scaled, shifted, flipped upside down in half of the
    draws, and given another gamma, which leaves black and white as they are."""
    (height, width), flip, scale, *shift, gamma = image.shape, *rng.random(5)
    scale = 1 + MAX_SCALE * (2 * scale - 1)
    shift_x, shift_y = MAX_SHIFT_FRACTION * (2 * np.array(shift) - 1) * (width, height) + (0, (1 - scale) * height / 2)
    placement = Placement(scale, shift_x, -scale if flip < 0.5 else scale, height - shift_y if flip < 0.5 else shift_y)
    patch = height // tissue.shape[0]
    full_scale = np.iinfo(image.dtype).max
    levels = np.arange(full_scale + 1) / full_scale
    table = np.rint(full_scale * levels ** np.exp(MAX_LOG_GAMMA * (2 * gamma - 1))).astype(image.dtype)
    fine = np.kron(tissue, np.ones((patch, patch), np.float32))
    tissue = _moved(fine, placement).reshape(*(s for n in tissue.shape for s in (n, patch))).mean(axis=(1, 3))
    return table[_moved(image, placement)], tissue, visible_boxes(placement.boxes(boxes), (height, width))


def _moved(plane: np.ndarray, placement: Placement) -> np.ndarray:
    """Return the plane under a placement, on a canvas of its own size; black comes in from outside."""
    scale_x, shift_x, scale_y, shift_y = placement
    centers = np.array(  # OpenCV counts from pixels' centers
        [[scale_x, 0, shift_x + (scale_x - 1) / 2], [0, scale_y, shift_y + (scale_y - 1) / 2]]
    )
    return cv2.warpAffine(plane, centers, plane.shape[::-1], flags=cv2.INTER_LINEAR)


def to_centers(boxes: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Convert corners in pixels to center x, center y, width, height, as fractions of the canvas (height, width)."""
    size = np.array([canvas[1], canvas[0]])
    return np.concatenate(((boxes[:, :2] + boxes[:, 2:]) / 2 / size, (boxes[:, 2:] - boxes[:, :2]) / size), axis=1)


def to_corners(boxes: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Invert `to_centers`."""
    size = np.array([canvas[1], canvas[0]])
    middle, half = boxes[:, :2] * size, boxes[:, 2:] * size / 2
    return np.concatenate((middle - half, middle + half), axis=1)
