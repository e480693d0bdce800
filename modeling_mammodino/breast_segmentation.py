"""Where the tissue is: the breast by default, or the body in an axial slice of CT or MR; its box and its patches.

Everything is found on a thumbnail, so that it does not depend on the resolution of the output.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

try:
    import cv2
except ImportError:  # transformers imports remote code before its packages are checked
    cv2 = None  # type: ignore[assignment]

THUMBNAIL_PX = 512  # longer side of the image that is segmented
LOW_CONFIDENCE = 0.5  # below it, a mask is looked at
BINS = 256  # in which modes are looked for
FINE_BINS = 16 * BINS  # in which levels are read
MIN_BREAST_FRACTION = 0.02  # of the image, twice that away from the sides; anything smaller is a label or noise
OPENING_FRACTION = 0.006  # radius of the opening, of the longer side: tape, lines and narrow labels go
MAX_HOLE_FRACTION = 0.05  # of the mask; a larger hole is air behind the rim of a paddle, or between strips of tape
SKIN_FRACTION = 0.06  # threshold, of the way from air to the typical tissue
NOISE_SIGMAS = 4.0  # threshold, in standard deviations of the air
MAX_NOISE = 0.125  # of the step to tissue: the threshold comes no higher than half of the step
MIN_BOX = 0.6  # share of its rectangle that a redaction box fills; air in a corner beside a breast at most half
BOX_LEVELS = (0.01, 0.03, 0.06, 0.1)  # of the image's range
BOX_JUMP = 0.06  # to what is around it, where a dip in tissue is still dark
MAX_STRIP_FRACTION = 0.06  # depth of a film's white border that is no straight line, of the side that it eats into
MIN_STRIP_FRACTION = 0.15  # its length, of the side along which it runs
MAX_ARMED = 0.85  # share of its hull that a mask fills, above which it has no arms to be cut off
DARK = 0.2  # step to tissue, of the image's range: below it what is faint is lifted, and taken ...
MIN_GAIN = 1.25  # ... where the mask grows by this much: nearly black films beside a white label
SLOPE = 0.02  # of the step to tissue: air that spreads wider may slope, as film does, and is flattened first
MAX_ROUGHNESS = 0.03  # of the step to tissue, see _roughness; above it the darkest mode is tissue, not air
MIN_JUMP = 0.03  # of the image's range: what ends a scanner border
MAX_BORDER_FRACTION = 0.25  # depth of a scanner border, of the side that it eats into
MAX_UNEVEN_FRACTION = 0.02  # by which the edge of a border leaves a straight line
MIN_RECTANGLE = 0.9  # share of its rectangle that a label or a film fills; the breasts of 128 real images at most 0.88
MIN_CIRCLE = 0.98  # the same of a circle, as far as it lies in the image; those breasts at most 0.92
MIN_STRAIGHT_FRACTION = 0.35  # of the longer side: an edge along rows or columns that no breast has
MIN_LABEL_FRACTION, MAX_LABEL_FRACTION = 0.001, 0.15  # of the image
MAX_LOOKS = 3  # black margin, film base and paddle can lie one inside the other
FLAT = 0.02  # of the range of a negative: where its air lies, if it is one
MIN_BRIGHT_AIR = 0.1  # of a negative's image, and of its sides
MIN_BODY_FRACTION = 0.02  # of the image; anything smaller is noise
TABLE_FRACTION = 0.012  # radius of the opening, of the longer side: the table, its rails and tubes go


class TissueMask(NamedTuple):
    """Where the tissue is, and how sure that is."""

    mask: np.ndarray  # (H, W) bool
    confidence: float  # 0 to 1, see find_breast
    outside_fraction: float  # of all that is brighter than air, the share outside the mask: labels, markers, borders
    warning: str  # what limits the confidence, in words; empty where nothing does


def find_breast(image: np.ndarray) -> TissueMask:
    """Find the breast in a gray image (H, W), 8 to 16 bits or float, in which tissue is brighter than air.

    On a thumbnail: scanner borders (uniform strips along the sides, straight or slanted, black or white) and bright
    rectangles (labels, stickers) are set aside. Air is the lowest significant mode of the histogram, less its slope
    where it slopes, as on film. The threshold stands just above that mode, so that the skin line stays in; an opening
    cuts tape, lines and labels off; the largest component wins, one that touches a vertical side counting double, and
    its small holes are filled. Where that is a rectangle, a circle or has a long straight edge, it is a film, a paddle
    or a collimated field, and the breast is looked for inside, against the air that is there. This is the usual
    "threshold, open, largest component" of mammogram preprocessing (Nagi et al., IECBES 2010; Wu et al., IEEE TMI 2020)
    with a threshold of our own: zero fails on film, Otsu splits fat from gland.

    Where the darkest mode is as rough as tissue there is no air: a crop inside the breast, all True. An image with no
    breast (constant, or white noise) is all False, with confidence 0. NaN and infinite pixels are air.

    `confidence` is the weakest of the `quality_checks`, our choice and no probability; below LOW_CONFIDENCE, look at
    the image.
    Research use only.
    """
    if image.ndim != 2:
        raise ValueError(f"find_breast takes a 2-D gray image, got shape {image.shape}; pass one plane (H, W).")
    H, W = image.shape
    values = unit_thumbnail(image)
    look = None if values is None else _segment(values)
    if look is None or not look.mask.any():
        return TissueMask(np.zeros((H, W), bool), 0.0, 0.0, "no breast found")
    checks = quality_checks(look)
    weakest = min(checks, key=checks.__getitem__)
    above = look.mask | (look.smooth > look.threshold)  # no air: NaN compares False
    outside_fraction = 1 - float(look.mask.sum() / above.sum())
    mask = look.mask
    if mask.all():
        mask = np.ones((H, W), bool)
    elif mask.shape != (H, W):
        mask = cv2.resize(mask.astype(np.uint8) * 255, (W, H), interpolation=cv2.INTER_LINEAR) > 127
    return TissueMask(mask, checks[weakest], outside_fraction, weakest if checks[weakest] < 1 else "")


def air_is_bright(image: np.ndarray) -> bool:
    """Whether a gray image (H, W) shows the breast dark on bright air, as MONOCHROME1 does that was exported as stored.

    So it is where the negative has a breast of some confidence, on air that is flat, its extreme mode, and lies along
    the sides. Ask only of an image that shows no breast as it is: films have bright borders, too.
    """
    values = unit_thumbnail(np.negative(image, dtype=np.float32))
    if values is None or (values < FLAT).mean() < MIN_BRIGHT_AIR:  # a film's borders and muscle are not flat
        return False
    look = _segment(values)
    if not look.mask.any() or np.isnan(look.air) or look.air > FLAT:
        return False
    air = look.smooth <= look.threshold
    sides = np.concatenate([air[0], air[-1], air[:, 0], air[:, -1]])
    is_flat = (look.values[air] < FLAT).mean() >= 0.5 and sides.mean() >= MIN_BRIGHT_AIR
    return bool(is_flat and min(quality_checks(look).values()) >= LOW_CONFIDENCE)


def find_body(image: np.ndarray) -> TissueMask:
    """Find the body in an axial slice, with the air inside it: lungs and bowel belong to it.

    Otsu's threshold (1979) on a thumbnail, an opening that cuts the table off, the largest component, and its holes
    filled. `confidence` is the share of all that is brighter than the threshold that lies in the mask. Research use
    only.
    """
    if image.ndim != 2:
        raise ValueError(f"find_body takes a 2-D gray image, got shape {image.shape}; pass one plane (H, W).")
    H, W = image.shape
    values = unit_thumbnail(image)
    nothing = TissueMask(np.zeros((H, W), bool), 0.0, 0.0, "no body found")
    if values is None:
        return nothing
    gray = np.rint(values * 255).astype(np.uint8)
    _, above = cv2.threshold(cv2.GaussianBlur(gray, (5, 5), 0), 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    opened = cv2.morphologyEx(above, cv2.MORPH_OPEN, _disc(gray.shape, TABLE_FRACTION))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(opened)
    if count == 1:
        return nothing
    body = (labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))).astype(np.uint8)
    outlines, _ = cv2.findContours(body, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    body = cv2.drawContours(body, outlines, -1, 1, cv2.FILLED)
    if body.mean() < MIN_BODY_FRACTION:
        return nothing
    inside = float((above & body).sum() / above.sum())
    mask = cv2.resize(body * 255, (W, H), interpolation=cv2.INTER_LINEAR) > 127
    return TissueMask(mask, inside, 1 - inside, "much besides it is as bright" if inside < 1 else "")


# Rules for the tissue in a gray image (H, W) in which tissue is brighter than air; without tissue the mask is empty.
TISSUE_FINDERS: dict[str, Callable[[np.ndarray], TissueMask]] = {"breast": find_breast, "body": find_body}


def breast_box(mask: np.ndarray, margin_fraction: float = 0.02) -> tuple[int, int, int, int]:
    """(y0, x0, y1, x1), half-open, around the mask with a margin of its longer side; the whole image if it is empty."""
    H, W = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return 0, 0, H, W
    y0, y1, x0, x1 = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    margin_px = round(margin_fraction * max(y1 - y0, x1 - x0))
    return max(0, y0 - margin_px), max(0, x0 - margin_px), min(H, y1 + margin_px), min(W, x1 + margin_px)


def chest_wall_side(mask: np.ndarray) -> str:
    """The vertical side, "left" or "right", with more tissue in its border columns; if even, nearer to the centroid."""
    W = mask.shape[1]
    border_px = max(1, round(0.02 * W))
    left, right = int(mask[:, :border_px].sum()), int(mask[:, W - border_px :].sum())
    if abs(left - right) > 0.02 * border_px * mask.shape[0]:
        return "left" if left > right else "right"
    tissue = mask.sum(axis=0)
    centroid = float((tissue * (np.arange(W) + 0.5)).sum()) / max(1, int(tissue.sum()))
    return "right" if centroid > W / 2 else "left"


def patch_tissue(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Breast fraction of each patch, (h, w) float32: exact area average, also where h or w does not divide the mask."""
    # (H + 1, W + 1); between pixel corners it is bilinear, so that the average is exact
    integral = cv2.integral(mask.astype(np.uint8))
    integral = _interpolated(integral, grid[0])  # (h + 1, W + 1)
    integral = _interpolated(integral.T, grid[1]).T  # (h + 1, w + 1)
    area = mask.size / (grid[0] * grid[1])
    return np.clip(np.diff(np.diff(integral, axis=0), axis=1) / area, 0.0, 1.0).astype(np.float32)


