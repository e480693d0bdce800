"""What every Trainer here shares: an order of images that is a function of seed and epoch, and a safe way to resume."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from modeling_mammodino.tools.features import worker_options
from training.settings import generator

from .run_settings import RunSettings

logger = logging.getLogger(__name__)

FINETUNE_ORDER_STREAM = 16


class SeededSampler(Sampler):
    """An epoch of (position, draw), or of positions alone where nothing is drawn for augmentation.

    `weights` (n,), where given, are how likely each image is drawn, with replacement; else each comes once, shuffled.
    The order is a function of seed and epoch: a resumed run has that of the uninterrupted one.
    """

    def __init__(self, num_images: int, seed: int, augment: bool, weights: np.ndarray | None = None):
        self.num_images, self.seed, self.augment, self.weights, self.epoch = num_images, seed, augment, weights, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int | tuple[int, int]]:
        rng = generator(self.seed, FINETUNE_ORDER_STREAM, self.epoch)
        if self.weights is None:
            order = rng.permutation(self.num_images)
        else:
            order = rng.choice(self.num_images, self.num_images, p=self.weights / self.weights.sum())
        for count, position in enumerate(order.tolist()):
            yield (position, self.epoch * self.num_images + count) if self.augment else position


class SeededTrainer(Trainer):
    """A Trainer whose order of images is that of a `SeededSampler`, and whose workers are spawned."""

    def __init__(self, *args: Any, sampler: SeededSampler, collate: Callable, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sampler, self.collate = sampler, collate

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self.args.train_batch_size, self.sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._loader(eval_dataset or self.eval_dataset, self.args.eval_batch_size, None)

    def _loader(self, images: Any, batch_size: int, sampler: SeededSampler | None) -> DataLoader:
        num_workers = self.args.dataloader_num_workers
        loader = DataLoader(
            images,
            batch_size,
            sampler=sampler,
            collate_fn=self.collate,
            persistent_workers=num_workers > 0,
            pin_memory=self.args.device.type == "cuda",
            **worker_options(num_workers),
        )
        return self.accelerator.prepare(loader)

    def resume(self) -> dict[str, Any]:
        """Train to the end, from the last whole checkpoint in `output_dir` on if there is one; return the last
        state."""
        folder = Path(str(self.args.output_dir))
        if last := find_checkpoint(folder):
            logger.info("going on from %s", last)
        self.train(resume_from_checkpoint=str(last) if last else None)
        self.accelerator.wait_for_everyone()  # the main process writes
        return last_state(folder)


def epoch_arguments(settings: RunSettings, folder: Path, **more: Any) -> TrainingArguments:
    """Return arguments of a cosine schedule with an evaluation and a checkpoint an epoch in `folder`.

    Fields of `settings` that carry a name of TrainingArguments mean the same; `more` takes precedence.
    """
    names = {field.name for field in fields(TrainingArguments)} - {"gradient_checkpointing"}  # see prepare_encoder
    arguments = TrainingArguments(
        **{name: value for name, value in asdict(settings).items() if name in names}
        | {
            "output_dir": str(folder),
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "lr_scheduler_type": "cosine",
            "warmup_steps": settings.warmup_fraction,
            "use_cpu": not torch.accelerator.is_available(),  # explicit, or bf16 is refused
            "logging_strategy": "epoch",
            "report_to": "none",
            "remove_unused_columns": False,
            "label_names": ["labels"],
        }
        | more
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # slices of an image and lists of boxes are not split over GPUs
    return arguments


def prepare_encoder(encoder: PreTrainedModel, settings: RunSettings) -> None:
    """Set stochastic depth and gradient checkpointing for its training. Raises ValueError where it has none."""
    if settings.drop_path_rate:
        layers: list[Any] = [each for each in encoder.modules() if hasattr(each, "drop_path_rate")]
        if not layers:
            raise ValueError(
                f"drop_path_rate={settings.drop_path_rate}: {type(encoder).__name__} has none that can be set; "
                "MammoDINO has"
            )
        for each in (*layers, encoder.config):
            each.drop_path_rate = settings.drop_path_rate
    if settings.gradient_checkpointing:
        encoder.gradient_checkpointing_enable({"use_reentrant": False})


def find_checkpoint(folder: Path) -> Path | None:
    """Return the last whole checkpoint; one that a kill left half-written is removed."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())  # the last file that a checkpoint gets
            return path
        except (OSError, ValueError):
            logger.warning("%s: only half-written; removed", path)
            shutil.rmtree(path)
    return None


def last_state(folder: Path) -> dict[str, Any]:
    """Return Trainer's state at the last whole checkpoint in `folder`, empty where there is none."""
    last = find_checkpoint(folder)
    return json.loads((last / TRAINER_STATE_NAME).read_text()) if last else {}
