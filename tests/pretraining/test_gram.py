"""Gram anchoring in a run: when its teacher is taken, what it sees, and that a resumed run has the same one."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pretrain_runs import log, recipe, tiny, tiny_batch, train, weights
from safetensors.torch import load_file

from training.pretraining.losses.gram import gram_loss
from training.pretraining.networks import GramTeacher, Network, resize_patches

# taken before step 2, anew before 4 and 6, and never again
SCHEDULE = ["--gram_weight", "2.0", "--gram_start_step", "2", "--gram_update_steps", "2", "--gram_max_updates", "2"]
PLAIN = ["--jitter_probability", "0", "--blur_probability", "0", "0", "0"]
MAX_STEPS = 9


def with_air(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same crops with air below on the right: this phantom's crops hold some breast in every patch."""
    for key in ("global_tissue", "gram_tissue"):
        if key in batch:
            batch[key][:, batch[key].shape[1] // 2 :, batch[key].shape[2] // 4 :] = 0
    return batch


@pytest.fixture(scope="module")
def run(phantom_corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("gram")
    arguments = ["--max_steps", str(MAX_STEPS), "--save_steps", "1", "--save_total_limit", "9", *SCHEDULE]
    train(recipe(phantom_corpus, output, *arguments, "--gram_crop_size", "128"))
    return output


def test_the_gram_teacher_is_taken_when_the_recipe_says(run):
    def encoder(step: int, name: str) -> dict[str, torch.Tensor]:
        tensors = load_file(run / f"checkpoint-{step}" / f"{name}.safetensors")
        return {key: value for key, value in tensors.items() if key.startswith("backbone.")}

    for step in range(3, MAX_STEPS + 1):  # checkpoint-N holds what step N - 1, counted from 0, used
        taken_before = min((step - 1) // 2 * 2, 6)
        used, teacher = encoder(step, "gram_teacher"), encoder(taken_before, "teacher")
        assert used.keys() == teacher.keys()
        assert all(torch.equal(used[key], teacher[key]) for key in used), step
    lines = log(run)
    assert [line["loss_gram"] > 0 for line in lines] == [False] * 2 + [True] * (MAX_STEPS - 2)
    weighted = lines[5]["loss"] - 2.0 * lines[5]["loss_gram"]
    others = lines[5] | {"loss_koleo": 0.1 * lines[5]["loss_koleo"], "loss_gram": 0}
    assert weighted == pytest.approx(sum(value for key, value in others.items() if key.startswith("loss_")), rel=1e-5)


@pytest.mark.parametrize("last", [2, 5])
def test_a_resumed_run_keeps_its_gram_teacher(run, phantom_corpus, tmp_path, last):
    """Cut where the gram teacher is about to be taken, and between."""
    shutil.copytree(run / f"checkpoint-{last}", tmp_path / f"checkpoint-{last}")
    arguments = ["--max_steps", str(MAX_STEPS), "--save_steps", "1", "--save_total_limit", "9", *SCHEDULE]
    train(recipe(phantom_corpus, tmp_path, *arguments, "--gram_crop_size", "128"))
    whole, resumed = (weights(folder / f"checkpoint-{MAX_STEPS}") for folder in (run, tmp_path))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert log(tmp_path)[-1]["loss_gram"] == log(run)[-1]["loss_gram"]


def test_the_gram_teacher_sees_the_same_boxes_larger_and_undistorted(phantom_corpus):
    larger = ["--gram_weight", "1", "--gram_crop_size", "128"]
    plain, batch = tiny_batch(phantom_corpus, *PLAIN), tiny_batch(phantom_corpus, *larger, *PLAIN)
    distorted = tiny_batch(phantom_corpus, *larger)
    assert "gram_crops" not in plain and torch.equal(plain["global_crops"], batch["global_crops"])  # nothing else moves
    assert batch["gram_crops"].shape == (16, 1, 128, 128) and batch["gram_tissue"].shape == (16, 8, 8)
    halved = torch.nn.functional.avg_pool2d(batch["gram_crops"].float(), 2)
    difference = (halved - batch["global_crops"]).abs().mean((1, 2, 3))  # per crop: both resize the same pixels
    mirrored = (halved.flip(-1) - batch["global_crops"]).abs().mean((1, 2, 3))
    assert (difference < 0.05 * 255 / 4).all() and mirrored.mean() > 4 * difference.mean()
    nested = torch.nn.functional.avg_pool2d(batch["gram_tissue"], 2)
    torch.testing.assert_close(nested, batch["global_tissue"], atol=1e-5, rtol=0)
    assert not np.allclose(distorted["global_crops"], batch["global_crops"])
    halved = torch.nn.functional.avg_pool2d(distorted["gram_crops"].float(), 2)
    assert (halved - distorted["global_crops"]).abs().mean() > 2 * difference.mean()


@pytest.mark.parametrize("arguments", [[], ["--gram_crop_size", "128"], ["--gram_crop_size", "96"]])
@pytest.mark.parametrize("tissue_tokens", ["false", "true"])
def test_features_of_the_gram_teacher_lie_on_the_students_grid(phantom_corpus, arguments, tissue_tokens):
    chosen = tiny("--gram_weight", "1", "--tissue_tokens", tissue_tokens, *arguments)
    batch = with_air(tiny_batch(phantom_corpus, "--gram_weight", "1", *arguments))
    teacher = Network(chosen).eval()
    gram_teacher = GramTeacher(teacher, chosen)
    patches = gram_teacher(batch)
    assert patches.shape == (16, 16, 32) and not patches.requires_grad
    with torch.no_grad():
        student = teacher(batch, is_student=False).crops.patches
    loss = gram_loss(student, patches, gram_teacher.counted_patches(batch))
    assert loss > 0.01 if arguments else loss == pytest.approx(0, abs=1e-10)  # the same weights on the same crops


def test_air_counts_only_where_masks_may_fall_on_it(phantom_corpus):
    batch, keeping = with_air(tiny_batch(phantom_corpus)), tiny("--gram_weight", "1")
    counted = GramTeacher(Network(keeping), keeping).counted_patches(batch)
    assert torch.equal(counted, batch["global_tissue"].flatten(1) > 0) and 0.2 < counted.float().mean() < 0.95
    everywhere = tiny("--gram_weight", "1", "--tissue_aware_masks", "false")
    assert GramTeacher(Network(everywhere), everywhere).counted_patches(batch) is None


def test_a_ramp_of_features_stays_a_ramp_on_a_coarser_grid():
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    ramp = torch.stack((y, 10 * x), dim=-1).flatten(0, 1)[None]  # (1, 96, 2)
    coarse = resize_patches(ramp, (8, 12), (4, 6)).unflatten(1, (4, 6))[0]
    y, x = torch.meshgrid(torch.arange(4.0) * 2 + 0.5, torch.arange(6.0) * 2 + 0.5, indexing="ij")
    torch.testing.assert_close(coarse[1:-1, 1:-1], torch.stack((y, 10 * x), dim=-1)[1:-1, 1:-1])
    assert resize_patches(ramp, (8, 12), (8, 12)) is ramp


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--gram_crop_size", "128"], "gram_crop_size=128: needs a gram_weight above 0"),
        (["--gram_weight", "1", "--gram_crop_size", "100"], "gram_crop_size=100: must be a multiple of patch_size"),
        (["--gram_weight", "1", "--gram_crop_size", "48"], "gram_crop_size=48: must be at least global_crop_size"),
        (["--gram_weight", "1", "--gram_start_step", "300"], "gram_start_step=300: must be below max_steps=300"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(*arguments)