def _interpolated(integral: np.ndarray, parts: int) -> np.ndarray:
    """Axis 0 read at the edges of `parts` equal intervals."""
    size = len(integral) - 1
    edges = np.arange(parts + 1) * size / parts
    below = np.minimum(edges.astype(np.intp), size - 1)
    share = (edges - below)[:, None]
    return integral[below] * (1 - share) + integral[below + 1] * share


def unit_thumbnail(image: np.ndarray) -> np.ndarray | None:
    """Make a float32 thumbnail, its minimum at 0 and its 99.5th percentile at 1; None where there is no contrast."""
    if image.size == 0:
        return None
    if image.dtype.kind == "f":
        finite = np.isfinite(image)
        if not finite.all():
            if not finite.any():
                return None
            image = np.where(finite, image, image[finite].min())
    if image.dtype == np.float32:
        image = image - image.min()  # a large offset would eat the precision of the sums below
    elif image.dtype.itemsize > 2:
        image = image - np.float64(image.min())
        image = image / max(float(image.max()), np.finfo(np.float64).tiny)
    H, W = image.shape
    scale = THUMBNAIL_PX / max(H, W)
    values: np.ndarray = image.astype(np.float32, copy=False)
    if scale < 1:
        size = (max(1, round(W * scale)), max(1, round(H * scale)))
        values = cv2.resize(values, size, interpolation=cv2.INTER_AREA)
    low, high = float(values.min()), float(np.percentile(values, 99.5))
    if high <= low:
        high = float(values.max())
    if high - low <= 1e-5 * abs(high):  # rounding of a constant image
        return None
    return np.clip((values - low) / (high - low), 0, 1)


