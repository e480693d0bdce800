"""One head for class tokens and patches, or a head for each: who goes through which, and what each has of its own."""

import math
import shutil

import numpy as np
import pytest
import torch
from pretrain_runs import SEPARATE, recipe, tiny, tiny_batch, train, weights
from safetensors.torch import load_file

from training.pretrain import compute_losses, weighted_sum
from training.pretraining.losses.cross_entropy import Logits, Probabilities
from training.pretraining.losses.targets import TeacherTargets, sinkhorn_knopp
from training.pretraining.networks import Network, ProjectionHead, make_teacher
from training.pretraining.optimization import param_groups


def dense(logits: Logits) -> torch.Tensor:
    return logits.features @ logits.prototypes.T


@pytest.fixture(scope="module")
def batch(phantom_corpus) -> dict[str, torch.Tensor]:
    return tiny_batch(phantom_corpus)


def test_a_head_gives_scaled_cosines_to_its_prototypes():
    """By hand: three layers with exact GELU, then g_k cos(bottleneck, v_k); at the start g is 1, and it learns."""
    head = ProjectionHead(8, 12, 5, 7).double()
    magnitude, direction = (getattr(head.last_layer.parametrizations.weight, f"original{part}") for part in (0, 1))
    assert (magnitude == 1).all() and magnitude.requires_grad and direction.requires_grad
    torch.nn.init.uniform_(magnitude, 0.5, 2)
    for layer in head.mlp[::2]:
        torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
    features = torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        logits, hidden = dense(head(features)), features.numpy()
        for number, layer in enumerate(head.mlp[::2]):
            hidden = hidden @ layer.weight.numpy().T + layer.bias.numpy()
            if number < 2:
                hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        norms = np.linalg.norm(hidden, axis=1)[:, None] * np.linalg.norm(direction.numpy(), axis=1)
        expected = magnitude.numpy()[:, 0] * (hidden @ direction.numpy().T) / norms
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-9)


def test_a_head_starts_from_small_normal_weights():
    head = ProjectionHead(256, 512, 128, 1024)
    for weight in (*(layer.weight for layer in head.mlp[::2]), head.last_layer.parametrizations.weight.original1):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03) and abs(weight.mean().item()) < 5e-4
    assert not any(layer.bias.any() for layer in head.mlp[::2])


@pytest.mark.parametrize("arguments", [[], SEPARATE])
def test_each_token_goes_through_its_head(batch, arguments):
    network = Network(tiny(*arguments, "--adjacent_patch_weight", "0.5")).eval()
    patch_head = network.ibot_head if arguments else network.head
    with torch.no_grad():
        seen = network(batch, is_student=True).crops
        global_cls, global_patches = network.encode(
            batch["global_crops"], batch["global_tissue"], batch["masks"].flatten(1)
        )
        local_cls, _ = network.encode(batch["local_crops"], batch["local_tissue"])
        slice_cls, slice_patches = network.encode(batch["slice_pairs"][:, 0], batch["slice_tissue"])
        expected = {
            "global_cls": dense(network.head(global_cls)).unflatten(0, (2, 8)),
            "local_cls": dense(network.head(local_cls)).unflatten(0, (2, 8)),
            "slice_cls": dense(network.head(slice_cls)),
            "masked_patches": dense(patch_head(global_patches[batch["masks"].flatten(1)])),
            "slice_patches": dense(patch_head(slice_patches[batch["slice_tissue"].flatten(1) > 0])),
        }
    assert len(expected["masked_patches"]) > 0 and len(expected["slice_patches"]) > 0
    assert expected["slice_patches"].shape[-1] == (24 if arguments else 64)
    for name, logits in expected.items():
        torch.testing.assert_close(dense(getattr(seen, name)), logits)


