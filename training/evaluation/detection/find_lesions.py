"""A trained detector on whole images: every slice, with boxes carried back to the source and merged in depth."""

import logging
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import RTDetrForObjectDetection

from modeling_mammodino.tools.command import show_progress
from modeling_mammodino.tools.features import read_files
from training.evaluation.run_settings import DetectionSettings

from .boxes import BoxedImage
from .data import LesionImage, LesionImageRenderer
from .detector import detect
from .lesion_metrics import Found, best_scores, hits, merge_boxes

logger = logging.getLogger(__name__)


def find_lesions(
    detector: RTDetrForObjectDetection,
    images: list[BoxedImage],
    renderer: LesionImageRenderer,
    settings: DetectionSettings,
) -> tuple[list[Found], dict[str, str]]:
    """Return what the detector finds in each image, in pixels of the source, the best box first; and why images were
    refused, by image_id."""
    read = partial(renderer, slices_per_volume=settings.test_slices_per_volume)
    of_files = read_files([image.file for image in images], read, settings.dataloader_num_workers)
    detector.eval()
    found, refused = [], {}
    for image, slices in zip(show_progress(images, desc="detect", unit="image"), of_files, strict=True):
        if isinstance(slices, str):
            logger.warning("left out: %s", slices)
            refused[image.image_id] = slices
        else:
            found.append(find_in_slices(detector, image, slices, renderer, settings))
    return found, refused


def find_in_slices(
    detector: RTDetrForObjectDetection,
    image: BoxedImage,
    slices: list[LesionImage],
    renderer: LesionImageRenderer,
    settings: DetectionSettings,
) -> Found:
    """Return what the detector finds in an image, as `find_lesions`, from its slices."""
    boxes, frames, scores = [], [], []
    size = settings.per_device_eval_batch_size
    for start in range(0, len(slices), size):
        batch = slices[start : start + size]
        inputs = torch.from_numpy(np.stack([renderer.inputs(each.image, each.tissue) for each in batch]))
        with torch.autocast(detector.device.type, torch.bfloat16, enabled=settings.bf16):
            detections = detect(detector, inputs)
        for each, (of_canvas, of_boxes) in zip(batch, detections, strict=True):
            height, width = each.source_shape
            boxes.append(np.clip(each.placement.inverse().boxes(of_canvas), 0, [width, height, width, height]))
            frames.append(np.full(len(of_boxes), each.frame))
            scores.append(of_boxes)
    all_boxes, all_frames, all_scores = np.concatenate(boxes), np.concatenate(frames), np.concatenate(scores)
    depth = slices[0].num_frames
    kept = merge_boxes(all_boxes, all_frames, all_scores, depth, settings.merge_iou)
    return Found(
        image.image_id,
        image.patient_id,
        depth,
        image.lesions,
        image.lesion_slices,
        all_boxes[kept],
        all_frames[kept],
        all_scores[kept],
        min(each.mask for each in slices),
    )


def prediction_table(found: list[Found], rule: str, iou_threshold: float) -> pd.DataFrame:
    """Return a row a predicted box: x0, y0, x1, y1 in pixels of the source, slice (of a volume, from 0; else -1),
    score, whether it hits a lesion, image_id, patient_id, num_slices."""
    parts = []
    for each in found:
        slices = each.slices if each.num_slices > 1 else np.full(len(each.slices), -1)
        is_hit = hits(each, rule, iou_threshold).any(axis=1)
        parts.append(_rows(each, each.boxes, slices, score=each.scores, hit=is_hit))
    return pd.concat(parts, ignore_index=True)


def lesion_table(found: list[Found], rule: str, iou_threshold: float) -> pd.DataFrame:
    """Return a row a true box, with the best score that hits it, missing where none does."""
    parts = []
    for each in found:
        best = best_scores(each, hits(each, rule, iou_threshold))
        best = np.where(np.isfinite(best), best, np.nan)
        parts.append(_rows(each, each.lesions, each.lesion_slices, score=best))
    return pd.concat(parts, ignore_index=True)


def _rows(found: Found, boxes: np.ndarray, slices: np.ndarray, **columns: Any) -> pd.DataFrame:
    corners = dict(zip(("x0", "y0", "x1", "y1"), boxes.T, strict=True))
    about = {"image_id": found.image_id, "patient_id": found.patient_id, "num_slices": found.num_slices}
    return pd.DataFrame({**corners, "slice": slices, **columns}).assign(**about)
