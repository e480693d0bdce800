"""From a gray plane to the image that the encoder sees: the one path of pretraining, fine-tuning and inference.

Order: segment the breast on a thumbnail -> intensity range inside it -> flip -> crop to the breast -> resize ->
normalize -> contrast-limited adaptive histogram equalization (CLAHE; Zuiderveld 1994, Reza 2004) -> background to zero.
The paper names intensity normalization and CLAHE without parameters; every value here is our choice.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .breast_segmentation import (
    LOW_CONFIDENCE,
    THUMBNAIL_PX,
    TISSUE_FINDERS,
    air_is_bright,
    breast_box,
    chest_wall_side,
    patch_tissue,
)
from .dicom_pixels import GraySettings
from .image_io import CLIPPED_REMEDY, InvalidImageError

try:
    import cv2
except ImportError:  # a checkpoint runs on ready tensors without OpenCV
    cv2 = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# An 8-bit image with more of its breast at 255 was clipped, not exposed: see CLIPPED_REMEDY. Over 128 real images
# the share is at most 5 %. Of 75 real slices at full range, clipped, it is at least 84 % at 12 bits and 65 % at 11; at
# 10 bits 18 to 50 %, which cannot be told from an implant or a hard window, and passes.
MAX_SATURATED_FRACTION = 0.6


@dataclass(frozen=True)
class RenderSettings(GraySettings):
    """Everything that makes an image of a file, saved with every checkpoint and every corpus.

    Attributes:
        canvas: (height, width) in pixels of what the encoder sees.
        patch_size: side of a patch in pixels; divides the canvas.
        mean, std: standardize the pixels, scaled to 0..1; 0 and 1 leave them as they are.
        slices_per_volume: evenly spaced slices taken of a volume; 0 takes all.
        allow_for_processing: take raw (FOR PROCESSING) DICOM images, too.
        tissue_finder: what is segmented: "breast", or "body" in axial slices of CT and MR, which are never flipped.
            What is said of the breast here and elsewhere then holds for the body.
        polarity: "auto" inverts an image, and warns, in which air is bright and the breast dark, as in MONOCHROME1 that
            was exported as stored or is not declared; "normal" never does, "inverted" always, once the file is read.
        do_intensity_normalize: map the percentiles below to black and white; otherwise the range of the data type,
            or of the values where floats leave 0..1.
        intensity_percentiles: percentiles of the intensities inside the breast; what lies outside saturates.
        chest_wall_side: "left" or "right" flips so that the chest wall is there; "as_is" never flips.
        do_crop_to_breast: crop to the bounding box of the breast.
        crop_margin_fraction: margin around that box, as a fraction of its sides.
        do_clahe, clahe_clip_limit, clahe_grid: equalization on clahe_grid x clahe_grid tiles (OpenCV's units).
        do_zero_background: everything outside the breast (labels, markers, tape, scanner border) becomes 0.
        bit_depth: 8 or 16 bits a pixel of the image.
    """

    canvas: tuple[int, int] = (518, 518)
    patch_size: int = 14
    mean: float = 0.5
    std: float = 0.25
    slices_per_volume: int = 0
    allow_for_processing: bool = False
    tissue_finder: str = "breast"
    polarity: str = "auto"
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
        if self.tissue_finder not in TISSUE_FINDERS:
            raise ValueError(f"tissue_finder={self.tissue_finder!r}: must be one of {', '.join(TISSUE_FINDERS)}")
        if self.polarity not in ("auto", "normal", "inverted"):
            raise ValueError(f"polarity={self.polarity!r}: must be 'auto', 'normal' or 'inverted'")
        if self.bit_depth not in (8, 16):
            raise ValueError(f"bit_depth={self.bit_depth}: must be 8 or 16")
        if not 0 <= self.crop_margin_fraction <= 1:
            raise ValueError(f"crop_margin_fraction={self.crop_margin_fraction}: must be from 0 to 1")
        if self.clahe_clip_limit <= 0 or self.clahe_grid < 1:
            raise ValueError(
                f"clahe_clip_limit={self.clahe_clip_limit}, clahe_grid={self.clahe_grid}: must be above 0; "
                "do_clahe=False leaves the equalization out"
            )
        if self.slices_per_volume < 0:
            raise ValueError(f"slices_per_volume={self.slices_per_volume}: must be 0 (all slices) or more")

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches on the canvas."""
        return self.canvas[0] // self.patch_size, self.canvas[1] // self.patch_size


class Thumbnail(NamedTuple):
    """A reduced plane: everything is estimated on it, so that it does not depend on the output."""

    pixels: np.ndarray  # (h, w) float32, the longer side at most THUMBNAIL_PX
    source_shape: tuple[int, int]  # (H, W)
    source_max: float  # largest value of the source's data type; 1 of a float
    breast: np.ndarray  # (h, w) bool; this and what follows as in TissueMask
    confidence: float
    outside_fraction: float
    warning: str


class RenderPlan(NamedTuple):
    """What a whole volume shares, so that its slices stay aligned: geometry in source pixels, and intensities."""

    shape: tuple[int, int]  # of the source plane
    box: tuple[int, int, int, int]  # y0, x0, y1, x1, half-open
    flip: bool
    black: float
    white: float


class Placement(NamedTuple):
    """Where the source lies in the image: image = scale * source + shift on each axis, in pixels.

    Whole numbers are edges of pixels, not centers, as in half-open boxes. A scale is negative where the source was
    mirrored.
    """

    scale_x: float = 1.0
    shift_x: float = 0.0
    scale_y: float = 1.0
    shift_y: float = 0.0

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Move boxes (n, 4) float, x0, y0, x1, y1, from the source into the image; they may reach beyond it."""
        x0, y0, x1, y1 = np.reshape(boxes, (-1, 4)).astype(np.float64).T
        x = np.sort((self.scale_x * x0 + self.shift_x, self.scale_x * x1 + self.shift_x), axis=0)
        y = np.sort((self.scale_y * y0 + self.shift_y, self.scale_y * y1 + self.shift_y), axis=0)
        return np.stack((x[0], y[0], x[1], y[1]), axis=1)

    def inverse(self) -> "Placement":
        """Return the way from the image back to the source."""
        return Placement(1 / self.scale_x, -self.shift_x / self.scale_x, 1 / self.scale_y, -self.shift_y / self.scale_y)


UNPLACED = Placement()


class Rendered(NamedTuple):
    image: np.ndarray  # (H, W) uint8 or uint16
    tissue: np.ndarray  # (H, W) bool
    small: Thumbnail  # of the plane, before crop and flip
    placement: Placement = UNPLACED  # of the plane in the image


def make_thumbnail(plane: np.ndarray, tissue_finder: str = RenderSettings.tissue_finder) -> Thumbnail:
    """Reduce a plane (H, W) and find the breast in it, or what else `tissue_finder` looks for."""
    if cv2 is None:
        raise ImportError("preparing images needs OpenCV: pip install opencv-python-headless")
    scale = THUMBNAIL_PX / max(plane.shape)
    pixels = _cv2_ready(plane)
    if scale < 1:
        height, width = (max(1, round(side * scale)) for side in plane.shape)
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    pixels = pixels.astype(np.float32)
    source_max = float(np.iinfo(plane.dtype).max) if plane.dtype.kind in "iu" else 1.0
    return Thumbnail(pixels, plane.shape, source_max, *TISSUE_FINDERS[tissue_finder](pixels))


def is_inverted(thumbnails: Sequence[Thumbnail], settings: RenderSettings, name: str = "image") -> bool:
    """Whether an image, or a volume by a few of its slices, is to be inverted; logs a warning where that was found."""
    if settings.polarity != "auto" or settings.tissue_finder != "breast":
        return settings.polarity == "inverted"
    doubtful = [each for each in thumbnails if each.confidence < LOW_CONFIDENCE]
    if 2 * len(doubtful) <= len(thumbnails) or not all(air_is_bright(each.pixels) for each in doubtful):
        return False
    logger.warning(
        "%s: air is bright and the breast dark, as in MONOCHROME1 that was exported as it is stored; inverted "
        "(polarity='normal' leaves it as it is)",
        name,
    )
    return True


def inverted(plane: np.ndarray) -> np.ndarray:
    """Return a plane with bright and dark exchanged, within the range of its data type; a float in 0..1."""
    return np.subtract(np.iinfo(plane.dtype).max if plane.dtype.kind in "iu" else 1, plane, dtype=plane.dtype)


def plan_rendering(thumbnails: Sequence[Thumbnail], settings: RenderSettings, name: str = "image") -> RenderPlan:
    """Plan one image, or a volume from a few of its slices.

    Raises InvalidImageError, naming `name`, where no breast is found, or where it was clipped to 8 bits earlier.
    Logs a warning where the mask is doubtful.
    """
    first = thumbnails[0]
    breast = np.logical_or.reduce([each.breast for each in thumbnails])  # (h, w)
    if not breast.any():
        raise InvalidImageError(
            name, f"no {settings.tissue_finder} found (the image is constant or empty); check the window and the file"
        )
    inside = np.concatenate([each.pixels[each.breast] for each in thumbnails])
    if first.source_max == 255 and (saturated := float(np.mean(inside == 255))) > MAX_SATURATED_FRACTION:
        raise InvalidImageError(
            name, f"{saturated:.0%} of the breast has the largest value of 8 bits, 255; {CLIPPED_REMEDY}"
        )
    black, white = 0.0, first.source_max
    least, most = (float(find([find(each.pixels) for each in thumbnails])) for find in (np.min, np.max))
    if least < black or most > white:  # floats in units of their own, such as signed or rescaled DICOM
        black, white = least, most
    if settings.do_intensity_normalize:
        black, white = (float(value) for value in np.percentile(inside, settings.intensity_percentiles))
    if white <= black:
        raise InvalidImageError(
            name, f"every pixel of the breast has the value {black:g}; check the window and the file"
        )

    height, width = first.source_shape
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
    has_chest_wall = settings.tissue_finder == "breast"
    flip = has_chest_wall and settings.chest_wall_side not in ("as_is", chest_wall_side(breast))
    worst = min(thumbnails, key=lambda each: each.confidence)
    if worst.confidence < LOW_CONFIDENCE:
        logger.warning(
            "%s: the %s mask is doubtful, confidence %.2f of 1 (%s); %.0f %% of what is brighter than air lies "
            "outside; look at it with `mammodino contact_sheet`",
            name,
            settings.tissue_finder,
            worst.confidence,
            worst.warning,
            100 * max(each.outside_fraction for each in thumbnails),
        )
    return RenderPlan((height, width), box, flip, black, white)


def render(
    plane: np.ndarray,
    small: Thumbnail,
    plan: RenderPlan,
    settings: RenderSettings,
    fit: tuple[int, int],
    upscale: bool = True,
) -> Rendered:
    """Render one plane (H, W) and its breast mask, as large as `fit` = (height, width) allows at its aspect.

    small: the plane's thumbnail.
    """
    if plane.shape != plan.shape:
        raise InvalidImageError(
            "slice", f"{plane.shape} pixels in a volume of {plan.shape}; the slices must share a size"
        )
    breast = small.breast
    y0, x0, y1, x1 = plan.box
    crop: np.ndarray = _cv2_ready(plane[y0:y1, x0:x1])
    if plan.flip:  # before resizing, so that an image and its mirror image give the same to the last bit
        crop, breast, left = cv2.flip(crop, 1), cv2.flip(breast.astype(np.uint8), 1), plane.shape[1] - x1
    else:
        left = x0

    scale = min(fit[0] / crop.shape[0], fit[1] / crop.shape[1])
    scale = scale if upscale else min(scale, 1.0)
    width, height = (max(1, round(side * scale)) for side in (crop.shape[1], crop.shape[0]))
    shrink = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized: np.ndarray = cv2.resize(crop, (width, height), interpolation=shrink).astype(np.float32)
    scale_x, scale_y = width / crop.shape[1], height / crop.shape[0]
    tissue = _resampled(breast, plane.shape, (y0, left), (scale_y, scale_x), (height, width)) >= 0.5

    full_scale = 2**settings.bit_depth - 1
    levels = np.clip((resized - plan.black) * (full_scale / (plan.white - plan.black)), 0, full_scale)
    image: np.ndarray = np.rint(levels).astype(np.uint8 if settings.bit_depth == 8 else np.uint16)
    if settings.do_clahe:
        image = _equalized(image, settings.clahe_clip_limit, settings.clahe_grid)
    if settings.do_zero_background:
        image[~tissue] = 0
    across = (-scale_x, scale_x * x1) if plan.flip else (scale_x, -scale_x * x0)
    return Rendered(image, tissue, small, Placement(*across, scale_y, -scale_y * y0))


def _resampled(
    breast: np.ndarray,
    shape: tuple[int, int],
    origin: tuple[int, int],
    scale: tuple[float, float],
    size: tuple[int, int],
) -> np.ndarray:
    """A mask of the whole plane (h, w), of any size, as the image of `size` has it: float32, 0..1.

    The image's corner lies at `origin` of the plane of `shape`, all of which rarely fall on pixels of the mask. Each is
    (y, x).
    """
    matrix = np.zeros((2, 3))
    for axis in (0, 1):  # between edges of pixels; warpAffine counts from their centers
        step = breast.shape[axis] / shape[axis]
        matrix[1 - axis, 1 - axis] = step / scale[axis]
        matrix[1 - axis, 2] = step * (origin[axis] + 0.5 / scale[axis]) - 0.5
    return cv2.warpAffine(
        breast.astype(np.float32),
        matrix,
        size[::-1],
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _equalized(image: np.ndarray, clip_limit: float, grid: int) -> np.ndarray:
    """CLAHE of an image, uint8 or uint16, on grid x grid tiles, with 256 bins at either depth.

    OpenCV gives 16 bits 65,536 bins, of which a tile fills few: what is clipped then depends on how many gray levels
    the source had. Here the tiles' curves are those of 8 bits, and 16 bits are interpolated along them.
    """
    if image.dtype == np.uint8:
        return cv2.createCLAHE(clip_limit, (grid, grid)).apply(image)
    height, width = image.shape
    levels = image * np.float32(255 / 65535)
    padding = (-height % grid, -width % grid)
    if any(padding):  # as OpenCV pads: a whole tile's row or column more where one side alone does not divide
        padding = (grid - height % grid, grid - width % grid)
    bins = cv2.copyMakeBorder(np.rint(levels), 0, padding[0], 0, padding[1], cv2.BORDER_REFLECT_101).astype(np.intp)
    tile = (bins.shape[0] // grid, bins.shape[1] // grid)
    pixels = tile[0] * tile[1]
    tiles = bins.reshape(grid, tile[0], grid, tile[1]) + 256 * np.arange(grid * grid).reshape(grid, 1, grid, 1)
    counts = np.bincount(tiles.ravel(), minlength=grid * grid * 256).reshape(grid, grid, 256)
    limit = max(1, int(clip_limit * pixels / 256))
    excess = np.maximum(counts - limit, 0).sum(axis=2, keepdims=True)
    rest = excess % 256  # as OpenCV hands it out: one each to evenly spaced bins, from the first on
    spacing = np.maximum(1, 256 // np.maximum(1, rest))
    handed_out = excess // 256 + (np.arange(256) % spacing == 0) * (np.arange(256) // spacing < rest)
    curves = np.cumsum(np.minimum(counts, limit) + handed_out, axis=2) * np.float32(1 / pixels)

    (above, below, share_y), (left, right, share_x) = (
        _between_tiles(side, length, grid) for side, length in zip((height, width), tile, strict=True)
    )
    rows = curves[above] * (1 - share_y)[:, None, None] + curves[below] * share_y[:, None, None]  # (H, grid, 256)
    lower = np.minimum(levels.astype(np.intp), 254)
    share = levels - lower
    places = lower + np.arange(height)[:, None] * (grid * 256)

    def along(tiles: np.ndarray) -> np.ndarray:
        at = places + 256 * tiles
        return rows.take(at) * (1 - share) + rows.take(at + 1) * share

    equalized = along(left) * (1 - share_x) + along(right) * share_x
    return np.rint(np.clip(equalized, 0, 1) * 65535).astype(np.uint16)


def _between_tiles(side: int, tile: int, grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two tiles between whose centers each pixel along a side lies, and the share (side,) of the second."""
    place = np.arange(side, dtype=np.float32) / np.float32(tile) - np.float32(0.5)
    first = np.floor(place).astype(np.intp)
    return np.maximum(first, 0), np.minimum(first + 1, grid - 1), place - first


class CanvasImage(NamedTuple):
    """What the encoder sees of one image, on the canvas."""

    image: np.ndarray  # (H, W) uint8 or uint16, not yet standardized
    tissue_mask: np.ndarray  # (h, w) float32, the breast fraction of each patch
    placement: Placement  # of the source plane on the canvas
    settings: RenderSettings

    @property
    def pixel_values(self) -> np.ndarray:
        """The standardized image, (1, H, W) float32."""
        return standardize(self.image, self.settings.mean, self.settings.std)[None]


def place_on_canvas(
    image: np.ndarray, tissue: np.ndarray, settings: RenderSettings, placement: Placement = UNPLACED
) -> CanvasImage:
    """Put a rendered image and its breast mask on the black canvas: the one way from `render` to what an encoder sees.

    The image, no larger than the canvas, stands against the chest-wall side, centered from top to bottom; `tissue_mask`
    and `pixel_values` come with it. `placement` is that of the source plane in the image.
    """
    (canvas_height, canvas_width), (height, width) = settings.canvas, image.shape
    top = (canvas_height - height) // 2
    left = canvas_width - width if settings.chest_wall_side == "right" else 0
    margins = ((top, canvas_height - height - top), (left, canvas_width - width - left))
    placement = placement._replace(shift_x=placement.shift_x + left, shift_y=placement.shift_y + top)
    tissue_mask = patch_tissue(np.pad(tissue, margins), settings.patch_grid)
    return CanvasImage(np.pad(image, margins), tissue_mask, placement, settings)


def standardize(image: np.ndarray, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    """Scale an image, uint8 or uint16, to 0..1 and standardize it, float32."""
    return (image.astype(np.float32) * np.float32(1 / np.iinfo(image.dtype).max) - np.float32(mean)) / np.float32(std)


def _cv2_ready(plane: np.ndarray) -> np.ndarray:
    """The plane in a type that OpenCV resizes, and without holes: what is not finite becomes the darkest value."""
    if plane.dtype in (np.uint8, np.uint16):
        return plane
    values: np.ndarray = plane.astype(np.float32, copy=False)
    if not np.isfinite(cv2.sumElems(values)[0]):  # a sum in double, which float32 cannot overflow: one quick pass
        finite = np.isfinite(values)
        values = np.where(finite, values, values.min(where=finite, initial=np.finfo(np.float32).max))
    return values


__all__ = [
    "CanvasImage",
    "Placement",
    "RenderPlan",
    "RenderSettings",
    "Rendered",
    "Thumbnail",
    "inverted",
    "is_inverted",
    "make_thumbnail",
    "place_on_canvas",
    "plan_rendering",
    "render",
    "standardize",
]