class Look(NamedTuple):
    """A thumbnail, segmented."""

    mask: np.ndarray  # (h, w) bool
    smooth: np.ndarray  # (h, w) float32, what was thresholded
    field: np.ndarray  # (h, w) bool: where breast was looked for, less borders, labels and the air around a film
    air: float  # level; NaN where there is none, and all of the field is breast
    threshold: float
    tissue: float  # median level of what is above the air
    values: np.ndarray  # (h, w) float32, before smoothing


def _segment(values: np.ndarray) -> Look:
    """Find the breast in a thumbnail (h, w) float32 with values in 0..1."""
    field = ~_borders(values)
    field &= ~_labels(values, field)
    boxes = _boxes(values, field)
    look = _look_deeper(values, field & ~boxes)
    if np.isnan(look.air) and boxes.any():  # dark tissue in a crop, as it seems
        look = _look_deeper(values, field)
    else:
        field &= ~boxes
    if look.mask.any() and not look.tissue - look.air > DARK:
        bright = max(float(np.percentile(values[field], 99.5)), 1 / FINE_BINS)
        lifted = _look_deeper(np.sqrt(np.minimum(values / bright, 1)), field)
        if np.isnan(look.air) or lifted.mask.sum() > MIN_GAIN * look.mask.sum():
            look = lifted
    if look.mask.any() and _solidity(look.mask) < MAX_ARMED and (strips := _strips(look)).any():
        look = _look(look.values, look.field & ~strips)
    return look


