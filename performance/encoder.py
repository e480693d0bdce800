"""What does background cost? Our encoder with tissue tokens beside `Dinov2WithRegistersModel` on the same weights.

python -m performance.encoder [IMAGE...] [--model vits14] [--sizes 518 1036] [--batches 1 8] [--device cpu]
    [--dtype float32] [--repeats 5]

Both encode the same canvases, in turn, in one process; a ratio is taken of each pair of turns. Memory is the peak that
one forward adds, each in a fresh process (on an accelerator: its allocator's peak). Two framings: the whole slice on
the canvas, as any encoder is fed, and cropped to the breast first, as our image processor does by default, where less
background is left to save. The share of peak is useful FLOP/s over those of a large matmul measured right before.
"""

import argparse
import multiprocessing
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from modeling_mammodino import MammoDinoConfig, MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.tissue_tokens import key_mask, select_tokens
from modeling_mammodino.tools.command import user_path
from training.pretraining.compute import block_flops, matmul_peak, synchronize

from .images import example_images

MODELS = {  # width, blocks, heads
    "vits14": (384, 12, 6),
    "vitb14": (768, 12, 12),
    "vitl14": (1024, 24, 16),
    "tiny14": (64, 2, 2),  # to try a script
}
FRAMINGS = {"whole slice": False, "cropped to breast": True}
NUM_IMAGES = 8
COLUMNS = (
    *("framing", "px", "batch", "tissue patches", "theirs img/s", "ours img/s"),
    *("faster", "padded instead of packed", "memory over theirs", "share of peak"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m performance.encoder", description=__doc__.splitlines()[0])
    parser.add_argument(
        "images", nargs="*", type=user_path, help="slices (default: real ones where present, or phantoms)"
    )
    parser.add_argument("--model", choices=MODELS, default="vits14")
    parser.add_argument("--sizes", type=int, nargs="+", default=[518, 1036], help="side of the canvas in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="images a forward")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    source, planes = example_images(NUM_IMAGES, options.images)
    dtype = getattr(torch, options.dtype)
    peak = matmul_peak(options.device, dtype)
    threads = f"{torch.get_num_threads()} threads, {platform.machine()}"
    print(f"{options.model}, {options.dtype} on {options.device} ({threads})")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; {len(planes)} images: {source}")
    print(f"matmul peak {peak / 1e12:.3g} TFLOP/s; {options.repeats} repeats; ratios: median (min, max)")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for framing, crop in FRAMINGS.items():
        for size in options.sizes:
            processor = MammoDinoImageProcessor(size={"height": size, "width": size}, do_crop_to_breast=crop)
            inputs = processor(planes, return_tensors="pt")
            for batch_size in options.batches:
                row = measure(options, inputs, batch_size, dtype, peak)
                print(f"| {framing} | {size} | {batch_size} | {row} |", flush=True)


def measure(options: argparse.Namespace, inputs: dict, batch_size: int, dtype: torch.dtype, peak: float) -> str:
    """One row of the table, from `tissue patches` on."""
    device = torch.device(options.device)
    ours, theirs = (make(options.model).to(device, dtype) for make in (make_ours, make_theirs))
    pixels = inputs["pixel_values"].to(device, dtype).split(batch_size)
    tissue = inputs["tissue_mask"].split(batch_size)  # stays on the host, where reading it waits for nothing
    ways: dict[str, Callable] = {
        "theirs": lambda x, mask: theirs(x),
        "ours": lambda x, mask: ours(x, tissue_mask=mask),
        "padded": partial(encode_padded, ours),
    }
    seconds = take_turns(ways, list(zip(pixels, tissue, strict=True)), options.repeats)
    kept = (inputs["tissue_mask"] > 0).flatten(1).sum(dim=1) + 1 + ours.config.num_register_tokens
    images_per_second = {way: len(kept) / np.median(times) for way, times in seconds.items()}
    useful = sum(block_flops(ours.config, int(length)) for length in kept) / np.median(seconds["ours"])
    memory = [peak_memory(kind, options, pixels[0], tissue[0]) for kind in ("ours", "theirs")]
    fraction = (inputs["tissue_mask"] > 0).float().mean(dim=(1, 2))
    return " | ".join(
        (
            f"{fraction.mean():.2f} ({fraction.min():.2f}, {fraction.max():.2f})",
            f"{images_per_second['theirs']:.2f}",
            f"{images_per_second['ours']:.2f}",
            spread(seconds["theirs"], seconds["ours"]),
            spread(seconds["theirs"], seconds["padded"]),
            f"{memory[0] / memory[1]:.2f} of {memory[1] / 2**20:.0f} MiB",
            f"{useful / peak:.0%}",
        )
    )


def make_ours(name: str, **changes) -> MammoDinoModel:
    torch.manual_seed(0)
    return MammoDinoModel(MammoDinoConfig(**{**architecture(name), **changes})).eval()


def make_theirs(name: str) -> Dinov2WithRegistersModel:
    torch.manual_seed(0)
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**architecture(name))).eval()


def architecture(name: str) -> dict:
    width, blocks, heads = MODELS[name]
    sizes = {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads}
    return {**sizes, "num_channels": 1, "image_size": 518, "patch_size": 14}


def encode_padded(model: MammoDinoModel, pixels: torch.Tensor, tissue: torch.Tensor) -> torch.Tensor:
    """What the model would cost if images of unequal length were padded instead of packed."""
    embeddings = model.embeddings(pixels)
    kept = select_tokens(tissue, 0.0, 1 + model.config.num_register_tokens, pack=False, device=pixels.device)
    states = model.encoder(kept.gather(embeddings), **kept.attention_arguments(embeddings.dtype)).last_hidden_state
    return kept.scatter(model.layernorm(states))


def encode_masked(model: MammoDinoModel, pixels: torch.Tensor, tissue: torch.Tensor) -> torch.Tensor:
    """The same result at dense cost: every token is encoded, and background keys are ignored."""
    embeddings = model.embeddings(pixels)
    keep = torch.nn.functional.pad(tissue.flatten(1) > 0, (1 + model.config.num_register_tokens, 0), value=True)
    keep = keep.to(pixels.device)
    states = model.encoder(embeddings, attention_mask=key_mask(keep, embeddings.dtype)).last_hidden_state
    return model.layernorm(states) * keep.unsqueeze(-1)


def take_turns(ways: dict[str, Callable], batches: list[tuple], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way for all batches, of each repeat after a first that warms up, in turn."""
    seconds = {way: [] for way in ways}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for way, encode in ways.items():
                elapsed = sum(stopwatch(encode, *batch) for batch in batches)
                if repeat:
                    seconds[way].append(elapsed)
    return seconds


def stopwatch(encode: Callable, *batch: torch.Tensor) -> float:
    """Seconds of one call, by the device's own clock on CUDA."""
    device = batch[0].device
    synchronize(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        encode(*batch)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    encode(*batch)
    synchronize(device)
    return time.perf_counter() - started


def spread(theirs: list[float], ours: list[float]) -> str:
    ratios = np.array(theirs) / np.array(ours)
    return f"{np.median(ratios):.1f} ({ratios.min():.1f}, {ratios.max():.1f})"


def peak_memory(kind: str, options: argparse.Namespace, pixels: torch.Tensor, tissue: torch.Tensor) -> int:
    """Bytes that one forward adds at its peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        arguments = (kind, options.model, options.device, pixels.cpu().float().numpy(), tissue.cpu().float().numpy())
        return pool.apply(forward_peak, (*arguments, options.dtype))


def forward_peak(
    kind: str, name: str, device_name: str, pixels: np.ndarray, tissue: np.ndarray, dtype_name: str
) -> int:
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    model = (make_ours if kind == "ours" else make_theirs)(name).to(device, dtype)
    mask = {"tissue_mask": torch.from_numpy(tissue).to(device)} if kind == "ours" else {}
    images = torch.from_numpy(pixels).to(device, dtype)
    with torch.inference_mode():
        model(images[:, :, :28, :28])  # libraries make their buffers
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(images, **mask)
            return torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
        before = resident_bytes("VmRSS")
        model(images, **mask)
        return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
