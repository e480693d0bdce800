"""From a file to a backbone's input, each in its own preprocessing. Picklable, for workers; no weights here.

Every backbone gets the same gray image: modality LUT, VOI, MONOCHROME1 inverted, cropped to the breast, and there the
percentiles of `RenderSettings` mapped to black and white, at full resolution. MammoDINO's own image processor goes on
from there. The others take 8-bit RGB: the plane three times, resized by their own interpolation to the final size of
their own image processor, then scaled and standardized by it.

Our choice, since no baseline but Mammo-CLIP was made for mammograms: images are cropped to the breast for all, and no
center crop cuts it; the aspect is kept, and the rest is padded with black.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # a dummy elsewhere on transformers 5.17
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.tools.features import SliceReader

from .checkpoint_files import find_beside

logger = logging.getLogger(__name__)

ANY_SIZE = (2**16, 2**16)  # larger than any image: not reduced before the backbone's own interpolation


@dataclass(frozen=True)
class MammoDinoImages:
    """As `MammoDinoImageProcessor` prepares them."""

    image_processor: MammoDinoImageProcessor

    def __call__(
        self, file: str | Path, slices: Sequence[int] | None = None, slices_per_volume: int = 4
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield `pixel_values` (1, H, W) float32 with `tissue_mask` (h, w) float32; see `Backbone.preprocess`."""
        for image in SliceReader(self.image_processor, slices_per_volume)(file, slices):
            yield {"pixel_values": image.pixel_values, "tissue_mask": image.tissue_mask}

    def settings(self) -> dict[str, Any]:
        return {"image_processor": self.image_processor.to_dict()}


@dataclass(frozen=True)
class RgbImages:
    """As an image processor of transformers standardizes them.

    Attributes:
        image_processor: scales and standardizes; its final size and interpolation are kept, its center crop is not.
        gray: makes the gray image.
        keeps_aspect: pads; else the image is stretched to the size, as Mammo-CLIP's.
        stretches_range: the fitted image's own minimum and maximum become 0 and 1 first, as Mammo-CLIP's.
    """

    image_processor: PilBackend
    gray: MammoDinoImageProcessor
    keeps_aspect: bool = True
    stretches_range: bool = False

    def __call__(
        self, file: str | Path, slices: Sequence[int] | None = None, slices_per_volume: int = 4
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield `pixel_values` (3, H, W) float32; see `Backbone.preprocess`."""
        rendered = self.gray.render_source(
            file, ANY_SIZE, upscale=False, slices_per_volume=slices_per_volume, slices=slices
        )
        for _, each in rendered:
            yield {"pixel_values": self.prepare(each.image)}

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Return a gray image (H, W) uint8 as the backbone takes it, (3, H', W') float32."""
        settings = self.image_processor.to_dict()
        height, width = final_size(settings)
        resample = settings.get("resample")
        resample = Image.Resampling.BILINEAR if resample is None else Image.Resampling(resample)
        image = Image.fromarray(pixels)
        if self.keeps_aspect:
            fitted = np.asarray(ImageOps.pad(image, (width, height), method=resample, color=0))
        else:
            fitted = np.asarray(image.resize((width, height), resample))
        if self.stretches_range and fitted.min() < fitted.max():
            low, high = float(fitted.min()), float(fitted.max())
            fitted = ((fitted - low) * (255 / (high - low))).astype(np.float32)
        rgb = np.repeat(fitted[:, :, None], 3, axis=2)  # (H, W, 3)
        inputs = self.image_processor(
            images=rgb, do_resize=False, do_center_crop=False, input_data_format="channels_last", return_tensors="np"
        )
        return np.asarray(inputs["pixel_values"][0], np.float32)

    def settings(self) -> dict[str, Any]:
        return {
            "image_processor": self.image_processor.to_dict(),
            "gray": self.gray.to_dict(),
            "keeps_aspect": self.keeps_aspect,
            "stretches_range": self.stretches_range,
        }


Preprocessing = MammoDinoImages | RgbImages


def rgb_images(source: str, published: dict[str, Any], crop_to_breast: bool, as_mammo_clip: bool = False) -> RgbImages:
    """Return the preprocessing by the image processor beside the weights, or else the `published` settings."""
    if beside := find_beside(source, "preprocessor_config.json"):
        image_processor = _own_processor(beside)
    else:
        logger.info("%s: no preprocessor_config.json; images are prepared as published, %s", source, published)
        image_processor = ViTImageProcessorPil(**published)
    final_size(image_processor.to_dict())  # refuses what has none
    gray = MammoDinoImageProcessor(
        chest_wall_side="as_is", do_crop_to_breast=crop_to_breast, do_clahe=False, do_zero_background=False
    )
    return RgbImages(image_processor, gray, keeps_aspect=not as_mammo_clip, stretches_range=as_mammo_clip)


def _own_processor(path: Path) -> PilBackend:
    """Return the image processor of a preprocessor_config.json, by Pillow, under today's name of its class."""
    settings = json.loads(path.read_text())
    settings.pop("auto_map", None)  # no code of a checkpoint is run
    older = settings.pop("feature_extractor_type", None)
    name = settings.get("image_processor_type") or older or "ViTImageProcessor"
    settings["image_processor_type"] = name.replace("FeatureExtractor", "ImageProcessor")
    with TemporaryDirectory() as folder:
        (Path(folder) / path.name).write_text(json.dumps(settings))
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if not isinstance(image_processor, PilBackend) or isinstance(image_processor, MammoDinoImageProcessor):
        raise ValueError(f"{path.name}: {name} is no image processor for RGB images")
    return image_processor


def final_size(settings: dict[str, Any]) -> tuple[int, int]:
    """Return (height, width) in pixels of an image processor's output: its crop's where it crops, else its size's."""
    size = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = size or settings.get("size")
    if isinstance(size, dict):
        height, width = (size.get(name) or size.get("shortest_edge") for name in ("height", "width"))
        if height and width:
            return int(height), int(width)
    raise ValueError(f"its preprocessor_config.json has size={size}; needs height and width, or shortest_edge")
