"""BiomedCLIP's image encoder as a `ViTModel`, from the file that open_clip published.

The file holds text and image towers; `visual.trunk.*` is a ViT-B/16 in the names of timm's `vision_transformer.py`,
which ends in a LayerNorm and gives its class token to the projection `visual.head.proj`. The features here are those
before the projection.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .checkpoint_files import build, read_tensors, under

HEAD_SIZE = 64  # of an attention head, in every ViT of timm that CLIP models were published with
RENAMES = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def convert_biomedclip(path: Path) -> tuple[ViTModel, dict[str, Any]]:
    """The encoder, float32 and in eval mode, and the settings of its image processor.

    Mean and standard deviation come from open_clip_config.json where it lies beside, else they are CLIP's, which
    BiomedCLIP was published with. Raises ValueError, naming the keys, for any other file.
    """
    trunk = under("visual.trunk.", read_tensors(path), "patch_embed.proj.weight", path, "a BiomedCLIP checkpoint")
    state: dict[str, torch.Tensor] = {}
    for original, tensor in trunk.items():
        name = original
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows.clone()
        else:
            state[name] = tensor
    positions = len(trunk["pos_embed"][0]) if "pos_embed" in trunk else 0
    architecture = vit_architecture(
        trunk, "patch_embed.proj.weight", positions, r"blocks\.(\d+)\.", "blocks.0.mlp.fc1.bias", path
    )
    config = ViTConfig(**architecture, layer_norm_eps=1e-6)  # timm's; the default here is another
    return build(ViTModel, config, state, path, add_pooling_layer=False), preprocessing(path, config.image_size)


def vit_architecture(
    tensors: dict[str, torch.Tensor], patch_weight: str, num_positions: int, block: str, hidden_bias: str, path: Path
) -> dict[str, int]:
    """What a ViT's configuration needs, from the shapes of its tensors.

    patch_weight, hidden_bias: names of the patch embedding and of a block's first MLP bias. block: pattern of a block's
    number in a name. num_positions: 1 + N.
    """
    width, channels, patch, _ = tensors[patch_weight].shape
    blocks = {int(found[1]) for name in tensors if (found := re.match(block, name))}
    hidden = len(tensors.get(hidden_bias, ()))
    side = math.isqrt(max(num_positions - 1, 0))
    if not blocks or not hidden or not side or side**2 != num_positions - 1 or width % HEAD_SIZE:
        raise ValueError(
            f"{path.name}: its image tower is not a whole ViT: {len(blocks)} blocks, width {width} (must be a multiple "
            f"of {HEAD_SIZE}), {num_positions} positions (must be a square and the class token)"
        )
    return {
        "hidden_size": width,
        "num_hidden_layers": max(blocks) + 1,
        "num_attention_heads": width // HEAD_SIZE,
        "intermediate_size": hidden,
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
    }


def preprocessing(path: Path, image_size: int) -> dict[str, Any]:
    """How open_clip prepares images for a checkpoint: bicubic to its size, with the mean and deviation beside it."""
    beside = path.parent / "open_clip_config.json"
    settings = json.loads(beside.read_text()).get("preprocess_cfg", {}) if beside.is_file() else {}
    return {
        "size": {"height": image_size, "width": image_size},
        "image_mean": list(settings.get("mean", OPENAI_CLIP_MEAN)),
        "image_std": list(settings.get("std", OPENAI_CLIP_STD)),
        "resample": 3,
    }
