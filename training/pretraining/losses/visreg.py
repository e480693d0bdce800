"""VISReg (arXiv 2606.02572): a Gaussian shape along random directions keeps the embeddings of a batch apart."""

import torch

from .distributed import from_first_process, gather_rows


def visreg_loss(embeddings: torch.Tensor, num_directions: int = 256) -> torch.Tensor:
    """Mean and scale terms over dimensions, and a sliced shape term over random directions.

        mean_d(mu_d^2) + mean_d((sigma_d - 1)^2)
        + mean_{k, i}((sort_i(y . a_k) - sqrt(2) erfinv(2 i / (B + 1) - 1))^2),   y = (z - mu) / stop_gradient(sigma)

    embeddings z (B, D), B the images of all processes; directions a (K, D) are drawn on the unit sphere from torch's
    generator, which training seeds anew for each step. The gradient does not vanish where all embeddings are equal.
    Returns a scalar float32. Written from the formula.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = gather_rows(embeddings.float())
        count, width = embeddings.shape
        mean, scale = embeddings.mean(dim=0), embeddings.std(dim=0) + 1e-4
        directions = from_first_process(torch.randn(width, num_directions, device=embeddings.device))
        directions = torch.nn.functional.normalize(directions, dim=0)
        standardized = (embeddings - mean) / scale.detach()
        ordered = (standardized @ directions).sort(dim=0).values  # (B, K)
        ranks = torch.arange(1, count + 1, device=embeddings.device) / (count + 1)
        quantiles = 2**0.5 * torch.erfinv(2 * ranks - 1)  # of the normal distribution
        return mean.square().mean() + (scale - 1).square().mean() + (ordered - quantiles[:, None]).square().mean()
