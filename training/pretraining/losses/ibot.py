"""iBOT loss on masked patches (Zhou et al. 2022), as DINOv2 weights it."""

import torch

from .cross_entropy import Logits, Probabilities, cross_entropy


def ibot_loss(
    student_logits: Logits,
    teacher_probabilities: Probabilities,
    masks: torch.Tensor,
    places: torch.Tensor,
    student_temperature: float = 0.1,
) -> torch.Tensor:
    """Mean over all global crops of each crop's mean cross-entropy over its masked patches.

    student_logits and teacher_probabilities (M, K), the masked patches in the order of `places` (M,), those of what is
    true in the flattened masks (C, N) bool, C = G * B global crops. Crops without a mask count in the divisor
    (dinov2/loss/ibot_patch_loss.py). Returns a scalar float32, zero where nothing is masked.
    """
    masked_per_crop = masks.sum(dim=1, keepdim=True).clamp_min(1)  # (C, 1)
    weights = (1.0 / masked_per_crop).expand_as(masks).flatten().index_select(0, places)  # (M,)
    return cross_entropy(student_logits, teacher_probabilities, student_temperature, weights) / masks.shape[0]
