"""Full and low-rank fine-tuning with transformers' Trainer: stops early, goes on after a kill, repeats by its seed."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, set_seed
from transformers.utils import SAFE_WEIGHTS_NAME

from training.evaluation.evaluate_metrics import MammographyScores
from training.evaluation.seeded_trainer import SeededTrainer, epoch_arguments, find_checkpoint, read_state

from .image_classifier import ImageClassifier
from .images import LabeledImages, SeededSampler, collate_images
from .settings import LEARNING_RATES, FinetuneSettings

logger = logging.getLogger(__name__)


def train_classifier(
    classifier: ImageClassifier,
    train: LabeledImages,
    validation: LabeledImages,
    sample_weights: np.ndarray | None,
    scores: MammographyScores,
    settings: FinetuneSettings,
    folder: Path,
) -> dict[str, Any]:
    """Trains `classifier` in place and leaves it with the weights of the best epoch; returns what there is to say.

    A checkpoint an epoch stands in `folder`. Called again after a kill, it goes on from the last whole one, and repeats
    no epoch; what comes out is the same.
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
    trainer = SeededTrainer(
        classifier,
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=scores.of_trainer,
        callbacks=[EarlyStoppingCallback(settings.early_stopping_patience)],
        sampler=SeededSampler(len(train), settings.seed, settings.augment, sample_weights),
        collate=collate_images,
    )
    last = find_checkpoint(folder)
    if last is None or not read_state(last)["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:
        if last:
            logger.info("going on from %s", last)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    state = read_state(find_checkpoint(folder))
    best = folder / f"checkpoint-{state['best_global_step']}"
    classifier.load_state_dict(load_file(best / SAFE_WEIGHTS_NAME))
    classifier.eval()
    validation_scores = [
        {"epoch": line["epoch"], metric: line[metric], "eval_loss": line["eval_loss"]}
        for line in state["log_history"]
        if metric in line
    ]
    return {"best_score": state["best_metric"], "validation_scores": validation_scores}
