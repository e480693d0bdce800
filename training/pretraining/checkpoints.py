"""Checkpoints: written beside the training, atomic, safetensors only, the last good one is found by itself; and no step
whose loss is not finite.

A run's output_dir holds `checkpoint-N/` (a file a module, the optimizer, and the three files named below), `logs/`,
`images/` and in the end `encoder/`.
"""

import json
import logging
import math
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
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
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino.tools.files import atomic_folder
from training.pretraining.views.sample import PretrainingViews

from .processes import Processes
from .recipe import MAY_CHANGE_ON_RESUME, Recipe, RunRecipe

logger = logging.getLogger(__name__)

STATE_FILE, RECIPE_FILE, CONFIG_FILE = "trainer_state.json", "recipe.yaml", "config.json"
LOG_FILE, WARNINGS_FILE = "logs/log.jsonl", "logs/warnings.jsonl"  # in a run's output_dir
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the main process, however it is spread


class Saver:
    """Writes checkpoints while training goes on: a save holds the run up for a copy to the host's memory, as large as
    its files, which a thread of the main process then writes, one at a time. Leaving `with` waits for it."""

    def __init__(
        self,
        recipe: Recipe,
        modules: dict[str, nn.Module],
        optimizer: Optimizer,
        about: dict[str, Any],
        processes: Processes,
    ):
        """about: what is noted beside the recipe, `global_batch_size` and the fingerprint of the `corpus`."""
        self.recipe, self.modules, self.optimizer, self.processes = recipe, modules, optimizer, processes
        self.about, self.last_step = about, 0
        self.writer, self.writing = ThreadPoolExecutor(1, "checkpoint"), Future[None]()
        self.writing.set_result(None)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: Any) -> None:
        self.writer.shutdown()

    def is_due(self, step: int) -> bool:
        """Tell whether a checkpoint is. Raises what went wrong in writing the one before."""
        if self.writing.done():
            self.writing.result()
        return step % self.recipe.run.save_steps == 0

    def save(self, step: int) -> None:
        """Copy the run's state, to be written as `checkpoint-{step}`. Every process calls it, for sharded tensors are
        gathered. Raises what went wrong in writing the one before, for which it waits."""
        self.writing.result()
        self.processes.wait()  # for the disk, however long; what follows is gathered within NCCL's ten minutes
        files = host_copy(self.modules, self.optimizer)
        if self.processes.is_main:
            student: Any = self.modules["student"]
            config = student.backbone.config
            self.writing = self.writer.submit(write_checkpoint, files, config, self.recipe, step, self.about)
        self.last_step = step

    def finish(self, step: int) -> Path:
        """Save the last step, unless it is saved; return its folder when it is on disk, in every process."""
        if self.last_step != step:
            self.save(step)
        self.writing.result()
        self.processes.wait()
        return checkpoint_folder(self.recipe, step)


def host_copy(modules: dict[str, nn.Module], optimizer: Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of modules and optimizer by the name of their file, copies in host memory that training does
    not change: whole, however they are spread, on the main process, and nothing on others."""
    student = modules["student"]
    files: dict[str, Any] = {name: get_model_state_dict(module, options=WHOLE) for name, module in modules.items()}
    files["optimizer"] = _flatten(get_optimizer_state_dict(student, optimizer, options=WHOLE))
    if next(student.parameters()).device.type == "cpu":  # where nothing was copied yet
        files = {name: {key: each.clone() for key, each in tensors.items()} for name, tensors in files.items()}
    return files


def write_checkpoint(
    files: dict[str, dict[str, torch.Tensor]],
    config: PreTrainedConfig,
    recipe: Recipe,
    step: int,
    about: dict[str, Any],
) -> None:
    """Write `checkpoint-{step}` atomically: a safetensors file each of `files`, the recipe, the step, what is noted of
    the run beside, and the encoder's configuration, by which another run can go on from it.

    Raises OSError where it cannot, and RuntimeError, before it writes, where a tensor is not finite.
    """
    final = checkpoint_folder(recipe, step)
    for name, tensors in files.items():
        if wrong := not_finite(tensors):
            raise RuntimeError(
                f"step {step}: {name} {wrong} is not finite, so no checkpoint is written; the last one in "
                f"{final.parent} stands. Lower learning_rate or max_grad_norm"
            )
    try:
        with atomic_folder(final, replace=True) as folder:
            for name, tensors in files.items():
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
            recipe.save(folder / RECIPE_FILE)
            config.to_json_file(folder / CONFIG_FILE)
            state = {"global_step": step, **about, "origin": recipe.origin}
            (folder / STATE_FILE).write_text(json.dumps(state) + "\n")
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{final}: cannot be written ({error}); what was saved before stands. Make room, and give the same command"
        ) from error
    found, named = list_checkpoints(final.parent), Path(recipe.run.resume_from_checkpoint).resolve()
    kept = [path for path in found if step_of(path) <= step][-recipe.run.save_total_limit :]
    for path in found:  # those of later steps are of what the run went back behind
        if path not in kept and path.resolve() != named:
            shutil.rmtree(path)


def checkpoint_folder(recipe: Recipe, step: int) -> Path:
    return Path(recipe.run.output_dir) / f"checkpoint-{step}"


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
        return read_state(path)["global_step"]
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint {path}: cannot be resumed ({error}); remove it to go on from the one before"
        ) from error


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the whole checkpoints in a run's folder, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if (path / STATE_FILE).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def find_checkpoint(recipe: Recipe) -> Path | None:
    """Return the checkpoint to go on from: the last in output_dir that is whole and finite. Where the recipe names one,
    only those count that the same command has saved since, and without them it is the one named."""
    named, found = recipe.run.resume_from_checkpoint, list_checkpoints(Path(recipe.run.output_dir))
    for path in reversed(found):
        if named and read_recipe(path).get("resume_from_checkpoint") != named:
            continue
        if not (wrong := _not_finite_file(path)):
            return path
        logger.warning("%s is passed over: %s is not finite", path, wrong)
    if named:
        path = Path(named)
        if not (path / STATE_FILE).is_file():
            raise ValueError(f"resume_from_checkpoint={path}: holds no {STATE_FILE}; give a checkpoint-N folder")
        if wrong := _not_finite_file(path):
            raise ValueError(f"resume_from_checkpoint={path}: {wrong} is not finite; give an earlier checkpoint")
        return path
    return None


def read_recipe(checkpoint: Path) -> dict[str, Any]:
    return yaml.safe_load((checkpoint / RECIPE_FILE).read_text())


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the records of LOG_FILE or WARNINGS_FILE, but for lines that a crash cut; none where there is no file."""
    found = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE_FILE).read_text())


