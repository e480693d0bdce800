"""The EfficientNet of batmanlab's Mammo-CLIP (Ghosh et al., MICCAI 2024, arXiv 2405.12255) as an `EfficientNetModel`.

Their files hold training's state under `model`; `image_encoder.*` is an EfficientNet (Tan and Le, 2019) in the names of
efficientnet_pytorch. It pads as TensorFlow's "same" does, by amounts that are fixed for the variant's own image size
(456 px for B5), whatever comes in; `depthwise_padding` says the same to transformers.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import EfficientNetConfig, EfficientNetModel

from .checkpoint_files import build, read_tensors, rename, under

# Of their configuration and preprocessing: the breast is cropped, reduced to this size by area average without keeping
# its aspect, and stretched to its own 0..1; aspect and stretch are in preprocessing.py.
PREPROCESSING = {
    "size": {"height": 1520, "width": 912},
    "image_mean": [0.3089279] * 3,
    "image_std": [0.25053555408335154] * 3,
    "resample": 4,  # Pillow's box filter: the area average
}
BATCH_NORM_MOMENTUM = 0.01  # in PyTorch's sense; EfficientNetConfig passes on TensorFlow's 0.99, its complement
RENAMES = (
    (r"^_conv_stem\.", "embeddings.convolution."),
    (r"^_bn0\.", "embeddings.batchnorm."),
    (r"^_conv_head\.", "encoder.top_conv."),
    (r"^_bn1\.", "encoder.top_bn."),
    (r"^_blocks\.", "encoder.blocks."),
    (r"\._expand_conv\.", ".expansion.expand_conv."),
    (r"\._bn0\.", ".expansion.expand_bn."),
    (r"\._depthwise_conv\.", ".depthwise_conv.depthwise_conv."),
    (r"\._bn1\.", ".depthwise_conv.depthwise_norm."),
    (r"\._se_(reduce|expand)\.", r".squeeze_excite.\1."),
    (r"\._project_conv\.", ".projection.project_conv."),
    (r"\._bn2\.", ".projection.project_bn."),
)


class Variant(NamedTuple):
    width: float  # coefficient of the channels
    depth: float  # coefficient of the blocks
    image_size: int  # for which padding is fixed


# Tan and Le 2019, as efficientnet_pytorch has them; Mammo-CLIP published B2 and B5
VARIANTS = {
    "b0": Variant(1.0, 1.0, 224),
    "b1": Variant(1.0, 1.1, 240),
    "b2": Variant(1.1, 1.2, 260),
    "b3": Variant(1.2, 1.4, 300),
    "b4": Variant(1.4, 1.8, 380),
    "b5": Variant(1.6, 2.2, 456),
    "b6": Variant(1.8, 2.6, 528),
    "b7": Variant(2.0, 3.1, 600),
    "small": Variant(0.5, 0.1, 72),  # of small_checkpoints.py
}


def convert_mammo_clip(path: Path) -> tuple[EfficientNetModel, dict[str, Any]]:
    """Return the image encoder, float32 and in eval mode, and the settings of its image processor.

    Drop connect is left out, which transformers would do to single values rather than to whole blocks. Raises
    ValueError, naming the keys, for any other file.
    """
    what = "a checkpoint of Mammo-CLIP with an EfficientNet"
    encoder = under("image_encoder.", read_tensors(path), "_conv_stem.weight", path, what)
    kept = {name: tensor for name, tensor in encoder.items() if not name.startswith("_fc.")}  # ImageNet's classifier
    model = build(EfficientNetModel, efficientnet_config(_variant(encoder, path)), rename(kept, RENAMES), path)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = BATCH_NORM_MOMENTUM
    return model, PREPROCESSING


def _variant(encoder: dict[str, torch.Tensor], path: Path) -> str:
    """Return B0 to B7, by the channels of stem and head and the number of blocks."""
    blocks = {int(found[1]) for name in encoder if (found := re.match(r"_blocks\.(\d+)\.", name))}
    head = len(encoder.get("_conv_head.weight", ()))
    stem = len(encoder["_conv_stem.weight"])
    for name in VARIANTS:
        config = efficientnet_config(name)
        repeats = sum(math.ceil(config.depth_coefficient * each) for each in config.num_block_repeats)
        if (stem, len(blocks), head) == (round_filters(32, config.width_coefficient), repeats, config.hidden_dim):
            return name
    raise ValueError(
        f"{path.name}: no EfficientNet B0 to B7 has {stem} channels in its stem, {len(blocks)} blocks and {head} "
        "channels in its head; give a whole checkpoint of Mammo-CLIP"
    )


def efficientnet_config(variant: str) -> EfficientNetConfig:
    """Return the configuration of a variant, with the padding of efficientnet_pytorch.

    A convolution of stride 2 pads an even input by one less on the left and top, and an odd one on all sides alike.
    """
    width, depth, size = VARIANTS[variant]
    config = EfficientNetConfig(
        width_coefficient=width,
        depth_coefficient=depth,
        image_size=size,
        hidden_dim=round_filters(1280, width),
        batch_norm_eps=1e-3,
        batch_norm_momentum=BATCH_NORM_MOMENTUM,
        drop_connect_rate=0.0,
        dropout_rate=0.0,
    )
    side, block, odd = math.ceil(size / 2), 0, []  # behind the stem
    for stride, repeats in zip(config.strides, config.num_block_repeats, strict=True):
        if stride == 2:
            odd += [block] if side % 2 else []
            side = math.ceil(side / 2)
        block += math.ceil(depth * repeats)
    config.depthwise_padding = odd
    return config


def round_filters(channels: int, width: float, divisor: int = 8) -> int:
    """Return the channels of a variant: `channels * width` to the nearest multiple of 8, at most a tenth below."""
    scaled = channels * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * scaled else rounded + divisor
