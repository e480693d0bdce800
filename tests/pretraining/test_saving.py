"""Checkpoints written beside the training, a run that a signal stops, and an encoder exported of any checkpoint."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from pretrain_runs import CROPS, ROOT, TINY, log, recipe
from safetensors.torch import load_file

from modeling_mammodino import MammoDinoConfig
from training.pretraining import checkpoints
from training.pretraining.checkpoints import Saver, find_checkpoint, list_checkpoints
from training.pretraining.processes import Processes


class Encoder(torch.nn.Linear):
    config = MammoDinoConfig()


@pytest.fixture
def saver(tmp_path) -> Saver:
    """Of a student with one weight, optimized for one step."""
    student = torch.nn.ModuleDict({"backbone": Encoder(1, 1)})
    student.backbone = student["backbone"]
    optimizer = torch.optim.AdamW(student.parameters())
    student.backbone(torch.ones(1)).backward()
    optimizer.step()
    return Saver(recipe("c", tmp_path), {"student": student}, optimizer, {}, Processes())


def test_training_goes_on_while_a_checkpoint_is_written(saver, tmp_path, monkeypatch):
    """What is written is as it was when it was saved; the end waits for it."""
    real, may_write = checkpoints.save_file, threading.Event()
    monkeypatch.setattr(checkpoints, "save_file", lambda *given: may_write.wait(60) and real(*given))
    student = saver.modules["student"]
    before = student.backbone.weight.detach().clone()
    with saver:
        saver.save(3)
        torch.nn.init.zeros_(student.backbone.weight)
        assert not saver.is_due(4) and list_checkpoints(tmp_path) == []
        threading.Timer(0.5, may_write.set).start()
        assert saver.finish(3) == tmp_path / "checkpoint-3"
        assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-3"]
    assert torch.equal(load_file(tmp_path / "checkpoint-3" / "student.safetensors")["backbone.weight"], before)
    assert not list(tmp_path.glob(".*"))


def test_a_failure_to_write_ends_the_run_at_its_next_step(saver, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with saver:
        saver.save(3)
        while not saver.writing.done():
            time.sleep(0.01)
        with pytest.raises(OSError, match="checkpoint-3: cannot be written .*No space left"):
            saver.is_due(4)
    assert list(tmp_path.iterdir()) == []


def test_going_on_from_an_earlier_checkpoint_loses_neither_it_nor_what_is_saved_since(saver, tmp_path):
    """Those of later steps, of what was left, give way; the same command goes on from its own last one."""
    run, found = saver.recipe.run, {}
    run.save_total_limit = 3
    with saver:
        for step in (3, 5, 8):
            saver.finish(step)
        run.save_total_limit, run.resume_from_checkpoint = 1, str(tmp_path / "checkpoint-3")
        for step in (4, 6, 7):
            found[step] = find_checkpoint(saver.recipe).name, [path.name for path in list_checkpoints(tmp_path)]
            saver.finish(step)
        run.resume_from_checkpoint = ""
        saver.finish(9)
    assert found == {
        4: ("checkpoint-3", ["checkpoint-3", "checkpoint-5", "checkpoint-8"]),
        6: ("checkpoint-4", ["checkpoint-3", "checkpoint-4"]),
        7: ("checkpoint-6", ["checkpoint-3", "checkpoint-6"]),
    }
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-9"] == [find_checkpoint(saver.recipe)]


def workers(process: subprocess.Popen) -> list[int]:
    """The processes of a run that torchrun started, in their order."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["SIGINT", "SIGUSR1"])
def test_a_signal_saves_a_run_of_two_processes_at_one_step(phantom_corpus, tmp_path, sent):
    """SIGINT to torchrun, which passes it on to its processes and their data workers, as it does SIGTERM; SIGUSR1 to
    one process alone. The main one says so, in one line."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = ["-m", "training.pretrain", CROPS, "--corpus", str(phantom_corpus), "--output_dir", str(tmp_path),
                 *TINY, "--per_device_train_batch_size", "4", "--dataloader_num_workers", "1", "--max_steps", "9999",
                 "--save_steps", "9999"]  # fmt: skip
    process = subprocess.Popen([*launcher, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    while process.poll() is None and (not (tmp_path / "logs/log.jsonl").is_file() or len(log(tmp_path)) < 4):
        time.sleep(0.05)
    own = workers(process)
    os.kill(own[1] if sent == "SIGUSR1" else process.pid, getattr(signal, sent))
    _, said = process.communicate(timeout=200)
    (saved,) = list_checkpoints(tmp_path)
    assert (
        said.count("stopped") == said.count(f"pretrain: stopped, and saved as {saved}; the same command goes on\n") == 1
    )
    assert "pretrain.py" not in said, said  # no traceback of ours
    step = int(saved.name.rpartition("-")[2])
    assert [line["step"] for line in log(tmp_path)] == list(range(1, step + 1)) and step < 9999
    assert not any(Path(f"/proc/{each}").exists() for each in own)
