"""Projection head of DINO and iBOT (dinov2/layers/dino_head.py)."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


class ProjectionHead(nn.Module):
    """MLP D -> hidden -> hidden -> bottleneck, L2-normalised, then weight-normed prototypes: (..., D) -> (..., K)."""

    def __init__(self, hidden_size: int, head_hidden_size: int, bottleneck_size: int, num_prototypes: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, head_hidden_size),
            nn.GELU(),
            nn.Linear(head_hidden_size, head_hidden_size),
            nn.GELU(),
            nn.Linear(head_hidden_size, bottleneck_size),
        )
        prototypes = nn.Linear(bottleneck_size, num_prototypes, bias=False)
        for module in [*self.mlp, prototypes]:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.last_layer = weight_norm(prototypes)
        self.last_layer.parametrizations.weight.original0.data.fill_(1.0)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        bottleneck = self.mlp(features)
        epsilon = 1e-6 if bottleneck.dtype == torch.float16 else 1e-12
        return self.last_layer(nn.functional.normalize(bottleneck, dim=-1, eps=epsilon))
