"""No step waits for the device: tried on the meta device, where reading a value raises, for there is none. A copy to it
that the host waits for is counted."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from pretrain_runs import tiny
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dataset_scripts.corpus.reader import Corpus
from training.pretrain import compute_losses, weighted_sum
from training.pretraining.checkpoints import FiniteWatch
from training.pretraining.losses.dense_regression import DenseTargets
from training.pretraining.losses.targets import TeacherTargets
from training.pretraining.networks import GramTeacher, Network, make_teacher, update_teacher
from training.pretraining.views.sample import PretrainingViews, collate

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Copies from the host to meta that are waited for."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if function is torch.ops.aten.copy_.default else args[0]
            waits = not (kwargs or {}).get("non_blocking", args[2] if len(args) > 2 else False)
            self.waits += [str(function)] if waits and source.device != result.device else []
        return result


class NewTensors(TorchFunctionMode):
    """Tensors made on meta of Python's numbers, which are copied there and waited for."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and result.is_meta:
            self.waits.append(str(function))
        return result


CROPS = ["--adjacent_patch_weight", "0.5", "--gram_weight", "1", "--gram_crop_size", "128"]
CANVAS = ["--dense_statistics_weight", "1", "--dense_components_weight", "1", "--dense_components", "16",
          "--canvas_tokens", "12", "--breast_weight", "1", "--patient_weight", "1", "--contralateral_weight", "1",
          "--views_per_patient", "4"]  # fmt: skip


@pytest.mark.parametrize("switches", [CROPS, ["--tissue_tokens", "true", *CROPS],
                                      ["--tissue_tokens", "true", "--teacher_targets", "centering"], CANVAS],
                         ids=["dense", "tissue tokens", "centering", "canvas"])  # fmt: skip
def test_a_step_waits_for_nothing(phantom_corpus, switches, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no meta device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    recipe = tiny(*switches)
    corpus = Corpus(phantom_corpus)
    canvas = (recipe.model.image_height, recipe.model.image_width) if recipe.uses_canvas else None
    views = PretrainingViews(corpus, recipe.views, 16, 0, 8, recipe.uses_slice_pairs, recipe.uses_crops, canvas)
    student = Network(recipe, corpus.image_processor).train().to(META)
    targets = DenseTargets(canvas, 16, recipe.model.dense_components).to(META) if canvas else None
    teacher, targets_of = make_teacher(student), TeacherTargets(recipe).to(META)
    gram = GramTeacher(teacher, recipe) if recipe.loss.gram_weight else None
    batch = collate([views[index] for index in range(8)]).to(META, non_blocking=True)
    assert batch["global_tissue"].device.type == "cpu"
    watch = FiniteWatch(views, recipe.run, SimpleNamespace(device=META))
    with Copies() as copies, NewTensors() as new_tensors:
        losses, _ = compute_losses(batch, student, teacher, targets_of, 0.07, recipe, gram, targets)
        total = weighted_sum(losses, recipe)
        watch.note(total, 0)
        total.backward()
        watch.note_gradient(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0), 0)
        update_teacher(teacher, student, 0.9)
    assert copies.waits == new_tensors.waits == []
