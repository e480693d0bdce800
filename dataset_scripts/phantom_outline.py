"""The outline of a compressed breast in its view: silhouette, nipple, pectoral muscle, and how deep each voxel lies.

Everything is drawn for a left breast, chest wall at column 0. Proportions are our choice, by the look of real slices;
compressed tissue is flat under the paddles and bulges in a half circle at the margin.
"""

from typing import NamedTuple

import cv2
import numpy as np

from dataset_scripts.phantom_breast import PhantomParameters


class Outline(NamedTuple):
    """A left breast from above."""

    silhouette: np.ndarray  # (H, W) bool
    muscle_mm: np.ndarray  # how far inside the pectoral muscle, (H, W) float32; negative outside
    nipple: tuple[float, float]  # row, column of its base
    half_height: float  # rows


def draw_outline(rng, view: str, reach: float, p: PhantomParameters) -> Outline:
    height, width = p.height_px, p.width_px
    y, x, muscle = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32), None
    reach, shape, power = reach * width * rng.uniform(0.95, 1.05), rng.uniform(1.4, 2.2), rng.uniform(1.4, 2.1)
    if view == "CC":
        nipple, floor = rng.uniform(0.43, 0.57) * height, 0.0
        upper = height * np.clip(0.24 + 0.34 * reach / width + rng.normal(0, 0.04), 0.28, 0.58)
        lower = upper * rng.uniform(0.9, 1.1)
        if rng.random() < 0.2:  # a sliver of muscle
            bulge, middle = rng.uniform(0.01, 0.06) * width, nipple + rng.uniform(-0.1, 0.1) * height
            muscle = bulge * (1 - ((y - middle) / (rng.uniform(0.2, 0.35) * height)) ** 2)
    else:
        nipple, lower = rng.uniform(0.52, 0.66) * height, rng.uniform(0.28, 0.44) * height
        upper, floor = nipple * rng.uniform(1.0, 1.2), rng.uniform(0.25, 0.5)
        top, bottom = rng.uniform(0.25, 0.5) * width, rng.uniform(0.4, 0.7) * height
        muscle = top * np.clip(1 - y / bottom, 0, 1) ** rng.uniform(0.8, 1.2)
        muscle -= (y > bottom) * (y - bottom)
    away = np.where(y < nipple, (nipple - y) / upper, (y - nipple) / lower)
    skin = np.clip(1 - away**shape, 0, 1) ** (1 / power)
    if view == "MLO":  # from the axilla hollow, then round
        hollow = rng.uniform(0, 0.7)
        skin = np.where(y < nipple, (1 - hollow) * skin + hollow * (1 + np.cos(np.pi * np.minimum(away, 1))) / 2, skin)
    skin = np.where(y < nipple, floor + (1 - floor) * skin, skin)
    wobble = sum(rng.normal() / k * np.sin(k * np.pi * y / height + rng.uniform(0, 6.28)) for k in (2, 3, 4))
    skin *= reach * (1 + 0.03 * wobble)
    if view == "MLO" and rng.random() < 0.5:  # the fold under the breast, and the abdomen's beginning
        fold = nipple + lower * rng.uniform(0.85, 1.0)
        skin = np.maximum(skin, rng.uniform(0.04, 0.2) * width * np.sqrt(np.clip((y - fold) / (0.2 * height), 0, 1)))
    muscle_mm = np.full((height, width), -1e3, np.float32)
    if muscle is not None:
        muscle_mm = ((muscle[:, None] - x) * p.pixel_spacing_mm).astype(np.float32)
    return Outline(x < skin[:, None], muscle_mm, (nipple, float(skin[int(nipple)])), (upper + lower) / 2)


def distance_to_margin_mm(silhouette, margin_mm: float, pixel_spacing_mm: float):
    """Distance to the silhouette's margin (H, W) in mm, negative outside.

    Tissue goes on beyond the chest wall, the top and the bottom.
    """
    margin = int(np.ceil(margin_mm / pixel_spacing_mm)) + 2
    padded = cv2.copyMakeBorder(silhouette.astype(np.uint8), margin, margin, margin, 0, cv2.BORDER_REPLICATE)
    signed = cv2.distanceTransform(padded, cv2.DIST_L2, 5) - cv2.distanceTransform(1 - padded, cv2.DIST_L2, 5)
    signed = cv2.GaussianBlur(signed, (0, 0), 1.5)  # the silhouette is of whole pixels, skin is not
    return signed[margin:-margin, margin:] * np.float32(pixel_spacing_mm)


def depth_mm(outline: Outline, inside, half_mm: float, z_mm, bump_mm: float, pixel_spacing_mm: float):
    """Depth in the breast (D, H, W) in mm: flat under the paddles, a half circle at the margin, a ball for a nipple."""
    rim = np.maximum(half_mm - inside, 0)
    depth = half_mm - np.sqrt(rim**2 + z_mm[:, None, None] ** 2)
    if bump_mm:
        row, column = (int(each) for each in outline.nipple)
        reach = int(2 * bump_mm / pixel_spacing_mm) + 2
        window = np.s_[:, max(row - reach, 0) : row + reach, max(column - reach, 0) : column + reach]
        y, x = (np.arange(s.start, s.start + n) for s, n in zip(window[1:], depth[window].shape[1:], strict=True))
        square = ((y - row) ** 2)[:, None] + (x - column + 0.5 * bump_mm / pixel_spacing_mm) ** 2
        away = np.sqrt(square * pixel_spacing_mm**2 + 0.5 * z_mm[:, None, None] ** 2)
        depth[window] = np.maximum(depth[window], bump_mm - away)
    return depth
