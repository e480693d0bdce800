"""Where the breast is: a mask, its box, the side of its chest wall and the tissue in each patch."""

from typing import NamedTuple

import numpy as np

from .breast_mask import doubts, segment_unit

try:
    import cv2
except ImportError:  # transformers imports remote code before its packages are checked
    cv2 = None  # type: ignore[assignment]

THUMBNAIL_PX = 512  # longer side of the image that is segmented
LOW_CONFIDENCE = 0.5  # below it, a mask is looked at


class TissueMask(NamedTuple):
    """Where the breast is, or other tissue (tissue_finders.py), and how sure that is."""

    mask: np.ndarray  # (H, W) bool
    confidence: float  # 0 to 1, see find_breast
    outside_fraction: float  # of all that is brighter than air, the share outside the mask: labels, markers, borders
    oddity: str  # what limits the confidence, in words; empty where nothing is odd


def find_breast(image: np.ndarray) -> TissueMask:
    """The breast in a grey image (H, W), 8 to 16 bits or float, in which tissue is brighter than air.

    On a thumbnail: scanner borders (uniform strips along the sides, straight or slanted, black or white) and bright
    rectangles (labels, stickers) are set aside. Air is the lowest significant mode of the histogram, whatever its
    level, less its slope where it slopes, as on film. The threshold stands just above that mode, so that the skin line
    stays in; an opening cuts tape, lines and labels off; the largest component wins, one that touches a vertical side
    counting double, and its small holes are filled. Where that is a rectangle, a circle or has a long straight edge, it
    is a film, a paddle or a collimated field, and the breast is looked for inside, against the air that is there. This
    is the usual "threshold, open, largest component" chain of mammogram preprocessing (Nagi et al., IECBES 2010; Wu et
    al., IEEE TMI 2020) with a threshold of our own: zero fails on film, Otsu splits fat from gland.

    Where the darkest mode is as rough as tissue there is no air: a crop inside the breast, all True. An image with no
    breast (constant, or white noise) is all False, with confidence 0. NaN and infinite pixels are air.

    `confidence` is the weakest of the pieces of evidence in `breast_mask.doubts`: contrast of the outline, what is left
    at twice the threshold, a compact shape that is not a rectangle or a circle, plausible size and sides, little else
    as bright, and air to compare with. It is our choice and no probability; below LOW_CONFIDENCE, look at the picture.
    Research use only.
    """
    if image.ndim != 2:
        raise ValueError(f"find_breast takes a 2-D grey image, got shape {image.shape}; pass one plane (H, W).")
    H, W = image.shape
    values = unit_thumbnail(image)
    look = None if values is None else segment_unit(values)
    if look is None or not look.mask.any():
        return TissueMask(np.zeros((H, W), bool), 0.0, 0.0, "no breast found")
    evidence = doubts(look)
    oddity = min(evidence, key=evidence.__getitem__)
    above = look.mask | (look.smooth > look.threshold)  # no air: NaN compares False
    outside_fraction = 1 - float(look.mask.sum() / above.sum())
    mask = look.mask
    if mask.all():
        mask = np.ones((H, W), bool)
    elif mask.shape != (H, W):
        mask = cv2.resize(mask.astype(np.uint8) * 255, (W, H), interpolation=cv2.INTER_LINEAR) > 127
    return TissueMask(mask, evidence[oddity], outside_fraction, oddity if evidence[oddity] < 1 else "")


def segment_breast(image: np.ndarray) -> np.ndarray:
    """The mask (H, W) bool of `find_breast` alone."""
    return find_breast(image).mask


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


def unit_thumbnail(image: np.ndarray) -> np.ndarray | None:
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
