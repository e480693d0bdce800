"""The first loss that is no number, found without asking the device in every step."""

import math

import torch
from accelerate import Accelerator

from ..recipe import RunRecipe
from ..views.sample import PretrainingViews


class FiniteWatch:
    """Notes on the device, and is asked where the run waits for the device anyway: at log lines and checkpoints.

    What the loss was made of is then known by number alone, for a sample is a function of its index.
    """

    def __init__(self, views: PretrainingViews, run: RunRecipe, accelerator: Accelerator):
        self.views, self.run, self.accelerator = views, run, accelerator
        self.first = torch.full((), math.inf, dtype=torch.float64, device=accelerator.device)  # forward, by number

    def note(self, loss: torch.Tensor, forward: int) -> None:
        self.first = torch.where(torch.isfinite(loss.detach()), self.first, self.first.clamp(max=forward))

    def check(self) -> None:
        """Raises RuntimeError with the step and the samples at fault. Every process calls it."""
        firsts = self.accelerator.gather(self.first.reshape(1)).tolist()
        forward = min(firsts)
        if math.isinf(forward):
            return
        batch, process = self.run.per_device_train_batch_size, firsts.index(forward)
        start = (int(forward) * len(firsts) + process) * batch
        rows = [self.views.row_of(index) for index in range(start, start + batch)]
        raise RuntimeError(
            f"step {int(forward) // self.run.gradient_accumulation_steps + 1}: the loss is not finite; samples {start} "
            f"to {start + batch - 1}, corpus rows {rows}. The last good checkpoint in {self.run.output_dir} stands; "
            "lower learning_rate or max_grad_norm, or look at these rows"
        )
