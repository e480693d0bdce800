"""Schedules as arrays over steps, and AdamW's parameter groups (dinov2/utils/param_groups.py).

A group has a layer-wise factor of the learning rate, a factor of the weight decay, and the name of the schedule that it
follows, by which backbone and last layer are frozen for a while.
"""

from collections import defaultdict

import numpy as np
import torch
from torch import nn

from training.evaluation.layer_decay import layer_multiplier

from .recipe import OptimizerRecipe, Recipe, whole_steps


def multipliers(name: str, num_layers: int, recipe: OptimizerRecipe) -> dict:
    """Return the learning-rate schedule of a parameter of `networks.Network`, and the multipliers of it and of the
    weight decay, by the parameter's name.

    The head's learning rate is not decayed by layers. Biases, norms and LayerScale are not decayed; position
    embeddings, tokens and the prototypes' magnitude are, as in DINOv2.
    """
    is_backbone = name.startswith("backbone.")
    learning_rate = layer_multiplier(name, num_layers, recipe.layerwise_decay) if is_backbone else 1.0
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
    """Return groups for AdamW; parameters of equal multipliers share one."""
    groups = defaultdict(list)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups[tuple(multipliers(name, num_layers, recipe).items())].append(parameter)
    return [{"params": parameters, **dict(key)} for key, parameters in groups.items()]


def linear_warmup_cosine(start: float, peak: float, end: float, warmup_steps: int, total_steps: int) -> np.ndarray:
    """Return (total_steps,) float64: linear from `start` to `peak` over the warm-up, inclusive, then a cosine that
    would reach `end` one step after the last: v(i) = end + (peak - end) / 2 * (1 + cos(pi * i / n))
    (dinov2/utils/utils.py, CosineScheduler)."""
    steps = np.arange(total_steps - warmup_steps)
    cosine = end + 0.5 * (peak - end) * (1 + np.cos(np.pi * steps / max(len(steps), 1)))
    return np.concatenate((np.linspace(start, peak, warmup_steps), cosine))


def make_schedules(recipe: Recipe, global_batch_size: int) -> dict[str, np.ndarray]:
    """Return learning_rate, backbone_learning_rate, last_layer_learning_rate, weight_decay, teacher_momentum and
    teacher_temperature, (max_steps,) each.

    The backbone's and the last layer's learning rates are the first, but zero while they are frozen: gradients flow
    all the same, so that Adam's moments have settled when they thaw.
    """
    optimizer, loss, steps = recipe.optimizer, recipe.loss, recipe.run.max_steps
    reference = optimizer.learning_rate_reference_batch
    peak = optimizer.learning_rate * ((global_batch_size / reference) ** 0.5 if reference else 1.0)
    if optimizer.learning_rate_reference_width:
        peak *= optimizer.learning_rate_reference_width / recipe.model.hidden_size
    warmup = whole_steps(optimizer.warmup_steps, steps)
    learning_rate = linear_warmup_cosine(0.0, peak, optimizer.min_learning_rate, warmup, steps)
    backbone, last_layer = learning_rate.copy(), learning_rate.copy()
    backbone[: whole_steps(optimizer.freeze_backbone_steps, steps)] = 0.0
    last_layer[: whole_steps(optimizer.freeze_last_layer_steps, steps)] = 0.0
    temperature_warmup = whole_steps(loss.teacher_temperature_warmup_steps, steps)
    temperature = np.full(steps, loss.teacher_temperature)
    temperature[:temperature_warmup] = np.linspace(
        loss.teacher_temperature_start, loss.teacher_temperature, temperature_warmup
    )
    return {
        "learning_rate": learning_rate,
        "backbone_learning_rate": backbone,
        "last_layer_learning_rate": last_layer,
        "weight_decay": linear_warmup_cosine(0, optimizer.weight_decay, optimizer.weight_decay_end, 0, steps),
        "teacher_momentum": linear_warmup_cosine(
            0, optimizer.teacher_momentum, optimizer.teacher_momentum_end, 0, steps
        ),
        "teacher_temperature": temperature,
    }


def set_learning_rates(optimizer: torch.optim.Optimizer, now: dict[str, float]) -> None:
    """Give each group its learning rate and weight decay of a step."""
    for group in optimizer.param_groups:
        group["lr"] = now[group["lr_schedule"]] * group["lr_multiplier"]
        group["weight_decay"] = now["weight_decay"] * group["wd_multiplier"]
