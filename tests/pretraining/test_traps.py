"""Mistakes found in published DINOv2 trainers, each forbidden: what a run does step by step, seen from outside."""

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from pretrain_runs import SEPARATE, log, recipe, train
from safetensors.torch import load_file

from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino import MammoDinoConfig
from modeling_mammodino.modeling_mammodino import MammoDinoLayer
from training import pretrain
from training.pretraining.losses.koleo import koleo_loss
from training.pretraining.networks import Network
from training.pretraining.optimization import make_schedules, param_groups
from training.pretraining.views.masks import block_mask
from training.pretraining.views.sample import PretrainingViews

STEPS, FROZEN_STEPS, MAX_NORM, BATCH = 4, 2, 1e-3, 8
ARGUMENTS = [*SEPARATE, "--max_steps", str(STEPS), "--save_steps", "1", "--save_total_limit", "9",
             "--freeze_last_layer_steps", str(FROZEN_STEPS), "--max_grad_norm", str(MAX_NORM), "--weight_decay", "0.4",
             "--layerwise_decay", "0.9", "--koleo_weight", "0.1"]  # fmt: skip


@dataclass
class Seen:
    """What happened in a run, in order."""

    order: list[str] = field(default_factory=list)
    batches: list[dict[str, torch.Tensor]] = field(default_factory=list)
    grad_norms: list[dict[str, float]] = field(default_factory=list)  # of each part, as the optimizer finds them
    rates: list[list[tuple[float, float]]] = field(default_factory=list)  # lr and weight decay of each group
    calls: dict[str, list[dict]] = field(default_factory=lambda: {"student": [], "teacher": []})  # of the backbones
    koleo: list[torch.Tensor] = field(default_factory=list)
    copies: bool = False  # student and teacher are equal before the first step


def parameters_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [each.detach().clone() for each in module.parameters()]


def watch(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen, networks = Seen(), {}
    make_teacher, compute_losses, koleo = pretrain.make_teacher, pretrain.compute_losses, pretrain.koleo_loss
    update_teacher, adam_step = pretrain.update_teacher, torch.optim.AdamW.step

    def watch_backbone(name: str, network: Network) -> None:
        def note(module, arguments, keywords):
            training = any(each.training for each in module.modules())
            seen.calls[name].append(
                {"pixels": arguments[0], "masks": keywords["bool_masked_pos"], "training": training}
            )

        network.backbone.register_forward_pre_hook(note, with_kwargs=True)

    def watched_teacher(student):
        networks["student"], networks["teacher"] = student, make_teacher(student)
        for name, network in networks.items():
            watch_backbone(name, network)
        pairs = zip(networks["teacher"].parameters(), student.parameters(), strict=True)
        seen.copies = all(torch.equal(a, b) and a is not b for a, b in pairs)
        return networks["teacher"]

    def watched_losses(batch, *rest, **options):
        seen.order.append("forward"), seen.batches.append(batch)
        return compute_losses(batch, *rest, **options)

    def watched_step(optimizer, *rest, **initial):
        if initial:  # torch's own, at rate 0, that makes room for the state of a checkpoint
            return adam_step(optimizer, *rest, **initial)
        seen.order.append("optimizer")
        seen.rates.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
        grads = {name: [each.grad for each in part.parameters()] for name, part in networks["student"].named_children()}
        norms = {name: float(torch.cat([each.flatten() for each in grad]).norm()) for name, grad in grads.items()}
        seen.grad_norms.append(norms)
        return adam_step(optimizer, *rest)

    def watched_update(teacher, student, momentum):
        seen.order.append("teacher")
        update_teacher(teacher, student, momentum)

    def watched_koleo(features, *rest):
        seen.koleo.append(features)
        return koleo(features, *rest)

    monkeypatch.setattr(pretrain, "make_teacher", watched_teacher)
    monkeypatch.setattr(pretrain, "compute_losses", watched_losses)
    monkeypatch.setattr(pretrain, "update_teacher", watched_update)
    monkeypatch.setattr(pretrain, "koleo_loss", watched_koleo)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)
    return seen


@pytest.fixture(scope="module")
def run(phantom_corpus, tmp_path_factory) -> tuple[Path, Seen]:
    output = tmp_path_factory.mktemp("traps")
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = watch(monkeypatch)
        train(recipe(phantom_corpus, output, *ARGUMENTS))
    return output, seen


def network(folder: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / f"{name}.safetensors")


def test_the_loop_runs_exactly_max_steps(run):
    """facebookresearch/dinov2 runs one more (`iteration > max_iter`)."""
    output, seen = run
    assert seen.order == ["forward", "optimizer", "teacher"] * STEPS
    assert torch.cat([each["index"] for each in seen.batches]).tolist() == list(range(STEPS * BATCH))
    assert [line["step"] for line in log(output)] == [1, 2, 3, 4]


