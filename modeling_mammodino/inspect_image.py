"""What a checkpoint sees of a file: the command `mammodino inspect`. Research use only."""

import os
from argparse import Namespace
from pathlib import Path

import numpy as np

from .image_processing_mammodino import MammoDinoImageProcessor

try:
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]

OUTLINE, GRID = (80, 220, 120), (90, 90, 90)  # BGR


def inspect_file(path: str, image_processor: MammoDinoImageProcessor) -> np.ndarray:
    """What the encoder sees of a file, (H, 3 * W + gaps, 3) uint8 BGR: the picture on its canvas, the breast's outline
    on it, and the patches that are encoded. Of a volume, the middle slice."""
    inputs = image_processor(path, slices_per_volume=1, return_tensors="np")
    (mean, std), tissue = image_processor.mean_and_std, inputs["tissue_mask"][0]  # (h, w)
    values = inputs["pixel_values"][0, 0] * std + mean  # (H, W)
    picture = cv2.cvtColor(np.rint(values.clip(0, 1) * 255).astype(np.uint8), cv2.COLOR_GRAY2BGR)
    height, width = picture.shape[:2]
    fraction = cv2.resize(tissue, (width, height), interpolation=cv2.INTER_LINEAR)
    contours, _ = cv2.findContours((fraction >= 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outlined = cv2.drawContours(picture.copy(), contours, -1, OUTLINE, max(1, height // 300))
    return side_by_side([picture, outlined, encoded_patches(picture, tissue > 0)])


def encoded_patches(picture: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) with dropped patches of the grid (h, w) darkened and the kept ones ruled."""
    height, width = picture.shape[:2]
    mask = cv2.resize(kept.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
    shown = np.where(mask[..., None], picture, picture // 4 + np.array([40, 0, 0], np.uint8))
    patch_height, patch_width = height // kept.shape[0], width // kept.shape[1]
    ruled = np.zeros_like(mask)
    ruled[::patch_height] = ruled[:, ::patch_width] = True
    shown[ruled & mask] = GRID
    return shown.astype(np.uint8)


def side_by_side(panels: list[np.ndarray], gap_px: int = 12) -> np.ndarray:
    """Panels of one height (H, W, 3) in a row, on white."""
    padded = [np.pad(panel, ((0, 0), (0, gap_px), (0, 0)), constant_values=255) for panel in panels]
    return np.hstack(padded)[:, :-gap_px]


def write_png(drawing: np.ndarray, output: Path) -> None:
    """A drawing (H, W, 3) uint8 BGR as a PNG file, whole or not at all."""
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_bytes(cv2.imencode(".png", drawing)[1].tobytes())
    os.replace(temporary, output)


def add_command(commands) -> None:
    """The subcommand `inspect`; `commands` is argparse's action of subparsers."""
    parser = commands.add_parser(
        "inspect",
        help="draw what a checkpoint sees of a file",
        description="Draws what a checkpoint sees of a file, of a volume the middle slice: the picture, the breast's "
        "outline, the patches that are encoded. Research use only.",
    )
    parser.add_argument("file", help="DICOM, PNG, JPEG, PGM or TIFF")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--model", help="checkpoint folder or Hub id (default: the default image processor)")
    parser.set_defaults(run=run)


def run(options: Namespace) -> None:
    output: Path = options.output
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {output}: a PNG is written; give a name that ends in .png")
    processor = MammoDinoImageProcessor.from_pretrained(options.model) if options.model else MammoDinoImageProcessor()
    drawing = inspect_file(options.file, processor)
    write_png(drawing, output)
    print(output)