def not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """Return the name of the first tensor with a value that is not finite."""
    return next((key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def _not_finite_file(checkpoint: Path) -> str | None:
    """Return the same of a checkpoint's files; None also where one cannot be read, which loading it says."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        try:
            if wrong := not_finite(load_file(file)):
                return f"{file.name} {wrong}"
        except (OSError, SafetensorError):
            return None
    return None


def check_corpus(corpus: Corpus, path: Path, may_be_extended: bool = False) -> None:
    """Raise ValueError where a checkpoint was made with another corpus, as far as it says."""
    found, noted = corpus.fingerprints, read_state(path).get("corpus")
    if noted is None or noted == found[-1]:
        return
    if noted not in found:
        raise ValueError(f"corpus={corpus.directory}: {path} was made with other images; give the --corpus that it had")
    if not may_be_extended:
        raise ValueError(
            f"corpus={corpus.directory}: was extended after {path}, so that samples are others; train its weights on "
            f"all with --init_from_checkpoint {path} and another --output_dir"
        )
    logger.warning("%s was extended after %s, whose card counts the images that are new, too", corpus.directory, path)


def check_same_run(recipe: Recipe, global_batch_size: int, path: Path) -> None:
    """Raise ValueError where a resumed run would not be the run that was started, naming the fields that differ."""
    wanted, saved = recipe.flat(), read_recipe(path)
    images = read_state(path).get("global_batch_size", global_batch_size)
    if images != global_batch_size:
        raise ValueError(
            f"{path}: was made with {images} images a step, not {global_batch_size}; give per_device_train_batch_size "
            f"and gradient_accumulation_steps whose product with the number of processes is {images}"
        )
    if saved.get("init_from") == f"{wanted['init_from']}/encoder":  # a run that was moved since, by its folder
        wanted["init_from"] = saved["init_from"]
    changed = [
        f"{name} ({saved[name]!r} -> {wanted[name]!r})"
        for name in wanted
        if name not in MAY_CHANGE_ON_RESUME and name in saved and saved[name] != wanted[name]
    ]
    if changed:
        is_longer = wanted["max_steps"] != saved["max_steps"]  # schedules end where a run does
        longer = f", with --init_from_checkpoint {path} to train its weights longer" if is_longer else ""
        raise ValueError(
            f"{path}: was made with another recipe: {', '.join(changed)}; give the same values to go on, or another "
            f"--output_dir to start afresh{longer}"
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
    """The first loss or gradient that is not finite, found without waiting for the device in every step: noted on the
    device, and asked for where the run waits anyway, at log lines and checkpoints. What the loss was made of is then
    known by number alone, for a sample is a function of its index."""

    def __init__(self, views: PretrainingViews, run: RunRecipe, accelerator: Accelerator):
        self.views, self.run, self.accelerator = views, run, accelerator
        # numbers of the first forward with such a loss, and of the last forward of the first step with such a gradient
        self.first = torch.full((2,), math.inf, dtype=torch.float64, device=accelerator.device)

    def note(self, loss: torch.Tensor, forward: int) -> None:
        self._note(0, loss, forward)

    def note_gradient(self, norm: torch.Tensor, step: int) -> None:
        """norm: of the gradients of a part of the student, of the step of this number (0-based)."""
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._note(1, whole, (step + 1) * self.run.gradient_accumulation_steps - 1)

    def _note(self, place: int, value: torch.Tensor, forward: int) -> None:
        first = self.first[place]
        self.first[place] = torch.where(torch.isfinite(value.detach()), first, first.clamp(max=forward))

    def check(self) -> None:
        """Raise RuntimeError with the step and the samples at fault. Every process calls it."""
        losses, gradients = self.accelerator.gather(self.first[None]).T.tolist()
        forward, what = min((min(losses), "loss"), (min(gradients), "gradient"), key=lambda each: each[0])
        if math.isinf(forward):
            return
        step, batch = int(forward) // self.run.gradient_accumulation_steps, self.run.per_device_train_batch_size
        if what == "loss":
            start, count = (int(forward) * len(losses) + losses.index(forward)) * batch, batch
        else:  # which all samples of the step share
            count = batch * len(losses) * self.run.gradient_accumulation_steps
            start = step * count
        rows = [self.views.row_of(index) for index in range(start, start + count)]
        raise RuntimeError(
            f"step {step + 1}: the {what} is not finite; samples {start} to {start + count - 1}, corpus rows {rows}. "
            f"The last good checkpoint in {self.run.output_dir} stands; lower learning_rate or max_grad_norm, or look "
            "at these rows"
        )
