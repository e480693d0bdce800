"""Checkpoints: atomic, safetensors only, the last good one is found by itself; and no step whose loss is not finite.

A run's output_dir holds `checkpoint-N/` (a file a module, the optimizer, and the three files named below), `logs/`,
`images/` and in the end `encoder/`.
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from modeling_mammodino.tools.files import atomic_folder
from training.pretraining.views.sample import PretrainingViews

from .recipe import MAY_CHANGE_ON_RESUME, Recipe, RunRecipe

STATE_FILE, RECIPE_FILE, CONFIG_FILE = "trainer_state.json", "recipe.yaml", "config.json"
LOG_FILE, WARNINGS_FILE = "logs/log.jsonl", "logs/warnings.jsonl"  # in a run's output_dir
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the main process, however it is spread


def save_checkpoint(
    directory: Path, step: int, modules: dict[str, nn.Module], optimizer: Optimizer, recipe: Recipe, is_main: bool
) -> Path:
    """Write `directory/checkpoint-{step}` atomically: one safetensors file a module, the optimizer, the recipe, the
    step, and the encoder's configuration, by which another run can go on from it.

    Every process calls it, for sharded tensors are gathered, and the main one writes. Raises OSError where it cannot.
    """
    final = directory / f"checkpoint-{step}"
    student: Any = modules["student"]
    files: dict[str, dict[str, Any]] = {
        name: get_model_state_dict(module, options=WHOLE) for name, module in modules.items()
    }
    files["optimizer"] = _flatten(get_optimizer_state_dict(student, optimizer, options=WHOLE))
    if not is_main:
        return final
    try:
        with atomic_folder(final, replace=True) as folder:
            for name, tensors in files.items():
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
            recipe.save(folder / RECIPE_FILE)
            student.backbone.config.to_json_file(folder / CONFIG_FILE)
            (folder / STATE_FILE).write_text(json.dumps({"global_step": step}) + "\n")
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{final}: cannot be written ({error}); what was saved before stands. Make room, and give the same command"
        ) from error
    for old in list_checkpoints(directory)[: -recipe.run.save_total_limit]:
        shutil.rmtree(old)
    return final


def load_module(module: nn.Module, file: Path) -> None:
    """Load a module's tensors in place, sharded or not."""
    tensors: dict[str, Any] = load_file(file)
    set_model_state_dict(module, tensors, options=WHOLE)


def load_checkpoint(path: Path, modules: dict[str, nn.Module], optimizer: Optimizer) -> int:
    """Load into modules and optimizer in place, sharded or not; return the number of finished steps."""
    try:
        for name, module in modules.items():
            load_module(module, path / f"{name}.safetensors")
        state: dict[str, Any] = get_optimizer_state_dict(modules["student"], optimizer)  # for its groups
        state["state"] = _unflatten(load_file(path / "optimizer.safetensors"))
        set_optimizer_state_dict(modules["student"], optimizer, state, options=WHOLE)
        return json.loads((path / STATE_FILE).read_text())["global_step"]
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint {path}: cannot be resumed ({error}); remove it to go on from the one before"
        ) from error


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the whole checkpoints in a run's folder, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(
        (path for path in found if (path / STATE_FILE).is_file()), key=lambda path: int(path.name.rpartition("-")[2])
    )


def find_checkpoint(recipe: Recipe) -> Path | None:
    """Return the checkpoint to go on from: the one that the recipe names, else the last whole one in output_dir."""
    if recipe.run.resume_from_checkpoint:
        path = Path(recipe.run.resume_from_checkpoint)
        if not (path / STATE_FILE).is_file():
            raise ValueError(f"resume_from_checkpoint={path}: holds no {STATE_FILE}; give a checkpoint-N folder")
        return path
    checkpoints = list_checkpoints(Path(recipe.run.output_dir))
    return checkpoints[-1] if checkpoints else None


def check_same_recipe(recipe: Recipe, saved: dict[str, Any], path: Path) -> None:
    """Raise ValueError where a resumed run would not be the run that was started, naming the fields that differ."""
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


def _flatten(optimizer_state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return tensors by `{parameter}.{name}`, such as exp_avg, of all parameters."""
    states = optimizer_state.get("state", {})
    return {f"{parameter}.{name}": value for parameter, state in states.items() for name, value in state.items()}


def _unflatten(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        parameter, _, name = key.rpartition(".")
        state.setdefault(parameter, {})[name] = tensor
    return state


class FiniteWatch:
    """The first loss that is not finite, found without waiting for the device in every step: noted on the device, and
    asked for where the run waits anyway, at log lines and checkpoints. What the loss was made of is then known by
    number alone, for a sample is a function of its index."""

    def __init__(self, views: PretrainingViews, run: RunRecipe, accelerator: Accelerator):
        self.views, self.run, self.accelerator = views, run, accelerator
        self.first = torch.full((), math.inf, dtype=torch.float64, device=accelerator.device)  # forward, by number

    def note(self, loss: torch.Tensor, forward: int) -> None:
        self.first = torch.where(torch.isfinite(loss.detach()), self.first, self.first.clamp(max=forward))

    def check(self) -> None:
        """Raise RuntimeError with the step and the samples at fault. Every process calls it."""
        firsts = self.accelerator.gather(self.first.reshape(1)).tolist()
        forward = min(firsts)
        if math.isinf(forward):
            return
        batch, process = self.run.per_device_train_batch_size, firsts.index(forward)
        start = (int(forward) * len(firsts) + process) * batch
        rows = [self.views.row_of(index) for index in range(start, start + batch)]
        raise RuntimeError(
            f"step {int(forward) // self.run.gradient_accumulation_steps + 1}: the loss is not finite; samples {start} "
            f"to {start + batch - 1}, corpus rows {rows}. The last good checkpoint in {self.run.output_dir} stands; "
            "lower learning_rate or max_grad_norm, or look at these rows"
        )
