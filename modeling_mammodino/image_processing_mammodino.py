"""Image processor: any mammogram a user holds -> `pixel_values` and `tissue_mask`."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

import numpy as np
from huggingface_hub.dataclasses import validate_typed_dict
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs

from .dicom import (
    SAMPLED_SLICES,
    DicomFile,
    Mammogram,
    group_files,
    instance_of,
    iter_series,
    iter_slices,
    open_dicom,
    open_folder,
    open_if_dicom,
    spread,
)
from .image_io import GrayImage, ImageFile, InvalidImageError, as_image_file, read_image, to_gray_plane
from .rendering import (
    CanvasImage,
    Rendered,
    RenderPlan,
    RenderSettings,
    Thumbnail,
    inverted,
    is_inverted,
    make_thumbnail,
    place_on_canvas,
    plan_rendering,
    render,
)

logger = logging.getLogger(__name__)

# transformers' settings that have one value here: what is allowed beside None, and why
FIXED_SETTINGS: dict[str, tuple[Any, str]] = {
    "do_resize": (True, "the breast is always fitted into `size`"),
    "resample": (None, "area average to shrink, bilinear to enlarge"),
    "do_rescale": (True, "pixels are always scaled to 0..1 before image_mean and image_std"),
    "rescale_factor": (1 / 255, "pixels are scaled to 0..1, whatever their `bit_depth`"),
    "do_convert_rgb": (False, "there is one gray channel"),
    "do_center_crop": (False, "see do_crop_to_breast"),
    "crop_size": (None, "see do_crop_to_breast"),
    "do_pad": (True, "the image always stands on a canvas of `size`"),
    "pad_size": (None, "the canvas is `size`"),
    "data_format": ("channels_first", "pixel_values are (B, 1, H, W)"),
    "input_data_format": (None, "channels are found by the shape"),
    "device": ("cpu", "images are prepared on the CPU; move the batch with .to(device)"),
    "disable_grouping": (None, "images are prepared one by one"),
    "image_seq_length": (None, "there is no text"),
}
# what a saved processor says beside its settings
DESCRIPTIONS = ("image_processor_type", "auto_map", "processor_class", "feature_extractor_type")


class MammoDinoImageProcessorKwargs(ImagesKwargs, total=False):
    """Settings beside transformers' own; each is documented in `RenderSettings` or in the processor."""

    # as in transformers, and whole numbers too, as JSON has them
    image_mean: float | int | list[float | int] | tuple[float | int, ...] | None  # type: ignore[misc]
    image_std: float | int | list[float | int] | tuple[float | int, ...] | None  # type: ignore[misc]
    do_modality_lut: bool
    do_voi_lut: bool
    do_invert_monochrome1: bool
    allow_for_processing: bool
    tissue_finder: str
    polarity: str
    do_intensity_normalize: bool
    intensity_percentiles: tuple[float | int, float | int] | list[float | int]
    chest_wall_side: str
    do_crop_to_breast: bool
    crop_margin_fraction: float | int
    do_clahe: bool
    clahe_clip_limit: float | int
    clahe_grid: int
    do_zero_background: bool
    bit_depth: int
    patch_size: int
    slices_per_volume: int


