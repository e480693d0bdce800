"""Full and low-rank fine-tuning with transformers' Trainer: stops early, resumes after a kill, repeats by its seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import datasets
import evaluate
import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, set_seed
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_mammodino import InvalidImageError
from training.evaluation.backbones.preprocessing import Preprocessing
from training.evaluation.layer_decay import decayed_groups
from training.evaluation.metrics import METRICS, metric_names, score
from training.evaluation.run_settings import LEARNING_RATES, FinetuneSettings
from training.evaluation.runs import this_process
from training.evaluation.seeded_trainer import SeededSampler, SeededTrainer, epoch_arguments, last_state
from training.settings import generator

from .image_classifier import ImageClassifier

FINETUNE_AUGMENT_STREAM = 17
MAX_TURN_DEGREES, MAX_SCALE, MAX_SHIFT_FRACTION = 10.0, 0.1, 0.05


class LabeledImages(Dataset):
    """Files with labels. An item is asked for by position, or by (position, draw) to be changed at random."""

    def __init__(
        self, preprocess: Preprocessing, files: list[str], labels: np.ndarray, slices_per_volume: int, seed: int = 0
    ) -> None:
        self.preprocess, self.files, self.labels = preprocess, files, labels
        self.slices_per_volume, self.seed = slices_per_volume, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[list[dict[str, np.ndarray]], int]:
        """Return its slices and its label. Raises InvalidImageError where the file, once usable, no longer is."""
        position, draw = index if isinstance(index, tuple) else (index, None)
        try:
            slices: list[dict[str, np.ndarray]] = [
                *self.preprocess(self.files[position], slices_per_volume=self.slices_per_volume)
            ]
        except OSError as error:
            raise InvalidImageError(self.files[position], f"cannot be read ({error.strerror})") from error
        if draw is not None:
            slices = augment(generator(self.seed, FINETUNE_AUGMENT_STREAM, draw), slices)
        return slices, int(self.labels[position])


def collate_images(items: list[tuple[list[dict[str, np.ndarray]], int]]) -> dict[str, torch.Tensor]:
    """Return the slices of B images in one row: pixel_values (N, C, H, W), tissue_mask (N, h, w) where there is one,
    num_slices (B,) of each image, labels (B,)."""
    slices = [each for of_image, _ in items for each in of_image]
    batch = {name: torch.from_numpy(np.stack([each[name] for each in slices])) for name in slices[0]}
    batch["num_slices"] = torch.tensor([len(of_image) for of_image, _ in items])
    batch["labels"] = torch.tensor([label for _, label in items])
    return batch


def augment(rng: np.random.Generator, slices: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Return the slices of one image under one random flip left to right, turn, scale and shift; what comes in from
    outside has the least value of its image. A tissue mask goes along, on its own grid. Our choice, mild."""
    flip, turn, scale, *shifts = rng.random(5)
    degrees, factor = MAX_TURN_DEGREES * (2 * turn - 1), 1 + MAX_SCALE * (2 * scale - 1)
    shift = MAX_SHIFT_FRACTION * (2 * np.array(shifts) - 1)

    def change(plane: np.ndarray) -> np.ndarray:
        height, width = plane.shape
        matrix: np.ndarray = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, factor)
        matrix[:, 2] += shift * (width, height)
        plane = np.ascontiguousarray(plane[:, ::-1] if flip < 0.5 else plane)
        border = float(plane.min())
        return cv2.warpAffine(plane, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=border)

    changed = []
    for each in slices:
        planes = {"pixel_values": np.stack([change(plane) for plane in each["pixel_values"]])}
        if "tissue_mask" in each:
            planes["tissue_mask"] = change(each["tissue_mask"])
        changed.append(planes)
    return changed


