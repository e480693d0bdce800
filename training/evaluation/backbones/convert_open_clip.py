"""Image towers of CLIP checkpoints in the layouts of open_clip and OpenAI, as models of transformers.

BiomedCLIP's file holds text and image towers; `visual.trunk.*` is a ViT-B/16 in the names of timm's
`vision_transformer.py`, which ends in a LayerNorm and gives its class token to the projection `visual.head.proj`.

A ViT in OpenAI's layout is taken for Mammo-CLIP of Chen et al. (arXiv 2404.15946), which fine-tunes CLIP, where a
checkpoint is given: none was published that we know. Their adapters and their fusion of views are no part of the tower;
a file with adapters in it is refused. Of both, features are those before the projection.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .checkpoint_files import build, read_tensors, rename, under

HEAD_SIZE = 64  # of an attention head, in every ViT of timm that CLIP models were published with
TIMM_NAMES = (
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
OPENAI_NAMES = (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^ln_pre\.", "pre_layrnorm."),  # transformers' spelling
    (r"^ln_post\.", "post_layernorm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def convert_biomedclip(path: Path) -> tuple[ViTModel, dict[str, Any]]:
    """Return the encoder, float32 and in eval mode, and the settings of its image processor.

    Mean and standard deviation come from open_clip_config.json where it lies beside, else they are CLIP's, which
    BiomedCLIP was published with. Raises ValueError, naming the keys, for any other file.
    """
    trunk = under("visual.trunk.", read_tensors(path), "patch_embed.proj.weight", path, "a BiomedCLIP checkpoint")
    state: dict[str, torch.Tensor] = {}
    for name, tensor in rename(trunk, TIMM_NAMES).items():
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
    return build(ViTModel, config, state, path, add_pooling_layer=False), preprocessing(
        path, architecture["image_size"]
    )


def convert_clip_vit(path: Path) -> tuple[CLIPVisionModel, dict[str, Any]]:
    """Return the tower, float32 and in eval mode, and the settings of its image processor.

    The activation is OpenAI's QuickGELU, unless an open_clip_config.json beside the file says otherwise (open_clip
    trains with GELU, and no tensor tells). Raises ValueError, naming the keys, for any other file.
    """
    visual = under("visual.", read_tensors(path), "conv1.weight", path, "a CLIP ViT in OpenAI's layout")
    if "class_embedding" not in visual:
        raise ValueError(f"{path.name}: its vision tower is not a ViT (no visual.class_embedding); give a ViT's file")
    visual.pop("proj", None)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in rename(visual, OPENAI_NAMES).items():
        if found := re.search(r"\.attn\.in_proj_(weight|bias)$", name):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                state[f"vision_model.{name[: found.start()]}.self_attn.{part}_proj.{found[1]}"] = rows.clone()
        else:
            state[f"vision_model.{name}"] = tensor
    positions = len(visual.get("positional_embedding", ()))
    block = r"transformer\.resblocks\.(\d+)\."
    architecture = vit_architecture(
        visual, "conv1.weight", positions, block, "transformer.resblocks.0.mlp.c_fc.bias", path
    )
    beside = open_clip_config(path)
    quick = not beside or beside.get("model_cfg", {}).get("quick_gelu")
    config = CLIPVisionConfig(**architecture, hidden_act="quick_gelu" if quick else "gelu")
    return build(CLIPVisionModel, config, state, path), preprocessing(path, architecture["image_size"])


def vit_architecture(
    tensors: dict[str, torch.Tensor], patch_weight: str, num_positions: int, block: str, hidden_bias: str, path: Path
) -> dict[str, Any]:
    """Return what a ViT's configuration needs, from the shapes of its tensors.

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
    """Return how open_clip prepares images for a checkpoint: bicubic to its size, mean and deviation as noted
    beside."""
    settings = open_clip_config(path).get("preprocess_cfg", {})
    return {
        "size": {"height": image_size, "width": image_size},
        "image_mean": list(settings.get("mean", OPENAI_CLIP_MEAN)),
        "image_std": list(settings.get("std", OPENAI_CLIP_STD)),
        "resample": 3,
    }


def open_clip_config(path: Path) -> dict[str, Any]:
    """Return the open_clip_config.json beside a checkpoint, empty where there is none."""
    beside = path.parent / "open_clip_config.json"
    return json.loads(beside.read_text()) if beside.is_file() else {}
