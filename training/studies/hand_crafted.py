"""Hand-crafted features: what dense regression predicts, measured. Nothing here is learned."""

import torch
from torch import nn

from training.pretraining.losses.dense_regression import DenseTargets

QUANTILES = (0.1, 0.5, 0.9)  # of the breast's patches


class HandCraftedReader:
    """The local statistics of a patch (brightness, bands of differences of Gaussians, orientation) at its place; of a
    whole image their mean, deviation and quantiles over the breast."""

    def __init__(self, canvas: tuple[int, int], patch_size: int):
        self.patch_size, self.targets = patch_size, DenseTargets(canvas, patch_size)

    def whole(self, pixels: torch.Tensor, tissue: torch.Tensor) -> torch.Tensor:
        found = []
        for values, weights in zip(self._statistics(pixels, tissue), tissue, strict=True):
            inside = values[weights > 0.5] if (weights > 0.5).sum() > 1 else values.flatten(0, 1)  # (n, S)
            quantiles = torch.quantile(inside, torch.tensor(QUANTILES), dim=0)
            found.append(torch.cat((inside.mean(0), inside.std(0), quantiles.flatten(), weights.mean()[None])))
        return torch.stack(found)

    def places(self, pixels: torch.Tensor, tissue: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return self._statistics(pixels, torch.ones_like(tissue))

    def _statistics(self, pixels: torch.Tensor, tissue: torch.Tensor) -> torch.Tensor:
        inside = nn.functional.interpolate(tissue[:, None], pixels.shape[2:])[:, 0] > 0.5
        return self.targets.statistics(pixels[:, 0], inside).unflatten(1, tuple(tissue.shape[1:]))