class MammographyScores(evaluate.Metric):
    """`compute(predictions=..., references=...)`: probabilities (n, C) and labels (n,) 0..C-1 -> one number a metric.

    Args:
        num_classes: C.
        ordered: whether the classes have an order, as densities have: quadratic kappa is given then.
        metrics: names of METRICS; None: all that such a task has.

    Usable as `compute_metrics` of transformers' Trainer through `of_trainer`. Works without a network.
    """

    def __init__(self, num_classes: int, ordered: bool = True, metrics: Sequence[str] | None = None, **kwargs):
        if unknown := [name for name in metrics or () if name not in METRICS]:
            raise ValueError(f"metric {unknown[0]!r}: must be one of {', '.join(METRICS)}")
        self.num_classes = num_classes
        self.metrics = list(metrics or metric_names(num_classes, ordered))
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="AUC, average precision, F1, balanced accuracy, quadratic kappa, sensitivity at fixed "
            "specificity. Research use only.",
            citation="",
            inputs_description="predictions: probabilities of the C classes; references: class numbers",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        labels, probabilities = np.asarray(references), np.asarray(predictions, float)
        if probabilities.ndim != 2 or probabilities.shape[1] != self.num_classes:
            raise ValueError(f"predictions have shape {probabilities.shape}, not (n, {self.num_classes})")
        if not np.isfinite(probabilities).all():
            raise ValueError("predictions are not finite: training diverged; lower learning_rate, or leave bf16 off")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(f"references go from {labels.min()} to {labels.max()}, not 0 to {self.num_classes - 1}")
        return {name: score(labels, probabilities, name) for name in self.metrics}

    def of_trainer(self, predictions: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        """Score the predictions of a model that returns logarithms of probabilities, or logits."""
        logits, labels = predictions
        logits = logits.astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return self.compute(predictions=exponentials / exponentials.sum(axis=1, keepdims=True), references=labels)


class ClassifierTrainer(SeededTrainer):
    """The optimizer of Trainer, with layer-wise decay of the encoder's learning rate."""

    def __init__(self, *args: Any, layerwise_decay: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.layerwise_decay = layerwise_decay

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.layerwise_decay < 1:
            classifier: Any = self.model
            decaying = set(self.get_decay_parameter_names(classifier))
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, classifier)
            groups = []
            for part, decay in (("backbone", self.layerwise_decay), ("head", 1.0)):
                named = getattr(classifier, part).named_parameters(prefix=part)
                rates = (self.args.learning_rate, self.args.weight_decay)
                groups += decayed_groups(named, *rates, lambda name, _: name in decaying, decay)
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)


def train_classifier(
    classifier: ImageClassifier,
    train: LabeledImages,
    validation: LabeledImages,
    sample_weights: np.ndarray | None,
    scores: MammographyScores,
    settings: FinetuneSettings,
    folder: Path,
) -> dict[str, Any]:
    """Train `classifier` in place and leave it with the weights of the best epoch; return what there is to say.

    A checkpoint an epoch stands in `folder`. Called again after a kill, it resumes from the last whole one, and repeats
    no epoch; the outcome is the same. Several processes share each step: it is of as many images as there are processes
    times the batch, and the main one writes.
    """
    arguments = epoch_arguments(
        settings,
        folder,
        learning_rate=settings.learning_rate or LEARNING_RATES[settings.mode],
        save_total_limit=2,  # the best is kept beside
        load_best_model_at_end=True,
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,  # the patience that is left
        logging_nan_inf_filter=False,
    )
    metric = f"eval_{settings.metric_for_best_model}"
    set_seed(settings.seed)
    trainer = ClassifierTrainer(
        classifier,
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=scores.of_trainer,
        callbacks=[EarlyStoppingCallback(settings.early_stopping_patience)],
        sampler=SeededSampler(len(train), settings.seed, settings.augment, sample_weights),
        collate=collate_images,
        layerwise_decay=settings.layerwise_decay,
    )
    with this_process().main_process_first():  # it removes what a kill left half-written
        state = last_state(folder)
    if not state or not state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:
        state = trainer.resume()
    best = folder / f"checkpoint-{state['best_global_step']}"
    classifier.load_state_dict(load_file(best / SAFE_WEIGHTS_NAME))
    classifier.eval()
    validation_scores = [
        {"epoch": line["epoch"], metric: line[metric], "eval_loss": line["eval_loss"]}
        for line in state["log_history"]
        if metric in line
    ]
    return {"best_score": state["best_metric"], "validation_scores": validation_scores}
