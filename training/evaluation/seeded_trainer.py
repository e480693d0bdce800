"""What every Trainer here shares: an order of images that is a function of seed and epoch, and a safe way back."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from training.evaluation.finetuning.feature_cache import worker_options
from training.evaluation.finetuning.images import SeededSampler

logger = logging.getLogger(__name__)


def epoch_arguments(settings: Any, folder: Path, **more: Any) -> TrainingArguments:
    """A cosine schedule, and an evaluation and a checkpoint an epoch in `folder`. Fields of the dataclass `settings`
    that carry a name of TrainingArguments mean the same; `more` goes before them."""
    names = {field.name for field in fields(TrainingArguments)}
    arguments = TrainingArguments(
        **{name: value for name, value in asdict(settings).items() if name in names}
        | {
            "output_dir": str(folder),
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "lr_scheduler_type": "cosine",
            "warmup_steps": settings.warmup_fraction,
            "use_cpu": not torch.accelerator.is_available(),  # said aloud, or bf16 is refused
            "logging_strategy": "epoch",
            "report_to": "none",
            "remove_unused_columns": False,
            "label_names": ["labels"],
        }
        | more
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # slices of an image and lists of boxes are not split over GPUs
    return arguments


class SeededTrainer(Trainer):
    """A Trainer whose order of images is a function of seed and epoch, and whose workers are spawned."""

    def __init__(self, *args: Any, sampler: SeededSampler, collate: Callable, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sampler, self.collate = sampler, collate

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self.args.train_batch_size, self.sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._loader(eval_dataset or self.eval_dataset, self.args.eval_batch_size, None)

    def _loader(self, images: Dataset, batch_size: int, sampler: SeededSampler | None) -> DataLoader:
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


def find_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint; one that a kill left half-written is removed."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            read_state(path)
            return path
        except (OSError, ValueError):
            logger.warning("%s: only half-written; removed", path)
            shutil.rmtree(path)
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text())  # the last file that a checkpoint gets
