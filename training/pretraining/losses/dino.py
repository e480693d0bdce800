"""DINO loss on class tokens (Caron et al. 2021; DINOv2: Oquab et al. 2023)."""

import torch


def dino_loss(
    student_logits: torch.Tensor,
    teacher_probabilities: torch.Tensor,
    student_temperature: float = 0.1,
    ignore_diagonal: bool = False,
) -> torch.Tensor:
    """Sum over (student crop, teacher crop) pairs of the mean cross-entropy over the batch.

        for s in student crops: for t in teacher crops:
            unless ignore_diagonal and s == t: loss += mean_b(-sum_k p_t[b, k] * log softmax(z_s[b] / tau)[k])

    student_logits (S, B, K), teacher_probabilities (T, B, K) -> scalar float32. The caller divides by the number of
    all pairs, L * G + G * (G - 1), as DINOv2 does.
    """
    with torch.autocast(student_logits.device.type, enabled=False):  # which runs einsum in half precision
        log_probabilities = torch.log_softmax(student_logits.float() / student_temperature, dim=-1)  # (S, B, K)
        pairs = -torch.einsum("sbk,tbk->st", log_probabilities, teacher_probabilities.float())  # (S, T)
        if ignore_diagonal:
            pairs = pairs * (1 - torch.eye(*pairs.shape, device=pairs.device))
        return pairs.sum() / student_logits.shape[1]
