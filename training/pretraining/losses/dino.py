"""DINO loss on class tokens (Caron et al. 2021; DINOv2: Oquab et al. 2023)."""

import torch

from .cross_entropy import Logits, Probabilities, cross_entropy


def dino_loss(
    student_logits: Logits,
    teacher_probabilities: Probabilities,
    student_temperature: float = 0.1,
    ignore_diagonal: bool = False,
) -> torch.Tensor:
    """Sum over (student crop, teacher crop) pairs of the mean cross-entropy over the batch.

        for s in student crops: for t in teacher crops:
            unless ignore_diagonal and s == t: loss += mean_b(-sum_k p_t[b, k] * log softmax(z_s[b] / tau)[k])

    student_logits (S, B, K), teacher_probabilities (T, B, K) -> scalar float32. The caller divides by the number of
    all pairs, L * G + G * (G - 1), as DINOv2 does.
    """
    total = cross_entropy(student_logits, teacher_probabilities, student_temperature, None, ignore_diagonal)
    return total / student_logits.features.shape[1]
