"""What does the image processor cost? Beside one area resize and one CLAHE, which any preparation of an image needs.

python -m performance.preprocess [IMAGE] [--repeats 40] [--threads N]

The reference is `cv2.resize(..., INTER_AREA)` of the whole plane to the canvas, then `cv2.createCLAHE(...).apply` on
that, in the plane's own bits. Both run in turn in one process, so that whatever else the machine does meets both; on a
busy machine the ratio of the minima is the steadier number, and CPU time tells what threads hide.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
import transformers

from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.rendering import RenderSettings
from modeling_mammodino.tools.command import user_path

from .images import example_images

MAMMOGRAM_PX, SLICE_PX = (4096, 3328), (2457, 1996)  # a full-field detector; a slice of BCS-DBT
NOISE = 8  # standard deviation, in gray levels of 12 bits
CANVASES_PX = (518, 1036)
BAR = 3.0  # for 16 bits on the default canvas


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m performance.preprocess", description=__doc__.splitlines()[0])
    parser.add_argument("image", nargs="*", type=user_path, help="8-bit slice (default: a real one, else a phantom)")
    parser.add_argument("--repeats", type=int, default=40, help="timings of each (default 40)")
    parser.add_argument("--threads", type=int, help="threads of OpenCV and torch (default: theirs)")
    options = parser.parse_args()
    if options.threads:
        cv2.setNumThreads(options.threads)
        torch.set_num_threads(options.threads)
    source, (small,) = example_images(1, options.image[:1])
    small = small if small.dtype == np.uint8 else (small >> 4).astype(np.uint8)  # (H, W); phantoms have 12 bits

    print(f"image: {source}; {options.repeats} repeats, {platform.machine()}")
    print(f"threads: {cv2.getNumThreads()} OpenCV, {torch.get_num_threads()} torch, {os.cpu_count()} CPUs")
    versions = {"OpenCV": cv2, "numpy": np, "torch": torch, "transformers": transformers}
    print(", ".join(f"{name} {module.__version__}" for name, module in versions.items()))
    print("| image | canvas | reference ms | processor ms | ratio of minima | of pairs: median (min, max) | CPU time |")
    print("|---" * 7 + "|")
    images = {
        f"{MAMMOGRAM_PX[0]} x {MAMMOGRAM_PX[1]}, 12 bits in uint16": enlarge(small),
        f"{SLICE_PX[0]} x {SLICE_PX[1]}, uint8 RGB": np.repeat(cv2.resize(small, SLICE_PX[::-1])[..., None], 3, axis=2),
    }
    for name, image in images.items():
        for side_px in CANVASES_PX:
            measure(name, image, side_px, options.repeats)


def measure(name: str, image: np.ndarray, side_px: int, repeats: int) -> None:
    """One row of the table."""
    processor = MammoDinoImageProcessor(size={"height": side_px, "width": side_px})
    plane = np.ascontiguousarray(image if image.ndim == 2 else image[..., 1])
    tiles = (RenderSettings.clahe_grid, RenderSettings.clahe_grid)

    def reference() -> np.ndarray:
        resized = cv2.resize(plane, (side_px, side_px), interpolation=cv2.INTER_AREA)
        return cv2.createCLAHE(RenderSettings.clahe_clip_limit, tiles).apply(resized)

    steps: tuple[Callable, Callable] = (reference, lambda: processor(image, return_tensors="pt"))
    timings = [[stopwatch(step) for step in steps] for _ in range(repeats + 2)][2:]  # the first two warm up
    wall, cpu = np.moveaxis(np.array(timings), -1, 0)  # each (repeats, 2), seconds
    pairs, minima, cpu_minima = wall[:, 1] / wall[:, 0], wall.min(axis=0), cpu.min(axis=0)
    ratio = minima[1] / minima[0]
    is_bar = image.ndim == 2 and side_px == MammoDinoImageProcessor.size["height"]
    verdict = f" ({'within' if ratio <= BAR else 'OVER'} {BAR:g})" if is_bar else ""
    spread = [f"{np.median(each):.1f} ({each.min():.1f}, {each.max():.1f})" for each in (*(wall * 1e3).T, pairs)]
    print(
        f"| {name} | {side_px} | {spread[0]} | {spread[1]} | {ratio:.2f}{verdict} | {spread[2]} "
        f"| {cpu_minima[1] / cpu_minima[0]:.2f} |"
    )


def stopwatch(step: Callable) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def enlarge(small: np.ndarray) -> np.ndarray:
    """A mammogram's size and depth from an 8-bit image (H, W): 12 bits with noise, in uint16."""
    large = cv2.resize(small.astype(np.float32), MAMMOGRAM_PX[::-1], interpolation=cv2.INTER_CUBIC) * 16
    noise = np.random.default_rng(0).normal(0, NOISE, large.shape)
    return np.clip(large + noise, 0, 4095).astype(np.uint16)


if __name__ == "__main__":
    main()
