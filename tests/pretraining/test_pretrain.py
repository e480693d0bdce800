"""A pretraining run: it learns, resumes exactly, survives bad ends, and its export opens anywhere."""

import filecmp
import json
import os
import shutil
import signal
import subprocess
import time
from functools import partialmethod
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pretrain_runs import CROPS, ROOT, TINY, launch, log, main, recipe, train, weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino import MammoDinoConfig
from training import export, pretrain
from training.pretraining import checkpoints
from training.pretraining.checkpoints import list_checkpoints
from training.pretraining.recipe import RECIPES, load_recipe
from training.pretraining.views.order import StepSampler

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.fixture(scope="module")
def run(phantom_corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    train(recipe(phantom_corpus, output, "--max_steps", "20", "--save_steps", "10"))
    return output


def test_the_losses_fall_in_twenty_steps(run):
    lines = log(run)
    assert [line["step"] for line in lines] == list(range(1, 21))
    first, last = (np.mean([line["loss"] for line in part]) for part in (lines[:3], lines[-3:]))
    assert last < 0.97 * first
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert all(line["slice_pairs"] > 0 for line in lines[:3]) and all(line["tissue_in_masks"] > 0 for line in lines)


def test_the_first_loss_is_the_closed_form_of_copied_heads(phantom_corpus, tmp_path):
    """At the start logits are cosines of variance 1/d, and the teacher's soft targets are almost uniform: each
    cross-entropy is ln K + 1 / (2 d tau_s^2) - 1 / (d tau_s tau_t), the last term only where the heads are copies."""
    arguments = ["--max_steps", "1", "--warmup_steps", "1", "--head_bottleneck_size", "256", "--num_prototypes", "512"]
    train(
        recipe(
            phantom_corpus, tmp_path, *arguments, "--teacher_temperature_start", "1", "--freeze_last_layer_steps", "0"
        )
    )
    first, expected = log(tmp_path)[0], np.log(512) + 1 / (2 * 256 * 0.1**2) - 1 / (256 * 0.1)
    pairs = 2 * (2 + 1)
    assert first["loss_dino_global"] == pytest.approx(2 / pairs * expected, rel=0.02)
    assert first["loss_dino_local"] == pytest.approx(4 / pairs * expected, rel=0.02)
    assert first["loss_adjacent_slice"] == pytest.approx(expected, rel=0.02)
    # half of the crops carry masks, and one whose mask came out empty counts as unmasked
    assert first["loss_ibot"] <= expected / 2 * 1.02 and first["loss_ibot"] / expected * 16 == pytest.approx(
        round(first["loss_ibot"] / expected * 16), abs=0.2
    )


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_a_signal_stopped_is_resumed_as_the_uninterrupted_run(
    run, phantom_corpus, tmp_path, monkeypatch, sent
):
    whole = weights(run / "checkpoint-20")
    half = recipe(phantom_corpus, tmp_path, "--max_steps", "20", "--save_steps", "10")
    update, updates = pretrain.update_teacher, []
    default = signal.default_int_handler if sent == signal.SIGINT else signal.SIG_DFL
    signal.signal(sent, default)  # Ctrl-C is ignored where the tests run in a shell's background

    def interrupted(*given):
        updates.append(update(*given))
        if len(updates) == 7:
            os.kill(os.getpid(), sent)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="saved as .*-7; the same command"):
        patched.setattr(pretrain, "update_teacher", interrupted)
        train(half)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-7"]
    assert signal.getsignal(sent) is default
    half.run.dataloader_num_workers = 1  # may change: it changes nothing
    train(half)
    resumed = weights(tmp_path / "checkpoint-20")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(run, phantom_corpus, tmp_path):
    """SIGKILL right after a checkpoint: the process dies without a word, and the same command finishes the run."""
    arguments = [CROPS, "--corpus", str(phantom_corpus), "--output_dir", str(tmp_path), *TINY]
    arguments += ["--max_steps", "20", "--save_steps", "10"]
    process = forked.start(main, arguments)
    while not (tmp_path / "checkpoint-10").is_dir() and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (tmp_path / ".checkpoint-15.tmp").mkdir()  # what a death while writing leaves
    main(arguments)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-20"]
    whole, resumed = weights(run / "checkpoint-20"), weights(tmp_path / "checkpoint-20")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_another_recipe_does_not_go_on_silently(run, phantom_corpus):
    with pytest.raises(ValueError, match="ibot_weight"):
        train(recipe(phantom_corpus, run, "--max_steps", "20", "--save_steps", "10", "--ibot_weight", "0.5"))
    with pytest.raises(ValueError, match=r"max_steps \(20 -> 30\).*--init_from_checkpoint .*checkpoint-20 to train"):
        train(recipe(phantom_corpus, run, "--max_steps", "30", "--save_steps", "10"))


