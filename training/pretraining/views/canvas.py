"""One view of a whole canvas, of which the encoder sees a subset of tissue tokens: tissue tokens taken to pretraining.

The subset is scattered over the breast, or a compact blob of which some tokens are masked: a step costs what it sees.
"""

from typing import Any

import cv2
import numpy as np

WITHOUT_AUGMENTATION: dict[str, Any] = {
    "canvas_rotation_degrees": 0.0, "canvas_scale": [1.0, 1.0], "canvas_aspect": 1.0, "canvas_shift_fraction": 0.0,
    "vertical_flip_probability": 0.0, "canvas_blur_probability": 0.0, "canvas_gamma": 0.0, "canvas_gain": 0.0,
    "canvas_offset": 0.0, "canvas_field": 0.0, "canvas_noise": 0.0,
}  # fmt: skip


def canvas_view(
    rng: np.random.Generator,
    pixels: np.ndarray,
    target: np.ndarray,
    tissue: np.ndarray,
    canvas: tuple[int, int],
    patch_size: int,
    recipe: Any,
) -> dict[str, np.ndarray]:
    """Draw a view: one affine transform for image, target and tissue; intensity changes of the image alone.

    pixels, target (H', W') uint8 or uint16, the image and what is to be predicted, such as its neighboring slice;
    tissue (h', w') float32, the breast fraction of cells of any size; recipe: a `ViewsRecipe`. Returns `canvas`
    (1, H, W) and `canvas_target` (H, W) uint8, a quarter of what floats would take on their way to the device,
    `canvas_tissue` (H, W) bool, `canvas_tokens` (h, w) bool, as many true as the recipe says, and `canvas_masks` (h, w)
    bool within them.
    """
    matrix = affine(rng, pixels.shape, canvas, recipe)

    def warp(plane: np.ndarray, transform: np.ndarray = matrix) -> np.ndarray:
        return cv2.warpAffine(plane, transform, canvas[::-1], flags=cv2.INTER_LINEAR)

    def unit(plane: np.ndarray) -> np.ndarray:
        return warp(plane).astype(np.float32) * np.float32(1 / np.iinfo(plane.dtype).max)

    def bytes_of(values: np.ndarray) -> np.ndarray:
        return np.rint(values * inside * np.float32(255)).astype(np.uint8)

    scale_y, scale_x = pixels.shape[0] / tissue.shape[0], pixels.shape[1] / tissue.shape[1]
    cells = matrix @ np.array([[scale_x, 0, (scale_x - 1) / 2], [0, scale_y, (scale_y - 1) / 2], [0, 0, 1]])
    inside = warp(tissue.astype(np.float32), cells) >= 0.5
    grid = (canvas[0] // patch_size, canvas[1] // patch_size)
    fraction = inside.reshape(grid[0], patch_size, grid[1], patch_size).mean(axis=(1, 3))
    tokens, is_blob = token_subset(rng, fraction, recipe.canvas_tokens, recipe.canvas_scatter_probability)
    draws, each = rng.random(), rng.random(grid)
    masked = tokens & (each < recipe.canvas_mask_ratio) & (is_blob and draws < recipe.canvas_mask_probability)
    return {
        "canvas": bytes_of(change_intensity(rng, unit(pixels), grid, recipe))[None],
        "canvas_target": bytes_of(unit(target)),
        "canvas_tissue": inside,
        "canvas_tokens": tokens,
        "canvas_masks": masked,
    }


def affine(rng: np.random.Generator, size: tuple[int, int], canvas: tuple[int, int], recipe: Any) -> np.ndarray:
    """(2, 3): fits an image onto the canvas, against its left side, then rotates, scales, flips and shifts it about a
    point a third from the left, where most of a breast lies that touches that side."""
    angle, size_change, aspect, shift_x, shift_y = rng.uniform(-1, 1, 5)
    angle *= np.deg2rad(recipe.canvas_rotation_degrees)
    low, high = np.log(recipe.canvas_scale)
    scale = np.exp(low + (high - low) * (size_change + 1) / 2)
    stretch = np.exp(np.log(recipe.canvas_aspect) * aspect)
    flip = -1.0 if rng.random() < recipe.vertical_flip_probability else 1.0
    fit = min(canvas[0] / size[0], canvas[1] / size[1])
    center_in = np.array([canvas[1] / 3 / fit, (size[0] - 1) / 2])
    center_out = np.array([canvas[1] / 3, (canvas[0] - 1) / 2])
    cosine, sine = np.cos(angle), np.sin(angle)
    linear = (
        fit * scale * np.array([[cosine * stretch, -sine * flip / stretch], [sine * stretch, cosine * flip / stretch]])
    )
    shift = recipe.canvas_shift_fraction * canvas[0] * np.array([shift_x, shift_y])
    return np.column_stack((linear, center_out + shift - linear @ center_in))


def token_subset(
    rng: np.random.Generator, fraction: np.ndarray, count: int, scatter_probability: float
) -> tuple[np.ndarray, bool]:
    """`count` tokens (h, w) bool, of the breast as long as there are any, and whether they are a blob.

    fraction (h, w): breast fraction of each patch.
    """
    height, width = fraction.shape
    breast = fraction > 0.25
    if not breast.any():
        breast = np.ones_like(breast)
    count = min(count, breast.size)
    start = rng.permutation(np.flatnonzero(breast))[0]
    y, x = np.mgrid[:height, :width]
    distance = np.maximum(np.abs(y - start // width), np.abs(x - start % width)) + 0.5 * rng.random(breast.shape)
    is_blob = bool(rng.random() >= scatter_probability)
    rank = np.where(breast, distance if is_blob else rng.random(breast.shape), breast.size + distance)
    tokens = np.zeros(breast.size, bool)
    tokens[np.argpartition(rank.ravel(), count - 1)[:count]] = True
    return tokens.reshape(breast.shape), is_blob


def change_intensity(rng: np.random.Generator, unit: np.ndarray, grid: tuple[int, int], recipe: Any) -> np.ndarray:
    """Change sharpness, gamma, gain and offset, the last two also by smooth random fields (Frepa's low-frequency
    perturbation, arXiv 2407.14651), and add noise, the sum of two uniform numbers a pixel."""
    gain, offset, noise = rng.uniform(-1, 1, 3).astype(np.float32)
    bends, gamma, blurs, blur = rng.random(4)
    if blurs < recipe.canvas_blur_probability:  # from sharpened to blurred
        unit = cv2.addWeighted(unit, 1.4 - 1.4 * blur, cv2.GaussianBlur(unit, (3, 3), 0), 1.4 * blur - 0.4, 0)
    if bends < 0.5:
        curve = (np.arange(257) / 256) ** np.exp(recipe.canvas_gamma * (2 * gamma - 1))
        unit = curve.astype(np.float32)[(unit * np.float32(256)).astype(np.uint16).clip(0, 256)]
    fields = np.float32(recipe.canvas_field) * rng.uniform(-1, 1, (2, 4, 3)).astype(np.float32)
    gains, offsets = (cv2.resize(each, unit.shape[::-1], interpolation=cv2.INTER_LINEAR) for each in fields)
    gains += np.float32(1 + recipe.canvas_gain * gain)
    offsets *= np.float32(0.4)
    offsets += np.float32(recipe.canvas_offset * offset)
    grain = np.frombuffer(rng.bytes(2 * unit.size), np.int8).reshape(2, *unit.shape)
    scale = np.float32(recipe.canvas_noise * abs(noise) / (128 * np.sqrt(2 / 3)))  # of the sum of two uniform numbers
    changed = unit * gains + offsets + cv2.add(grain[0], grain[1], dtype=cv2.CV_32F) * scale
    return np.clip(changed, 0, 1, out=changed)
