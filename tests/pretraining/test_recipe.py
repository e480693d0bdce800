"""Recipes: overrides, resolved files, and refusals that name the field."""

from dataclasses import fields

import numpy as np
import pytest
import torch
import yaml
from pretrain_runs import CROPS
from transformers import TrainingArguments

from training.pretraining.compute import set_precision
from training.pretraining.networks import Network, make_teacher, update_teacher
from training.pretraining.optimization import make_schedules, multipliers, param_groups
from training.pretraining.recipe import RECIPES, SECTIONS, OptimizerRecipe, load_recipe

WHERE = ["--corpus", "c", "--output_dir", "o"]
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def test_fields_carry_the_names_of_training_arguments():
    theirs = {each.name for each in fields(TrainingArguments)}
    ours = {each.name for section in SECTIONS for each in fields(section)}
    shared = {
        "max_steps", "save_steps", "save_total_limit", "logging_steps", "learning_rate", "per_device_train_batch_size",
        "gradient_accumulation_steps", "dataloader_num_workers", "seed", "output_dir", "resume_from_checkpoint", "bf16",
        "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "warmup_steps", "report_to", "torch_compile",
        "gradient_checkpointing",
    }  # fmt: skip
    assert shared <= theirs & ours
    assert len(ours) == sum(len(fields(section)) for section in SECTIONS)  # one flat namespace


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_survive_saving(name, tmp_path):
    recipe = load_recipe([name, *WHERE])
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe([str(tmp_path / "recipe.yaml")]) == recipe


def test_every_field_can_be_overridden():
    arguments = ["--max_steps", "7", "--global_crop_scale", "0.4", "0.9", "--tissue_aware_crops", "false", "--bf16"]
    recipe = load_recipe([CROPS, *WHERE, *arguments, "--teacher_targets", "centering"])
    assert recipe.run.max_steps == 7 and recipe.run.bf16 and recipe.views.global_crop_scale == [0.4, 0.9]
    assert recipe.views.tissue_aware_crops is False and recipe.loss.teacher_targets == "centering"


@pytest.mark.parametrize(
    "content,message",
    [
        ("learning_rat: 1", "did you mean 'learning_rate'"),
        ("global_min_tissue: 1.5", r"global_min_tissue=1.5: must be 0 to 1"),
        ("report_to: 3", "report_to=3: must be of type str"),
        ("bf16: 1", "bf16=1: must be of type bool"),
        ("hidden_size: 130", "hidden_size=130: must be a multiple of num_attention_heads"),
        ("local_crop_size: 50", "local_crop_size=50: must be a multiple of patch_size"),
        ("mask_ratio: [0.5, 0.1]", "mask_ratio"),
        ("mask_ratio: [0.5]", "mask_ratio"),
        ("global_crop_scale: [0.0, 1.0]", "global_crop_scale"),
        ("teacher_targets: none", "teacher_targets='none': must be sinkhorn_knopp, centering"),
        ("- 1", "lines of `name: value`"),
    ],
)
def test_what_is_invalid_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content + "\n")
    with pytest.raises(ValueError, match=message):
        load_recipe([str(path), *WHERE])


@pytest.mark.parametrize("gpu", [None, "without bfloat16", "with bfloat16"])
def test_precision_is_by_the_device_unless_the_recipe_says(monkeypatch, gpu):
    set_to: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu == "with bfloat16")
    for given, expected in (([], gpu == "with bfloat16"), (["--bf16", "true"], True), (["--bf16", "false"], False)):
        run = load_recipe([CROPS, *WHERE, *given]).run
        set_precision(run)
        assert run.bf16 is expected
    assert set_to == ["high"] * 3 * (gpu is not None)


def test_what_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="corpus and output_dir"):
        load_recipe([CROPS])
    with pytest.raises(ValueError, match="shipped recipes: .*paper"):
        load_recipe(["nowhere", *WHERE])
    with pytest.raises(ValueError, match="local_min_tissue"):
        load_recipe([CROPS, *WHERE, "--local_min_tissue", "2"])
    with pytest.raises(ValueError, match="unknown option --max_stepz; did you mean '--max_steps'"):
        load_recipe([CROPS, *WHERE, "--max_stepz=2"])
    (tmp_path / "recipe.yaml").write_text("max_steps: many")
    with pytest.raises(ValueError, match="max_steps"):
        load_recipe([str(tmp_path / "recipe.yaml"), *WHERE])


def test_schedules_have_the_reference_values():
    recipe = load_recipe(["paper", *WHERE])
    schedules = make_schedules(recipe, global_batch_size=2048)
    rate = schedules["learning_rate"]
    peak = 4e-3 * (2048 / 1024) ** 0.5  # square-root rule of DINOv2
    assert len(rate) == 125_000 and rate[0] == 0 and rate[12_499] == pytest.approx(peak)
    middle = 12_500 + 56_250
    assert rate[middle] == pytest.approx(1e-6 + 0.5 * (peak - 1e-6) * (1 + np.cos(np.pi / 2)))
    assert rate[-1] == pytest.approx(1e-6, abs=1e-8)
    assert (schedules["last_layer_learning_rate"][:1250] == 0).all()
    assert schedules["last_layer_learning_rate"][1250] == rate[1250] > 0
    assert (schedules["backbone_learning_rate"] == rate).all()
    late = make_schedules(load_recipe(["paper", *WHERE, "--freeze_backbone_steps", "600"]), 2048)
    assert (late["backbone_learning_rate"][:600] == 0).all() and (late["learning_rate"] == rate).all()
    assert (late["backbone_learning_rate"][600:] == rate[600:]).all()
    assert schedules["weight_decay"][0] == pytest.approx(0.04) and schedules["weight_decay"][-1] == pytest.approx(
        0.4, abs=1e-6
    )
    assert schedules["teacher_momentum"][0] == pytest.approx(0.992) and schedules["teacher_momentum"][
        -1
    ] == pytest.approx(1, abs=1e-6)
    temperature = schedules["teacher_temperature"]
    assert temperature[0] == 0.04 and temperature[37_499] == temperature[-1] == 0.07