def test_a_resumed_run_goes_on_with_the_next_samples(run, phantom_corpus, tmp_path, monkeypatch):
    """facebookresearch/dinov2 restarts the order of the data (`sampler_advance=0`)."""
    output, seen = run
    shutil.copytree(output / "checkpoint-2", tmp_path / "checkpoint-2")
    again = watch(monkeypatch)
    train(recipe(phantom_corpus, tmp_path, *ARGUMENTS))
    for before, after in zip(seen.batches[2:], again.batches, strict=True):
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_no_step_waits_for_the_device_to_look_at_a_number(phantom_corpus, tmp_path, monkeypatch):
    """facebookresearch/dinov2 checks for NaN in every step, which waits for the device; here only where one logs."""
    looks = []
    for name in ("__float__", "__bool__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, real=real: looks.append(1) or real(tensor))
    counts = []
    for steps in (2, 6):
        rare = ["--logging_steps", "1000", "--save_steps", "1000", "--max_steps", str(steps)]
        before = len(looks)
        train(recipe(phantom_corpus, tmp_path / str(steps), *rare, "--drop_path_rate", "0.2"))
        counts.append(len(looks) - before)
    assert counts[0] == counts[1] > 0


def largest_rectangle(mask: np.ndarray) -> int:
    sides = [(height, width) for height in range(1, mask.shape[0] + 1) for width in range(1, mask.shape[1] + 1)]
    full = (np.lib.stride_tricks.sliding_window_view(mask, side).all((2, 3)).any() for side in sides)
    return max((height * width for (height, width), found in zip(sides, full, strict=True) if found), default=0)


def test_the_largest_block_is_a_share_of_all_patches_on_any_grid():
    """`0.5 * img // patch * img // patch` of facebookresearch/dinov2 is right only by luck of precedence."""
    for grid in ((6, 40), (40, 6), (15, 16)):
        allowed = np.ones(grid, bool)
        for max_ratio, low, high in ((0.05, 6, 15), (0.5, 18, 48)):
            masks = [block_mask(np.random.default_rng(seed), 0.2, allowed, max_ratio) for seed in range(40)]
            assert low < np.mean([largest_rectangle(mask) for mask in masks]) < high, (grid, max_ratio)


def test_masks_and_views_have_one_source_of_randomness(phantom_corpus):
    """facebookresearch/dinov2 draws masks by `random` and views by torch: two states to restore. Here there is none."""
    views = PretrainingViews(Corpus(phantom_corpus), recipe(phantom_corpus, phantom_corpus).views, 16, 3, BATCH)
    samples = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        samples.append(views[5])
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        views[6]
        assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    for key in ("masks", "global_crops", "local_crops", "boxes"):
        np.testing.assert_array_equal(samples[0][key], samples[1][key])


def test_the_teacher_starts_as_a_copy_with_its_heads(run):
    """lightly's example starts student and teacher heads from different random weights."""
    assert run[1].copies


def test_the_last_layers_wait_in_magnitude_and_direction(run):
    """lightly's freeze looks for a key that no parameter group has, and never fires."""
    output, _ = run
    states = [network(output, step, "student") for step in range(1, STEPS + 1)]
    for head in ("head", "ibot_head"):
        for part in ("original0", "original1"):  # g and v of the weight norm
            key = f"{head}.last_layer.parametrizations.weight.{part}"
            assert torch.equal(states[0][key], states[1][key]), key
            assert not torch.equal(states[1][key], states[2][key]), key
            assert not torch.equal(states[2][key], states[3][key]), key
        assert (states[1][f"{head}.last_layer.parametrizations.weight.original0"] == 1).all()  # as at the start
        assert not torch.equal(states[0][f"{head}.mlp.0.weight"], states[1][f"{head}.mlp.0.weight"])


def test_backbone_and_each_head_are_clipped_apart(run):
    """lightly's example does not clip; one norm over all parts would let the heads hold the backbone down."""
    for norms in run[1].grad_norms:
        assert norms == pytest.approx(dict.fromkeys(("backbone", "head", "ibot_head"), MAX_NORM), rel=1e-3)


def test_every_group_follows_its_schedules_in_every_step(run, phantom_corpus):
    """lightly's example has no schedule of the learning rate."""
    _, seen = run
    chosen = recipe(phantom_corpus, "o", *ARGUMENTS)
    schedules, groups = make_schedules(chosen, BATCH), param_groups(Network(chosen), 2, chosen.optimizer)
    for step, rates in enumerate(seen.rates):
        expected = [(schedules[group["lr_schedule"]][step] * group["lr_multiplier"],
                     schedules["weight_decay"][step] * group["wd_multiplier"]) for group in groups]  # fmt: skip
        np.testing.assert_allclose(rates, expected, rtol=1e-12)
    assert len({rate for rates in seen.rates for rate, _ in rates}) > 8  # warm-up, cosine, layers, freeze


def test_biases_norms_and_layer_scales_do_not_decay(phantom_corpus):
    """lightly's example decays everything. An oracle without gradients: what decays shrinks by lr * weight decay."""
    chosen = recipe(phantom_corpus, "o", *ARGUMENTS)
    student = Network(chosen)
    optimizer = torch.optim.AdamW(param_groups(student, 2, chosen.optimizer))
    now = {"learning_rate": 0.5, "backbone_learning_rate": 0.25, "last_layer_learning_rate": 0.125, "weight_decay": 0.4}
    pretrain.set_learning_rates(optimizer, now)
    for parameter in student.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in student.named_parameters():
        rate, layer = (0.25, 3) if name.startswith("backbone") else (0.125 if "last_layer" in name else 0.5, 3)
        layer = 0 if "embeddings" in name else int(name.split(".layer.")[1][0]) + 1 if ".layer." in name else layer
        rate *= 0.9 ** (3 - layer) * (chosen.optimizer.patch_embed_lr_multiplier if "patch_embeddings" in name else 1)
        exempt = name.endswith(".bias") or "norm" in name or "lambda1" in name
        expected = torch.full_like(parameter, 1.0 if exempt else 1 - rate * 0.4)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_the_teacher_sees_whole_global_crops_alone_and_never_drops(run, phantom_corpus):
    _, seen = run
    chosen = recipe(phantom_corpus, "o", *ARGUMENTS)
    assert all(not call["training"] and call["masks"] is None for call in seen.calls["teacher"])
    assert all(call["training"] for call in seen.calls["student"])
    teacher, student = iter(seen.calls["teacher"]), iter(seen.calls["student"])
    mean, std = Corpus(phantom_corpus).image_processor.mean_and_std
    for of_bytes in seen.batches:
        batch = {key: (value / 255 - mean) / std if value.dtype == torch.uint8 else value
                 for key, value in of_bytes.items()}  # fmt: skip
        assert torch.equal(next(teacher)["pixels"], batch["global_crops"])
        assert torch.equal(next(teacher)["pixels"], batch["slice_pairs"][:, 1])
        call = next(student)
        assert torch.equal(call["pixels"], batch["global_crops"])
        assert torch.equal(call["masks"], batch["masks"].flatten(1)) and call["masks"].any()
        call = next(student)
        assert torch.equal(call["pixels"], batch["local_crops"]) and call["masks"] is None
        assert call["pixels"].shape[-1] == chosen.views.local_crop_size
        call = next(student)
        assert torch.equal(call["pixels"], batch["slice_pairs"][:, 0]) and call["masks"] is None
    assert next(teacher, None) is next(student, None) is None


def test_the_teacher_follows_the_student_of_after_the_step(run, phantom_corpus):
    output, _ = run
    momentum = make_schedules(recipe(phantom_corpus, "o", *ARGUMENTS), BATCH)["teacher_momentum"]
    for step in range(1, STEPS):
        before, after = (network(output, each, "teacher") for each in (step, step + 1))
        student, m = network(output, step + 1, "student"), momentum[step]
        assert any(not torch.equal(student[key], before[key]) for key in before)
        for key, value in after.items():
            expected = m * before[key].double() + (1 - m) * student[key].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8)


