"""A trained detector on whole images: every slice looked at, boxes carried back to the source and merged in depth."""

import logging
from collections.abc import Iterator

import numpy as np
import pandas
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import RTDetrForObjectDetection

from modeling_mammodino import InvalidImageError
from training.evaluation.finetuning.feature_cache import unchanged, worker_options

from .data import LesionImage, LesionImageRenderer
from .detector import detect
from .metrics import Found, hits, merge_boxes
from .settings import DetectionSettings
from .table import BoxedImage

logger = logging.getLogger(__name__)


class SourceImages(Dataset):
    """Images as the images of their slices, or why they were refused; picklable, for workers."""

    def __init__(self, images: list[BoxedImage], maker: LesionImageRenderer, slices_per_volume: int):
        self.images, self.maker, self.slices_per_volume = images, maker, slices_per_volume

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> list[LesionImage] | str:
        try:
            return list(self.maker(self.images[position].file, None, self.slices_per_volume))
        except (InvalidImageError, OSError) as refusal:
            return " ".join(str(refusal).split())


def find_lesions(
    detector: RTDetrForObjectDetection,
    images: list[BoxedImage],
    maker: LesionImageRenderer,
    settings: DetectionSettings,
) -> tuple[list[Found], dict[str, str]]:
    """What the detector finds in each image, in pixels of the source, the best box first; and why images were refused,
    by image_id."""
    slices_of = SourceImages(images, maker, settings.test_slices_per_volume)
    loader = DataLoader(
        slices_of, batch_size=None, collate_fn=unchanged, **worker_options(settings.dataloader_num_workers)
    )
    found, refused = [], {}
    for image, slices in zip(tqdm(images, desc="detect", unit="image"), loader, strict=True):
        if isinstance(slices, str):
            logger.warning("left out: %s", slices)
            refused[image.image_id] = slices
        else:
            found.append(_find(detector.eval(), image, slices, maker, settings))
    return found, refused


def _find(
    detector: RTDetrForObjectDetection,
    image: BoxedImage,
    slices: list[LesionImage],
    maker: LesionImageRenderer,
    settings: DetectionSettings,
) -> Found:
    boxes, frames, scores = [], [], []
    for each, (of_canvas, of) in zip(slices, _detections(detector, slices, maker, settings), strict=True):
        height, width = each.source_shape
        boxes.append(np.clip(each.placement.inverse().boxes(of_canvas), 0, [width, height, width, height]))
        frames.append(np.full(len(of), each.frame)), scores.append(of)
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
    )


def _detections(
    detector: RTDetrForObjectDetection,
    slices: list[LesionImage],
    maker: LesionImageRenderer,
    settings: DetectionSettings,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    size = settings.per_device_eval_batch_size
    for start in range(0, len(slices), size):
        batch = [maker.inputs(each.image, each.tissue) for each in slices[start : start + size]]
        with torch.autocast(detector.device.type, torch.bfloat16, enabled=settings.bf16):
            yield from detect(detector, torch.from_numpy(np.stack(batch)))


def prediction_table(found: list[Found], rule: str, iou_threshold: float) -> pandas.DataFrame:
    """A row a predicted box: image_id, patient_id, num_slices, slice (of a volume, from 0; else -1), x0, y0, x1, y1 in
    pixels of the source, score, and whether it hits a lesion."""
    parts = []
    for each in found:
        columns = dict(zip(("x0", "y0", "x1", "y1"), each.boxes.T, strict=True))
        about = {"image_id": each.image_id, "patient_id": each.patient_id, "num_slices": each.num_slices}
        slices = each.slices if each.num_slices > 1 else np.full(len(each.slices), -1)
        hit = hits(each, rule, iou_threshold).any(axis=1)
        parts.append(pandas.DataFrame({**columns, "slice": slices, "score": each.scores, "hit": hit}).assign(**about))
    return pandas.concat(parts, ignore_index=True)


def lesion_table(found: list[Found], rule: str, iou_threshold: float) -> pandas.DataFrame:
    """A row a true box, with the best score that hits it, missing where none does."""
    parts = []
    for each in found:
        columns = dict(zip(("x0", "y0", "x1", "y1"), each.lesions.T, strict=True))
        about = {"image_id": each.image_id, "patient_id": each.patient_id, "num_slices": each.num_slices}
        hit = hits(each, rule, iou_threshold)
        best = np.max(np.where(hit, each.scores[:, None], -np.inf), axis=0, initial=-np.inf)
        best = np.where(np.isfinite(best), best, np.nan)
        parts.append(pandas.DataFrame({**columns, "slice": each.lesion_slices, "score": best}).assign(**about))
    return pandas.concat(parts, ignore_index=True)
