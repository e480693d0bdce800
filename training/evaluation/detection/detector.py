"""A lesion detector on the encoder: transformers' RT-DETR (Zhao et al., CVPR 2024) over `DetectionBackbone`.

A plain ViT has one scale, too coarse for small lesions. Its patch map is doubled by a learned upsampling, a level of
the simple feature pyramid of Li et al. (ViTDet, ECCV 2022). A small convolutional stem on the image adds what the patch
embedding has averaged away, as the spatial prior of Chen et al. (ViT-Adapter, ICLR 2023) does, here by plain addition;
without it (`spatial_prior=False`) detection rests on the encoder alone. Tissue travels as the second channel of
`pixel_values`, because detectors of transformers hand a backbone nothing else: with it the encoder drops background.

Of DETR, Conditional DETR, Deformable DETR and RT-DETR, the last learned fastest on small data, mainly because its
queries are picked from the map's cells, and `cell_loss` teaches every cell, where the matching of sets teaches one cell
a lesion.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional
from transformers import AutoBackbone, AutoConfig, RTDetrConfig, RTDetrForObjectDetection
from transformers.loss.loss_for_object_detection import sigmoid_focal_loss
from transformers.modeling_outputs import BackboneOutput

from modeling_mammodino import MammoDinoBackbone, MammoDinoConfig, MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.modeling_mammodino import MammoDinoPreTrainedModel
from modeling_mammodino.tools.embed import open_encoder

from .data import to_corners

CLASS = "lesion"


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
            feature_map = feature_map + functional.interpolate(detail, feature_map.shape[-2:], mode="bilinear")
        return BackboneOutput(feature_maps=(self.norm(feature_map),))


def spatial_prior(width: int) -> nn.Sequential:
    """Make convolutions from the image (B, 1, H, W) to (B, width, H / 8, W / 8)."""
    channels, layers = (1, width // 4, width // 2, width // 2), []
    for inputs, outputs in zip(channels, channels[1:], strict=False):
        for each, stride in ((inputs, 2), (outputs, 1)):
            layers += [nn.Conv2d(each, outputs, 3, stride, 1, bias=False), nn.GroupNorm(4, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels[-1], width, 1))


AutoConfig.register(DetectionBackboneConfig.model_type, DetectionBackboneConfig, exist_ok=True)
AutoBackbone.register(DetectionBackboneConfig, DetectionBackbone, exist_ok=True)


def build_detector(
    encoder: MammoDinoModel,
    map_width: int,
    decoder_layers: int,
    num_queries: int,
    spatial_prior: bool,
    seed: int,
) -> RTDetrForObjectDetection:
    """Build an untrained detector over the weights of `encoder`. Takes `pixel_values` as `DetectionBackbone` does."""
    fields = [name for name in MammoDinoConfig.__annotations__ if not name.startswith("_")]
    about = {name: getattr(encoder.config, name) for name in fields}  # and nothing of its place on disk
    heads = max(1, map_width // 32)
    config = RTDetrConfig(
        backbone_config=DetectionBackboneConfig(**about, map_width=map_width, spatial_prior=spatial_prior),
        id2label={0: CLASS},
        label2id={CLASS: 0},
        num_queries=num_queries,
        d_model=map_width,
        # one map goes in, and no attention over its cells: the encoder has attended already
        encoder_layers=0,
        encode_proj_layers=[0],
        encoder_in_channels=[map_width],
        encoder_hidden_dim=map_width,
        feat_strides=[1],  # used where anchors are fixed, which they are not
        decoder_in_channels=[map_width],
        num_feature_levels=2,  # the second is the first at half its resolution
        decoder_layers=decoder_layers,
        decoder_attention_heads=heads,
        decoder_ffn_dim=4 * map_width,
        num_denoising=0,  # noised true boxes: transformers 5.17 mixes them into the loss of the last layer
    )
    torch.manual_seed(seed)
    detector = RTDetrForObjectDetection(config)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):  # transformers starts them near 0, meant for weights that are loaded
            nn.init.ones_(module.weight)
    detector.model.backbone.model.encoder.load_state_dict(encoder.state_dict())
    return detector


def load_detector(folder: str | Path) -> tuple[RTDetrForObjectDetection, MammoDinoImageProcessor]:
    """Open what `training.detect` saved, for inference. Raises OSError where there is none."""
    return RTDetrForObjectDetection.from_pretrained(folder).eval(), MammoDinoImageProcessor.from_pretrained(folder)


def open_start(name: str, from_random: bool, seed: int) -> tuple[MammoDinoModel, MammoDinoImageProcessor]:
    """Open encoder and image processor of a folder or Hub id; with `from_random` its architecture, untrained.

    Raises as `modeling_mammodino.tools.embed.open_encoder` does.
    """
    encoder: Any
    encoder, processor = open_encoder(name)
    if from_random:
        torch.manual_seed(seed)
        encoder = MammoDinoModel(encoder.config)
    return encoder, processor


def cell_loss(cell_logits: torch.Tensor, labels: list[dict[str, torch.Tensor]], grid: tuple[int, int]) -> torch.Tensor:
    """Return the focal loss (Lin et al., ICCV 2017) of every cell of RT-DETR's two levels: whether it lies in a lesion.

    One lesion then teaches all of its cells, an assignment of one to many beside the matching of one to one, which
    speeds up detectors with queries (Co-DETR, Zong et al., ICCV 2023). A cell lies in a lesion if its center does, or
    if it holds the lesion's center.

    cell_logits (B, T, 1), `enc_outputs_class` of the detector's output; labels as its own; grid: (height, width) of the
    first level, the second is half of it.
    """
    centers, halves = [], []
    for height, width in (grid, (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))):
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        centers.append(torch.stack((x.flatten(), y.flatten()), dim=1))
        halves.append(torch.tensor([0.5 / width, 0.5 / height]).expand(height * width, 2))
    center, half = (torch.cat(each).to(cell_logits.device) for each in (centers, halves))  # (T, 2)
    in_lesion = []
    for label in labels:
        middle, extent = label["boxes"][None].split(2, dim=2)  # (1, g, 2)
        near = (center[:, None] - middle).abs() <= torch.maximum(half[:, None], extent / 2)  # (T, g, 2)
        in_lesion.append(near.all(dim=2).any(dim=1))
    target = torch.stack(in_lesion).to(cell_logits.dtype)  # (B, T)
    num_cells = cell_logits.shape[1]
    # transformers' loss is the mean over cells and the sum over images
    return num_cells * sigmoid_focal_loss(cell_logits, target[..., None], max(1.0, float(target.sum())), alpha=0.75)


@torch.inference_mode()
def detect(detector: RTDetrForObjectDetection, pixel_values: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return boxes (num_queries, 4), corners in pixels of the canvas, and scores (num_queries,) of each image of
    (B, 2, H, W)."""
    outputs: Any = detector(pixel_values.to(detector.device))
    scores = outputs.logits[..., 0].float().sigmoid().cpu().numpy()
    boxes = outputs.pred_boxes.float().cpu().numpy().astype(float)
    height, width = pixel_values.shape[-2:]
    return [(to_corners(each, (height, width)), of.astype(float)) for each, of in zip(boxes, scores, strict=True)]
