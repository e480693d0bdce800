"""Tiny pretraining runs: their options, recipe, batches, log and weights."""

import importlib
import json
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import forked  # noqa: F401 (chooses what is imported before the fork)
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino import MammoDinoConfig, MammoDinoModel
from training import pretrain
from training.pretraining.export import export_encoder
from training.pretraining.recipe import Recipe, load_recipe
from training.pretraining.views.sample import PretrainingViews, collate

ROOT = Path(__file__).parents[1]
CROPS = str(Path(__file__).with_name("crops_recipe.yaml"))
TINY = [
    "--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "4", "--num_prototypes", "64",
    "--head_hidden_size", "32", "--head_bottleneck_size", "16", "--global_crop_size", "64", "--local_crop_size", "32",
    "--num_local_crops", "2", "--per_device_train_batch_size", "8", "--dataloader_num_workers", "0",
    "--image_height", "128", "--image_width", "96", "--logging_steps", "1", "--warmup_steps", "2",
    "--report_to", "none", "--drop_path_rate", "0.2", "--visualization_steps", "0",
]  # fmt: skip


SEPARATE = ["--separate_ibot_head", "true", "--ibot_num_prototypes", "24", "--ibot_head_hidden_size", "20",
            "--ibot_head_bottleneck_size", "12"]  # fmt: skip


def recipe(corpus: Path | str = "c", output: Path | str = "o", *arguments: str) -> Recipe:
    return load_recipe([CROPS, "--corpus", str(corpus), "--output_dir", str(output), *TINY, *arguments])


def tiny(*arguments: str) -> Recipe:
    """A recipe of no place."""
    return recipe("c", "o", *arguments)


def tiny_batch(corpus: Path, *arguments: str) -> dict[str, torch.Tensor]:
    """The first eight samples of a corpus."""
    views = PretrainingViews(Corpus(corpus), tiny(*arguments).views, 16, seed=0, global_batch_size=8)
    return collate([views[index] for index in range(8)])


def exported_run(output: Path, corpus: Path) -> Path:
    """A run's folder as after five logged steps, with the encoder that it exports."""
    (output / "logs").mkdir(parents=True)
    signs = ("target_entropy", "prototype_entropy", "feature_rank", "tissue_in_crops", "tissue_in_masks")
    lines = [{"step": step, "loss_dino_global": 5 / step, **dict.fromkeys(signs, 0.5)} for step in range(1, 6)]
    (output / "logs" / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    size = ["--patch_size", "16", "--image_height", "64", "--image_width", "48", "--local_crop_size", "96"]
    made = load_recipe(["mammodino", "--max_steps", "5", "--corpus", str(corpus), "--output_dir", str(output), *size])
    config = MammoDinoConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16)
    export_encoder(MammoDinoModel(config), Corpus(corpus), made, 5, output / "encoder")
    return output


def train(chosen: Recipe) -> Path:
    """Train as a process of its own would: Accelerate keeps one state a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return pretrain.train(chosen)


def main(arguments: list[str]) -> None:
    """The command, as a process of its own would run it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    pretrain.main(arguments)


def start_processes(work: Callable[..., None], processes: int, *arguments: object) -> None:
    """Call `work(process, *arguments)` in that many processes, forked as those of `forked` are."""
    torch.multiprocessing.start_processes(work, arguments, processes, start_method="forkserver")


def launch(processes: int, *arguments: str, module: str = "training.pretrain") -> str:
    """The command by that many processes on the CPU, in the environment that torchrun gives them; what it prints.

    torchrun itself starts the runs of test_saving.py, which are stopped, and of test_nodes.py, which come to their end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.NamedTemporaryFile() as said:
        start_processes(_take_part, processes, processes, port, said.name, module, list(arguments))
        return Path(said.name).read_text()


def _take_part(process: int, processes: int, port: int, said: str, module: str, arguments: list[str]) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), 1)
    if processes > 1:
        of_one_machine = {f"{local}{name}": str(value) for local in ("", "LOCAL_")
                          for name, value in (("RANK", process), ("WORLD_SIZE", processes))}  # fmt: skip
        os.environ.update(of_one_machine, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    importlib.import_module(module).main(arguments)


def log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "logs" / "log.jsonl").read_text().splitlines()]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for name in ("student", "teacher", "optimizer")
            for key, value in load_file(checkpoint / f"{name}.safetensors").items()}  # fmt: skip