def test_a_run_goes_on_on_its_own_corpus_alone_wherever_that_lies(run, phantom_corpus, tmp_path, caplog):
    moved, extended, other = (shutil.copytree(phantom_corpus, tmp_path / name) for name in ("moved", "more", "other"))
    manifest = json.loads((extended / "manifest.json").read_text())
    manifest["shards"].append({"name": "data-00099.arrow", "rows": 1, "sha256": "0" * 64})
    (extended / "manifest.json").write_text(json.dumps(manifest))
    manifest["shards"].pop(0)
    (other / "manifest.json").write_text(json.dumps(manifest))
    saved, arguments = tmp_path / "run" / "checkpoint-20", ["--max_steps", "20", "--save_steps", "10"]
    shutil.copytree(run, saved.parent, ignore=shutil.ignore_patterns("checkpoint-10"))
    for corpus, message in (
        (extended, "was extended after .*--init_from_checkpoint"),
        (other, "other images; give the"),
    ):
        with pytest.raises(ValueError, match=f"corpus={corpus}: .*{message}"):
            train(recipe(corpus, saved.parent, *arguments))
    with pytest.raises(SystemExit, match="corpus=.*other: .*checkpoint-20 was made with other images"):
        export.main([str(saved), "--corpus", str(other)])
    checkpoints.check_corpus(Corpus(moved), saved)
    assert not caplog.records
    checkpoints.check_corpus(Corpus(extended), saved, may_be_extended=True)
    assert "counts the images that are new" in caplog.text
    state = json.loads((saved / "trainer_state.json").read_text())
    del state["corpus"]  # as before it was noted
    (saved / "trainer_state.json").write_text(json.dumps(state))
    checkpoints.check_corpus(Corpus(other), saved)


def test_a_damaged_checkpoint_is_named(run, phantom_corpus, tmp_path):
    damaged = tmp_path / "checkpoint-10"
    subprocess.run(["cp", "-r", str(run / "checkpoint-10"), str(damaged)], check=True)
    (damaged / "student.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="checkpoint-10"):
        train(recipe(phantom_corpus, tmp_path, "--max_steps", "20", "--save_steps", "10"))


def test_a_full_disk_is_said_and_the_last_checkpoint_stands(run, phantom_corpus, tmp_path, monkeypatch):
    save, files = checkpoints.save_file, []

    def save_until_full(tensors, path):
        files.append(path)
        if len(files) == 6:  # in the middle of the second checkpoint
            raise SafetensorError("No space left on device (os error 28)")
        save(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", save_until_full)
    arguments = [CROPS, "--corpus", str(phantom_corpus), "--output_dir", str(tmp_path), *TINY]
    arguments += ["--max_steps", "20", "--save_steps", "10"]
    with pytest.raises(SystemExit, match="checkpoint-20: cannot be written .*No space left.*Make room"):
        main(arguments)
    assert [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name] == ["checkpoint-10"]
    main(arguments)
    whole, resumed = weights(run / "checkpoint-20"), weights(tmp_path / "checkpoint-20")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(phantom_corpus, tmp_path, monkeypatch):
    real, calls = pretrain.weighted_sum, []

    def break_at_step_12(losses, recipe):
        calls.append(1)
        return real(losses, recipe) * (float("nan") if len(calls) == 12 else 1)

    monkeypatch.setattr(pretrain, "weighted_sum", break_at_step_12)
    with pytest.raises(RuntimeError, match=r"step 12: the loss is not finite; samples 88 to 95, corpus rows \[\d+"):
        train(recipe(phantom_corpus, tmp_path, "--max_steps", "20", "--save_steps", "10"))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10"]


ACCUMULATED = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]


def test_a_gradient_that_is_not_finite_stops_the_run_and_reaches_no_checkpoint(phantom_corpus, tmp_path, monkeypatch):
    real, calls = Accelerator.backward, []

    def break_at_step_6(accelerator, loss, **options):
        real(accelerator, loss, **options)
        calls.append(1)
        if len(calls) == 12:
            next(iter(students[0].backbone.parameters())).grad.view(-1)[0] = float("inf")

    students, make_teacher = [], pretrain.make_teacher
    monkeypatch.setattr(pretrain, "make_teacher", lambda student: students.append(student) or make_teacher(student))
    monkeypatch.setattr(Accelerator, "backward", break_at_step_6)
    arguments = ["--max_steps", "8", "--save_steps", "4", "--logging_steps", "8", *ACCUMULATED]
    with pytest.raises(RuntimeError, match=r"step 6: the gradient is not finite; samples 40 to 47, corpus rows \[\d+"):
        train(recipe(phantom_corpus, tmp_path, *arguments))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]


