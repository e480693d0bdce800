"""Drawings of what a checkpoint sees: `mammodino inspect`, a file in detail, and `mammodino contact_sheet`, the breast
masks of many files. Research use only."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from ..image_io import InvalidImageError
from ..image_processing_mammodino import MammoDinoImageProcessor
from ..rendering import Thumbnail
from .command import add_model_option, show_progress, user_path
from .embed import open_encoder
from .examine import examine, feature_colors, look
from .figure import PANEL_PX, Key, Panel, draw_figure, even_columns, write_figure
from .files import atomic_file, check_output, readable

try:
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]

OUTLINE, GRID, LEFT_OUT = (80, 220, 120), (214, 160, 60), (98, 98, 112)  # RGB
WHITE = (255, 255, 255)
PAIRS_A_ROW = 4  # an image and its features
TILE_PX, CAPTION_PX = 200, 32  # side of the square for the image; height of the two lines below it
TILES_PER_PAGE = 200
FONT_SCALE, CAPTION_CHARACTERS = 0.36, 32


def inspect_file(
    path: str | Path, image_processor: MammoDinoImageProcessor, model: PreTrainedModel | None = None
) -> np.ndarray:
    """Draw what the encoder sees of a file, a figure (H, W, 3) uint8 RGB: the image on its canvas, the outline of the
    breast mask, the patches that are encoded, and of a `model` their features as colors. Of a volume, the middle
    slice."""
    examined = examine(path, model, image_processor) if model is not None else None
    seen = examined.seen if examined else look(path, image_processor)
    image, kept = enlarged(seen.image), examined.kept if examined else seen.tissue_mask > 0
    height, width = seen.image.shape
    warning = f", {seen.warning}" if seen.warning else ""
    patch_px = f"{height // kept.shape[0]} x {width // kept.shape[1]}"
    panels = [
        Panel(image, f"Image on the encoder's canvas, {height} x {width} pixels"),
        Panel(outlined(image, seen.breast), f"Breast mask, confidence {seen.confidence:.2f} of 1{warning}"),
        Panel(
            encoded_patches(image, kept),
            f"Patches that are encoded: {kept.sum()} of {kept.size}, {kept.mean():.0%}; each {patch_px} pixels",
        ),
    ]
    legend = [Key("outline of the mask", [OUTLINE], is_line=True), Key("background, left out", [LEFT_OUT])]
    if examined:
        words = "Patch features: first three principal components as red, green and blue"
        panels.append(Panel(colored_patches(image, examined.colors(), kept), words))
    if seen.px_per_mm:
        legend.append(scale_bar(seen.px_per_mm * image.shape[0] / height, image.shape[1]))
    place = f", slice {seen.slice_index} (0 to {seen.num_slices - 1})" if seen.num_slices > 1 else ""
    return draw_figure(f"{Path(path).name}{place}: what the encoder sees", panels, legend)


def enlarged(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W) or (H, W, 3) uint8 as RGB, a whole number of times larger, so that it fills a panel; so
    that patches stay squares, the number is the same for all images of a canvas."""
    scale = -(-PANEL_PX // image.shape[0])
    large = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    return large if large.ndim == 3 else cv2.cvtColor(large, cv2.COLOR_GRAY2RGB)


def outlined(image: np.ndarray, breast: np.ndarray) -> np.ndarray:
    """Draw the outline of a mask (H, W) bool on its image, `enlarged`."""
    mask = cv2.resize(breast.astype(np.float32), image.shape[1::-1], interpolation=cv2.INTER_LINEAR) >= 0.5
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(image.copy(), contours, -1, OUTLINE, 3, cv2.LINE_AA)


def encoded_patches(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the image (H, W, 3) with dropped patches of the grid (h, w) painted over and the kept ones ruled."""
    height, width = image.shape[:2]
    mask = on_pixels(kept, image).astype(bool)
    shown = np.where(mask[..., None], image, np.array(LEFT_OUT, np.uint8))
    patch_height, patch_width = height // kept.shape[0], width // kept.shape[1]
    ruled = np.zeros_like(mask)
    ruled[::patch_height] = ruled[:, ::patch_width] = True
    shown[ruled & mask] = GRID
    return shown


def colored_patches(image: np.ndarray, colors: np.ndarray, kept: np.ndarray, opacity: float = 1.0) -> np.ndarray:
    """Return the image (H, W, 3) with the kept patches of the grid (h, w) in their colors (h, w, 3), 0 to 1, and the
    dropped ones painted over."""
    colors = on_pixels(np.rint(255 * colors).astype(np.uint8), image)
    shown = np.where(on_pixels(kept, image)[..., None], (1 - opacity) * image + opacity * colors, LEFT_OUT)
    return np.rint(shown).astype(np.uint8)


def on_pixels(grid: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return the values of patches, (h, w) or (h, w, 3), at each pixel of an image (H, W, 3)."""
    values = grid.astype(np.uint8) if grid.dtype == bool else grid
    return cv2.resize(values, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)


def scale_bar(px_per_mm: float, width_px: int) -> Key:
    """Return the legend's bar of 5 to 50 mm, by the pixel spacing of the file, which is that of the detector."""
    lengths_mm = [mm for mm in (5, 10, 20, 50) if mm * px_per_mm <= width_px / 3]
    mm = max(lengths_mm, default=5)
    return Key(f"{mm} mm at the detector", length_px=round(mm * px_per_mm))


def draw_features(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    tissue_mask: torch.Tensor,
    title: str,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Draw images side by side with their `feature_colors`, under their names: a figure (H, W, 3) uint8 RGB."""
    panels = []
    shown = zip(pixel_values[:, 0].cpu().numpy(), feature_colors(model, pixel_values, tissue_mask), strict=True)
    for number, (image, colors) in enumerate(shown):
        unit = (image - image.min()) / max(float(np.ptp(image)), 1e-12)
        gray = enlarged(np.rint(unit * 255).astype(np.uint8))[::2, ::2]
        kept = tissue_mask[number].cpu().numpy() > model.config.tissue_threshold
        pair = np.hstack((gray, np.full_like(gray[:, :4], 255), colored_patches(gray, colors, kept)))
        panels.append(Panel(pair, names[number] if names else f"image {number + 1} of {len(pixel_values)}"))
    legend = [
        Key("patch features: first three principal components of all images together, as red, green, blue", ()),
        Key("background, left out", [LEFT_OUT]),
    ]
    return draw_figure(title, panels, legend, even_columns(len(panels), PAIRS_A_ROW))


def write_png(drawing: np.ndarray, output: Path) -> None:
    """Write a drawing (H, W, 3) uint8 BGR as a PNG file, atomically."""
    with atomic_file(output) as temporary:
        temporary.write_bytes(cv2.imencode(".png", drawing)[1].tobytes())


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--output", type=user_path, required=True, help="PNG to write")
    add_model_option(parser, otherwise="the default image processor")


def _open_processor(options: Namespace) -> MammoDinoImageProcessor:
    """Return the image processor that was asked for. Raises ValueError or OSError where no PNG can be written."""
    check_output(options.output, ".png")
    return MammoDinoImageProcessor.from_pretrained(options.model) if options.model else MammoDinoImageProcessor()


def add_inspect_command(commands) -> None:
    """Add the subcommand `inspect`; `commands` is argparse's action of subparsers."""
    parser = commands.add_parser(
        "inspect",
        help="draw what a checkpoint sees of a file",
        description="Draws what a checkpoint sees of a file, of a volume the middle slice: the image, the breast's "
        "outline, the patches that are encoded, their features as colors. Research use only.",
    )
    parser.add_argument("file", type=user_path, help="DICOM, PNG, JPEG, PGM or TIFF, or the folder of one volume")
    _add_options(parser)
    parser.set_defaults(run=run_inspect)


def run_inspect(options: Namespace) -> None:
    check_output(options.output, ".png")
    model, processor = open_encoder(options.model) if options.model else (None, MammoDinoImageProcessor())
    write_figure(inspect_file(options.file, processor, model), options.output)
    print(options.output)


def draw_tile(thumbnail: Thumbnail, name: str) -> np.ndarray:
    """Draw an image with the outline of its mask, from red (confidence 0) to green (1), and its caption: uint8 BGR."""
    low, high = np.percentile(thumbnail.pixels, (0.5, 99.8))
    gray = np.clip((thumbnail.pixels - low) * (255 / max(high - low, 1e-6)), 0, 255).astype(np.uint8)
    scale = TILE_PX / max(gray.shape)
    height, width = (max(1, round(side * scale)) for side in gray.shape)
    size, shrink = (width, height), cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    image = cv2.cvtColor(cv2.resize(gray, size, interpolation=shrink), cv2.COLOR_GRAY2BGR)
    mask = cv2.resize(thumbnail.breast.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    confidence = thumbnail.confidence
    color = (60, round(255 * min(1, 2 * confidence)), round(255 * min(1, 2 - 2 * confidence)))
    cv2.drawContours(image, contours, -1, color, 1)
    words = f"{confidence:.2f} {thumbnail.warning}" if thumbnail.warning else f"{confidence:.2f}"
    return _captioned(image, name, words, color)


def draw_refusal(name: str, reason: str) -> np.ndarray:
    """Draw the tile of a file that cannot be used."""
    return _captioned(np.full((TILE_PX, TILE_PX, 3), 40, np.uint8), name, reason, (80, 80, 255))


def tiles(
    volumes: Sequence[Sequence[Path]], image_processor: MammoDinoImageProcessor
) -> Iterator[tuple[np.ndarray, str | None]]:
    """Yield for each volume, given as its files in order, the tile of its middle slice; and why it was refused, or
    None."""
    for files in volumes:
        path = files[len(files) // 2]
        try:
            source = files if len(files) > 1 else path
            slices = image_processor.render_source(source, (TILE_PX, TILE_PX), slices_per_volume=1)
            _, rendered = next(slices)  # rendered, so that what the model would refuse is refused here
            yield draw_tile(rendered.small, path.name), None
        except InvalidImageError as refusal:
            yield draw_refusal(path.name, refusal.reason), str(refusal)
        except OSError as error:
            yield draw_refusal(path.name, error.strerror or str(error)), str(error)


def draw_sheet(page: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Put tiles of one size in rows of `columns`, uint8 BGR."""
    columns = min(columns, len(page))
    blanks = [np.zeros_like(page[0])] * (-len(page) % columns)
    every = [*page, *blanks]
    return np.vstack([np.hstack(every[first : first + columns]) for first in range(0, len(every), columns)])


def _captioned(image: np.ndarray, first: str, second: str, color: tuple[int, int, int]) -> np.ndarray:
    tile = np.zeros((TILE_PX + CAPTION_PX, TILE_PX, 3), np.uint8)
    tile[: image.shape[0], : image.shape[1]] = image
    first, second = readable(first), readable(second)  # OpenCV crashes on what is not UTF-8
    if len(first) > CAPTION_CHARACTERS:  # file names differ at their end
        first = "..." + first[3 - CAPTION_CHARACTERS :]
    if len(second) > CAPTION_CHARACTERS:
        second = second[: CAPTION_CHARACTERS - 3] + "..."
    for line, text, ink in ((1, first, WHITE), (2, second, color)):
        place = (2, TILE_PX + 14 * line - 2)
        cv2.putText(tile, text, place, cv2.FONT_HERSHEY_SIMPLEX, FONT_SCALE, ink, 1, cv2.LINE_AA)
    return tile


def add_contact_sheet_command(commands) -> None:
    """Add the subcommand `contact_sheet`; `commands` is argparse's action of subparsers."""
    parser = commands.add_parser(
        "contact_sheet",
        help="draw the breast masks of many files on one sheet",
        description="Draws each file, of a volume in one file or many the middle slice, with the outline of its breast "
        "mask, from red (doubtful) to green, its name and the mask's confidence. File names are on the sheet: they may "
        "name patients. Research use only.",
    )
    parser.add_argument("sources", nargs="+", type=user_path, metavar="SOURCE", help="files and folders")
    _add_options(parser)
    parser.add_argument("--columns", type=int, default=10, help="tiles in a row (10)")
    parser.set_defaults(run=run_contact_sheet)


def run_contact_sheet(options: Namespace) -> None:
    from .features import find_files, group_paths  # bring torch's data loaders, which nothing else here needs

    processor, output = _open_processor(options), options.output
    if not 1 <= options.columns <= TILES_PER_PAGE:
        raise ValueError(f"--columns {options.columns}: must be from 1 to {TILES_PER_PAGE}")
    files = find_files(options.sources).files
    if not files:
        raise ValueError(f"{', '.join(map(str, options.sources))}: no image found; name a file, or a folder with some")
    volumes = [[files[place] for place in places] for places in group_paths(files)]
    for number, first in enumerate(range(0, len(volumes), TILES_PER_PAGE)):
        page = []
        of_page = volumes[first : first + TILES_PER_PAGE]
        for tile, refused in show_progress(tiles(of_page, processor), "contact_sheet", len(of_page), unit="image"):
            page.append(tile)
            if refused is not None:
                print(readable(refused), file=sys.stderr)
        paged = len(volumes) > TILES_PER_PAGE
        name = output.with_name(f"{output.stem}-{number:03d}{output.suffix}") if paged else output
        write_png(draw_sheet(page, options.columns), name)
        print(name)
