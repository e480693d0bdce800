"""Going on from a former run's checkpoint under another recipe, such as at a higher resolution: networks, heads and
centres are its own; optimizer, schedules, order and views are the new run's."""

from pathlib import Path

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict

from modeling_mammodino import MammoDinoConfig

from ..recipe import Recipe
from .checkpoints import CONFIG_FILE, RECIPE_FILE, WHOLE

# what fixes the shapes of the networks, and of the centres
SHAPES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_register_tokens", "head_hidden_size",
    "head_bottleneck_size", "num_prototypes", "separate_ibot_head", "ibot_num_prototypes", "ibot_head_hidden_size",
    "ibot_head_bottleneck_size", "teacher_targets",
)  # fmt: skip


def former_config(recipe: Recipe) -> MammoDinoConfig:
    """The configuration of the encoder in `init_from_checkpoint`, with this run's stochastic depth. Its position
    embeddings keep their stored size, from which they are interpolated to any crop.

    Raises ValueError where the folder is no checkpoint, or the recipe's networks are others, naming field and remedy.
    """
    folder = Path(recipe.model.init_from_checkpoint)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"init_from_checkpoint={folder}: holds no {CONFIG_FILE}; give a run's checkpoint-N folder")
    wanted = recipe.flat()
    former = Recipe().flat() | yaml.safe_load((folder / RECIPE_FILE).read_text())
    for name in SHAPES:
        if wanted[name] != former[name]:
            raise ValueError(
                f"{name}={wanted[name]}: init_from_checkpoint={folder} has {name}={former[name]}; give --{name} "
                f"{former[name]}, or another checkpoint"
            )
    config = MammoDinoConfig.from_json_file(folder / CONFIG_FILE)
    config.drop_path_rate = recipe.model.drop_path_rate
    return config


def load_former_run(recipe: Recipe, modules: dict[str, nn.Module]) -> None:
    """Loads student, teacher and centres of `init_from_checkpoint` in place; raises ValueError where one is damaged."""
    folder = Path(recipe.model.init_from_checkpoint)
    try:
        for name in ("student", "teacher", "targets"):
            set_model_state_dict(modules[name], load_file(folder / f"{name}.safetensors"), options=WHOLE)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"init_from_checkpoint={folder}: cannot be read ({error}); give another checkpoint") from error
