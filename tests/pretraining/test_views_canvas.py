"""A view of a canvas: what is kept, where it lies, and that image, target and tissue move together."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from made_inputs import draw_breast

from training.pretraining.views.canvas import WITHOUT_AUGMENTATION, affine, canvas_view, token_subset

CANVAS, PATCH = (96, 64), 8
RECIPE = {
    "canvas_rotation_degrees": 12.0, "canvas_scale": [0.88, 1.15], "canvas_aspect": 1.06, "canvas_shift_fraction": 0.02,
    "vertical_flip_probability": 0.5, "canvas_tokens": 20, "canvas_scatter_probability": 0.5,
    "canvas_mask_probability": 0.5, "canvas_mask_ratio": 0.3, "canvas_blur_probability": 0.4, "canvas_gamma": 0.4,
    "canvas_gain": 0.2, "canvas_field": 0.2, "canvas_offset": 0.1, "canvas_noise": 0.05,
}  # fmt: skip


def recipe(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{**RECIPE, **changes})


@pytest.fixture(scope="module")
def image() -> tuple[np.ndarray, np.ndarray]:
    """A drawn breast (90, 60) uint8 and the breast fraction of its cells of 4 px."""
    pixels = (draw_breast(92, 60) >> 4).astype(np.uint8)
    return pixels, (pixels > 25).astype(np.float32).reshape(23, 4, 15, 4).mean(axis=(1, 3))


def draw(image, seed=0, **changes):
    pixels, tissue = image
    return canvas_view(np.random.default_rng(seed), pixels, pixels, tissue, CANVAS, PATCH, recipe(**changes))


def test_without_changes_it_is_the_image_fitted_to_the_canvas(image):
    view = draw(image, **WITHOUT_AUGMENTATION)
    fit = 96 / 92
    expected = cv2.resize(image[0], (round(60 * fit), 96), interpolation=cv2.INTER_LINEAR).astype(np.float32) / 255
    inside = view["canvas_tissue"][:, : expected.shape[1]]
    np.testing.assert_array_equal(view["canvas"][0], view["canvas_target"])
    assert np.abs(view["canvas"][0, :, : expected.shape[1]] / 255 - expected)[inside].mean() < 0.01


@pytest.mark.parametrize("seed", range(8))
def test_as_many_tokens_as_asked_for_and_all_of_breast(image, seed):
    view = draw(image, seed)
    fraction = view["canvas_tissue"].reshape(12, 8, 8, 8).mean(axis=(1, 3))
    assert view["canvas_tokens"].sum() == 20 and (fraction[view["canvas_tokens"]] > 0.25).all()
    assert not (view["canvas_masks"] & ~view["canvas_tokens"]).any()
    assert view["canvas"].dtype == view["canvas_target"].dtype == np.uint8
    assert not view["canvas"][0][~view["canvas_tissue"]].any()


def test_scattered_tokens_are_never_masked_and_blobs_are_compact(image):
    for seed in range(6):
        scattered, blob = (
            draw(image, seed, canvas_scatter_probability=1.0),
            draw(image, seed, canvas_scatter_probability=0.0),
        )
        assert not scattered["canvas_masks"].any()
        extent = [np.ptp(np.nonzero(view["canvas_tokens"])[0]) for view in (scattered, blob)]
        assert extent[1] < extent[0] and extent[1] <= 6
    masked = [
        draw(image, seed, canvas_scatter_probability=0.0, canvas_mask_probability=1.0)["canvas_masks"].sum()
        for seed in range(30)
    ]
    assert np.mean(masked) / 20 == pytest.approx(0.3, abs=0.06)


def test_too_little_breast_is_filled_with_the_nearest_patches():
    fraction = np.zeros((6, 5))
    fraction[2, 2] = 1
    tokens, _ = token_subset(np.random.default_rng(0), fraction, 9, 0.0)
    assert tokens[1:4, 1:4].all() and tokens.sum() == 9
    assert token_subset(np.random.default_rng(0), np.zeros((6, 5)), 7, 1.0)[0].sum() == 7


def test_the_affine_turns_about_its_fixed_point_and_scales_areas():
    for seed in range(5):
        matrix = affine(np.random.default_rng(seed), (92, 60), CANVAS, recipe(canvas_shift_fraction=0.0))
        fit = 96 / 92
        np.testing.assert_allclose(matrix @ [64 / 3 / fit, 45.5, 1], [64 / 3, 47.5], atol=1e-9)
        area = abs(np.linalg.det(matrix[:, :2])) / fit**2
        assert 0.88**2 <= area <= 1.15**2


def test_a_neighbor_moves_with_the_image(image):
    """The target is another image under the same transform: where the sources differ, the views do."""
    pixels, tissue = image
    marked = pixels.copy()
    marked[40:50, 10:20] = 255
    views = [
        canvas_view(np.random.default_rng(3), pixels, target, tissue, CANVAS, PATCH, recipe())
        for target in (pixels, marked)
    ]
    np.testing.assert_array_equal(views[0]["canvas"], views[1]["canvas"])
    changed = np.abs(views[0]["canvas_target"] - views[1]["canvas_target"].astype(float)) > 50
    assert 60 < changed.sum() < 180
