"""What every Trainer here shares: an order of pictures that is a function of seed and epoch, and a safe way back."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from .finetuning.feature_cache import worker_options
from .finetuning.pictures import SeededSampler

logger = logging.getLogger(__name__)


class SeededTrainer(Trainer):
    """A Trainer whose order of pictures is a function of seed and epoch, and whose workers are spawned."""

    def __init__(self, *args: Any, sampler: SeededSampler, collate: Callable, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sampler, self.collate = sampler, collate

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self.args.train_batch_size, self.sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._loader(eval_dataset or self.eval_dataset, self.args.eval_batch_size, None)

    def _loader(self, pictures: Dataset, batch_size: int, sampler: SeededSampler | None) -> DataLoader:
        num_workers = self.args.dataloader_num_workers
        loader = DataLoader(
            pictures,
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
