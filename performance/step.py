"""What does a pretraining step cost, beside DINOv2's own and its peers?

    python -m performance.step [--model vits14] [--batches 4 8] [--ways plain compiled bf16 tissue] [--steps 6]

`training.pretrain.train` itself, on a batch that stands in memory: 2 crops of 224 px and 8 of 98, half of the global
ones masked, 65,536 prototypes, one head, no registers, no stochastic depth, centered targets: the peers' arithmetic.
Each line in a fresh process, beside the matmul peak measured there. The ways: plain (float32), compiled (blocks
compiled), bf16 (autocast, compiled), sinkhorn (Sinkhorn-Knopp instead of centring), dense and tissue (masks keep to the
breast, as the peers' do not; without and with tissue tokens).
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from modeling_mammodino import MammoDinoConfig
from training.pretrain import train
from training.pretraining.checkpoints import LOG_FILE, read_log
from training.pretraining.compute import matmul_peak, step_flops, synchronize
from training.pretraining.recipe import Recipe, load_recipe
from training.pretraining.views.sample import Batch, PretrainingViews, load_batches

from .encoder import MODELS, resident_bytes
from .images import write_corpus

WAYS = {
    "plain": [],
    "compiled": ["--torch_compile", "true"],
    "bf16": ["--torch_compile", "true", "--bf16", "true"],
    "sinkhorn": ["--teacher_targets", "sinkhorn_knopp"],
    "dense": ["--tissue_aware_masks", "true"],
    "tissue": ["--tissue_aware_masks", "true", "--tissue_tokens", "true"],
}
# measured in 2026 on two cores of an AMD EPYC, float32, ViT-S/14, torch 2.13; matmul peak 186 GFLOP/s
PEERS = {
    "facebookresearch/dinov2, batch 4": (0.76, 0.70, 3.4),
    "lightly, batch 4": (0.64, 0.60, 3.2),
    "lightly-train, batch 4": (0.73, 0.65, 3.6),
    "facebookresearch/dinov2, batch 8 (allocator tuned; 0.55 untuned)": (0.81, 0.73, 6.1),
    "lightly, batch 8 (allocator tuned)": (0.84, 0.76, 5.3),
}
COLUMNS = ("way", "batch", "ms a step", "images/s", "share of matmul peak", "peak GFLOP/s", "peak memory GiB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m performance.step", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="vits14")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=6, help="timed, after the first two")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return print(json.dumps(measure(options.model, options.ways[0], options.batches[0], options.steps)))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    print(
        f"{options.model}; {device}, {platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}"
    )
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for batch in options.batches:
        for way in options.ways:
            command = [sys.executable, "-m", "performance.step", "--child", "--model", options.model]
            command += ["--batches", str(batch), "--ways", way, "--steps", str(options.steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"step: {way}, batch {batch}: {done.stderr[-2000:]}")
            print(f"| {way} | {batch} | {table_row(batch, json.loads(done.stdout.splitlines()[-1]))} |",
                  flush=True)  # fmt: skip
    if options.model == "vits14":
        print("\nThe peers, on such a machine at a peak of 186: images/s, share of peak, GiB")
        for name, (rate, share, memory) in PEERS.items():
            print(f"    {name}: {rate}, {share}, {memory}")


def table_row(batch: int, found: dict) -> str:
    seconds, peak = statistics.median(found["seconds"]), found["peak"]
    share = found["flops"] / seconds / peak
    least, most = (each * 1e3 for each in (min(found["seconds"]), max(found["seconds"])))
    return (
        f"{seconds * 1e3:.0f} ({least:.0f}, {most:.0f}) | {batch / seconds:.3f} | {share:.2f} | {peak / 1e9:.0f} "
        f"| {found['memory'] / 2**30:.1f}"
    )


def measure(model: str, way: str, batch_size: int, steps: int) -> dict:
    """Seconds of each step, the matmul peak in the step's precision, and the process' peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder, "corpus"), batch_size)
        recipe = make_recipe(model, way, batch_size, steps + 3, Path(folder))
        timed = TimedRun(recipe, from_loader=1)
    dtype = torch.bfloat16 if recipe.run.bf16 else torch.float32
    peak = matmul_peak(timed.device, dtype)
    return {"seconds": timed.seconds[2:], "flops": timed.flops, "peak": peak, "memory": timed.memory}


class TimedRun:
    """One run of a recipe, on batches of the loader, after `from_loader` of them on the last one again and again.

    seconds, waits: of each step, and how long its batch was waited for; a step ends where the next batch is asked for,
    by the device's own clock on CUDA, so that nothing waits that would not. flops: of a step on the last batch. memory:
    peak in bytes. losses: of each step that the recipe logs.
    """

    def __init__(self, recipe: Recipe, from_loader: int):
        self.ticks: list = []
        self.waits: list[float] = []
        self.device, self.batch = torch.device("cpu"), Batch()

        def load(views: PretrainingViews, recipe: Recipe, first_step: int, accelerator: Accelerator) -> Iterator[Batch]:
            self.device = accelerator.device
            batches = load_batches(views, recipe, first_step, accelerator)
            while True:
                self.tick()
                started = time.perf_counter()
                if len(self.waits) < from_loader:
                    self.batch = next(batches)
                self.waits.append(time.perf_counter() - started)
                yield self.batch

        encoder = train(recipe, load=load)
        self.memory = peak_memory(self.device)
        rate = recipe.model.drop_path_rate  # of which an export has none
        config = MammoDinoConfig.from_pretrained(encoder, drop_path_rate=rate)
        self.flops = step_flops(self.batch, config, recipe)
        log = read_log(Path(recipe.run.output_dir) / LOG_FILE)
        self.losses = [line["loss"] for line in log if "loss" in line]

    def tick(self) -> None:
        if self.device.type == "cuda":
            self.ticks.append(torch.cuda.Event(enable_timing=True))
            self.ticks[-1].record()
        else:
            self.ticks.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:  # less the last, after which checkpoint and encoder are written
        synchronize(self.device)
        pairs = itertools.pairwise(self.ticks)
        if self.device.type == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def make_recipe(model: str, way: str, batch_size: int, steps: int, folder: Path) -> Recipe:
    width, blocks, heads = MODELS[model]
    settings = {
        **{"model_size": "", "hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads},
        **{"num_register_tokens": 0, "drop_path_rate": 0, "adjacent_slice_weight": 0, "adjacent_patch_weight": 0},
        **{"dense_statistics_weight": 0, "dense_components_weight": 0, "breast_weight": 0, "patient_weight": 0},
        **{"views_per_patient": 0, "whiten_patch_embeddings": "false", "dataloader_num_workers": 0},
        **{"teacher_targets": "centering", "bf16": "false", "per_device_train_batch_size": batch_size},
        **{"max_steps": steps, "save_steps": steps, "logging_steps": steps, "report_to": "none"},
        **{"visualization_steps": 0, "preflight": "false", "tissue_aware_masks": "false"},
        **{"corpus": folder / "corpus", "output_dir": folder / "run"},
    }
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return load_recipe(["mammodino", *arguments, *WAYS[way]])


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator, on a CPU of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")


if __name__ == "__main__":
    main()
