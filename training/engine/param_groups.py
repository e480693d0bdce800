"""Parameter groups: layer-wise learning-rate decay, weight-decay exemptions, and the learning-rate schedule of a group,
by which backbone and last layer are frozen for a while (dinov2/utils/param_groups.py)."""

import re
from collections import defaultdict

from torch import nn

from ..recipe import OptimizerRecipe


def multipliers(name: str, num_layers: int, recipe: OptimizerRecipe) -> dict:
    """Learning-rate schedule, and multipliers of it and of the weight decay, of a parameter of
    `student_teacher.Network`, by its name.

    Layer 0 are embeddings and tokens, layer i + 1 block i; the final norm and the head get 1. Biases, norms and
    LayerScale are not decayed; position embeddings, tokens and the prototypes' magnitude are, as in DINOv2.
    """
    depth = num_layers + 1
    if "embeddings." in name:
        depth = 0
    elif block := re.search(r"encoder\.layer\.(\d+)\.", name):
        depth = int(block.group(1)) + 1
    is_backbone = name.startswith("backbone.")
    learning_rate = recipe.layerwise_decay ** (num_layers + 1 - depth) if is_backbone else 1.0
    if "patch_embeddings" in name:
        learning_rate *= recipe.patch_embed_lr_multiplier
    exempt = name.endswith(".bias") or "norm" in name or "layer_scale" in name
    part = "backbone_" if is_backbone else "last_layer_" if "last_layer" in name else ""
    return {
        "lr_schedule": f"{part}learning_rate",
        "lr_multiplier": learning_rate,
        "wd_multiplier": 0.0 if exempt else 1.0,
    }


def param_groups(network: nn.Module, num_layers: int, recipe: OptimizerRecipe) -> list[dict]:
    """Groups for AdamW; parameters of equal multipliers share one."""
    groups = defaultdict(list)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups[tuple(multipliers(name, num_layers, recipe).items())].append(parameter)
    return [{"params": parameters, **dict(key)} for key, parameters in groups.items()]
