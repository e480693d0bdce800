"""Figures that explain themselves: panels in rows, each under its caption; above them a title, below a legend with the
scale; on white, at 200 dots an inch. Drawn with Pillow, which every installation has. Research use only."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import atomic_file, readable

Color = tuple[int, int, int]  # RGB

DPI = 200
PAPER, INK, FAINT = (255, 255, 255), (24, 24, 27), (95, 95, 102)
TITLE_PX, CAPTION_PX, LEGEND_PX = 30, 25, 23  # 11, 9 and 8 points
MARGIN_PX, GAP_PX = 28, 22
PANEL_PX = 760  # least height of a single row's panels
NOTICE = "Research use only: not a medical device."


class Panel(NamedTuple):
    image: np.ndarray  # (H, W, 3) uint8 RGB
    caption: str


class Key(NamedTuple):
    """An entry of the legend: a swatch of a color, a line, a bar of a length, or of several colors a gradient."""

    words: str
    colors: Sequence[Color] = (INK,)
    is_line: bool = False
    length_px: int | None = None


def draw_figure(
    title: str, panels: Sequence[Panel], legend: Sequence[Key] = (), columns: int | None = None
) -> np.ndarray:
    """Draw panels of one size in rows of `columns`, by default one row: (H, W, 3) uint8 RGB."""
    columns = min(columns or len(panels), len(panels))
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    height, width = panels[0].image.shape[:2]
    inner = max(columns * (width + GAP_PX) - GAP_PX, 700)
    title_lines = _wrapped(title, TITLE_PX, inner)
    captions = [[_wrapped(panel.caption, CAPTION_PX, width) for panel in row] for row in rows]
    caption_heights = [max(map(len, row)) * _line(CAPTION_PX) for row in captions]
    entries, legend_height = _flowed([*legend, Key(NOTICE, ())], inner)

    top = MARGIN_PX + len(title_lines) * _line(TITLE_PX) + GAP_PX // 2
    full = top + sum(caption_heights) + len(rows) * (height + GAP_PX) + legend_height + MARGIN_PX
    sheet = Image.new("RGB", (inner + 2 * MARGIN_PX, full), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, title_lines, MARGIN_PX, MARGIN_PX, TITLE_PX, INK)
    for row, texts, caption_height in zip(rows, captions, caption_heights, strict=True):
        for column, (panel, lines) in enumerate(zip(row, texts, strict=True)):
            left = MARGIN_PX + column * (width + GAP_PX)
            _write(draw, lines, left, top + caption_height - len(lines) * _line(CAPTION_PX), CAPTION_PX, INK)
            sheet.paste(Image.fromarray(panel.image), (left, top + caption_height))
        top += caption_height + height + GAP_PX
    for key, x, y in entries:
        _draw_key(draw, key, MARGIN_PX + x, top + y)
    return np.asarray(sheet)


def write_figure(figure: np.ndarray, output: Path) -> None:
    """Write a figure (H, W, 3) uint8 RGB as a PNG of 200 dots an inch, atomically."""
    with atomic_file(output) as temporary:
        Image.fromarray(figure).save(temporary, format="PNG", dpi=(DPI, DPI))


def even_columns(count: int, most: int) -> int:
    """Return the columns, at most `most`, that fill the rows of `count` panels best; of several, the most."""
    if count <= most:
        return count
    return max(range(2, most + 1), key=lambda columns: (-(-count % columns), columns))


@cache
def _font(size_px: int):
    return ImageFont.load_default(size_px)


def _line(size_px: int) -> int:
    return round(1.3 * size_px)


def _width(text: str, size_px: int) -> int:
    return round(_font(size_px).getlength(text))


def _wrapped(text: str, size_px: int, width: int) -> list[str]:
    """Break text at spaces into lines of a width; a longer word, such as a file's name, is broken where it must be."""
    lines = [""]
    for word in readable(text).split():
        if lines[-1] and _width(f"{lines[-1]} {word}", size_px) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
        while _width(lines[-1], size_px) > width and len(lines[-1]) > 1:
            lengths = range(1, len(lines[-1]))
            fits = max(1, bisect_right(lengths, width, key=lambda length: _width(lines[-1][:length], size_px)))
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return lines


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, size_px: int, color: Color) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + number * _line(size_px)), line, font=_font(size_px), fill=color)


def _swatch(key: Key) -> int:
    """Return the width of what stands before a key's words."""
    return 0 if not key.colors else key.length_px or (150 if len(key.colors) > 1 else 34)


def _flowed(legend: Sequence[Key], width: int) -> tuple[list[tuple[Key, int, int]], int]:
    """Place the entries of a legend as words are set, (key, x, y) each; and the height of all."""
    placed, x, y = [], 0, 0
    for key in legend:
        needed = _swatch(key) + 10 + _width(readable(key.words), LEGEND_PX)
        if x and x + needed > width:
            x, y = 0, y + _line(LEGEND_PX) + 6
        placed.append((key, x, y))
        x += needed + 36
    return placed, y + _line(LEGEND_PX)


def _draw_key(draw: ImageDraw.ImageDraw, key: Key, x: int, y: int) -> None:
    width, top, bottom = _swatch(key), y + 4, y + LEGEND_PX + 2
    middle = (top + bottom) // 2
    if key.length_px:
        draw.line([(x, middle), (x + width, middle)], fill=INK, width=3)
        for end in (x, x + width):
            draw.line([(end, top), (end, bottom)], fill=INK, width=3)
    elif key.is_line:
        draw.line([(x, middle), (x + width, middle)], fill=key.colors[0], width=5)
    elif key.colors:
        ramp = np.linspace(0, len(key.colors) - 1, width)
        channels = np.transpose(key.colors)
        for column, color in enumerate(
            zip(*(np.interp(ramp, range(len(key.colors)), each) for each in channels), strict=True)
        ):
            draw.line([(x + column, top), (x + column, bottom)], fill=tuple(round(value) for value in color))
    color = INK if key.colors else FAINT
    draw.text((x + width + (10 if width else 0), y), readable(key.words), font=_font(LEGEND_PX), fill=color)
