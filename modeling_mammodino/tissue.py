"""Where the breast is: a mask, its box, the side of its chest wall and the tissue in each patch."""

import numpy as np

try:
    import cv2
except ImportError:  # transformers imports remote code before its packages are checked
    cv2 = None  # type: ignore[assignment]

THUMBNAIL_PX = 512  # longer side of the image that is segmented
BINS = 256  # in which modes are looked for
FINE_BINS = 16 * BINS  # in which levels are read
MIN_BREAST_FRACTION = 0.02  # of the image, twice that away from the sides; anything smaller is a label or noise
FRAME_FRACTION = 0.1  # deepest scanner frame, of a side
OPENING_FRACTION = 0.006  # radius of the opening, of the longer side: tape, lines and narrow labels go
SKIN_FRACTION = 0.06  # threshold, of the way from air to the typical tissue
NOISE_SIGMAS = 4.0  # threshold, in standard deviations of the air
MAX_NOISE = 0.125  # of the step to tissue: the threshold comes no higher than half of the step
MAX_ROUGHNESS = 0.03  # of the step to tissue, see _roughness; above it the darkest mode is tissue, not air


def segment_breast(image: np.ndarray) -> np.ndarray:
    """Breast mask (H, W) bool of a grey image (H, W) in which tissue is brighter than air.

    Air is the lowest significant mode of the histogram of a thumbnail, whatever its level; uniform scanner frames are
    set aside before. The threshold stands just above that mode, so that the skin line stays in; an opening cuts tape,
    lines and labels off; the largest component wins, one that touches a vertical side counting double, and its holes
    are filled. This is the usual "threshold, open, largest component" chain of mammogram preprocessing (Nagi et al.,
    IECBES 2010; Wu et al., IEEE TMI 2020) with a threshold of our own: zero fails on film, Otsu splits fat from gland.
    Where the darkest mode is as rough as tissue there is no air: a crop inside the breast, all True. An image with no
    breast (constant, or white noise) is all False. NaN and infinite pixels are air.
    """
    if image.ndim != 2:
        raise ValueError(f"segment_breast takes a 2-D grey image, got shape {image.shape}; pass one plane (H, W).")
    H, W = image.shape
    values = _unit_thumbnail(image)
    if values is None:
        return np.zeros((H, W), bool)
    mask = _segment_unit(values)
    if mask.all() or not mask.any():
        return np.full((H, W), bool(mask.flat[0]))
    if mask.shape == (H, W):
        return mask
    return cv2.resize(mask.astype(np.uint8) * 255, (W, H), interpolation=cv2.INTER_LINEAR) > 127


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
    integral = cv2.integral(
        mask.astype(np.uint8)
    )  # (H + 1, W + 1); between pixel corners it is bilinear, so this is exact
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


def _unit_thumbnail(image: np.ndarray) -> np.ndarray | None:
    """Float32 thumbnail, its minimum at 0 and its 99.5th percentile at 1; None where there is no contrast."""
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


def _segment_unit(values: np.ndarray) -> np.ndarray:
    """The mask of a thumbnail with values in 0..1."""
    mask = np.zeros(values.shape, bool)
    y0, y1, x0, x1 = _without_frame(values)
    view = values[y0:y1, x0:x1]
    for blur_px in (3, 11):  # noise of the air averages out under a wider blur, tissue does not
        smooth = cv2.GaussianBlur(view, (blur_px, blur_px), 0)
        air, noise, tissue = _levels(smooth)
        step = tissue - air
        threshold = air + max(NOISE_SIGMAS * noise, SKIN_FRACTION * step)
        stands_apart = step > 0 and noise <= MAX_NOISE * step
        if stands_apart and _roughness(smooth, smooth <= threshold) <= MAX_ROUGHNESS * step:
            break
    else:
        mask[y0:y1, x0:x1] = not _is_white_noise(view)
        return mask
    mask[y0:y1, x0:x1] = _largest_component(smooth > threshold)
    return mask


