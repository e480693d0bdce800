"""A phase at a higher resolution: networks, heads and centers of a former run go on under another recipe."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pretrain_runs import CROPS, TINY, log, main, recipe, train, weights
from safetensors.torch import load_file, save_file

from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino import MammoDinoModel
from training import export
from training.pretrain import compute_losses
from training.pretraining.losses.targets import TeacherTargets
from training.pretraining.networks import Network, make_teacher
from training.pretraining.optimization import make_schedules
from training.pretraining.recipe import Recipe, load_recipe, whole_steps
from training.pretraining.views.sample import PretrainingViews, collate
from training.release import members

FORMER_STEPS = 20
FORMER = ["--max_steps", str(FORMER_STEPS), "--save_steps", str(FORMER_STEPS), "--teacher_targets", "centering",
          "--separate_ibot_head", "true", "--learning_rate", "5e-4", "--drop_path_rate", "0"]  # fmt: skip
# twice the crops: a grid of 8 x 8 patches for position embeddings stored at 4 x 4
LARGER = ["--max_steps", "2", "--save_steps", "1", "--teacher_targets", "centering", "--separate_ibot_head", "true",
          "--drop_path_rate", "0", "--global_crop_size", "128", "--local_crop_size", "64"]  # fmt: skip


@pytest.fixture(scope="module")
def former(phantom_corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("former")
    train(recipe(phantom_corpus, output, *FORMER))
    return output / f"checkpoint-{FORMER_STEPS}"


def larger(corpus: Path | str, output: Path | str, former: Path, *arguments: str) -> Recipe:
    return recipe(Path(corpus), Path(output), *LARGER, "--init_from_checkpoint", str(former), *arguments)


@pytest.fixture(scope="module")
def run(former, phantom_corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("larger")
    train(larger(phantom_corpus, output, former))
    return output


def test_the_first_losses_are_those_of_the_former_networks_on_larger_crops(run, former, phantom_corpus):
    """By hand: the same checkpoint in networks of the former recipe, which interpolate their position embeddings."""
    chosen, corpus = larger(phantom_corpus, "o", former), Corpus(phantom_corpus)
    student = Network(recipe(phantom_corpus, Path("o"), *FORMER))
    teacher, targets_of = make_teacher(student), TeacherTargets(chosen)
    for name, module in (("student", student), ("teacher", teacher), ("targets", targets_of)):
        module.load_state_dict(load_file(former / f"{name}.safetensors"))
    assert student.backbone.embeddings.stored_grid == (4, 4)
    views = PretrainingViews(corpus, chosen.views, 16, chosen.run.seed, global_batch_size=8)
    batch = collate([views[index] for index in range(8)])
    assert batch["global_crops"].shape[-1] == 128
    temperature = make_schedules(chosen, 8)["teacher_temperature"][0]
    losses = compute_losses(batch, student, teacher, targets_of, float(temperature), chosen)[0]
    for name, value in losses.items():
        assert log(run)[0][f"loss_{name}"] == pytest.approx(value.item(), rel=1e-5), name


def test_neither_heads_nor_centers_are_fresh(run, former, phantom_corpus, tmp_path):
    """The losses above tell: with fresh heads, or fresh centers, on the same encoder they are others."""
    logged = log(run)[0]
    for name, kept in (
        ("heads", ("backbone.", "cls_center", "patch_center")),
        ("centers", ("backbone.", "head", "ibot")),
    ):
        changed = shutil.copytree(former, tmp_path / name)
        fresh = recipe(phantom_corpus, Path("o"), *FORMER)
        student = Network(fresh)
        modules = {"student": student, "teacher": make_teacher(student), "targets": TeacherTargets(fresh)}
        for file, module in modules.items():
            former_tensors = load_file(changed / f"{file}.safetensors")
            mixed = {key: former_tensors[key] if key.startswith(kept) else value.contiguous()
                     for key, value in module.state_dict().items()}  # fmt: skip
            save_file(mixed, changed / f"{file}.safetensors")
        train(larger(phantom_corpus, tmp_path / f"run with fresh {name}", changed))
        for loss in ("loss_dino_local", "loss_ibot"):
            other = log(tmp_path / f"run with fresh {name}")[0][loss]
            assert abs(other - logged[loss]) > 0.02 * logged[loss], (name, loss)


def test_position_embeddings_keep_their_size_and_go_on_learning(run, former):
    key = "backbone.embeddings.position_embeddings"
    before, after = (load_file(folder / "student.safetensors")[key] for folder in (former, run / "checkpoint-2"))
    assert before.shape == after.shape == (1, 1 + 16, 32) and not torch.equal(before, after)
    encoder = MammoDinoModel.from_pretrained(run / "encoder")
    assert encoder.embeddings.stored_grid == (4, 4) and encoder.config.image_size == 64
    with torch.no_grad():
        assert encoder(torch.zeros(1, 1, 128, 96)).last_hidden_state.shape == (1, 1 + 2 + 48, 32)


def test_the_optimizer_and_the_steps_start_afresh(run, former):
    states = load_file(run / "checkpoint-1" / "optimizer.safetensors"), load_file(former / "optimizer.safetensors")
    steps = [{float(value) for key, value in state.items() if key.endswith(".step")} for state in states]
    assert steps == [{1.0}, {float(FORMER_STEPS)}]
    assert [line["step"] for line in log(run)] == [1, 2]


@pytest.fixture
def gone(former) -> Iterator[Path]:
    """The former run's checkpoint, which is no longer there."""
    yield former.rename(former.with_name("elsewhere")) and former
    former.with_name("elsewhere").rename(former)


