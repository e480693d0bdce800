"""Continued pretraining: the backbone starts from a checkpoint, waits while the head settles, and resumes exactly."""

import shutil
from pathlib import Path

import pytest
import torch
from dinov2_checkpoints import MEAN, STD, TINY, inputs, one_thread, randomize, save_source  # noqa: F401 (a fixture)
from pretrain_runs import CROPS, log, main, train, weights
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2WithRegistersConfig
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersModel

from modeling_mammodino import MammoDinoConfig, MammoDinoImageProcessor, MammoDinoModel
from training.pretraining.networks import Network, load_backbone, make_teacher
from training.pretraining.recipe import Recipe, load_recipe

FREEZE_STEPS, MAX_STEPS = 2, 4
ARGUMENTS = [
    "--hidden_size", "128", "--num_hidden_layers", "2", "--num_attention_heads", "2", "--patch_size", "14",
    "--num_register_tokens", "0", "--num_prototypes", "32", "--head_hidden_size", "32", "--head_bottleneck_size", "16",
    "--global_crop_size", "56", "--local_crop_size", "28", "--num_local_crops", "1", "--image_height", "140",
    "--image_width", "98", "--per_device_train_batch_size", "4", "--dataloader_num_workers", "0", "--logging_steps",
    "1", "--warmup_steps", "1", "--report_to", "none", "--drop_path_rate", "0.2", "--save_steps", "1",
    "--save_total_limit", "9", "--max_steps", str(MAX_STEPS), "--freeze_backbone_steps", str(FREEZE_STEPS),
    "--layerwise_decay", "0.9", "--weight_decay", "0.4",
]  # fmt: skip


def recipe(source: Path, corpus: Path | str = "c", output: Path | str = "o", *arguments: str) -> Recipe:
    where = ["--corpus", str(corpus), "--output_dir", str(output), "--init_from", str(source)]
    return load_recipe([CROPS, *where, *ARGUMENTS, *arguments])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Plain RGB DINOv2, so that channels, normalization and interpolation all have to be carried over."""
    folder = tmp_path_factory.mktemp("dinov2")
    save_source(folder, Dinov2Model, Dinov2Config(**TINY))
    return folder


@pytest.fixture(scope="module")
def run(source, phantom_corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    train(recipe(source, phantom_corpus, output))
    return output


def parts(checkpoint: Path, network: str) -> tuple[dict, dict]:
    """Backbone and head of student or teacher."""
    tensors = load_file(checkpoint / f"{network}.safetensors")
    chosen = (
        {name: each for name, each in tensors.items() if name.startswith(part)} for part in ("backbone.", "head.")
    )
    return next(chosen), next(chosen)


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[key].numpy().tobytes() == b[key].numpy().tobytes() for key in a)


def test_the_backbone_waits_bit_by_bit_and_then_learns(run, source):
    start = {f"backbone.{name}": each for name, each in load_backbone(recipe(source)).state_dict().items()}
    checkpoints = [run / f"checkpoint-{step}" for step in range(1, MAX_STEPS + 1)]
    for network in ("student", "teacher"):
        backbones, heads = zip(*(parts(path, network) for path in checkpoints), strict=True)
        assert all(same_bits(start, each) for each in backbones[:FREEZE_STEPS])
        for before, after in zip(backbones[FREEZE_STEPS - 1 :], backbones[FREEZE_STEPS:], strict=False):
            moved = [name for name in before if not torch.equal(before[name], after[name])]
            assert {"backbone.embeddings.position_embeddings", "backbone.layernorm.weight"} <= set(moved)
            assert len(moved) > 0.9 * len(before)
        assert not any(same_bits(a, b) for a, b in zip(heads, heads[1:], strict=False))  # the head learns throughout
    rates = [(line["backbone_learning_rate"], line["learning_rate"]) for line in log(run)]
    assert [backbone for backbone, _ in rates[:FREEZE_STEPS]] == [0.0] * FREEZE_STEPS
    assert all(backbone == rate > 0 for backbone, rate in rates[FREEZE_STEPS:])


@pytest.mark.parametrize("last", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_run(run, source, phantom_corpus, tmp_path, last):
    """Cut while frozen and after; the weights that it started from, of a run's folder, are no longer there."""
    saved = shutil.copytree(run / f"checkpoint-{last}", tmp_path / f"checkpoint-{last}") / "recipe.yaml"
    saved.write_text(saved.read_text().replace(f"init_from: {source}\n", f"init_from: {tmp_path}/gone/encoder\n"))
    train(recipe(tmp_path / "gone", phantom_corpus, tmp_path))
    whole, resumed = (weights(folder / f"checkpoint-{MAX_STEPS}") for folder in (run, tmp_path))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_other_weights_or_another_freeze_are_another_run(run, source, phantom_corpus):
    with pytest.raises(ValueError, match="freeze_backbone_steps"):
        train(recipe(source, phantom_corpus, run, "--freeze_backbone_steps", "3"))