def _look_deeper(values: np.ndarray, field: np.ndarray) -> Look:
    """Look again inside what is found as long as it is a film or a plate."""
    look = _look(values, field)
    for _ in range(MAX_LOOKS - 1):
        if np.isnan(look.air) or not _is_plate(look.mask):
            break
        inner = _look(values, cv2.erode(look.mask.astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=1) > 0)
        if np.isnan(inner.air) or not inner.mask.any():
            break
        look = inner
    return look


def _look(values: np.ndarray, field: np.ndarray) -> Look:
    """One threshold and the largest component above it, inside the field."""
    if not field.any():
        return Look(field, values, field, np.nan, np.nan, np.nan, values)
    for blur_px in (3, 11, 25):  # noise averages out under a wider blur, tissue does not
        smooth = cv2.GaussianBlur(values, (blur_px, blur_px), 0)
        for is_flat in (False, True):
            air, noise, tissue = _levels(smooth, field)
            step = tissue - air
            threshold = air + max(NOISE_SIGMAS * noise, SKIN_FRACTION * step)
            if step <= 0 or _roughness(smooth, field & (smooth <= threshold)) > MAX_ROUGHNESS * step:
                break
            if noise <= (MAX_NOISE if is_flat else SLOPE) * step:
                return Look(
                    _largest_component(field & (smooth > threshold)), smooth, field, air, threshold, tissue, values
                )
            smooth = _flattened(smooth, field & (smooth <= air + noise))
    mask = np.zeros_like(field) if _is_white_noise(values) else field
    return Look(mask, smooth, field, np.nan, np.nan, np.nan, values)


def _levels(values: np.ndarray, field: np.ndarray) -> tuple[float, float, float]:
    """Level and noise of the air (lowest significant mode), and the median level of what stands above it.

    Everything is read off one fine histogram, many times cheaper than a sort of the pixels for each quantile.
    """
    fine = _histogram(values, field)
    coarse = fine.reshape(BINS, -1).sum(axis=1).astype(np.float32)
    smooth = cv2.GaussianBlur(coarse[None], (13, 1), 2.0, borderType=cv2.BORDER_REFLECT)[0]
    mode, valley, pixels = 0, BINS - 1, fine.sum()
    for bin_ in range(BINS):
        if smooth[bin_] > smooth[mode]:
            mode = bin_
        significant = coarse[max(0, mode - 6) : mode + 7].sum() >= 0.01 * pixels
        if significant and smooth[bin_] < 0.5 * smooth[mode]:
            valley = bin_ + int(np.argmin(smooth[bin_ : bin_ + 6]))
            break
    width = FINE_BINS // BINS
    first = max(0, mode - 2) * width
    air = first + _quantile(fine[first : (mode + 3) * width], 0.5)
    lower = _quantile(fine[air::-1], 0.8)
    upper = _quantile(fine[air : max(air + 1, valley * width)], 0.8)
    noise = max(lower, upper) / 1.28
    first = air + 1 + int(max(NOISE_SIGMAS * noise, 2 * width))
    tissue = first + _quantile(fine[first:], 0.5) if fine[first:].any() else air
    return air / FINE_BINS, noise / FINE_BINS, tissue / FINE_BINS


