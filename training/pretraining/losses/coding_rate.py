"""Coding rate (SimDINOv2, Wu et al. 2025): the volume that the embeddings of a batch span, to be made large."""

import torch

from .distributed import gather_rows


def coding_rate_loss(embeddings: torch.Tensor, epsilon: float = 0.05) -> torch.Tensor:
    """Negative coding rate of L2-normalized embeddings, scaled as SimDINOv2 does.

        -gamma / 2 logdet(I + D / (B epsilon) Z^T Z),   gamma = (D + B) / (D B)

    embeddings Z (B, D), B the images of all processes. Returns a scalar float32, at most 0; 0 would be no spread at
    all. Its covariance is that of all processes: with few images in each it collapses otherwise (SimDINO's issues).
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        directions = torch.nn.functional.normalize(gather_rows(embeddings.float()), dim=-1)
        count, width = directions.shape
        gram = directions.T @ directions if width <= count else directions @ directions.T  # of equal determinant
        spread = torch.eye(len(gram), device=gram.device) + width / (count * epsilon) * gram
        return -(width + count) / (width * count) / 2 * torch.linalg.slogdet(spread).logabsdet