def test_the_export_keeps_grid_and_interpolation(run):
    encoder = MammoDinoModel.from_pretrained(run / "encoder")
    assert (encoder.config.interpolate_antialias, encoder.config.interpolate_offset) == (False, 0.1)
    assert encoder.config.image_size == TINY["image_size"] and encoder.embeddings.stored_grid == (5, 5)
    assert encoder.config.num_channels == 1 and encoder.config.drop_path_rate == 0
    teacher = parts(run / f"checkpoint-{MAX_STEPS}", "teacher")[0]
    assert same_bits(teacher, {f"backbone.{name}": each for name, each in encoder.state_dict().items()})


def test_student_and_teacher_start_from_the_weights_with_the_views_normalization(tmp_path):
    native = save_source(tmp_path, Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**TINY, num_register_tokens=2))
    views = MammoDinoImageProcessor(image_mean=[0.2], image_std=[0.6])
    student = Network(recipe(tmp_path, "c", "o", "--num_register_tokens", "2"), views)
    teacher = make_teacher(student)
    rgb, gray = inputs(56, 56, MEAN, STD)
    seen = (gray * 0.25 + 0.5 - 0.2) / 0.6
    with torch.no_grad():
        expected = native(rgb).last_hidden_state
        for network in (student.eval(), teacher):
            torch.testing.assert_close(network.backbone(seen).last_hidden_state, expected, rtol=0, atol=1e-5)
    student.train()
    assert [layer.drop_path_rate for layer in student.backbone.encoder.layer] == [0.2, 0.2]
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.backbone.config._attn_implementation == "sdpa"


def test_missing_registers_start_fresh_and_are_said(source, caplog):
    caplog.set_level("INFO")
    backbone = load_backbone(recipe(source, "c", "o", "--num_register_tokens", "3"))
    registers = backbone.embeddings.register_tokens
    assert registers.shape == (1, 3, 128) and 0 < registers.abs().max() < 1e-5
    assert caplog.text.count("0 register tokens: 3 fresh") == 1
    assert backbone(torch.randn(1, 1, 28, 28)).last_hidden_state.shape == (1, 1 + 3 + 4, 128)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--hidden_size", "64"], r"hidden_size=64: init_from=.* has hidden_size=128; give --hidden_size 128"),
        (["--num_hidden_layers", "3"], "num_hidden_layers=3: .* has num_hidden_layers=2"),
        (["--num_attention_heads", "4"], "num_attention_heads=4: .* has num_attention_heads=2"),
        (["--patch_size", "7"], "patch_size=7: .* has patch_size=14"),
        (["--num_register_tokens", "1"], "num_register_tokens=1: .* has 2, none of which can be left out"),
    ],
)
def test_another_architecture_is_refused_by_field(tmp_path, arguments, message):
    randomize(MammoDinoModel(MammoDinoConfig(**TINY, num_register_tokens=2))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_backbone(recipe(tmp_path, "c", "o", "--num_register_tokens", "2", *arguments))


def test_the_command_names_weights_that_are_not_there(phantom_corpus, tmp_path):
    for source in (tmp_path / "nowhere", tmp_path / "nowhere.pth"):
        with pytest.raises(SystemExit, match="nowhere"):
            main([CROPS, "--corpus", str(phantom_corpus), "--output_dir", str(tmp_path), "--init_from", str(source)])
