"""What pixels went through before a checkpoint saw them, and how its patch embedding takes them in another form."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import cached_file

from ..image_processing_mammodino import MammoDinoImageProcessor

logger = logging.getLogger(__name__)


class Normalization(NamedTuple):
    """(x - mean) / std of pixels in 0..1, a value a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, image_processor: MammoDinoImageProcessor) -> "Normalization":
        mean, std = image_processor.mean_and_std
        return cls((mean,), (std,))


IMAGENET = Normalization(tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD))  # of DINOv2's own training


def processor_settings(source: str | Path) -> dict[str, Any] | None:
    """preprocessor_config.json of a folder or Hub id; None where it has none, as a `.pth`."""
    if Path(source).is_file():
        return None
    if cached_file(str(source), "preprocessor_config.json", _raise_exceptions_for_missing_entries=False) is None:
        return None
    return MammoDinoImageProcessor.get_image_processor_dict(str(source))[0]


def own_processor(settings: dict[str, Any] | None) -> MammoDinoImageProcessor | None:
    """The image processor, where the settings are those of ours."""
    if settings is None or settings.get("image_processor_type") != MammoDinoImageProcessor.__name__:
        return None
    return MammoDinoImageProcessor.from_dict(settings)


def source_normalization(
    source: str | Path, settings: dict[str, Any] | None, num_channels: int, target: Normalization
) -> Normalization:
    """The normalization that a checkpoint was made with. Where nothing says it, an RGB model is taken to be of
    ImageNet's, as DINOv2 is, and any other to be of `target`; a warning says so."""
    own = own_processor(settings)
    if own is not None:
        found = Normalization.of(own)
    elif settings is None or settings.get("image_mean") is None or settings.get("image_std") is None:
        found = IMAGENET if num_channels == 3 else target
        expected = num_channels == 3 and Path(source).is_file()  # the original files have nothing beside them
        logger.log(
            logging.INFO if expected else logging.WARNING,
            "%s: no preprocessor_config.json with image_mean and image_std; taken to be made with mean %s and standard "
            "deviation %s%s", source, found.mean, found.std, " (ImageNet's, DINOv2's own)" if num_channels == 3 else "",
        )  # fmt: skip
    elif not settings.get("do_normalize", True):
        found = Normalization((0.0,), (1.0,))
    else:
        mean, std = (np.ravel(settings[name]).astype(float).tolist() for name in ("image_mean", "image_std"))
        found = Normalization(tuple(mean), tuple(std))
    if own is None and settings is not None:  # transformers normalizes what it has rescaled: 0..1 by default
        full = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255
        found = Normalization(tuple(each / full for each in found.mean), tuple(each / full for each in found.std))
    if len(set(found.mean)) == len(set(found.std)) == 1:
        found = Normalization(found.mean[:1] * num_channels, found.std[:1] * num_channels)
    if not len(found.mean) == len(found.std) == num_channels or min(found.std) <= 0:
        raise ValueError(
            f"{source}: image_mean={found.mean} and image_std={found.std} of preprocessor_config.json do not fit "
            f"num_channels={num_channels} of the model: give one value for all channels or one for each, "
            "those of image_std above 0"
        )
    return found


def fold_normalization(
    projection: torch.nn.Conv2d, source: Normalization, target: Normalization
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (D, 1, p, p) and bias (D,) of a patch embedding that takes a gray plane g as (g - m) / s and gives what
    `projection` gives for it in each of its channels c as (g - m_c) / s_c:

        weight = sum_c W_c s / s_c,    bias = b + sum over c and the patch of W_c (m - m_c) / s_c
    """
    weight = projection.weight.detach().double()  # (D, C, p, p)
    mean_c, std_c = (torch.tensor(each, dtype=torch.float64).view(-1, 1, 1) for each in source)  # (C, 1, 1)
    shift = (weight * ((target.mean[0] - mean_c) / std_c)).sum((1, 2, 3))  # (D,)
    bias = shift if projection.bias is None else projection.bias.detach().double() + shift
    folded = (weight * (target.std[0] / std_c)).sum(1, keepdim=True)
    return folded.to(projection.weight.dtype), bias.to(projection.weight.dtype)


__all__ = ["Normalization", "fold_normalization", "own_processor", "processor_settings", "source_normalization"]
