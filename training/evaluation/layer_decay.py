"""Layer-wise decay of the learning rate, of every optimizer that tunes an encoder, as DINOv2, BEiT and MAE have it."""

import re
from collections.abc import Callable, Iterable

from torch import nn

BLOCK = re.compile(r"\blayers?\.(\d+)\.")


def layer_multiplier(name: str, num_layers: int, decay: float) -> float:
    """Return the factor of the learning rate of an encoder's parameter, decay ** (layers above it), by its name.

    Layer 0 are embeddings and tokens, layer i + 1 block i; what follows the blocks gets 1
    (dinov2/utils/param_groups.py). For ViTs as transformers names them.
    """
    depth = num_layers + 1
    if "embeddings." in name or "pre_layrnorm" in name:  # sic, of CLIP
        depth = 0
    elif block := BLOCK.search(name):
        depth = int(block.group(1)) + 1
    return decay ** (num_layers + 1 - depth)


def decayed_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rate: float,
    weight_decay: float,
    decays: Callable[[str, nn.Parameter], bool],
    layerwise_decay: float = 1.0,
) -> list[dict]:
    """Return groups for AdamW of those named parameters that learn; `decays` says of which the weights decay."""
    named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    num_layers = 1 + max((int(block.group(1)) for name, _ in named if (block := BLOCK.search(name))), default=-1)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        rate = learning_rate * layer_multiplier(name, num_layers, layerwise_decay)
        groups.setdefault((rate, weight_decay * decays(name, parameter)), []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]
