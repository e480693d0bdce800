"""Gram anchoring (Siméoni et al. 2025, DINOv3): patches stay as alike as an earlier teacher saw them."""

import torch


def gram_loss(
    student_patches: torch.Tensor, gram_teacher_patches: torch.Tensor, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over images of the mean squared difference of the two Gram matrices of L2-normalized patch features.

        for each image: mean over kept patches i, j of (x_i . x_j - y_i . y_j)^2

    student_patches x and gram_teacher_patches y (n, N, D), the latter without gradient; keep (n, N) bool: the patches
    that count, None for all. An image without any counts as zero. Returns a scalar float32.
    """
    with torch.autocast(student_patches.device.type, enabled=False):
        keep = torch.ones_like(student_patches[..., 0]) if keep is None else keep
        grams = []
        for patches in (student_patches, gram_teacher_patches):
            directions = torch.nn.functional.normalize(patches.float(), dim=-1) * keep.float().unsqueeze(-1)
            grams.append(directions @ directions.transpose(1, 2))  # (n, N, N), zero where a patch does not count
        squares = (grams[0] - grams[1]).square().sum(dim=(1, 2))  # (n,)
        return (squares / keep.float().sum(dim=1).square().clamp_min(1)).mean()
