"""Checkpoints: whole or absent, safetensors only; the last good one is found by itself."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..recipe import MAY_CHANGE_ON_RESUME, Recipe

STATE_FILE, RECIPE_FILE, CONFIG_FILE = "trainer_state.json", "recipe.yaml", "config.json"


def save_checkpoint(
    directory: Path, step: int, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer, recipe: Recipe
) -> Path:
    """Writes `directory/checkpoint-{step}`: one safetensors file a module, the optimizer, the recipe, the step,
    and the encoder's configuration, by which another run can go on from it.

    All is written into a folder of a temporary name, which is renamed when everything is on disk.
    """
    final, temporary = directory / f"checkpoint-{step}", directory / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, module in modules.items():
        save_file(_contiguous(module.state_dict()), temporary / f"{name}.safetensors")
    save_file(_contiguous(_optimizer_tensors(optimizer)), temporary / "optimizer.safetensors")
    recipe.save(temporary / RECIPE_FILE)
    modules["student"].backbone.config.to_json_file(temporary / CONFIG_FILE)
    (temporary / STATE_FILE).write_text(json.dumps({"global_step": step}) + "\n")
    for path in temporary.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in list_checkpoints(directory)[: -recipe.run.save_total_limit]:
        shutil.rmtree(old)
    return final


def load_checkpoint(path: Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Loads into modules and optimizer in place; returns the number of finished steps."""
    try:
        for name, module in modules.items():
            module.load_state_dict(load_file(path / f"{name}.safetensors"))
        _load_optimizer_tensors(optimizer, load_file(path / "optimizer.safetensors"))
        return json.loads((path / STATE_FILE).read_text())["global_step"]
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint {path}: cannot be resumed ({error}); remove it to go on from the one before"
        ) from error


def list_checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints in a run's folder, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(
        (path for path in found if (path / STATE_FILE).is_file()), key=lambda path: int(path.name.rpartition("-")[2])
    )


def find_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint to go on from: the one that the recipe names, else the last whole one in output_dir."""
    if recipe.run.resume_from_checkpoint:
        path = Path(recipe.run.resume_from_checkpoint)
        if not (path / STATE_FILE).is_file():
            raise ValueError(f"resume_from_checkpoint={path}: holds no {STATE_FILE}; give a checkpoint-N folder")
        return path
    checkpoints = list_checkpoints(Path(recipe.run.output_dir))
    return checkpoints[-1] if checkpoints else None


def check_same_recipe(recipe: Recipe, saved: dict[str, Any], path: Path) -> None:
    """A run that is resumed is the run that was started: refuses fields that would change what is computed."""
    wanted = recipe.flat()
    changed = [
        f"{name} ({saved[name]!r} -> {wanted[name]!r})"
        for name in wanted
        if name not in MAY_CHANGE_ON_RESUME and name in saved and saved[name] != wanted[name]
    ]
    if changed:
        raise ValueError(
            f"{path}: was made with another recipe: {', '.join(changed)}; give the same values to go on, or another "
            "--output_dir to start afresh"
        )


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, values in state.items() for name, value in values.items()
    }


def _load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state_dict = optimizer.state_dict()
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": state_dict["param_groups"]})
