"""From a file to a backbone's input, each in its own preprocessing. Picklable, for workers; no weights here.

Every backbone gets the same gray image: modality LUT, VOI, MONOCHROME1 inverted, cropped to the breast, and there the
percentiles of `RenderSettings` mapped to black and white, at full resolution. MammoDINO's own image processor goes on
from there. The others take 8-bit RGB: the plane three times, resized by their own interpolation to the final size of
their own image processor, then scaled and standardized by it.

Our choice, since most baselines were not made for mammograms: images are cropped to the breast for all, and no center
crop cuts it; but for Mammo-CLIP's the aspect is kept, and the rest is padded with black.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.rendering import Thumbnail, place_on_canvas

from .checkpoint_files import find_beside

logger = logging.getLogger(__name__)

ANY_SIZE = (2**16, 2**16)  # larger than any image: not reduced before the backbone's own interpolation
NUMBERS = ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize")


class Prepared(dict[str, np.ndarray]):
    """What a backbone takes of one slice, by name; `mask`: the confidence of its breast mask, 0 to 1, and what limits
    it in words."""

    def __init__(self, inputs: dict[str, np.ndarray], small: Thumbnail):
        super().__init__(inputs)
        self.mask = (small.confidence, small.warning)


@dataclass(frozen=True)
class MammoDinoImages:
    """As `MammoDinoImageProcessor` prepares them."""

    image_processor: MammoDinoImageProcessor

    def __call__(
        self, file: str | Path, slices: Sequence[int] | None = None, slices_per_volume: int = 4
    ) -> Iterator[Prepared]:
        """Yield `pixel_values` (1, H, W) float32 with `tissue_mask` (h, w) float32; see `Backbone.preprocess`."""
        settings = self.image_processor.render_settings
        for _, each in self.image_processor.render_source(
            file, settings.canvas, slices_per_volume=slices_per_volume, slices=slices
        ):
            placed = place_on_canvas(each.image, each.tissue, settings)
            yield Prepared({"pixel_values": placed.pixel_values, "tissue_mask": placed.tissue_mask}, each.small)

    @property
    def renderer(self) -> MammoDinoImageProcessor:
        """What renders a file larger, for tiles."""
        return self.image_processor

    def tile(self, image: np.ndarray, tissue: np.ndarray) -> dict[str, np.ndarray]:
        """Return a tile (H, W) and its breast mask (H, W) bool of what `renderer` rendered as the encoder takes it, at
        its aspect on the canvas."""
        settings = self.image_processor.render_settings
        scale = min(side / own for side, own in zip(settings.canvas, image.shape, strict=True))
        size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        fitted: np.ndarray = cv2.resize(image, size, interpolation=how)
        breast = cv2.resize(tissue.astype(np.float32), size, interpolation=how) >= 0.5
        placed = place_on_canvas(fitted, breast, settings)
        return {"pixel_values": placed.pixel_values, "tissue_mask": placed.tissue_mask}

    def settings(self) -> dict[str, Any]:
        return {"image_processor": self.image_processor.to_dict()}


@dataclass(frozen=True)
class RgbImages:
    """As an image processor of transformers standardizes them.

    Attributes:
        image_processor: of the final size and interpolation; it scales and standardizes. No center crop.
        gray: makes the gray image.
        as_mammo_clip: the image is stretched to the size, not padded, and its own minimum and maximum then become 0
            and 1.
    """

    image_processor: ViTImageProcessorPil
    gray: MammoDinoImageProcessor
    as_mammo_clip: bool = False

    def __call__(
        self, file: str | Path, slices: Sequence[int] | None = None, slices_per_volume: int = 4
    ) -> Iterator[Prepared]:
        """Yield `pixel_values` (3, H, W) float32; see `Backbone.preprocess`."""
        rendered = self.gray.render_source(
            file, ANY_SIZE, upscale=False, slices_per_volume=slices_per_volume, slices=slices
        )
        for _, each in rendered:
            yield Prepared({"pixel_values": self.prepare(each.image)}, each.small)

    @property
    def renderer(self) -> MammoDinoImageProcessor:
        """What renders a file larger, for tiles."""
        return self.gray

    def tile(self, image: np.ndarray, tissue: np.ndarray) -> dict[str, np.ndarray]:
        """Return a tile (H, W) uint8 of what `renderer` rendered as the backbone takes it."""
        return {"pixel_values": self.prepare(image)}

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Return a gray image (H, W) uint8 as the backbone takes it, (3, H', W') float32."""
        size, resample = self.image_processor.size, Image.Resampling(self.image_processor.resample)
        image, final = Image.fromarray(pixels), (size["width"], size["height"])
        if self.as_mammo_clip:
            fitted = np.asarray(image.resize(final, resample), np.float32)
            low, high = float(fitted.min()), float(fitted.max())
            if low < high:
                fitted = (fitted - low) * (255 / (high - low))
        else:
            fitted = np.asarray(ImageOps.pad(image, final, method=resample, color=0))
        rgb = np.repeat(fitted[:, :, None], 3, axis=2)  # (H, W, 3)
        inputs = self.image_processor(
            images=rgb, do_resize=False, input_data_format="channels_last", return_tensors="np"
        )
        return np.asarray(inputs["pixel_values"][0], np.float32)

    def settings(self) -> dict[str, Any]:
        return {
            "image_processor": self.image_processor.to_dict(),
            "gray": self.gray.to_dict(),
            "as_mammo_clip": self.as_mammo_clip,
        }


Preprocessing = MammoDinoImages | RgbImages


def rgb_images(source: str, published: dict[str, Any], crop_to_breast: bool, as_mammo_clip: bool = False) -> RgbImages:
    """Return the preprocessing by the preprocessor_config.json beside the weights; what that lacks is as `published`.

    Whatever class it names: of all of them only the final size, the interpolation and the numbers are taken.
    """
    settings = dict(published)
    if beside := find_beside(source, "preprocessor_config.json"):
        settings |= json.loads(beside.read_text())
    else:
        logger.info("%s: no preprocessor_config.json; images are prepared as published, %s", source, published)
    if settings["image_mean"] is None or len(settings["image_mean"]) != 3:
        name = settings.get("image_processor_type", "it")
        raise ValueError(f"preprocessor_config.json: {name} is no image processor for RGB images")
    height, width = final_size(settings)
    image_processor = ViTImageProcessorPil(
        size={"height": height, "width": width},
        **{name: settings[name] for name in NUMBERS if settings.get(name) is not None},
    )
    gray = MammoDinoImageProcessor(
        chest_wall_side="as_is", do_crop_to_breast=crop_to_breast, do_clahe=False, do_zero_background=False
    )
    return RgbImages(image_processor, gray, as_mammo_clip)


def final_size(settings: dict[str, Any]) -> tuple[int, int]:
    """Return (height, width) in pixels of an image processor's output: its crop's where it crops, else its size's."""
    size = settings.get("crop_size") if settings.get("do_center_crop", "crop_size" in settings) else None
    size = size or settings.get("size")
    size = {"shortest_edge": size} if isinstance(size, int) else size  # of older versions
    if isinstance(size, dict):
        height, width = (size.get(name) or size.get("shortest_edge") for name in ("height", "width"))
        if height and width:
            return int(height), int(width)
    raise ValueError(f"its preprocessor_config.json has size={size}; needs height and width, or shortest_edge")
