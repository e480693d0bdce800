"""Teacher logits to targets: by Sinkhorn-Knopp (Caron et al. 2020, SwAV; DINOv2's long recipe), or by centering (Caron
et al. 2021, DINO; its short recipe).
"""

from typing import NamedTuple

import torch
from torch import nn

from training.pretraining.networks import Outputs, num_patch_prototypes
from training.pretraining.recipe import Recipe

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
    def forward(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return probabilities (n, K) float32 of logits (n, K), and update the center for the next step by the mean
        over all processes; each must call it, also with n = 0."""
        probabilities = torch.softmax((logits.float() - self.center) / temperature, dim=-1)
        total = torch.cat((logits.float().sum(dim=0), logits.new_tensor([float(logits.shape[0])]).float()))
        total = sum_over_processes(total)
        mean, any_sample = total[:-1] / total[-1].clamp_min(1), total[-1:] > 0  # an `if` would wait for the device
        self.center.add_((mean - self.center) * any_sample, alpha=1 - self.momentum)
        return probabilities


@torch.no_grad()
def sinkhorn_knopp(logits: torch.Tensor, temperature: float, num_iterations: int = 3) -> torch.Tensor:
    """Return soft assignments of n samples to K prototypes, every prototype used equally over all processes.

    logits (n, K) -> probabilities (n, K) float32, rows summing to 1. Every process must call it, also with n = 0.
    Row sums and totals are global, so the result does not depend on how samples are spread over processes.
    """
    scores = logits.float() / temperature
    largest = scores.max() if scores.numel() else scores.new_tensor(-torch.inf)
    largest = max_over_processes(largest)  # one shift for all: exact, and exp() cannot overflow
    assignment = torch.exp(scores - largest)  # (n, K)
    num_samples = sum_over_processes(torch.tensor(float(assignment.shape[0]), device=assignment.device))
    num_prototypes = assignment.shape[1]
    for _ in range(num_iterations):
        prototype_mass = sum_over_processes(assignment.sum(dim=0, keepdim=True))  # (1, K)
        assignment /= prototype_mass.clamp_min(torch.finfo(torch.float32).tiny) * num_prototypes
        assignment /= assignment.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) * num_samples
    return assignment * num_samples


class Targets(NamedTuple):
    """Probabilities over prototypes, each of the shape of its logits in `Outputs`; None where it has none."""

    global_cls: torch.Tensor | None  # (G, B, K)
    masked_patches: torch.Tensor | None  # (M, K)
    slice_cls: torch.Tensor | None  # (P, K)
    slice_patches: torch.Tensor | None  # (T, K)


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

    def balance(self, name: str, logits: torch.Tensor | None, temperature: float) -> torch.Tensor | None:
        if logits is None:
            return None
        rows = logits.flatten(0, -2)
        balanced = self.centers[name](rows, temperature) if self.centers else sinkhorn_knopp(rows, temperature)
        return balanced.view_as(logits)