def test_a_run_shortened_on_the_command_line_has_its_phases_shortened():
    recipe = load_recipe(["mammodino", *WHERE, "--max_steps", "2000"])
    schedules = make_schedules(recipe, 128)
    assert schedules["learning_rate"].argmax() in (199, 200) and schedules["learning_rate"][-1] < 1e-5
    assert (schedules["last_layer_learning_rate"] == 0).sum() == 20
    assert schedules["teacher_temperature"][598] < 0.07 == schedules["teacher_temperature"][599]


def test_a_model_size_sets_what_is_not_given(tmp_path):
    (tmp_path / "own.yaml").write_text("model_size: tiny\nnum_hidden_layers: 3\nlearning_rate_reference_width: 384\n")
    own = [str(tmp_path / "own.yaml"), *WHERE]
    of_file = load_recipe(own)
    model = of_file.model
    assert (model.hidden_size, model.num_hidden_layers, model.num_attention_heads) == (192, 3, 3)
    assert of_file.run.per_device_train_batch_size == 128
    larger = load_recipe([*own, "--model_size", "small", "--num_attention_heads", "12"])  # outdoes the file
    assert (larger.model.num_hidden_layers, larger.model.num_attention_heads) == (12, 12)
    larger.save(tmp_path / "recipe.yaml")
    assert load_recipe([str(tmp_path / "recipe.yaml")]) == larger
    peaks = [make_schedules(each, 1024)["learning_rate"].max() for each in (of_file, larger)]
    assert peaks == pytest.approx([2 * 4e-3, 4e-3])  # half the width, twice the rate
    (tmp_path / "own.yaml").write_text("model_size: huge")
    with pytest.raises(ValueError, match="model_size='huge': must be , nano, micro"):
        load_recipe(own)


@pytest.mark.parametrize(
    ("field", "steps", "message"),
    [
        ("warmup_steps", "21", "is longer than max_steps=20"),
        ("teacher_temperature_warmup_steps", "21", "is longer than max_steps=20"),
        ("freeze_last_layer_steps", "20", "is not over within max_steps=20"),
        ("freeze_backbone_steps", "20", "is not over within max_steps=20"),
        ("warmup_steps", "1.5", "whole steps, or a fraction"),
    ],
)
def test_a_phase_longer_than_the_run_is_refused(field, steps, message):
    with pytest.raises(ValueError, match=f"{field}={float(steps)}: .*{message}"):
        load_recipe([CROPS, *WHERE, "--max_steps", "20", f"--{field}", steps])


TINY = ["--hidden_size", "32", "--num_hidden_layers", "3", "--num_attention_heads", "4", "--num_prototypes", "16"]
TINY += ["--head_hidden_size", "24", "--head_bottleneck_size", "8"]


def test_parameter_groups_follow_dinov2():
    recipe = OptimizerRecipe()  # layer decay 0.9, patch embedding 0.2
    expected = {
        "backbone.embeddings.patch_embeddings.projection.weight": (0.9**4 * 0.2, 1.0),
        "backbone.embeddings.position_embeddings": (0.9**4, 1.0),
        "backbone.encoder.layer.0.attention.attention.query.weight": (0.9**3, 1.0),
        "backbone.encoder.layer.2.mlp.fc1.bias": (0.9, 0.0),
        "backbone.encoder.layer.1.layer_scale1.lambda1": (0.9**2, 0.0),
        "backbone.layernorm.weight": (1.0, 0.0),
        "head.mlp.0.weight": (1.0, 1.0),
        "head.last_layer.parametrizations.weight.original0": (1.0, 1.0),
    }
    network = Network(load_recipe([CROPS, *WHERE, *TINY]))
    names = dict(network.named_parameters())
    for name, (rate, decay) in expected.items():
        assert name in names
        found = multipliers(name, 3, recipe)
        assert (found["lr_multiplier"], found["wd_multiplier"]) == pytest.approx((rate, decay)), name
        part = "backbone_" if name.startswith("backbone") else "last_layer_" if "last_layer" in name else ""
        assert found["lr_schedule"] == f"{part}learning_rate"
    groups = param_groups(network, 3, recipe)
    assert sum(len(group["params"]) for group in groups) == len(names)
    frozen = [group for group in groups if group["lr_schedule"] == "last_layer_learning_rate"]
    assert sum(parameter.numel() for group in frozen for parameter in group["params"]) == 16 * 8 + 16  # it does freeze


def test_the_teacher_starts_as_a_copy_and_follows_by_momentum():
    student = Network(load_recipe([CROPS, *WHERE, *TINY]))
    teacher = make_teacher(student)
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    before = [parameter.clone() for parameter in teacher.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))  # head included
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    update_teacher(teacher, student, 0.75)
    for a, b in zip(before, teacher.parameters(), strict=True):
        torch.testing.assert_close(b, a + 0.25)


def test_recipes_mark_what_the_paper_does_not_publish():
    text = (RECIPES / "paper.yaml").read_text()
    assert "OUR CHOICE" in text and set(yaml.safe_load(text)) > {"global_min_tissue", "adjacent_slice_weight"}


def test_no_register_tokens_are_refused_where_they_would_be_sharded():
    with pytest.raises(ValueError, match="num_register_tokens=0: cannot be sharded"):
        load_recipe([CROPS, *WHERE, "--fsdp", "true", "--num_register_tokens", "0"])