def test_a_checkpoint_that_is_not_finite_is_neither_written_nor_chosen(run, phantom_corpus, tmp_path, caplog):
    for step in (10, 20):
        shutil.copytree(run / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    file = tmp_path / "checkpoint-20" / "teacher.safetensors"
    tensors = load_file(file)
    tensors["backbone.layernorm.weight"][0] = float("nan")
    save_file(tensors, file)
    arguments = ["--max_steps", "20", "--save_steps", "10"]
    named = recipe(phantom_corpus, tmp_path, *arguments, "--resume_from_checkpoint", str(tmp_path / "checkpoint-20"))
    with pytest.raises(ValueError, match="teacher.safetensors backbone.layernorm.weight is not finite"):
        train(named)
    train(recipe(phantom_corpus, tmp_path, *arguments))
    assert "checkpoint-20 is passed over: teacher.safetensors backbone.layernorm.weight is not finite" in caplog.text
    assert f"{tmp_path}: checkpoint-20 give way to the next that is saved" in caplog.text
    whole, resumed = weights(run / "checkpoint-20"), weights(tmp_path / "checkpoint-20")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    files = {"targets": {"bias": torch.tensor([float("nan")])}}
    with pytest.raises(RuntimeError, match="step 30: targets bias is not finite, so no checkpoint is written"):
        checkpoints.write_checkpoint(files, MammoDinoConfig(), named, 30, {})
    assert not (tmp_path / "checkpoint-30").exists()


def test_a_run_goes_on_with_as_many_images_a_step(run, phantom_corpus, tmp_path):
    """Batch and accumulation may change together, as for another number of processes; their product may not."""
    shutil.copytree(run / "checkpoint-10", tmp_path / "checkpoint-10")
    arguments = ["--max_steps", "20", "--save_steps", "10"]
    with pytest.raises(ValueError, match="checkpoint-10: was made with 8 images a step, not 2; give per_device"):
        train(recipe(phantom_corpus, tmp_path, *arguments, "--per_device_train_batch_size", "2"))
    train(recipe(phantom_corpus, tmp_path, *arguments, *ACCUMULATED))
    assert [line["step"] for line in log(tmp_path)] == list(range(11, 21))


def test_a_resumed_run_logs_no_step_twice(run, phantom_corpus, tmp_path):
    """A run that died at step 13 of 20, in the middle of a line, with its last checkpoint at 10."""
    shutil.copytree(run / "checkpoint-10", tmp_path / "checkpoint-10")
    (tmp_path / "logs").mkdir()
    lines = [json.dumps({"step": step, "loss": 0.0}) for step in range(1, 14)] + ['{"step": 1']
    (tmp_path / "logs" / "log.jsonl").write_text("\n".join(lines))
    train(recipe(phantom_corpus, tmp_path, "--max_steps", "20", "--save_steps", "10"))
    assert [line["step"] for line in log(tmp_path)] == list(range(1, 21))
    assert [line["loss"] for line in log(tmp_path)][10:] == [line["loss"] for line in log(run)][10:]


def test_max_grad_norm_0_clips_nothing(phantom_corpus, tmp_path):
    """As in `TrainingArguments`: a norm that no gradient reaches gives the same weights."""
    for name, norm in (("off", "0"), ("never", "1e9")):
        train(recipe(phantom_corpus, tmp_path / name, "--max_steps", "2", "--max_grad_norm", norm))
    off, never = (weights(tmp_path / name / "checkpoint-2") for name in ("off", "never"))
    assert all(torch.equal(off[key], never[key]) for key in never)


def test_processes_share_out_the_same_samples():
    one = load_recipe(
        [CROPS, "--corpus", "c", "--output_dir", "o", "--max_steps", "3", "--per_device_train_batch_size", "8"]
    )
    two = load_recipe(
        [CROPS, "--corpus", "c", "--output_dir", "o", "--max_steps", "3", "--per_device_train_batch_size", "4"]
    )
    alone = list(StepSampler(one, 1, 0, 1))
    shared = [a + b for a, b in zip(StepSampler(two, 1, 0, 2), StepSampler(two, 1, 1, 2), strict=True)]
    assert alone == shared and alone[0] == list(range(8, 16))


@pytest.mark.slow
@pytest.mark.parametrize("switch", [["--tissue_aware_crops", "false", "--tissue_aware_masks", "false"],
                                    ["--adjacent_slice_weight", "0", "--adjacent_patch_weight", "0"],
                                    ["--tissue_tokens", "true"], ["--teacher_targets", "centering"],
                                    ["--num_local_crops", "0"], ["--mask_probability", "0"],
                                    ["--gradient_accumulation_steps", "2"], ["--bf16", "true"],
                                    ["--gradient_checkpointing", "true"], ["--torch_compile", "true"]])  # fmt: skip
def test_every_part_can_be_switched(phantom_corpus, tmp_path, switch, monkeypatch):
    """Blocks are compiled to torch's own operators: the C++ compiler's minute tells nothing of our code."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    train(recipe(phantom_corpus, tmp_path, "--max_steps", "2", *switch))
    assert np.isfinite(log(tmp_path)[-1]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_starts(run, phantom_corpus, tmp_path, name):
    """Two steps of each, all its own but the sizes."""
    beginnings = {
        "continue_from_dinov2": ["--init_from", str(run / "encoder"), "--patch_size", "16"],
        "high_resolution": ["--init_from_checkpoint", str(run / "checkpoint-20"), "--gram_crop_size", "96",
                            "--patch_size", "16"],
    }  # fmt: skip
    # eight pixels: components of a window of three patches of 16 take seconds; four images: the views of one patient
    sizes = ["--patch_size", "8", "--num_register_tokens", "2", "--per_device_train_batch_size", "4"]
    arguments = [name, "--corpus", str(phantom_corpus), "--output_dir", str(tmp_path), *TINY, *sizes]
    arguments += ["--torch_compile", "false", "--max_steps", "2", *beginnings.get(name, [])]
    train(load_recipe(arguments))
    assert [line["step"] for line in log(tmp_path)] == [1, 2] and np.isfinite(log(tmp_path)[-1]["loss"])


def same_files(folder: Path, other: Path) -> bool:
    names = sorted(path.name for path in folder.iterdir())
    return (
        names == sorted(path.name for path in other.iterdir()) and not filecmp.cmpfiles(folder, other, names, False)[1]
    )


@pytest.mark.slow
def test_any_checkpoint_is_exported_in_a_fresh_process_as_the_run_does_it(run, tmp_path):
    """Of a run's folder the last; of an earlier one its own teacher, and a figure that ends with it."""
    said = launch(1, str(run), "--output", str(tmp_path / "last"), module="training.export")
    assert said == f"encoder: {tmp_path / 'last'}\n"
    assert same_files(run / "encoder", tmp_path / "last")
    copied = tmp_path / "run"
    shutil.copytree(run, copied, ignore=shutil.ignore_patterns("checkpoint-20", "encoder"))
    export.main([str(copied)])
    teacher = load_file(run / "checkpoint-10" / "teacher.safetensors")
    exported = load_file(copied / "encoder-10" / "model.safetensors")
    assert all(torch.equal(teacher[f"backbone.{key}"], value) for key, value in exported.items())
    assert "| steps | 10 |" in (copied / "encoder-10" / "README.md").read_text()
    lines = (run / "logs" / "log.jsonl").read_text().splitlines(keepends=True)
    (copied / "logs" / "log.jsonl").write_text("".join(lines[:10]))
    export.main([str(copied / "checkpoint-10"), "--output", str(tmp_path / "at_10")])
    assert same_files(copied / "encoder-10", tmp_path / "at_10")
    for wrong, reason in (
        (tmp_path, "neither is a checkpoint-N nor holds one"),
        (copied, "exists and is not an empty"),
    ):
        with pytest.raises(SystemExit, match=f"export: .*{reason}"):
            export.main([str(wrong)])


def test_the_export_is_the_teacher_with_code_card_recipe_and_figure(run):
    """That such a folder opens where the package is not installed, tests/modeling/test_entry_points.py tries."""
    names = {path.name for path in (run / "encoder").iterdir()}
    for path in (ROOT / "modeling_mammodino").glob("[!_]*.py"):
        assert (run / "encoder" / path.name).read_bytes() == path.read_bytes()
    for name, model in (("config", "MammoDinoModel"), ("preprocessor_config", "MammoDinoImageProcessor")):
        found = json.loads((run / "encoder" / f"{name}.json").read_text())["auto_map"]
        assert any(value.endswith(f".{model}") for value in found.values())
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml",
            "pretraining.png"} <= names  # fmt: skip
    card = (run / "encoder" / "README.md").read_text()
    assert "Research use only" in card and "84 images of 24 volumes" in card and "license: apache-2.0" in card
    teacher, exported = (
        load_file(run / "checkpoint-20" / "teacher.safetensors"),
        load_file(run / "encoder" / "model.safetensors"),
    )
    assert all(torch.equal(teacher[f"backbone.{key}"], value) for key, value in exported.items())


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    for arguments, message in (
        ([CROPS, "--corpus", str(tmp_path), "--output_dir", str(tmp_path)], "no manifest.json, so no corpus"),
        (["nowhere", "--corpus", "c", "--output_dir", "o"], "shipped recipes"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(arguments)


def two_processes(corpus: Path, output: Path, *arguments: str) -> str:
    where = ["--corpus", str(corpus), "--output_dir", str(output)]
    return launch(2, CROPS, *where, *TINY, "--per_device_train_batch_size", "4", *arguments)


@pytest.mark.slow
def test_two_processes_are_one_run(phantom_corpus, tmp_path):
    """One log, one checkpoint, and both halves of each batch trained on."""
    said = two_processes(phantom_corpus, tmp_path, "--max_steps", "2")
    assert [line["step"] for line in log(tmp_path)] == [1, 2]
    assert said.count("encoder:") == 1 and [each.name for each in list_checkpoints(tmp_path)] == ["checkpoint-2"]


@pytest.mark.slow
def test_sharded_is_the_same_run(phantom_corpus, tmp_path):
    """FSDP2 over two processes against DDP over two, and a checkpoint of one goes on as the other."""
    steps = ["--max_steps", "2", "--save_steps", "1", "--gradient_accumulation_steps", "2"]
    two_processes(phantom_corpus, tmp_path / "ddp", *steps)
    two_processes(phantom_corpus, tmp_path / "fsdp", *steps, "--fsdp", "true")
    shutil.copytree(tmp_path / "fsdp" / "checkpoint-1", tmp_path / "changed" / "checkpoint-1")
    two_processes(phantom_corpus, tmp_path / "changed", *steps)
    whole = weights(tmp_path / "ddp" / "checkpoint-2")
    for name in ("fsdp", "changed"):
        found = weights(tmp_path / name / "checkpoint-2")
        assert found.keys() == whole.keys()
        for key, value in whole.items():
            if "key.bias" not in key:  # attention does not depend on it: its gradient is rounding, which Adam scales up
                torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=f"{name}: {key}")
    export.main([str(tmp_path / "fsdp" / "checkpoint-2")])
    assert same_files(tmp_path / "fsdp" / "encoder", tmp_path / "fsdp" / "encoder-2")


def test_sharding_one_process_is_refused(phantom_corpus, tmp_path):
    with pytest.raises(ValueError, match="fsdp=True: there is one process"):
        train(recipe(phantom_corpus, tmp_path, "--max_steps", "2", "--fsdp", "true"))
