"""How teacher logits become targets: by Sinkhorn-Knopp (Caron et al. 2020, SwAV; DINOv2's long recipe), or by centering
(Caron et al. 2021, DINO; its short recipe). Either is a softmax after one number a prototype is added to its logits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from training.pretraining.networks import Outputs, num_patch_prototypes
from training.pretraining.recipe import Recipe

from .cross_entropy import CHUNK_LOGITS, Logits, Probabilities, logit_chunks
from .distributed import max_over_processes, sum_over_processes


class Centering(nn.Module):
    """softmax((z - c) / temperature), c an exponential moving average of the batch mean of z.

    The center applied at a step is the one known after the step before (dinov2/loss/dino_clstoken_loss.py).
    """

    center: torch.Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    @torch.no_grad()
    def forward(self, logits: Logits, temperature: float) -> torch.Tensor:
        """Return the offset (K,) of n logits / temperature, and update the center for the next step by the mean over
        all processes; each must call it, also with n = 0."""
        offset = self.center[0] / -temperature
        with torch.autocast(logits.features.device.type, enabled=False):
            total = logits.features.float().sum(dim=0) @ logits.prototypes.float().T  # (K,)
        total = sum_over_processes(torch.cat((total, total.new_full((1,), len(logits.features)))))
        mean, any_sample = total[:-1] / total[-1].clamp_min(1), total[-1:] > 0  # an `if` would wait for the device
        self.center.add_((mean - self.center) * any_sample, alpha=1 - self.momentum)
        return offset


@torch.no_grad()
def sinkhorn_knopp(logits: Logits, temperature: float, num_iterations: int = 3) -> torch.Tensor:
    """Return the offset (K,) of n logits / temperature by which the rows of their softmax are soft assignments to K
    prototypes, every prototype used equally over all processes.

    Sinkhorn-Knopp scales the columns and rows of exp(logits / temperature) in turn, rows last: the logarithm of a
    column's factor is the offset, and rows are scaled by the softmax. So logits are made anew, chunk by chunk, for each
    iteration, unless they are few. Every process must call it, also with n = 0; the masses of columns are global.
    """
    logits = logits.over(temperature)
    num_logits = len(logits.features) * len(logits.prototypes)

    def chunks() -> Iterator[torch.Tensor]:
        return (chunk for _, (chunk,) in logit_chunks(logits))

    kept = [*chunks()] if num_logits <= CHUNK_LOGITS else []
    offset = torch.full((len(logits.prototypes),), -torch.inf, device=logits.prototypes.device)
    for chunk in kept or chunks():  # rows are not scaled yet: logarithms, which cannot overflow
        offset = torch.logaddexp(offset, chunk.float().logsumexp(dim=0))
    largest = max_over_processes(offset)
    offset = -largest - sum_over_processes((offset - largest).exp()).log()
    for _ in range(num_iterations - 1):
        mass = torch.zeros_like(offset)
        for chunk in kept or chunks():
            mass += Probabilities(logits, offset).of(chunk).sum(dim=0)
        offset = offset - sum_over_processes(mass).clamp_min(torch.finfo(torch.float32).tiny).log()
    return offset


class Targets(NamedTuple):
    """Probabilities over prototypes, each of the shape of its logits in `Outputs`; None where it has none."""

    global_cls: Probabilities | None  # (G, B, K)
    masked_patches: Probabilities | None  # (M, K)
    slice_cls: Probabilities | None  # (P, K)
    slice_patches: Probabilities | None  # (T, K)


class TeacherTargets(nn.Module):
    """The targets of each loss are balanced by themselves, as DINOv2's are, or have a center of their own: what one
    loss learns from does not depend on which others a recipe uses."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.centers = nn.ModuleDict()
        if recipe.loss.teacher_targets == "centering":
            for name in Targets._fields:
                is_patches = name.endswith("patches")
                width = num_patch_prototypes(recipe.model) if is_patches else recipe.model.num_prototypes
                self.centers[name] = Centering(width)

    @torch.no_grad()
    def forward(self, teacher: Outputs, temperature: float) -> Targets:
        return Targets(*(self.balance(name, getattr(teacher, name), temperature) for name in Targets._fields))

    def balance(self, name: str, logits: Logits | None, temperature: float) -> Probabilities | None:
        if logits is None:
            return None
        rows = logits._replace(features=logits.features.flatten(0, -2))
        offset = self.centers[name](rows, temperature) if self.centers else sinkhorn_knopp(rows, temperature)
        return Probabilities(logits.over(temperature), offset)
