"""Changes of brightness and sharpness of one crop."""

import cv2
import numpy as np

from ..recipe import ViewsRecipe

BLUR_KERNEL_PX = 9


def photometric(rng: np.random.Generator, pixels: np.ndarray, recipe: ViewsRecipe, number: int) -> np.ndarray:
    """Crop `number` (0, 1: global; 2: local), (S, S) uint8 or uint16, as float32 in 0..1, with the jitter, blur and
    solarisation of the recipe (dinov2/data/augmentations.py, less what needs colour).

    As many numbers are drawn whatever is switched on, so that a switch changes nothing but what it names.
    """
    jitters, brightness, contrast, blurs, sigma, solarizes = rng.random(6).tolist()
    unit = to_unit(pixels)
    if jitters < recipe.jitter_probability:
        jitter(unit, 1 + recipe.brightness * (2 * brightness - 1), 1 + recipe.contrast * (2 * contrast - 1))
    if blurs < recipe.blur_probability[number]:
        low, high = recipe.blur_sigma_px
        unit = cv2.GaussianBlur(unit, (BLUR_KERNEL_PX, BLUR_KERNEL_PX), low + (high - low) * sigma)
    if number == 1 and solarizes < recipe.solarize_probability:
        unit = np.where(unit >= 0.5, 1 - unit, unit)
    return unit


def to_unit(pixels: np.ndarray) -> np.ndarray:
    unit = pixels.astype(np.float32)
    unit *= np.float32(1 / np.iinfo(pixels.dtype).max)
    return unit


def jitter(unit: np.ndarray, brightness: float, contrast: float) -> None:
    """Factors for brightness, then for contrast about the mean, each clipped to 0..1 (torchvision's ColorJitter); in
    place."""
    unit *= np.float32(brightness)
    np.minimum(unit, 1, out=unit)
    mean = cv2.mean(unit)[0]
    unit *= np.float32(contrast)
    unit += np.float32(mean * (1 - contrast))
    np.clip(unit, 0, 1, out=unit)