def _levels(seen: np.ndarray) -> tuple[float, float, float]:
    """Level and noise of the air (lowest significant mode), and the median level of what stands above it.

    Everything is read off one fine histogram, many times cheaper than a sort of the pixels for each quantile.
    """
    fine = np.bincount((seen * FINE_BINS).astype(np.intp).ravel(), minlength=FINE_BINS + 1)
    fine[-2] += fine[-1]
    coarse = fine[:-1].reshape(BINS, -1).sum(axis=1).astype(np.float32)
    smooth = cv2.GaussianBlur(coarse[None], (13, 1), 2.0, borderType=cv2.BORDER_REFLECT)[0]
    mode, valley = 0, BINS - 1
    for bin_ in range(BINS):
        if smooth[bin_] > smooth[mode]:
            mode = bin_
        significant = coarse[max(0, mode - 6) : mode + 7].sum() >= 0.01 * seen.size
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


def _quantile(counts: np.ndarray, fraction: float) -> int:
    """The bin that a share of the counts reaches."""
    running = np.cumsum(counts)
    return int(np.searchsorted(running, fraction * running[-1]))


def _roughness(values: np.ndarray, air: np.ndarray) -> float:
    """Typical difference between two pixels of the air that stand 1/32 of the image apart, as a standard deviation.

    A slow gradient of the air counts little here, averaged noise as well; in tissue it is the texture that counts.
    """
    lag = max(1, max(values.shape) // 32)
    counts = np.zeros(FINE_BINS + 1, np.intp)
    for v, a in ((values, air), (values.T, air.T)):
        differences = np.abs(v[lag:] - v[:-lag])[a[lag:] & a[:-lag]]
        counts += np.bincount((differences * FINE_BINS).astype(np.intp), minlength=FINE_BINS + 1)
    return _quantile(counts, 0.8) / FINE_BINS / 1.81 if counts.any() else np.inf  # 1.81 = 1.28 * sqrt 2


def _without_frame(values: np.ndarray) -> tuple[int, int, int, int]:
    """(y0, y1, x0, x1) inside the scanner frame: less the uniform bands along the sides that end in a jump."""
    top, bottom, left, right = (_frame_px(view) for view in (values, values[::-1], values.T, values.T[::-1]))
    return top, values.shape[0] - bottom, left, values.shape[1] - right


def _frame_px(values: np.ndarray) -> int:
    """Thickness of the frame along the first axis' start."""
    limit = int(np.ceil(FRAME_FRACTION * len(values)))
    if len(values) < 32:
        return 0
    low, level, high = np.percentile(values[: limit + 2], (8, 50, 92), axis=1)  # each (limit + 2,)
    frame = (high - low < 0.03) & (np.abs(level - level[0]) < 0.03)
    depth = int(np.argmin(frame))  # 0 as well where all are alike
    if depth == 0 or depth > limit:
        return 0
    jump = np.abs(values[depth + 1] - level[0]) > 0.03
    return depth + 1 if jump.mean() > 0.8 else 0


def _is_white_noise(values: np.ndarray) -> bool:
    """Whether neighbours two pixels apart are uncorrelated, as in empty air; tissue is smooth over many pixels."""
    step = 2
    if min(values.shape) <= 4 * step:
        return False
    centred = values - values.mean()
    variance = float((centred**2).mean())
    across = float((centred[:, step:] * centred[:, :-step]).mean())
    down = float((centred[step:] * centred[:-step]).mean())
    return max(across, down) <= 0.1 * variance


def _largest_component(above: np.ndarray) -> np.ndarray:
    """Opened, the largest component, back to its own outline, with holes filled."""
    radius = max(1, round(OPENING_FRACTION * max(above.shape)))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
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
    breast = (cv2.dilate((labels == best).astype(np.uint8), disc) > 0) & above
    count, labels = cv2.connectedComponents((~breast).astype(np.uint8), connectivity=4)
    outside = np.zeros(count, bool)
    for rim in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        outside[rim] = True
    outside[0] = False  # the breast itself
    return ~outside[labels]
