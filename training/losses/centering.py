"""Teacher targets by centering (Caron et al. 2021, DINO): the short recipe's alternative to Sinkhorn-Knopp."""

import torch
from torch import nn

from .processes import sum_over_processes


class Centering(nn.Module):
    """softmax((z - c) / temperature), c an exponential moving average of the batch mean of z.

    The centre applied at a step is the one known after the step before (dinov2/loss/dino_clstoken_loss.py).
    """

    center: torch.Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    @torch.no_grad()
    def forward(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """logits (n, K) -> probabilities (n, K) float32. Updates the centre for the next step by the mean over all
        processes; each must call it, also with n = 0."""
        probabilities = torch.softmax((logits.float() - self.center) / temperature, dim=-1)
        total = torch.cat((logits.float().sum(dim=0), logits.new_tensor([float(logits.shape[0])]).float()))
        total = sum_over_processes(total)
        mean, any_sample = total[:-1] / total[-1].clamp_min(1), total[-1:] > 0  # an `if` would wait for the device
        self.center.add_((mean - self.center) * any_sample, alpha=1 - self.momentum)
        return probabilities