class MammoDinoImageProcessor(PilBackend):
    r"""
    Prepares mammograms and DBT slices. Research use only.

    Takes a DICOM path or data set, a PNG / JPEG / PGM / TIFF / BMP path, an open file or the bytes of one, an array or
    tensor (2-D, or 3-D with one or three equal channels; 8-bit, 10-16-bit or float), a PIL image, or a sequence (list,
    column of `datasets`, ...) or 4-D batch of these. A multi-frame DICOM given alone yields its slices in order, and so
    does a folder of DICOM files that are the slices of one volume. In a sequence, files of one volume are seen as the
    corpus sees them, under one crop and window; each stays a row in its place. Returns `pixel_values` (B, 1, H, W)
    float32 and `tissue_mask` (B, h, w) float32, the breast fraction of each patch. Raises `InvalidImageError`, naming
    the image, for what is no mammogram.

    Every setting may be given for one call, too; None leaves it as it is. A setting of transformers that has no meaning
    here (`FIXED_SETTINGS`) is refused by name, with the reason.

    A pipeline cuts a 16-bit path to 8 bits; give it `fetch_images(path)` instead.

    Args:
        size (`dict`): The canvas, `{"height": H, "width": W}` in pixels; the breast is fitted into it at its aspect.
        patch_size (`int`): Side of a patch in pixels, for `tissue_mask`; must divide the canvas.
        slices_per_volume (`int`): Evenly spaced slices taken of a volume; 0 takes all.
        do_normalize, image_mean, image_std: Standardization of pixels scaled to 0..1.
        do_modality_lut, do_voi_lut, do_invert_monochrome1 (`bool`): Steps of reading a DICOM.
        All others: see `RenderSettings`.
    """

    valid_kwargs = MammoDinoImageProcessorKwargs
    model_input_names = ["pixel_values", "tissue_mask"]

    size = {"height": 518, "width": 518}
    patch_size = 14
    slices_per_volume = 0
    do_resize = True
    do_rescale = True
    rescale_factor = None  # type: ignore[assignment]
    do_normalize = True
    # mean and standard deviation inside the breast, over the rendered real DBT slices we had; our choice
    image_mean = [0.5]
    image_std = [0.25]
    do_modality_lut = True
    do_voi_lut = True
    do_invert_monochrome1 = True
    allow_for_processing = RenderSettings.allow_for_processing
    tissue_finder = RenderSettings.tissue_finder
    polarity = RenderSettings.polarity
    do_intensity_normalize = RenderSettings.do_intensity_normalize
    intensity_percentiles = list(RenderSettings.intensity_percentiles)  # as JSON has it
    chest_wall_side = RenderSettings.chest_wall_side
    do_crop_to_breast = RenderSettings.do_crop_to_breast
    crop_margin_fraction = RenderSettings.crop_margin_fraction
    do_clahe = RenderSettings.do_clahe
    clahe_clip_limit = RenderSettings.clahe_clip_limit
    clahe_grid = RenderSettings.clahe_grid
    do_zero_background = RenderSettings.do_zero_background
    bit_depth = RenderSettings.bit_depth

    def __init__(self, **kwargs: Any) -> None:
        if unknown := set(kwargs) - set(self.valid_kwargs.__annotations__) - set(DESCRIPTIONS):
            raise TypeError(f"{type(self).__name__} has no setting {', '.join(sorted(unknown))}")
        super().__init__(**{name: value for name, value in kwargs.items() if value is not None})
        settings = {name: getattr(self, name) for name in self._valid_kwargs_names}
        chosen = {name: value for name, value in kwargs.items() if name in settings and value is not None}
        validate_typed_dict(self.valid_kwargs, chosen)  # type: ignore[type-var]
        self._validate_preprocess_kwargs(**settings)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make one of a saved file's settings, without those of a later version, and of the user's own."""
        settings = list(cls.valid_kwargs.__annotations__)
        for name in kwargs:
            if name not in settings and (meant := get_close_matches(name, settings, 1, 0.8)):
                raise TypeError(f"{cls.__name__} has no setting {name}; is {meant[0]} meant?")
        known = {name: value for name, value in image_processor_dict.items() if name in (*settings, *DESCRIPTIONS)}
        if others := sorted(set(image_processor_dict) - set(known)):
            logger.warning("saved settings that this version does not know are left out: %s", ", ".join(others))
        return super().from_dict(known, **kwargs)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        return self.preprocess(images, **kwargs)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        for name in ("image_mean", "image_std"):
            if isinstance(kwargs.get(name), (int, float)):
                kwargs[name] = (kwargs[name],)
        if isinstance(kwargs.get("intensity_percentiles"), tuple):
            kwargs["intensity_percentiles"] = list(kwargs["intensity_percentiles"])
        return super()._standardize_kwargs(**kwargs)

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        return super().preprocess(images, **{key: value for key, value in kwargs.items() if value is not None})

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open paths and DICOM data sets at their full depth, as this processor would: for transformers' pipelines.

        A path, or a list of them, gives a `GrayImage`, or a list; of a multi-frame DICOM, the list of its slices,
        which then are images of their own: only the processor itself gives the slices of a volume one common crop and
        window. Images pass unchanged, as in transformers. The argument has the name that transformers gave it.
        """
        source = _as_file(image_url_or_urls, 0)
        if _is_sequence(source):
            return [self.fetch_images(each) for each in source]
        if opened := _open_if_dicom(source):
            settings, num_slices = self.render_settings, opened.num_frames
            wanted = spread(num_slices, settings.slices_per_volume or num_slices)
            options: dict[str, Any] = {"indices": wanted, "allow_for_processing": settings.allow_for_processing}
            images = [GrayImage.of(each.pixels) for each in iter_slices(opened, settings, **options)]
            return images if num_slices > 1 else images[0]
        return GrayImage.of(read_image(source)) if _is_file(source) else source

    @property
    def render_settings(self) -> RenderSettings:
        """All that this processor does, as one value."""
        return _render_settings(vars(self))

    @property
    def mean_and_std(self) -> tuple[float, float]:
        """What standardizes pixels of 0..1; 0 and 1 where nothing does."""
        settings = self.render_settings
        return settings.mean, settings.std

    def render_source(
        self,
        source: Any,
        fit: tuple[int, int],
        upscale: bool = True,
        hash_key: bytes | None = None,
        slices_per_volume: int = 0,
        correct: Callable[[Mammogram], Mammogram] | None = None,
        slices: Sequence[int] | None = None,
    ) -> Iterator[tuple[Mammogram, Rendered]]:
        """Render slices of a file, all or some: image and breast mask, before canvas and standardization.

        One plan serves the whole volume, so that its slices stay aligned. `fit` is (height, width) in pixels. A list of
        DICOM files is one volume, a file a slice, in order, and so is a folder of them, in any order.

        `correct` sees each slice as it was read. `slices` names those wanted, counted in order of position, in place of
        `slices_per_volume` evenly spaced ones.
        """
        settings = replace(self.render_settings, slices_per_volume=slices_per_volume)
        is_series = _is_sequence(source)
        files = [_as_file(each, place) for place, each in enumerate(source if is_series else [source])]
        opened = _opened(files if is_series else files[0])
        for mammogram, small, plan in _planned(opened, _name(files[0], 0), settings, hash_key, correct, slices):
            yield mammogram, render(mammogram.pixels, small, plan, settings, fit, upscale)

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:  # type: ignore[override]
        for name, (value, reason) in FIXED_SETTINGS.items():
            given = kwargs[name]
            if given is not None and str(getattr(given, "value", given)) != str(value):
                raise ValueError(
                    f"{name}={given!r}: MammoDinoImageProcessor has no such option, {reason}; leave it out"
                )
        _render_settings(kwargs)  # refuses values out of range

    def _preprocess_image_like_inputs(self, images: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        settings = _render_settings(kwargs)
        items = [_as_file(each, place) for place, each in enumerate(_flat(images))]
        if not items:
            raise InvalidImageError("images", "an empty list; give at least one image")
        names = [_name(item, position) for position, item in enumerate(items)]
        sources = [_opened(item) for item in items]
        for name, source in zip(names, sources, strict=True):
            if len(items) > 1 and _num_slices(source) > 1:
                raise InvalidImageError(name, "a volume among other images; give volumes one at a time")
        canvases: dict[int, list[CanvasImage]] = {}  # of each item
        is_batch = len(items) > 1
        instances = [instance_of(each) if is_batch and isinstance(each, DicomFile) else None for each in sources]
        for places in group_files(instances):
            if is_series := len(places) > 1:  # files of one volume: one plan for all, and a row each
                of_volume, source = replace(settings, slices_per_volume=0), [sources[place] for place in places]
            else:
                of_volume, source = settings, sources[places[0]]
            for number, (mammogram, small, plan) in enumerate(_planned(source, names[places[0]], of_volume)):
                rendered = render(mammogram.pixels, small, plan, settings, settings.canvas)
                canvas = place_on_canvas(rendered.image, rendered.tissue, settings)
                canvases.setdefault(places[number] if is_series else places[0], []).append(canvas)
        in_order = [canvas for place in range(len(items)) for canvas in canvases[place]]
        data = {
            "pixel_values": np.stack([canvas.pixel_values for canvas in in_order]),
            "tissue_mask": np.stack([canvas.tissue_mask for canvas in in_order]),
        }
        return BatchFeature(data, tensor_type=kwargs["return_tensors"])


def _render_settings(values: Mapping[str, Any]) -> RenderSettings:
    """Make the settings of a call, or of a processor. Raises ValueError for what is out of range."""
    size, patch_size = values["size"], values["patch_size"]
    canvas = (size["height"], size["width"])
    if patch_size < 1 or not all(side and side > 0 and side % patch_size == 0 for side in canvas):
        raise ValueError(f"size={dict(size)}: needs 'height' and 'width', both multiples of patch_size={patch_size}")
    mean, std = (values["image_mean"], values["image_std"]) if values["do_normalize"] else ((0.0,), (1.0,))
    if len(mean) != 1 or len(std) != 1 or not np.isfinite(mean[0]) or not 0 < std[0] < np.inf:
        raise ValueError(
            f"image_mean={mean}, image_std={std}: give one number each, for the one gray channel, image_std above 0"
        )
    chosen: dict[str, Any] = {each.name: values.get(each.name) for each in fields(RenderSettings)}
    chosen |= {
        "canvas": canvas,
        "mean": float(mean[0]),
        "std": float(std[0]),
        "intensity_percentiles": tuple(values["intensity_percentiles"]),
    }
    return RenderSettings(**chosen)


def _planned(
    source: Any,
    name: str,
    settings: RenderSettings,
    hash_key: bytes | None = None,
    correct: Callable[[Mammogram], Mammogram] | None = None,
    chosen: Sequence[int] | None = None,
) -> Iterator[tuple[Mammogram, Thumbnail, RenderPlan]]:
    """The slices of a volume, or `settings.slices_per_volume` of them, or those `chosen`, under the plan of the volume.

    source: an opened DICOM, a list of DICOM files, an image file, or an image (H, W).
    """
    is_series, is_file = isinstance(source, (list, tuple)), _is_file(source)
    is_image = not is_series and not isinstance(source, DicomFile)
    if is_image and chosen is not None and any(chosen):
        raise InvalidImageError(name, f"slice {max(chosen)} of an image was asked for; it has slice 0 alone")

    def read(indices: list[int]) -> Iterator[tuple[Mammogram, Thumbnail]]:
        if is_image:
            plane = read_image(source) if is_file else to_gray_plane(source, name)
            slices = iter([Mammogram.from_image(source if is_file else name, plane, hash_key)])
        else:
            options: dict[str, Any] = {"hash_key": hash_key, "allow_for_processing": settings.allow_for_processing}
            slices = (iter_series if is_series else iter_slices)(source, settings, indices=indices, **options)
        for each in map(correct, slices) if correct and not is_image else slices:
            yield each, make_thumbnail(each.pixels, settings.tissue_finder)

    def upright(each: Mammogram, small: Thumbnail) -> tuple[Mammogram, Thumbnail]:
        if not is_negative:
            return each, small
        each = replace(each, pixels=inverted(each.pixels))
        return each, make_thumbnail(each.pixels, settings.tissue_finder)

    num_slices = 1 if is_image else source.num_frames if isinstance(source, DicomFile) else len(source)
    sampled, wanted = spread(num_slices, SAMPLED_SLICES), spread(num_slices, settings.slices_per_volume or num_slices)
    if chosen is not None:
        wanted = list(dict.fromkeys(chosen))  # each once: a sample is handed out once
    slices = read(sampled + [index for index in wanted if index not in sampled])  # none is decoded twice
    samples = {index: next(slices) for index in sampled}  # kept until their turn
    is_negative = is_inverted([small for _, small in samples.values()], settings, name)
    samples = {index: upright(*sample) for index, sample in samples.items()}
    plan = plan_rendering([small for _, small in samples.values()], settings, name)
    for index in wanted:
        each, small = samples.pop(index) if index in samples else upright(*next(slices))
        yield each, small, plan


def _flat(images: Any) -> Iterator[Any]:
    """The images of nested sequences and of a 4-D batch, one by one."""
    if _is_sequence(images):
        for each in images:
            yield from _flat(each)
    elif getattr(images, "ndim", 0) == 4:
        yield from images
    else:
        yield images


def _is_sequence(images: Any) -> bool:
    """Whether it holds images: a list, a column of `datasets` or pandas, an array of objects; not text or bytes."""
    if isinstance(images, Sequence):
        return not isinstance(images, (str, bytes, bytearray, memoryview))
    return getattr(images, "ndim", 0) == 1 and getattr(getattr(images, "dtype", None), "kind", "") == "O"


def _as_file(item: Any, position: int) -> Any:
    """An open file or bytes as an ImageFile; all else as it is."""
    return item if _is_file(item) else as_image_file(item, f"image {position}")


def _is_file(item: Any) -> bool:
    return isinstance(item, (str, os.PathLike, ImageFile))


def _opened(source: Any) -> Any:
    """What `_planned` takes: a DICOM is opened, a folder becomes the list of its files, a list and all else stays."""
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        files = open_folder(source)
        return files if len(files) > 1 else files[0]
    return source if isinstance(source, (list, tuple)) else _open_if_dicom(source) or source


def _num_slices(source: Any) -> int:
    """Of what `_opened` returns."""
    return source.num_frames if isinstance(source, DicomFile) else len(source) if isinstance(source, list) else 1


def _open_if_dicom(item: Any) -> DicomFile | None:
    """A DICOM, opened, of a file or a data set; None for what is none."""
    if _is_file(item):
        return open_if_dicom(item)
    return open_dicom(item) if hasattr(item, "SOPClassUID") or hasattr(item, "file_meta") else None


def _name(item: Any, position: int) -> str:
    return item.name if isinstance(item, ImageFile) else str(item) if _is_file(item) else f"image {position}"


__all__ = ["MammoDinoImageProcessor"]
