"""Agreement of several views: embeddings of one group, such as a patient's images, are drawn to their mean (LeJEPA)."""

import torch

from .distributed import gather_rows


def view_agreement_loss(embeddings: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of each embedding to the mean of its group, over images and dimensions.

        mean_{b, d}((z_bd - mean_{c in group(b)} z_cd)^2)

    embeddings z (B, D); groups (B,) int64, any numbers, equal within a group over all processes. Alone it collapses:
    a regularizer of the batch (VISReg, SIGReg, coding rate) stands beside it. Returns a scalar float32.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = gather_rows(embeddings.float())
        groups = gather_rows(groups)
        is_same = groups[:, None] == groups
        first = is_same.int().argmax(dim=1)  # image of each one's group; `unique` would wait for the device
        sums = torch.zeros_like(embeddings).index_add(0, first, embeddings)
        return (embeddings - sums[first] / is_same.sum(dim=1, keepdim=True)).square().mean()