def _histogram(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Counts (FINE_BINS,) of values in 0..1; exactly 1 counts in the last bin."""
    counts = cv2.calcHist([values], [0], where.astype(np.uint8), [FINE_BINS + 1], [0, 1 + 1 / FINE_BINS]).ravel()
    counts[-2] += counts[-1]
    return counts[:-1].astype(np.float64)


def _quantile(counts: np.ndarray, fraction: float) -> int:
    """The bin that a share of the counts reaches."""
    running = np.cumsum(counts)
    return int(np.searchsorted(running, fraction * running[-1]))


def _flattened(values: np.ndarray, air: np.ndarray) -> np.ndarray:
    """Less the slope of the air: a quadratic surface through its pixels, fitted again to all that lie close to it."""
    height, width = values.shape
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]  # (h, 1)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None]  # (1, w)
    every = 16
    samples, near = values[::every, ::every], air[::every, ::every]
    u, v = np.broadcast_arrays(x[:, ::every], y[::every])
    terms = np.stack([np.ones_like(u), u, u * u, v, u * v, v * v], axis=-1)  # (h / 8, w / 8, 6)
    for _ in range(3):
        if near.sum() < 20:
            return values
        chosen = terms[near].astype(np.float64)  # (n, 6); where the air lies along a line, float32 is singular
        weights = np.linalg.solve(chosen.T @ chosen + 1e-6 * np.eye(6), chosen.T @ samples[near])
        weights = weights.astype(np.float32)
        residual = samples - terms @ weights
        near = np.abs(residual) <= 3 * max(float(residual[near].std()), 1 / FINE_BINS)
    a, b, c, d, e, f = weights
    slope = (a + b * x + c * x * x) + y * (d + e * x) + f * y * y
    return np.clip(values - (slope - slope.min()), 0, 1)


def _roughness(values: np.ndarray, air: np.ndarray) -> float:
    """Typical difference between two pixels of the air 1/32 of the image apart, as a standard deviation.

    A slow gradient of the air counts little here, averaged noise as well; in tissue it is the texture that counts.
    """
    lag = max(1, max(values.shape) // 32)
    counts = np.zeros(FINE_BINS)
    for high, low in ((np.s_[lag:], np.s_[:-lag]), (np.s_[:, lag:], np.s_[:, :-lag])):
        if values[high].size:
            counts += _histogram(cv2.absdiff(values[high], values[low]), air[high] & air[low])
    return _quantile(counts, 0.8) / FINE_BINS / 1.81 if counts.any() else np.inf  # 1.81 = 1.28 * sqrt 2


def _borders(values: np.ndarray) -> np.ndarray:
    """Scanner borders (h, w) bool: uniform strips along the sides, of any level, that end in a jump along a line."""
    borders = np.zeros(values.shape, bool)
    for view, marked in (
        (values, borders),
        (values[::-1], borders[::-1]),
        (values.T, borders.T),
        (values.T[::-1], borders.T[::-1]),
    ):
        depth = _border_px(view)
        if depth is not None:
            marked |= np.arange(len(view))[:, None] < depth
    return borders


def _border_px(values: np.ndarray) -> np.ndarray | None:
    """Thickness (w,) of the border along the first axis' start, for each column; None where there is none."""
    length, width = values.shape
    if min(length, width) < 32:
        return None
    limit = int(np.ceil(MAX_BORDER_FRACTION * length))
    head = values[: limit + 2]
    level = np.median(head[0])
    differs = np.abs(head - level) > MIN_JUMP  # (limit + 2, w)
    depth = np.where(differs.any(axis=0), differs.argmax(axis=0), limit + 2).astype(np.float32)
    columns = np.arange(width)
    thirds = [np.median(part) for part in np.array_split(depth, 3)]
    line = np.median(depth) + (thirds[2] - thirds[0]) / (width * 2 / 3) * (columns - width / 2)
    uneven = max(2.0, MAX_UNEVEN_FRACTION * length)
    on_line = np.abs(depth - line) <= uneven
    if on_line.mean() < 0.8 or np.median(depth) < 1 or np.median(depth) > limit:
        return None
    return np.where(on_line, depth, line) + 1


def _strips(look: Look) -> np.ndarray:
    """Thin bright strips (h, w) bool along a side with air behind them: white borders of a film that are no straight
    lines, and join the breast to the rest of the frame."""
    values = look.values
    strips = np.zeros(values.shape, bool)
    smooth = cv2.GaussianBlur(values, (5, 5), 0)
    step = look.tissue - look.air
    is_air, bright = smooth < look.air + 0.25 * step, look.air + 0.5 * step
    for view, air, marked in (
        (values, is_air, strips),
        (values[::-1], is_air[::-1], strips[::-1]),
        (values.T, is_air.T, strips.T),
        (values.T[::-1], is_air.T[::-1], strips.T[::-1]),
    ):
        limit = round(MAX_STRIP_FRACTION * len(view))
        head = air[: limit + 1]
        depth = np.where(head.any(axis=0), head.argmax(axis=0), limit + 1)  # where the air begins
        is_strip = (view[:3].max(axis=0) > bright) & (depth <= limit)
        if is_strip.mean() >= MIN_STRIP_FRACTION:
            marked |= is_strip & (np.arange(len(view))[:, None] < depth + 2)
    return strips


def _labels(values: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Labels and stickers (h, w) bool: what is bright, fills its rectangle and stands apart from what is around it."""
    labels = np.zeros(values.shape, bool)
    for level in (0.6, 0.8, 0.95):
        bright = field & (values > level)
        labels |= _plates(bright, bright, MIN_RECTANGLE, _disc(values.shape))
    return labels


def _boxes(values: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Redaction boxes (h, w) bool: the same, darker than all around it by a jump."""
    boxes = np.zeros(values.shape, bool)
    smooth = cv2.GaussianBlur(values, (5, 5), 0)
    for level in BOX_LEVELS:
        dark = field & (smooth < level)
        if dark.any():
            boxes |= _plates(dark, field & (smooth < level + BOX_JUMP), MIN_BOX, np.ones((3, 3), np.uint8))
    return boxes


def _plates(alike: np.ndarray, near_alike: np.ndarray, least_fill: float, opening: np.ndarray) -> np.ndarray:
    """Parts (h, w) bool of what is alike that fill their rectangle, with little around them that is nearly so."""
    plates = np.zeros(alike.shape, np.uint8)
    opened = cv2.morphologyEx(alike.astype(np.uint8), cv2.MORPH_OPEN, opening)
    for contour in cv2.findContours(opened, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]:
        area = cv2.contourArea(contour) / alike.size
        if not MIN_LABEL_FRACTION <= area <= MAX_LABEL_FRACTION or _rectangle_fill(contour) < least_fill:
            continue
        plate = cv2.drawContours(np.zeros_like(plates), [contour], -1, 1, cv2.FILLED)
        near, wide = (cv2.dilate(plate, np.ones((side, side), np.uint8)) for side in (5, 19))
        if near_alike[wide > near].mean() < 0.25:
            plates[plate > 0] = 1
    return cv2.dilate(plates, np.ones((5, 5), np.uint8)) > 0


def _rectangle_fill(contour: np.ndarray) -> float:
    """Share of the smallest rectangle around a contour that it fills; the contour runs through pixels' centers."""
    _, (height, width), _ = cv2.minAreaRect(contour)
    return cv2.contourArea(contour) / max(1.0, height * width)


def _is_plate(mask: np.ndarray) -> bool:
    """Whether a mask looks like a film, a compression paddle or a collimated field, with air of its own, rather than
    like a breast: it fills a rectangle or a circle, or has a long straight edge along rows or columns."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return False
    contour = max(contours, key=cv2.contourArea)
    if _rectangle_fill(contour) >= MIN_RECTANGLE:
        return True
    height, width = mask.shape
    x, y = contour[:, 0].T
    inside = (x > 2) & (x < width - 3) & (y > 2) & (y < height - 3)  # the image's own sides are no edges
    if inside.any():
        longest = max(np.convolve(np.bincount(axis[inside]), np.ones(3)).max() for axis in (x, y))
        if longest >= MIN_STRAIGHT_FRACTION * max(mask.shape):
            return True
    return _circle_fill(contour, mask) >= MIN_CIRCLE


def _outline(mask: np.ndarray) -> np.ndarray:
    """The longest outline around a mask that is not empty."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return max(contours, key=cv2.contourArea)


def _solidity(mask: np.ndarray) -> float:
    """Share of its convex hull that a mask fills."""
    return np.count_nonzero(mask) / max(1.0, cv2.contourArea(cv2.convexHull(_outline(mask))))


def _circle_fill(contour: np.ndarray, mask: np.ndarray) -> float:
    """Share of the smallest circle around a contour, as far as it lies in the image, that the mask fills."""
    (x, y), radius = cv2.minEnclosingCircle(contour)
    circle = cv2.circle(np.zeros(mask.shape, np.uint8), (round(x), round(y)), round(radius), 1, cv2.FILLED)
    return cv2.countNonZero(mask.astype(np.uint8)) / max(1, cv2.countNonZero(circle))


def _is_white_noise(values: np.ndarray) -> bool:
    """Whether neighbors two pixels apart are uncorrelated, as in empty air; tissue is smooth over many pixels."""
    step = 2
    if min(values.shape) <= 4 * step:
        return False
    centered = values - values.mean()
    variance = float((centered**2).mean())
    across = float((centered[:, step:] * centered[:, :-step]).mean())
    down = float((centered[step:] * centered[:-step]).mean())
    return max(across, down) <= 0.1 * variance


def _disc(shape: tuple[int, ...], fraction: float = OPENING_FRACTION) -> np.ndarray:
    """The disc of an opening, its radius a fraction of the longer side."""
    radius = max(1, round(fraction * max(shape)))
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def _largest_component(above: np.ndarray) -> np.ndarray:
    """Opened, the largest component, back to its own outline, with holes filled."""
    disc = _disc(above.shape)
    opened = cv2.morphologyEx(
        above.astype(np.uint8), cv2.MORPH_OPEN, disc, borderType=cv2.BORDER_CONSTANT, borderValue=0
    )
    count, labels, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
    if count == 1:
        return np.zeros(above.shape, bool)
    on_sides = np.isin(np.arange(count), labels[:, [0, -1]])
    areas = stats[:, cv2.CC_STAT_AREA]
    scores = areas * (1 + on_sides)
    best = 1 + int(np.argmax(scores[1:]))
    if scores[best] < 2 * MIN_BREAST_FRACTION * above.size:
        return np.zeros(above.shape, bool)
    # the opening rounds the corners and takes the nipple off: give back what is above and near
    breast = cv2.dilate((labels == best).astype(np.uint8), disc) & above
    outlines, nesting = cv2.findContours(breast, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    largest_hole_px = MAX_HOLE_FRACTION * cv2.countNonZero(breast)
    is_hole = nesting[0, :, 3] >= 0  # has a parent
    holes = [each for each, hole in zip(outlines, is_hole, strict=True) if hole]
    holes = [each for each in holes if cv2.contourArea(each) <= largest_hole_px]
    return cv2.drawContours(breast, holes, -1, 1, cv2.FILLED) > 0


def quality_checks(look: Look) -> dict[str, float]:
    """Check a mask that is not empty: each check from 0 (fails) to 1 (passes), by the warning if it fails. The ranges
    are our choice: over 128 real images and composed films, right masks stand near 1."""
    if np.isnan(look.air):
        return {"no air beside the breast": 0.2}
    mask, smooth = look.mask.astype(np.uint8), look.smooth
    step, width = look.tissue - look.air, max(3, round(0.016 * max(mask.shape))) | 1
    ring = np.ones((width, width), np.uint8)
    inside = cv2.subtract(mask, cv2.erode(mask, ring, borderValue=1))  # 4 px of 512 to either side of the outline
    outside = cv2.subtract(cv2.dilate(mask, ring, borderValue=0), mask)
    outside = cv2.bitwise_and(outside, look.field.astype(np.uint8))  # a white scanner border is no air
    edge = (cv2.mean(smooth, inside)[0] - cv2.mean(smooth, outside)[0]) / step if outside.any() else 0.0
    firm = float((smooth[look.mask] > 2 * look.threshold - look.air).mean())  # stays at twice the threshold
    beside = cv2.countNonZero((look.field & (smooth > look.threshold) & ~look.mask).astype(np.uint8))
    contour, area = _outline(look.mask), cv2.countNonZero(mask)
    top, bottom, left, right = (float(side.mean()) for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
    fill = max(_rectangle_fill(contour), _circle_fill(contour, look.mask) - (MIN_CIRCLE - MIN_RECTANGLE))
    return {
        "faint outline": _ramp(edge, 0.0, 0.2),
        "much of it hardly brighter than air": _ramp(firm, 0.3, 0.8),
        "ragged or with arms": _ramp(_solidity(look.mask), 0.65, 0.87),
        "a rectangle or a circle, as a film or a collimated field is": _ramp(fill, 0.92, 0.88),
        "along two opposite sides": _ramp(max(min(top, bottom), min(left, right)), 0.9, 0.5),
        "small": _ramp(area / mask.size, 0.01, 0.05),
        "the whole image": _ramp(area / mask.size, 1.0, 0.92),
        "much besides it is as bright": _ramp(beside / (beside + area), 0.9, 0.5),
    }


def _ramp(value: float, zero: float, one: float) -> float:
    return float(np.clip((value - zero) / (one - zero), 0, 1))
