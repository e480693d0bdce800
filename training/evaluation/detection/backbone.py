"""The encoder as a backbone for detectors: one map at twice the encoder's resolution.

A plain ViT has one scale, too coarse for small lesions. Its patch map is doubled by a learnt upsampling, a level of the
simple feature pyramid of Li et al. (ViTDet, ECCV 2022). A small convolutional stem on the image adds what the patch
embedding has averaged away, as the spatial prior of Chen et al. (ViT-Adapter, ICLR 2023) does, here by plain addition;
without it (`spatial_prior=False`) detection rests on the encoder alone.

Tissue travels as the second channel of `pixel_values`, because detectors of transformers hand a backbone nothing else:
with it the encoder leaves background out.
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
class DetectionBackboneConfig(MammoDinoConfig):
    """The encoder's configuration, with `map_width`, channels of the map, a multiple of 32, and `spatial_prior`."""

    model_type = "mammodino_detection_backbone"

    map_width: int = 256
    spatial_prior: bool = True

    def __post_init__(self, **kwargs):
        kwargs["auto_map"] = {}  # no remote code: this class runs from a checkout
        super().__post_init__(**kwargs)


class DetectionBackbone(MammoDinoPreTrainedModel):
    """`pixel_values` (B, 2, H, W), an image and its tissue, the breast fraction of the patch that a pixel lies in ->
    one feature map (B, map_width, 2 * h, 2 * w)."""

    config: DetectionBackboneConfig
    config_class = DetectionBackboneConfig
    base_model_prefix = "detection_backbone"

    def __init__(self, config: DetectionBackboneConfig):
        super().__init__(config)
        self.channels = [config.map_width]  # asked for by transformers' detectors
        self.encoder = MammoDinoBackbone(config)
        self.upsample = nn.ConvTranspose2d(config.hidden_size, config.map_width, 2, stride=2)
        self.prior = spatial_prior(config.map_width) if config.spatial_prior else None
        self.norm = nn.GroupNorm(32, config.map_width)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        image, tissue = pixel_values[:, :1], pixel_values[:, 1]
        patch_height, patch_width = self.encoder.embeddings.patch_embeddings.patch_size
        tissue = tissue[:, ::patch_height, ::patch_width]  # (B, h, w)
        features = self.encoder(image, tissue_mask=tissue).feature_maps[-1]  # (B, D, h, w)
        feature_map = self.upsample(features)  # (B, map_width, 2 * h, 2 * w)
        if self.prior is not None:
            detail = self.prior(image)
            feature_map = feature_map + F.interpolate(detail, feature_map.shape[-2:], mode="bilinear")
        return BackboneOutput(feature_maps=(self.norm(feature_map),))


def spatial_prior(width: int) -> nn.Sequential:
    """Convolutions from the image (B, 1, H, W) to (B, width, H / 8, W / 8)."""
    channels, layers = (1, width // 4, width // 2, width // 2), []
    for inputs, outputs in zip(channels, channels[1:], strict=False):
        for each, stride in ((inputs, 2), (outputs, 1)):
            layers += [nn.Conv2d(each, outputs, 3, stride, 1, bias=False), nn.GroupNorm(4, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels[-1], width, 1))


AutoConfig.register(DetectionBackboneConfig.model_type, DetectionBackboneConfig, exist_ok=True)
AutoBackbone.register(DetectionBackboneConfig, DetectionBackbone, exist_ok=True)