def test_separate_heads_have_sizes_groups_and_centers_of_their_own(batch):
    chosen = tiny(*SEPARATE, "--teacher_targets", "centering", "--adjacent_patch_weight", "0.5")
    student = Network(chosen)
    assert [each.out_features for each in student.ibot_head.mlp if hasattr(each, "out_features")] == [20, 20, 12]
    frozen = [group["params"] for group in param_groups(student, 2, chosen.optimizer)
              if group["lr_schedule"] == "last_layer_learning_rate"]  # fmt: skip
    assert sum(each.numel() for parameters in frozen for each in parameters) == (64 * 16 + 64) + (24 * 12 + 24)
    inherited = Network(tiny("--separate_ibot_head", "true"))
    assert [each.shape for each in inherited.head.parameters()] == [
        each.shape for each in inherited.ibot_head.parameters()
    ]
    assert not torch.equal(inherited.head.mlp[0].weight, inherited.ibot_head.mlp[0].weight)

    teacher, targets_of = make_teacher(student), TeacherTargets(chosen)
    logits = teacher(batch, is_student=False).crops
    targets_of(logits, 0.07)
    balanced = TeacherTargets(tiny(*SEPARATE))(logits, 0.07)
    for name in ("global_cls", "masked_patches", "slice_cls", "slice_patches"):
        rows = getattr(logits, name)
        rows = rows._replace(features=rows.features.flatten(0, -2))
        torch.testing.assert_close(targets_of.centers[name].center[0], 0.1 * dense(rows).mean(0))
        expected = Probabilities(rows.over(0.07), sinkhorn_knopp(rows, 0.07)).dense()  # by itself
        torch.testing.assert_close(getattr(balanced, name).dense().flatten(0, -2), expected)


@pytest.mark.parametrize("targets", ["sinkhorn_knopp", "centering"])
@pytest.mark.parametrize(
    ("off", "names"),
    [
        (["adjacent_slice_weight"], {"adjacent_slice"}),
        (["adjacent_patch_weight"], {"adjacent_patch"}),
        (["dino_weight", "koleo_weight"], {"dino_global", "dino_local", "koleo"}),
        (["ibot_weight", "adjacent_patch_weight"], {"ibot", "adjacent_patch"}),
    ],
)
def test_a_loss_of_weight_0_is_not_computed_and_changes_no_other(batch, off, names, targets):
    arguments = [*SEPARATE, "--teacher_targets", targets, "--adjacent_patch_weight", "0.5"]
    found, state = [], {}
    for more in ([], [part for name in off for part in (f"--{name}", "0")]):
        chosen = tiny(*arguments, *more)
        torch.manual_seed(0)
        student = Network(chosen).eval()
        student.load_state_dict(state, strict=False)
        state = student.state_dict()
        losses, _ = compute_losses(batch, student, make_teacher(student), TeacherTargets(chosen), 0.07, chosen)
        weighted_sum(losses, chosen).backward()
        unused = [name for name, each in student.named_parameters() if each.grad is None]
        assert unused == [], "DistributedDataParallel needs a gradient of each"
        found.append({name: value.item() for name, value in losses.items()})
    assert found[0].keys() - found[1].keys() == names
    assert found[1] == pytest.approx({name: found[0][name] for name in found[1]}, rel=1e-6)


@pytest.mark.parametrize("targets", ["sinkhorn_knopp", "centering"])
def test_a_run_with_separate_heads_resumes_exactly(phantom_corpus, tmp_path, targets):
    arguments = [*SEPARATE, "--max_steps", "4", "--save_steps", "2", "--teacher_targets", targets]
    train(recipe(phantom_corpus, tmp_path / "whole", *arguments))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train(recipe(phantom_corpus, tmp_path / "resumed", *arguments))
    whole, resumed = (weights(tmp_path / name / "checkpoint-4") for name in ("whole", "resumed"))
    assert "teacher.ibot_head.last_layer.parametrizations.weight.original1" in whole
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    centers = [load_file(tmp_path / name / "checkpoint-4" / "targets.safetensors") for name in ("whole", "resumed")]
    assert len(centers[0]) == (4 if targets == "centering" else 0)
    assert all(torch.equal(centers[0][key], centers[1][key]) for key in centers[0])


def test_settings_of_a_head_that_is_not_there_are_refused():
    with pytest.raises(ValueError, match="ibot_num_prototypes=24: needs --separate_ibot_head true"):
        tiny("--ibot_num_prototypes", "24")
    with pytest.raises(ValueError, match="ibot_num_prototypes=1: must be 2 or more"):
        tiny("--separate_ibot_head", "true", "--ibot_num_prototypes", "1")
