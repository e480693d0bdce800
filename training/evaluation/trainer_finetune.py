"""Full and low-rank fine-tuning with transformers' Trainer: stops early, goes on after a kill, repeats by its seed."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from .evaluate_metrics import MammographyScores
from .feature_cache import worker_options
from .finetune_settings import LEARNING_RATES, FinetuneSettings
from .image_classifier import ImageClassifier
from .training_pictures import LabelledImages, SeededSampler, collate_images

logger = logging.getLogger(__name__)


class FinetuneTrainer(Trainer):
    """A Trainer whose order of images is a function of seed and epoch, and whose workers are spawned."""

    def __init__(self, *args: Any, sampler: SeededSampler, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sampler = sampler

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self.args.train_batch_size, self.sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._loader(eval_dataset or self.eval_dataset, self.args.eval_batch_size, None)

    def _loader(self, images: LabelledImages, batch_size: int, sampler: SeededSampler | None) -> DataLoader:
        num_workers = self.args.dataloader_num_workers
        loader = DataLoader(
            images,
            batch_size,
            sampler=sampler,
            collate_fn=collate_images,
            persistent_workers=num_workers > 0,
            pin_memory=self.args.device.type == "cuda",
            **worker_options(num_workers),
        )
        return self.accelerator.prepare(loader)


def train_classifier(
    classifier: ImageClassifier,
    train: LabelledImages,
    validation: LabelledImages,
    sample_weights: np.ndarray | None,
    scores: MammographyScores,
    settings: FinetuneSettings,
    folder: Path,
) -> dict[str, Any]:
    """Trains `classifier` in place and leaves it with the weights of the best epoch; returns what there is to say.

    A checkpoint an epoch stands in `folder`. Called again after a kill, it goes on from the last whole one, and repeats
    no epoch; what comes out is the same.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,  # the best is kept beside
        load_best_model_at_end=True,
        metric_for_best_model=settings.metric_for_best_model,
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,  # the patience that is left
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate or LEARNING_RATES[settings.mode],
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_fraction,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),  # said aloud, or bf16 is refused
        dataloader_num_workers=settings.dataloader_num_workers,
        seed=settings.seed,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
    )
    metric = f"eval_{settings.metric_for_best_model}"
    arguments._n_gpu = min(arguments.n_gpu, 1)  # slices of an image are not split over GPUs
    set_seed(settings.seed)
    trainer = FinetuneTrainer(
        classifier,
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=scores.of_trainer,
        callbacks=[EarlyStoppingCallback(settings.early_stopping_patience)],
        sampler=SeededSampler(len(train), settings.seed, settings.augment, sample_weights),
    )
    last = find_checkpoint(folder)
    if last is None or not _state(last)["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:
        if last:
            logger.info("going on from %s", last)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    state = _state(find_checkpoint(folder))
    best = folder / f"checkpoint-{state['best_global_step']}"
    classifier.load_state_dict(load_file(best / SAFE_WEIGHTS_NAME))
    classifier.eval()
    validation_scores = [
        {"epoch": line["epoch"], metric: line[metric], "eval_loss": line["eval_loss"]}
        for line in state["log_history"]
        if metric in line
    ]
    return {"best_score": state["best_metric"], "validation_scores": validation_scores}


def find_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint; one that a kill left half-written is removed."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            _state(path)
            return path
        except (OSError, ValueError):
            logger.warning("%s: only half-written; removed", path)
            shutil.rmtree(path)
    return None


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text())  # the last file that a checkpoint gets
