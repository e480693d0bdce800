"""Seeing a run: progress bar, TensorBoard, a JSON line a log step, and the signs of collapse."""

import json
import logging
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ..recipe import RunRecipe

logger = logging.getLogger(__name__)


@torch.no_grad()
def target_statistics(probabilities: torch.Tensor) -> dict[str, float]:
    """Entropy of teacher targets (n, K), as fractions of ln K.

    `target_entropy`: of each sample's target, averaged; 1 means that the teacher says nothing (the entropy wall).
    `prototype_entropy`: of the mean target; 0 means that every sample has the same target (collapse).
    """
    probabilities = probabilities.float().flatten(0, -2)
    entropy = -torch.xlogy(probabilities, probabilities).sum(-1).mean()
    mean = probabilities.mean(0)
    spread = -torch.xlogy(mean, mean).sum()
    scale = math.log(probabilities.shape[-1])
    return {"target_entropy": float(entropy) / scale, "prototype_entropy": float(spread) / scale}


@torch.no_grad()
def feature_rank(features: torch.Tensor) -> float:
    """RankMe (Garrido et al. 2023): exp of the entropy of the singular values of features (n, D), at most min(n, D)."""
    values = torch.linalg.svdvals(features.float())
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


class Monitor:
    """Meters of one process; only the main process writes. Times split into waiting for data and computing."""

    def __init__(self, run: RunRecipe, first_step: int, global_batch_size: int, is_main: bool):
        self.run, self.global_batch_size, self.is_main = run, global_batch_size, is_main
        self.progress = tqdm(total=run.max_steps, initial=first_step, unit="step", disable=not is_main, desc="pretrain")
        self.writer = self.lines = None
        if is_main:
            logs = Path(run.output_dir) / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            self.lines = (logs / "log.jsonl").open("a")
            if run.report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(logs))
        self.data_seconds, self.steps_since_log = 0.0, 0
        self.last_log = time.monotonic()

    def wait(self, iterator):
        """The iterator, with the time spent waiting for it counted."""
        while True:
            started = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.data_seconds += time.monotonic() - started
            yield item

    def step(self, step: int) -> bool:
        """Counts a finished step (1-based); True where a log line is due."""
        self.steps_since_log += 1
        self.progress.update()
        return step % self.run.logging_steps == 0 or step == self.run.max_steps

    def log(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        seconds = max(now - self.last_log, 1e-9)
        values = {
            **values,
            "images_per_second": self.steps_since_log * self.global_batch_size / seconds,
            "data_wait_fraction": self.data_seconds / seconds,
        }
        self.last_log, self.data_seconds, self.steps_since_log = now, 0.0, 0
        if not self.is_main:
            return
        if values["prototype_entropy"] < 0.1:
            logger.warning("step %d: collapse: every image gets the same target", step)
        shown = {key: f"{value:.3g}" for key, value in values.items() if key.startswith("loss") or "/s" in key}
        self.progress.set_postfix(shown | {"img/s": f"{values['images_per_second']:.1f}"})
        self.lines.write(json.dumps({"step": step, **values}) + "\n")
        self.lines.flush()
        if self.writer:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.progress.close()
        for each in (self.writer, self.lines):
            if each:
                each.close()
