"""How much GPU memory does a pretraining step need? Counted, without a GPU and without allocating it.

    python -m performance.memory [RECIPE [--name value ...]]      by default every shipped recipe

`training.pretrain.compute_losses` and its backward run on torch's fake tensors, shapes and types without data,
and what each operation allocates is added up. The batch is the largest that there can be: every patch is breast, every
image has a neighboring slice. One process, eager, bfloat16 unless the recipe says otherwise. Not counted: what CUDA and
its libraries take (about 1 GiB), and gaps in its allocator (some 10 %).
"""

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers.initialization import no_init_weights

from training.pretrain import compute_losses, weighted_sum
from training.pretraining.losses.dense_regression import DenseTargets
from training.pretraining.losses.targets import TeacherTargets
from training.pretraining.networks import GramTeacher, Network
from training.pretraining.recipe import RECIPES, Recipe, load_recipe
from training.pretraining.views.sample import PretrainingViews, collate

DRAWN = 16  # samples, of which a larger batch is made
COLUMNS = ("recipe", "images a forward", "state", "kept for the backward", "peak, GiB")


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    names = [given] if given else [[path.stem] for path in sorted(RECIPES.glob("*.yaml"))]
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for words in names:
        recipe = load_recipe([*words, "--corpus", "none", "--output_dir", "none"])
        state, kept, peak = (f"{each / 2**30:.1f}" for each in count_memory(recipe))
        print(f"| {words[0]} | {recipe.run.per_device_train_batch_size} | {state} | {kept} | {peak} |", flush=True)


class AllBreast:
    """A corpus that is nowhere, whose images are breast all over: pairs of neighboring slices, four of a patient."""

    num_volumes = 512
    kinds = np.full(num_volumes, "dbt")

    def __init__(self, side: int):
        self.pixels, self.tissue = np.zeros((side, side), np.uint8), np.ones((side // 8, side // 8), np.float32)

    def image(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return self.pixels, self.tissue

    def rows_of(self, volume: int) -> range:
        return range(2 * volume, 2 * volume + 2)

    def slice_indices(self, rows: range) -> np.ndarray:
        return np.array(rows)

    def slice_spacing_mm(self, row: int) -> None:
        return None

    def volume_column(self, name: str) -> list[str]:
        of_patient = {"laterality": "LLRR", "view": ["CC", "MLO", "CC", "MLO"]}.get(name)
        return [of_patient[each % 4] if of_patient else str(each // 4) for each in range(self.num_volumes)]


class Allocations(TorchDispatchMode):
    """Bytes of what is allocated by operations within, and not freed since."""

    def __init__(self, before: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()
        for tensor in before:
            self.known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and (storage := each.untyped_storage()) not in self.known:
                self.known[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def count_memory(recipe: Recipe) -> tuple[int, int, int]:
    """Return bytes: of weights, their gradients, optimizer and teachers; kept for the backward; at the peak."""
    student, before, forward = prepare_step(recipe, FakeTensorMode(allow_non_fake_inputs=True))
    state = sum(each.nbytes for each in before) + 2 * sum(each.nbytes for each in student.parameters())  # of AdamW
    with Allocations(before) as allocated:
        total = forward()
        kept = allocated.now
        total.backward()
    return state, kept, state + allocated.peak


def prepare_step(
    recipe: Recipe, mode: FakeTensorMode | None = None
) -> tuple[Network, list[torch.Tensor], Callable[[], torch.Tensor]]:
    """Return the student, every tensor that there is before a step, and its forward, which returns the loss; on fake
    tensors of `mode`, on real ones without."""
    model, run = recipe.model, recipe.run
    model.init_from = model.init_from_checkpoint = ""
    canvas, corpus = (model.image_height, model.image_width), cast(Any, AllBreast(max(model.image_height, 512)))
    drawn = min(run.per_device_train_batch_size, DRAWN)
    views = PretrainingViews(
        corpus, recipe.views, model.patch_size, 0, drawn,
        recipe.uses_slice_pairs, recipe.uses_crops, canvas if recipe.uses_canvas else None,
    )  # fmt: skip
    samples = [views[index] for index in range(drawn)]
    batch = collate([samples[index % drawn] for index in range(run.per_device_train_batch_size)])
    with mode or nullcontext(), no_init_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fake tensor is copied
        student, teacher = Network(recipe).train(), Network(recipe).eval().requires_grad_(False)
        targets_of = TeacherTargets(recipe)
        gram_teacher = GramTeacher(teacher, recipe) if recipe.loss.gram_weight else None
        dense_targets = DenseTargets(canvas, model.patch_size, model.dense_components) if recipe.uses_canvas else None
        if dense_targets:
            dense_targets.cpu_images = recipe.run.per_device_train_batch_size  # all at once, as on a GPU
        if run.gradient_checkpointing:
            student.backbone.gradient_checkpointing_enable()
    if mode:  # what else a batch holds is small, and says which tokens there are
        batch.update({name: mode.from_tensor(each) for name, each in batch.items() if each.dtype == torch.uint8})
    modules = [module for module in (student, teacher, targets_of, gram_teacher, dense_targets) if module]
    before = [*batch.values(), *(each for module in modules for each in (*module.parameters(), *module.buffers()))]
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
        before.append(parameter.grad)
    is_half = run.bf16 is not False

    def forward() -> torch.Tensor:
        called = convert_outputs_to_fp32(student) if is_half else student  # as Accelerate does
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            losses, _ = compute_losses(batch, called, teacher, targets_of, 0.07, recipe, gram_teacher, dense_targets)
            return weighted_sum(losses, recipe)

    return student, before, forward


if __name__ == "__main__":
    main()