def test_koleo_never_sees_two_views_of_one_image(run):
    """Once for each global crop, of its batch alone: the other view would be everyone's nearest neighbor."""
    output, seen = run
    assert len(seen.koleo) == 2 * STEPS and all(len(features) == BATCH for features in seen.koleo)
    first, second, volume = *seen.koleo[:2], seen.batches[0]["volume"]
    assert not torch.equal(first, second) and len(volume.unique()) == BATCH
    breasts = seen.batches[0]["breast"]
    apart = koleo_loss(first, breasts) + koleo_loss(second, breasts)
    assert log(output)[0]["loss_koleo"] == pytest.approx(apart.item(), rel=1e-4)
    assert 2 * koleo_loss(torch.cat((first, second))) > apart + 0.1


def test_stochastic_depth_runs_the_kept_rows_alone_and_keeps_the_expectation():
    """Batch-subset form: b' = max(int(b (1 - r)), 1) rows, the branch of each added b / b' times."""
    config = MammoDinoConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, drop_path_rate=0.3)
    layer = MammoDinoLayer(config).train()
    torch.nn.init.normal_(layer.layer_scale1.lambda1)
    states = torch.randn(7, 3, 16, generator=torch.Generator().manual_seed(0))
    computed = []

    def branch(rows_of_states, rows):
        computed.append(len(rows_of_states))
        return torch.tanh(rows_of_states * 2)

    torch.manual_seed(0)
    with torch.no_grad():
        undropped = torch.tanh(states * 2) * layer.layer_scale1.lambda1
        draws = torch.stack([layer.add_residual(states, branch, layer.layer_scale1) - states for _ in range(4000)])
    assert set(computed) == {4}  # int(7 * 0.7)
    kept = (draws.abs() > 1e-7).any((2, 3))
    assert (kept.sum(1) == 4).all() and kept.float().mean(0) == pytest.approx(4 / 7, abs=0.04)
    torch.testing.assert_close(draws[0][kept[0]], undropped[kept[0]] * 7 / 4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draws.mean(0), undropped, rtol=0.1, atol=1e-3)
    assert MammoDinoLayer(MammoDinoConfig(**config.to_dict() | {"drop_path_rate": 0.95})).train().add_residual(
        states, branch, layer.layer_scale1
    ).shape == states.shape and computed[-1] == 1  # fmt: skip
