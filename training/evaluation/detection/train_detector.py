"""Training of a detector with transformers' Trainer: resumes after a kill, repeats by its seed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import RTDetrForObjectDetection, set_seed
from transformers.trainer_utils import EvalPrediction

from training.evaluation.layer_decay import decayed_groups
from training.evaluation.run_settings import DetectionSettings
from training.evaluation.seeded_trainer import SeededSampler, SeededTrainer, epoch_arguments, prepare_encoder

from .data import DetectionImages, collate_images, to_corners
from .detector import cell_loss
from .lesion_metrics import FALSE_POSITIVES, Found, average_precision, coco_matches, froc_marks, sensitivity_at


class DetectionTrainer(SeededTrainer):
    """A loss of each cell beside the detector's own, and boxes and scores alone as predictions."""

    def __init__(self, *args: Any, cell_loss_weight: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.cell_loss_weight = cell_loss_weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        height, width = inputs["pixel_values"].shape[-2:]
        patch_size = self.model.config.backbone_config.patch_size
        grid = (2 * (height // patch_size), 2 * (width // patch_size))
        loss = outputs.loss + self.cell_loss_weight * cell_loss(outputs.enc_outputs_class, inputs["labels"], grid)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, (outputs.logits.float(), outputs.pred_boxes.float()), inputs["labels"]

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # save_pretrained writes older names of some weights, which Trainer would pass over without a word
        saved = type(self.model).from_pretrained(resume_from_checkpoint)
        self.model.load_state_dict(saved.state_dict())


def train_detector(
    detector: RTDetrForObjectDetection,
    train: DetectionImages,
    validation: DetectionImages,
    settings: DetectionSettings,
    folder: Path,
) -> dict[str, Any]:
    """Train `detector` in place, to the end of its schedule; return losses and validation scores by epoch.

    A checkpoint an epoch stands in `folder`. Called again after a kill, it resumes from the last whole one.
    """
    arguments = epoch_arguments(
        settings,
        folder,
        save_total_limit=1,
        eval_do_concat_batches=False,  # boxes differ in number
    )
    prepare_encoder(detector.model.backbone.model.encoder, settings)
    set_seed(settings.seed)
    canvas = train.renderer.canvas
    trainer = DetectionTrainer(
        detector,
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=lambda predictions: validation_scores(predictions, canvas, settings),
        optimizers=(make_optimizer(detector, settings), None),
        sampler=SeededSampler(
            len(train), settings.seed, settings.augment, lesion_weights(train.has_lesion, settings.lesion_share)
        ),
        collate=collate_images,
        cell_loss_weight=settings.cell_loss_weight,
    )
    history = trainer.resume()["log_history"]
    detector.eval()
    by_epoch: dict[float, dict[str, float]] = {}
    for line in history:
        kept = {name: line[name] for name in line if name in ("loss", "eval_loss") or name.startswith(PREFIXES)}
        by_epoch.setdefault(line["epoch"], {}).update(kept)
    return {"epochs": [{"epoch": epoch, **line} for epoch, line in by_epoch.items() if "eval_loss" in line]}


PREFIXES = ("eval_map", "eval_sensitivity")


def make_optimizer(detector: RTDetrForObjectDetection, settings: DetectionSettings) -> torch.optim.Optimizer:
    """Make AdamW: a slower rate for the encoder, by layers where that is asked for, which stays as it is where it is
    frozen, and no decay of vectors."""
    encoder: nn.Module = detector.model.backbone.model.encoder
    encoder.requires_grad_(not settings.freeze_encoder)
    of_encoder = {id(parameter) for parameter in encoder.parameters()}
    rest = [each for each in detector.named_parameters() if id(each[1]) not in of_encoder]

    def groups(parameters: Any, learning_rate: float, decay: float) -> list[dict]:
        return decayed_groups(parameters, learning_rate, settings.weight_decay, lambda _, each: each.ndim > 1, decay)

    return torch.optim.AdamW(
        groups(rest, settings.learning_rate, 1.0)
        + groups(encoder.named_parameters(), settings.encoder_learning_rate, settings.layerwise_decay)
    )


def lesion_weights(has_lesion: np.ndarray, lesion_share: float) -> np.ndarray | None:
    """Return how likely each image is drawn, so that `lesion_share` of them have a lesion; None where all are alike."""
    if lesion_share == 0 or has_lesion.all() or not has_lesion.any():
        return None
    return np.where(has_lesion, lesion_share / has_lesion.sum(), (1 - lesion_share) / (~has_lesion).sum())


def validation_scores(
    predictions: EvalPrediction, canvas: tuple[int, int], settings: DetectionSettings
) -> dict[str, float]:
    """Return mAP and sensitivities over images, before boxes are merged; in training only, to monitor it."""
    found, none = [], np.zeros(0, int)
    for (logits, boxes), labels in zip(predictions.predictions, predictions.label_ids, strict=True):
        for of, each, label in zip(logits, boxes, labels, strict=True):
            corners = to_corners(each.astype(float), canvas)
            lesions = to_corners(label["boxes"].astype(float), canvas)
            scores = 1 / (1 + np.exp(-of[:, 0].astype(float)))
            found.append(Found("", "", 1, lesions, np.zeros(len(lesions), int), corners, none, scores))
    marks, (map_50, map_) = froc_marks(found, settings.hit, settings.hit_iou), average_precision(coco_matches(found))
    sensitivities = {f"sensitivity_at_{each}": sensitivity_at(marks, each) for each in FALSE_POSITIVES}
    return {"map_50": map_50, "map": map_, **sensitivities}