def test_such_a_run_resumes_exactly_and_is_exported_when_the_former_one_is_gone(run, gone, phantom_corpus, tmp_path):
    shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    train(larger(phantom_corpus, tmp_path, gone))
    export.main([str(tmp_path)])
    card = (tmp_path / "encoder-2" / "README.md").read_text()
    assert "| initial weights | a former run's, which started from: random |" in card
    state = tmp_path / "checkpoint-1" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"origin": {}}))  # as before it was noted
    with pytest.raises(SystemExit, match="init_from_checkpoint=.*-20: cannot be read .*; put this folder back"):
        export.main([str(tmp_path / "checkpoint-1")])
    whole, resumed = (weights(folder / "checkpoint-2") for folder in (run, tmp_path))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_it_goes_on_from_what_a_release_archives_of_a_run(run, former, phantom_corpus, tmp_path):
    for name, path in members(former.parent).items():
        (tmp_path / "archive" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "archive" / name)
    train(larger(phantom_corpus, tmp_path / "run", tmp_path / "archive" / former.name))
    assert log(tmp_path / "run")[0]["loss"] == log(run)[0]["loss"]


def test_gram_anchoring_begins_with_the_former_teacher(former, phantom_corpus, tmp_path):
    gram = ["--gram_weight", "1.5", "--gram_update_steps", "0", "--gram_crop_size", "192"]
    train(larger(phantom_corpus, tmp_path, former, *gram))
    anchor = load_file(tmp_path / "checkpoint-2" / "gram_teacher.safetensors")
    teacher = load_file(former / "teacher.safetensors")
    assert all(torch.equal(anchor[key], teacher[key]) for key in anchor) and log(tmp_path)[0]["loss_gram"] > 0


def test_the_shipped_recipe_holds_everything_constant_after_its_warm_up():
    chosen = load_recipe(["high_resolution", "--corpus", "c", "--output_dir", "o"])
    schedules = make_schedules(chosen, 128)
    after = {
        name: np.unique(values[whole_steps(chosen.optimizer.warmup_steps, chosen.run.max_steps) :])
        for name, values in schedules.items()
    }
    assert {name: each.tolist() for name, each in after.items()} == {
        "learning_rate": [1.25e-5], "backbone_learning_rate": [1.25e-5], "last_layer_learning_rate": [1.25e-5],
        "weight_decay": [0.04], "teacher_momentum": [0.999], "teacher_temperature": [0.07],
    }  # fmt: skip
    assert schedules["learning_rate"][0] == 0 and schedules["teacher_temperature"][0] == 0.07
    source = load_recipe(["mammodino", "--corpus", "c", "--output_dir", "o"])
    for name in ("hidden_size", "num_hidden_layers", "num_prototypes", "patch_size", "separate_ibot_head"):
        assert getattr(chosen.model, name) == getattr(source.model, name), name
    for name in ("dense_statistics_weight", "breast_weight", "patient_weight"):  # each with a head that goes on
        assert getattr(chosen.loss, name) == getattr(source.loss, name) > 0, name
    assert chosen.views.global_crop_size > source.views.global_crop_size


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--hidden_size", "64"], r"hidden_size=64: init_from_checkpoint=.* has hidden_size=32; give --hidden_size 32"),
        (["--num_prototypes", "32"], "num_prototypes=32: .* has num_prototypes=64"),
        (["--separate_ibot_head", "false"], "separate_ibot_head=False: .* has separate_ibot_head=True"),
        (["--teacher_targets", "sinkhorn_knopp"], "teacher_targets=sinkhorn_knopp: .* has teacher_targets=centering"),
        (["--init_from", "somewhere"], "init_from_checkpoint: cannot be combined with init_from"),
    ],
)
def test_other_networks_are_refused_by_field(former, arguments, message):
    with pytest.raises(ValueError, match=message):
        Network(larger("c", "o", former, *arguments))


def test_the_command_names_a_checkpoint_that_is_not_there_or_damaged(former, phantom_corpus, tmp_path):
    where = [CROPS, "--corpus", str(phantom_corpus), "--output_dir", str(tmp_path / "run"), *TINY, *LARGER]
    with pytest.raises(SystemExit, match="init_from_checkpoint=.*nowhere: holds no config.json; give a run's"):
        main([*where, "--init_from_checkpoint", str(tmp_path / "nowhere")])
    damaged = shutil.copytree(former, tmp_path / "checkpoint-1")
    (damaged / "teacher.safetensors").write_bytes(b"half")
    with pytest.raises(SystemExit, match="init_from_checkpoint=.*checkpoint-1: cannot be read"):
        main([*where, "--init_from_checkpoint", str(damaged)])
