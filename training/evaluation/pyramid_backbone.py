"""The encoder as a backbone of two scales for detectors: a plain ViT has one, too coarse for small lesions.

Its patch map is doubled by a learnt upsampling (the simple feature pyramid of Li et al., ViTDet, ECCV 2022). A small
convolutional stem on the picture adds what a patch embedding has averaged away, as the spatial prior of Chen et al.,
ViT-Adapter, ICLR 2023 does, here by plain addition; `spatial_prior=False` leaves detection to the encoder alone.

Tissue travels as the second channel of `pixel_values`, because detectors hand nothing else to a backbone: with it the
encoder leaves background out.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone, AutoConfig
from transformers.modeling_outputs import BackboneOutput

from modeling_mammodino import MammoDinoBackbone, MammoDinoConfig
from modeling_mammodino.modeling_mammodino import MammoDinoPreTrainedModel


@strict
class PyramidConfig(MammoDinoConfig):
    """Of the encoder, and `pyramid_width`, channels of both maps, a multiple of 32; `spatial_prior`, the stem."""

    model_type = "mammodino_pyramid"

    pyramid_width: int = 256
    spatial_prior: bool = True

    def __post_init__(self, **kwargs):
        kwargs["auto_map"] = {}  # no remote code: this class runs from a checkout
        super().__post_init__(**kwargs)


class PyramidBackbone(MammoDinoPreTrainedModel):
    """Maps of strides p / 2 and p, each (B, pyramid_width, ...), from `pixel_values` (B, 2, H, W): picture and tissue.

    Tissue is the breast fraction of each patch, constant within it.
    """

    config: PyramidConfig
    config_class = PyramidConfig
    base_model_prefix = "pyramid"

    def __init__(self, config: PyramidConfig):
        super().__init__(config)
        width = config.pyramid_width
        self.channels = [width, width]
        self.encoder = MammoDinoBackbone(config)
        self.to_patch = nn.Conv2d(config.hidden_size, width, 1)
        self.to_fine = nn.ConvTranspose2d(config.hidden_size, width, 2, stride=2)
        self.prior = SpatialPrior(width) if config.spatial_prior else None
        self.norms = nn.ModuleList([nn.GroupNorm(32, width) for _ in self.channels])
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        picture, tissue = pixel_values[:, :1], pixel_values[:, 1]
        patch_size = self.encoder.embeddings.patch_embeddings.patch_size
        tissue = tissue[:, :: patch_size[0], :: patch_size[1]]  # (B, h, w)
        features = self.encoder(picture, tissue_mask=tissue).feature_maps[-1]  # (B, D, h, w)
        maps = [self.to_fine(features), self.to_patch(features)]
        if self.prior is not None:
            maps = [each + detail for each, detail in zip(maps, self.prior(picture, maps), strict=True)]
        return BackboneOutput(feature_maps=tuple(norm(each) for norm, each in zip(self.norms, maps, strict=True)))


class SpatialPrior(nn.Module):
    """Eight convolutions down to stride 16: what is seen at strides 8 and 16, on the grids of the encoder's maps."""

    def __init__(self, width: int):
        super().__init__()
        quarter = width // 4
        self.to_8 = nn.Sequential(block(1, quarter, 2), block(quarter, quarter, 2), block(quarter, width // 2, 2))
        self.to_16 = block(width // 2, width // 2, 2)
        self.project = nn.ModuleList([nn.Conv2d(width // 2, width, 1) for _ in range(2)])

    def forward(self, picture: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
        fine = self.to_8(picture)
        return [
            F.interpolate(project(each), size=target.shape[-2:], mode="bilinear")
            for project, each, target in zip(self.project, (fine, self.to_16(fine)), like, strict=True)
        ]


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, step in ((inputs, stride), (outputs, 1)):
        layers += [
            nn.Conv2d(channels, outputs, 3, step, 1, bias=False),
            nn.GroupNorm(min(8, outputs), outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


AutoConfig.register(PyramidConfig.model_type, PyramidConfig, exist_ok=True)
AutoBackbone.register(PyramidConfig, PyramidBackbone, exist_ok=True)
