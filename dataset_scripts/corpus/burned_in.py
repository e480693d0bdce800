"""Text that is burned into the pixels: a flag for a person to look at."""

from collections.abc import Sequence

import cv2
import numpy as np

SEARCH_PX = 2048  # longer side of what is searched: every second pixel of a full-field image, strokes of 2 to 5 px
MIN_GLYPH_PX, MAX_GLYPH_PX = 6, 80  # height of a character there
MIN_GLYPHS = 3  # in a row; "RCC" and "R MLO" are flagged as well, a lone "L" is not
BRIGHT, BRIGHT_IN_AIR = 0.8, 0.4  # of the range: what may be a stroke on tissue, and beside it
DARK = 0.1  # of the range: black characters, on a label or on film
MIN_CONTRAST = 0.2  # of the range, between a stroke and what is around it
MAX_SHAPES = 4000  # more small shapes than this are noise


def looks_annotated(plane: np.ndarray, breast: np.ndarray) -> bool:
    """Tell whether characters seem to be burned into a plane (H, W); breast (h, w) bool is its mask, of any size.

    A flag for people to look at, and no promise: handwriting, a script with joined letters, slanted, faint or very
    small text pass it, and so does a single letter. Laterality markers of three characters or more are flagged too: no
    text is read here. Before data are shared, look at the images. Research use only.
    """
    return longest_row(plane, breast) >= MIN_GLYPHS


def longest_row(plane: np.ndarray, breast: np.ndarray) -> int:
    """Count the shapes that look like characters in the longest row or column of them.

    They are small, of nearly one level, white or black, set off sharply, and of like height. Our own method.
    """
    scale = SEARCH_PX / max(plane.shape)
    values = plane if plane.dtype in (np.uint8, np.uint16) else plane.astype(np.float32)
    if scale < 1:  # single pixels, not their average, in which thin strokes would drown
        height, width = (max(1, round(side * scale)) for side in plane.shape)
        values = cv2.resize(values, (width, height), interpolation=cv2.INTER_NEAREST)
    if values.dtype == np.float32:
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high, _, _ = cv2.minMaxLoc(values)
    if high <= low:
        return 0
    gray = cv2.convertScaleAbs(values, alpha=255 / (high - low), beta=-low * 255 / (high - low))
    tissue = cv2.resize(breast.astype(np.uint8), gray.shape[::-1], interpolation=cv2.INTER_NEAREST)
    in_air = cv2.bitwise_and(cv2.inRange(gray, round(255 * BRIGHT_IN_AIR), 255), cv2.inRange(tissue, 0, 0))
    white = cv2.bitwise_or(in_air, cv2.inRange(gray, round(255 * BRIGHT), 255))
    black = cv2.inRange(gray, 0, round(255 * DARK))
    return max(_longest_row(gray, white), _longest_row(gray, black))


def _longest_row(gray: np.ndarray, strokes: np.ndarray) -> int:
    contours, _ = cv2.findContours(strokes, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    boxes = [cv2.boundingRect(contour) for contour in contours if len(contour) >= 4]
    candidates = [box for box in boxes if _has_size_of_glyph(box)]
    if not MIN_GLYPHS <= len(candidates) <= MAX_SHAPES:
        return 0
    glyphs = np.array([box for box in candidates if _is_set_off(gray, strokes, box)], np.float32).reshape(-1, 4)
    turned = glyphs[:, [1, 0, 3, 2]]
    return max(_in_a_row(glyphs), _in_a_row(turned))


def _has_size_of_glyph(box: Sequence[int]) -> bool:
    _, _, width, height = box
    return MIN_GLYPH_PX <= max(width, height) <= MAX_GLYPH_PX and min(width, height) * 12 >= max(width, height)


def _is_set_off(gray: np.ndarray, strokes: np.ndarray, box: Sequence[int]) -> bool:
    """Tell whether a shape is of nearly one level and what surrounds it is of another, without a slope between."""
    x, y, width, height = box
    window = np.s_[max(0, y - 2) : y + height + 2, max(0, x - 2) : x + width + 2]
    pixels, inside = gray[window], strokes[window]
    if not 0.05 <= cv2.countNonZero(inside) / inside.size <= 0.8:
        return False
    outside = cv2.bitwise_not(inside)
    if abs(cv2.mean(pixels, inside)[0] - cv2.mean(pixels, outside)[0]) < 0.8 * 255 * MIN_CONTRAST:
        return False  # most shapes of tissue end here, at a tenth of the cost of the medians
    stroke, around = pixels[inside > 0].astype(np.float32), pixels[outside > 0].astype(np.float32)
    level, ground = np.median(stroke), np.median(around)
    return bool(
        abs(level - ground) >= 255 * MIN_CONTRAST
        and np.mean(np.abs(stroke - level) <= 26) >= 0.6
        and np.mean(np.abs(around - ground) <= 40) >= 0.6
    )


def _in_a_row(glyphs: np.ndarray) -> int:
    """Count the most boxes (n, 4) of x, y, width, height that follow each other in one line, at like heights."""
    longest = 0
    middles, heights = glyphs[:, 1] + glyphs[:, 3] / 2, glyphs[:, 3]
    for middle, height in zip(middles, heights, strict=True):
        alike = (np.abs(middles - middle) <= 0.25 * height) & (np.abs(heights - height) <= 0.25 * height + 1)
        line = glyphs[alike]
        line = line[np.argsort(line[:, 0])]
        run, end = 0, -np.inf
        for x, _, width, _ in line:
            if x >= end - 1:  # the holes of letters lie inside them
                run = run + 1 if x - end <= 2.5 * height else 1
                end = x + width
            longest = max(longest, run)
    return longest
