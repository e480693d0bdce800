"""Image processor: any mammogram a user holds -> `pixel_values` and `tissue_mask`."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs

from .dicom import Mammogram, count_slices, is_dicom, iter_slices
from .errors import ImageRefused
from .pictures import read_picture, to_grey_plane
from .rendering import Rendered, RenderPlan, RenderSettings, place_on_canvas, plan_rendering, render, standardize
from .tissue import patch_tissue

# a volume's plan is made from this many slices, evenly spaced through it
PLAN_SLICES = 5


class MammoDinoImageProcessorKwargs(ImagesKwargs, total=False):
    """Settings beside transformers' own; each is documented in `RenderSettings` or in the processor."""

    do_modality_lut: bool
    do_voi_lut: bool
    do_invert_monochrome1: bool
    do_intensity_normalize: bool
    intensity_percentiles: tuple[float, float] | list[float]
    chest_wall_side: str
    do_crop_to_breast: bool
    crop_margin_fraction: float
    do_clahe: bool
    clahe_clip_limit: float
    clahe_grid: int
    do_zero_background: bool
    bit_depth: int
    patch_size: int
    slices_per_volume: int


class MammoDinoImageProcessor(PilBackend):
    r"""
    Prepares mammograms and DBT slices. Research use only.

    Takes a DICOM path or data set, a PNG / JPEG / PGM path, an array or tensor (2-D, or 3-D with one or three equal
    channels; 8-bit, 10-16-bit or float), a PIL image, or a list of these. A multi-frame DICOM given alone yields its
    slices in order. Returns `pixel_values` (B, 1, H, W) float32 and `tissue_mask` (B, h, w) float32, the breast
    fraction of each patch. Raises `ImageRefused`, naming the image, for what is not a mammogram.

    Args:
        size (`dict`): The canvas, `{"height": H, "width": W}` in pixels; the breast is fitted into it at its aspect.
        patch_size (`int`): Side of a patch in pixels, for `tissue_mask`; must divide the canvas.
        slices_per_volume (`int`): Evenly spaced slices taken of a volume; 0 takes all.
        do_normalize, image_mean, image_std: Standardisation of pixels scaled to 0..1.
        do_modality_lut, do_voi_lut, do_invert_monochrome1 (`bool`): Steps of reading a DICOM.
        All others: see `RenderSettings`.
    """

    valid_kwargs = MammoDinoImageProcessorKwargs
    model_input_names = ["pixel_values", "tissue_mask"]

    size = {"height": 518, "width": 518}
    patch_size = 14
    slices_per_volume = 0
    do_resize = True
    do_normalize = True
    # mean and standard deviation inside the breast, over the rendered real DBT slices we had; our choice
    image_mean = [0.5]
    image_std = [0.25]
    do_modality_lut = True
    do_voi_lut = True
    do_invert_monochrome1 = True
    do_intensity_normalize = RenderSettings.do_intensity_normalize
    intensity_percentiles = RenderSettings.intensity_percentiles
    chest_wall_side = RenderSettings.chest_wall_side
    do_crop_to_breast = RenderSettings.do_crop_to_breast
    crop_margin_fraction = RenderSettings.crop_margin_fraction
    do_clahe = RenderSettings.do_clahe
    clahe_clip_limit = RenderSettings.clahe_clip_limit
    clahe_grid = RenderSettings.clahe_grid
    do_zero_background = RenderSettings.do_zero_background
    bit_depth = RenderSettings.bit_depth

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        return super().__call__(images, *args, **kwargs)

    @property
    def render_settings(self) -> RenderSettings:
        return _render_settings(vars(self))

    def render_source(
        self, source: Any, fit: tuple[int, int], upscale: bool = True, hash_key: bytes | None = None
    ) -> Iterator[tuple[Mammogram, Rendered]]:
        """Every slice of a file with its picture and breast mask, before canvas and standardisation.

        One plan serves the whole volume, so that its slices stay aligned. `fit` is (height, width) in pixels.
        """
        settings, options = self.render_settings, _read_options(vars(self))
        for mammogram, plan in _planned_slices(source, settings, {**options, "hash_key": hash_key}):
            yield mammogram, render(mammogram.pixels, plan, settings, fit, upscale)

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:  # type: ignore[override]
        _render_settings(kwargs)  # refuses values out of range
        size, patch_size = kwargs["size"], kwargs["patch_size"]
        if not (size.height and size.width) or size.height % patch_size or size.width % patch_size:
            raise ValueError(
                f"size={dict(size)}: needs 'height' and 'width', both multiples of patch_size={patch_size}"
            )

    def _preprocess_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        settings, options = _render_settings(kwargs), _read_options(kwargs)
        canvas = (kwargs["size"].height, kwargs["size"].width)
        grid = (canvas[0] // kwargs["patch_size"], canvas[1] // kwargs["patch_size"])
        statistics = (kwargs["image_mean"][0], kwargs["image_std"][0]) if kwargs["do_normalize"] else ()
        pixel_values, tissue_mask = [], []
        for plane, plan in _planes(images, settings, options, kwargs["slices_per_volume"]):
            rendered = place_on_canvas(render(plane, plan, settings, canvas), canvas, settings.chest_wall_side)
            pixel_values.append(standardize(rendered.picture, *statistics)[None])
            tissue_mask.append(patch_tissue(rendered.tissue, grid))
        data = {"pixel_values": np.stack(pixel_values), "tissue_mask": np.stack(tissue_mask)}
        return BatchFeature(data, tensor_type=kwargs.get("return_tensors"))


def _render_settings(values: Mapping[str, Any]) -> RenderSettings:
    chosen = {field.name: values[field.name] for field in fields(RenderSettings)}
    chosen["intensity_percentiles"] = tuple(chosen["intensity_percentiles"])
    return RenderSettings(**chosen)


def _read_options(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apply_modality_lut": values["do_modality_lut"],
        "apply_voi": values["do_voi_lut"],
        "invert_monochrome1": values["do_invert_monochrome1"],
        "hash_key": None,
    }


def _planes(
    images: Any, settings: RenderSettings, options: dict, slices_per_volume: int
) -> Iterator[tuple[np.ndarray, RenderPlan]]:
    """Each image of a call as a grey plane (H, W) with its plan."""
    is_batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
    items = list(images) if is_batch else [images]
    for position, item in enumerate(items):
        if _is_dicom_source(item):
            if len(items) > 1 and count_slices(item) > 1:
                raise ImageRefused(f"{_name(item, position)}: a volume among other images; give volumes one at a time")
            for mammogram, plan in _planned_slices(item, settings, options, slices_per_volume):
                yield mammogram.pixels, plan
        else:
            plane = read_picture(item) if _is_path(item) else to_grey_plane(item, _name(item, position))
            yield plane, plan_rendering([plane], settings, _name(item, position))


def _planned_slices(
    source: Any, settings: RenderSettings, options: dict, slices_per_volume: int = 0
) -> Iterator[tuple[Mammogram, RenderPlan]]:
    """The slices of a source, or `slices_per_volume` of them, under the plan of its volume."""
    name = _name(source, 0)
    if not _is_dicom_source(source):
        plane = read_picture(source)
        yield Mammogram.from_picture(source, plane, options["hash_key"]), plan_rendering([plane], settings, name)
        return
    num_slices = count_slices(source)
    sampled, wanted = _spread(num_slices, PLAN_SLICES), _spread(num_slices, slices_per_volume or num_slices)
    samples = list(iter_slices(source, indices=sampled, **options))
    plan = plan_rendering([each.pixels for each in samples], settings, name)
    # a 2D image, or a short volume, is decoded once
    for each in samples if wanted == sampled else iter_slices(source, indices=wanted, **options):
        yield each, plan


def _spread(num_slices: int, count: int) -> list[int]:
    """`count` slices evenly spaced through a volume, half a step from either end; all where it has no more."""
    if num_slices <= count:
        return list(range(num_slices))
    return ((np.arange(count) + 0.5) * num_slices / count).astype(int).tolist()


def _is_path(item: Any) -> bool:
    return isinstance(item, (str, os.PathLike))


def _is_dicom_source(item: Any) -> bool:
    return is_dicom(item) if _is_path(item) else hasattr(item, "SOPClassUID") or hasattr(item, "file_meta")


def _name(item: Any, position: int) -> str:
    return str(item) if _is_path(item) else f"image {position}"


__all__ = ["MammoDinoImageProcessor"]
