"""What does a pretraining step cost, beside DINOv2's own and its peers?

    python -m performance.step [--model vits14] [--batches 4 8] [--ways plain compiled bf16 tissue] [--steps 6]

`training.pretrain.train` itself, on a batch that stands in memory: 2 crops of 224 px and 8 of 98, half of the global
ones masked, 65,536 prototypes, one head, no registers, no stochastic depth, centered targets: the peers' arithmetic.
Each line in a fresh process, beside the matmul peak measured there. The ways: plain (float32), compiled (blocks
compiled), bf16 (autocast, compiled), sinkhorn (Sinkhorn-Knopp instead of centring), dense and tissue (crops of real
slices where they are at hand, without and with tissue tokens).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from accelerate.utils import send_to_device

from dataset_scripts.corpus.build import build_corpus
from modeling_mammodino import MammoDinoConfig, MammoDinoImageProcessor
from training.pretrain import train
from training.pretraining.compute import matmul_peak, step_flops, synchronize
from training.pretraining.recipe import Recipe, load_recipe
from training.pretraining.views.sample import collate

from .encoder import MODELS, resident_bytes
from .images import example_images

WAYS = {
    "plain": [],
    "compiled": ["--torch_compile", "true"],
    "bf16": ["--torch_compile", "true", "--bf16", "true"],
    "sinkhorn": ["--teacher_targets", "sinkhorn_knopp"],
    "dense": [],
    "tissue": ["--tissue_tokens", "true"],
}
REAL = ("dense", "tissue")  # on crops of slices, not of noise
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
    times: list[float] = []
    batch: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        _, planes = example_images(batch_size)
        archive = write_archive(Path(folder, "archive"), planes)
        build_corpus([archive], Path(folder, "corpus"), (1024, 1024), MammoDinoImageProcessor(), "benchmark")
        recipe = make_recipe(model, way, batch_size, steps + 3, Path(folder))

        def one_batch(views, recipe: Recipe, first_step: int, accelerator) -> Iterator[dict]:
            batch.update(collate_one(views, recipe, way in REAL, accelerator))
            while True:
                synchronize(accelerator.device)
                times.append(time.perf_counter())
                yield batch

        train(recipe, load=one_batch)
        memory = peak_memory()
        config = MammoDinoConfig.from_pretrained(Path(folder, "run", "encoder"))
    flops = step_flops(batch, config, recipe)
    dtype = torch.bfloat16 if recipe.run.bf16 else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peak = matmul_peak(torch.device(device), dtype)
    return {"seconds": np.diff(times)[2:].tolist(), "flops": flops, "peak": peak, "memory": memory}


def make_recipe(model: str, way: str, batch_size: int, steps: int, folder: Path) -> Recipe:
    width, blocks, heads = MODELS[model]
    settings = {
        **{"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads},
        **{"num_register_tokens": 0, "drop_path_rate": 0, "adjacent_slice_weight": 0, "adjacent_patch_weight": 0},
        **{"teacher_targets": "centering", "bf16": "false", "per_device_train_batch_size": batch_size},
        **{"max_steps": steps, "save_steps": steps, "logging_steps": steps, "report_to": "none"},
        "visualization_steps": 0,
        **{"corpus": folder / "corpus", "output_dir": folder / "run"},
    }
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return load_recipe(["mammodino", *arguments, *WAYS[way]])


def write_archive(folder: Path, planes: list[np.ndarray]) -> Path:
    folder.mkdir()
    for number, plane in enumerate(planes):
        cv2.imwrite(str(folder / f"{number}.png"), plane)
    return folder


def collate_one(views, recipe: Recipe, real: bool, accelerator) -> dict:
    """A batch as the loader makes it; of noise all over, with masks that know no breast, unless `real`."""
    if not real:
        views.recipe.tissue_aware_masks = False
    batch = collate([views[index] for index in range(recipe.run.per_device_train_batch_size)])
    if not real:
        batch |= {name: torch.randn_like(batch[name]) for name in ("global_crops", "local_crops")}
    return send_to_device(batch, accelerator.device)


def peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident_bytes("VmHWM")


if __name__ == "__main__":
    main()
