"""A CLIP vision tower in the layout of OpenAI's CLIP and open_clip as a `CLIPVisionModel`.

For Mammo-CLIP of Chen et al. (arXiv 2404.15946), which fine-tunes CLIP, where a checkpoint is given: none was published
that we know. Their adapters and their fusion of views are no part of the tower; a file with adapters in it is refused.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from .checkpoint_files import build, read_tensors, under
from .convert_biomedclip import preprocessing, vit_architecture

RENAMES = (
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


def convert_clip_vit(path: Path) -> tuple[CLIPVisionModel, dict[str, Any]]:
    """The tower, float32 and in eval mode, and the settings of its image processor.

    The activation is OpenAI's QuickGELU, unless an open_clip_config.json beside the file says otherwise (open_clip
    trains with GELU, and no tensor tells). Raises ValueError, naming the keys, for any other file.
    """
    visual = under("visual.", read_tensors(path), "conv1.weight", path, "a CLIP ViT in OpenAI's layout")
    if "class_embedding" not in visual:
        raise ValueError(f"{path.name}: its vision tower is not a ViT (no visual.class_embedding); give a ViT's file")
    visual.pop("proj", None)  # the features are those before the projection
    state: dict[str, torch.Tensor] = {}
    for original, tensor in visual.items():
        name = original
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
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
    config = CLIPVisionConfig(**architecture, hidden_act=_activation(path))
    return build(CLIPVisionModel, config, state, path), preprocessing(path, config.image_size)


def _activation(path: Path) -> str:
    beside = path.parent / "open_clip_config.json"
    if not beside.is_file():
        return "quick_gelu"
    return "quick_gelu" if json.loads(beside.read_text()).get("model_cfg", {}).get("quick_gelu") else "gelu"
