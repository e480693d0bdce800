"""From a grey plane to the picture that the encoder sees: the one path of pretraining, fine-tuning and inference.

Order: segment the breast on a thumbnail -> intensity range inside it -> flip -> crop to the breast -> resize ->
normalise -> contrast-limited adaptive histogram equalisation (CLAHE; Zuiderveld 1994, Reza 2004) -> background to zero.
The article names intensity normalisation and CLAHE without parameters; every value here is our choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .errors import ImageRefused
from .tissue import THUMBNAIL_PX, breast_box, chest_wall_side, segment_breast

try:
    import cv2
except ImportError:  # a checkpoint runs on ready tensors without OpenCV
    cv2 = None  # type: ignore[assignment]


@dataclass(frozen=True)
class RenderSettings:
    """The settings of the picture, saved with every checkpoint and every corpus.

    Attributes:
        do_intensity_normalize: map the percentiles below to black and white; otherwise the range of the data type.
        intensity_percentiles: percentiles of the intensities inside the breast; what lies outside saturates.
        chest_wall_side: "left" or "right" flips so that the chest wall is there; "as_is" never flips.
        do_crop_to_breast: crop to the bounding box of the breast.
        crop_margin_fraction: margin around that box, as a fraction of its sides.
        do_clahe, clahe_clip_limit, clahe_grid: equalisation on clahe_grid x clahe_grid tiles (OpenCV's units).
        do_zero_background: everything outside the breast (labels, markers, tape, scanner border) becomes 0.
        bit_depth: 8 or 16 bits a pixel of the picture.
    """

    do_intensity_normalize: bool = True
    intensity_percentiles: tuple[float, float] = (0.5, 99.9)
    chest_wall_side: str = "left"
    do_crop_to_breast: bool = True
    crop_margin_fraction: float = 0.02
    do_clahe: bool = True
    clahe_clip_limit: float = 2.0
    clahe_grid: int = 8
    do_zero_background: bool = True
    bit_depth: int = 8

    def __post_init__(self) -> None:
        low, high = self.intensity_percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"intensity_percentiles={(low, high)}: must be 0 <= low < high <= 100")
        if self.chest_wall_side not in ("left", "right", "as_is"):
            raise ValueError(f"chest_wall_side={self.chest_wall_side!r}: must be 'left', 'right' or 'as_is'")
        if self.bit_depth not in (8, 16):
            raise ValueError(f"bit_depth={self.bit_depth}: must be 8 or 16")


class RenderPlan(NamedTuple):
    """What a whole volume shares, so that its slices stay aligned: geometry in source pixels, and intensities."""

    shape: tuple[int, int]  # of the source plane
    box: tuple[int, int, int, int]  # y0, x0, y1, x1, half-open
    flip: bool
    black: float
    white: float


class Rendered(NamedTuple):
    picture: np.ndarray  # (H, W) uint8 or uint16
    tissue: np.ndarray  # (H, W) bool


def thumbnail(plane: np.ndarray) -> np.ndarray:
    """The plane with its longer side at most THUMBNAIL_PX, float32; everything that is estimated is estimated here,
    so that it does not depend on the size of the output."""
    _require_cv2()
    plane = np.nan_to_num(plane) if plane.dtype.kind == "f" else plane
    scale = THUMBNAIL_PX / max(plane.shape)
    if scale < 1:
        height, width = (max(1, round(side * scale)) for side in plane.shape)
        plane = cv2.resize(_cv2_dtype(plane), (width, height), interpolation=cv2.INTER_AREA)
    return plane.astype(np.float32)


def plan_rendering(planes: Sequence[np.ndarray], settings: RenderSettings, name: str = "image") -> RenderPlan:
    """Plan for one image, or for a volume from a few of its slices, each (H, W).

    Raises ImageRefused, naming `name`, where no breast is found.
    """
    thumbnails = [thumbnail(plane) for plane in planes]
    masks = [segment_breast(small) for small in thumbnails]
    breast = np.logical_or.reduce(masks)  # (h, w)
    if not breast.any():
        raise ImageRefused(f"{name}: no breast found (the picture is constant or empty); check the window and the file")
    inside = np.concatenate([small[mask] for small, mask in zip(thumbnails, masks, strict=True)])
    if settings.do_intensity_normalize:
        black, white = (float(value) for value in np.percentile(inside, settings.intensity_percentiles))
    else:
        black, white = 0.0, float(np.iinfo(planes[0].dtype).max) if planes[0].dtype.kind in "iu" else 1.0
    if white <= black:
        raise ImageRefused(f"{name}: every pixel of the breast has the value {black:g}; check the window and the file")

    height, width = planes[0].shape
    box = (0, 0, height, width)
    if settings.do_crop_to_breast:
        small_height, small_width = breast.shape
        y0, x0, y1, x1 = breast_box(breast, settings.crop_margin_fraction)
        box = (
            y0 * height // small_height,
            x0 * width // small_width,
            -(-y1 * height // small_height),
            -(-x1 * width // small_width),
        )
    flip = settings.chest_wall_side not in ("as_is", chest_wall_side(breast))
    return RenderPlan((height, width), box, flip, black, white)


def render(
    plane: np.ndarray, plan: RenderPlan, settings: RenderSettings, fit: tuple[int, int], upscale: bool = True
) -> Rendered:
    """The picture of one plane (H, W) and its breast mask, as large as `fit` = (height, width) allows at its aspect."""
    if plane.shape != plan.shape:
        raise ImageRefused(f"a slice of {plane.shape} pixels in a volume of {plan.shape}: the slices must share a size")
    plane = np.nan_to_num(plane) if plane.dtype.kind == "f" else plane
    mask = segment_breast(thumbnail(plane))
    y0, x0, y1, x1 = plan.box
    crop = plane[y0:y1, x0:x1]
    crop_mask = mask[
        y0 * mask.shape[0] // plane.shape[0] : -(-y1 * mask.shape[0] // plane.shape[0]),
        x0 * mask.shape[1] // plane.shape[1] : -(-x1 * mask.shape[1] // plane.shape[1]),
    ]
    if plan.flip:
        crop, crop_mask = crop[:, ::-1], crop_mask[:, ::-1]

    scale = min(fit[0] / crop.shape[0], fit[1] / crop.shape[1])
    scale = scale if upscale else min(scale, 1.0)
    width, height = (max(1, round(side * scale)) for side in (crop.shape[1], crop.shape[0]))
    shrink = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized = cv2.resize(_cv2_dtype(crop), (width, height), interpolation=shrink).astype(np.float32)
    tissue = cv2.resize(crop_mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR) >= 0.5

    full_scale = 2**settings.bit_depth - 1
    picture = np.clip((resized - plan.black) * (full_scale / (plan.white - plan.black)), 0, full_scale)
    picture = np.rint(picture).astype(np.uint8 if settings.bit_depth == 8 else np.uint16)
    if settings.do_clahe:
        grid = (settings.clahe_grid, settings.clahe_grid)
        picture = cv2.createCLAHE(settings.clahe_clip_limit, grid).apply(picture)
    if settings.do_zero_background:
        picture = np.where(tissue, picture, 0).astype(picture.dtype)
    return Rendered(picture, tissue)


def place_on_canvas(rendered: Rendered, canvas: tuple[int, int], chest_wall: str) -> Rendered:
    """The picture on a black canvas (height, width): against the chest-wall side, centred from top to bottom."""
    height, width = rendered.picture.shape
    top, left = (canvas[0] - height) // 2, canvas[1] - width if chest_wall == "right" else 0
    margins = ((top, canvas[0] - height - top), (left, canvas[1] - width - left))
    return Rendered(np.pad(rendered.picture, margins), np.pad(rendered.tissue, margins))


def standardize(picture: np.ndarray, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    """A picture, uint8 or uint16, scaled to 0..1 and standardised, float32."""
    return (picture.astype(np.float32) * np.float32(1 / np.iinfo(picture.dtype).max) - np.float32(mean)) / np.float32(
        std
    )


def _cv2_dtype(plane: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(plane if plane.dtype in (np.uint8, np.uint16, np.float32) else plane.astype(np.float32))


def _require_cv2() -> None:
    if cv2 is None:
        raise ImportError("preparing pictures needs OpenCV: pip install opencv-python-headless")


__all__ = [
    "RenderPlan",
    "RenderSettings",
    "Rendered",
    "place_on_canvas",
    "plan_rendering",
    "render",
    "standardize",
    "thumbnail",
]
