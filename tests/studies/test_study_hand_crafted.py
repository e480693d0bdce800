"""Features hand-crafted: known images give known figures, and drawn lesions are told from tissue."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from training.studies.readout import PERCENTILES, SCALES_PX, Example, hand_crafted_features, mean_of_rows

PATCH, GRID = 8, 8
BRIGHTNESS = slice(0, 2 + len(PERCENTILES) + 3)
GRADIENTS = slice(BRIGHTNESS.stop + 6 * len(SCALES_PX), -5)


def example(image: np.ndarray, row: int = 0) -> Example:
    """Its middle 4 x 4 patches are the region."""
    weights = np.zeros((GRID, GRID), np.float32)
    weights[2:6, 2:6] = 64
    return Example(row, image[None].astype(np.float32), np.ones_like(weights), weights)


def test_brightness_in_the_region_and_about_it():
    image = np.zeros((64, 64))
    image[16:48, 16:48] = np.arange(1024).reshape(32, 32) / 1000
    image[0] = 64.0  # one row of 64 in 3072 pixels about it
    found = hand_crafted_features([example(image)])[0, BRIGHTNESS]
    inside, about = np.arange(1024) / 1000, 64 * 64 / 3072
    expected = [inside.mean(), inside.std(), *np.percentile(inside, PERCENTILES), about, inside.mean() - about, 1024]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rings_have_gradients_along_the_radius_and_spokes_across():
    y, x = np.indices((64, 64)) - 31.5
    rings = hand_crafted_features([example(np.cos(np.hypot(y, x)))])[0, GRADIENTS]
    spokes = hand_crafted_features([example(np.cos(8 * np.arctan2(y, x)))])[0, GRADIENTS]
    along, across, ratio = (slice(start, None, 4) for start in (1, 2, 3))
    assert (rings[along] > 3 * rings[across]).all() and (rings[ratio] < -1).all()
    assert (spokes[across] > 3 * spokes[along]).all() and (spokes[ratio] > 1).all()


def test_fine_specks_are_told_from_noise_that_a_mean_does_not_tell():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 64, 64))
    images += rng.normal(size=(40, 1, 1))  # brightness says nothing
    images[:20, 20:44:8, 20:44:8] += 8
    found = hand_crafted_features([example(image, row) for row, image in enumerate(images)])
    assert np.isfinite(found).all() and found.shape == (40, 57)
    has_specks = np.arange(40) < 20
    assert roc_auc_score(has_specks, found[:, BRIGHTNESS.stop + 1]) == 1  # the highest of the finest band
    assert roc_auc_score(has_specks, found[:, 0]) < 0.8


def test_a_flat_image_and_a_region_that_is_all_give_numbers():
    whole = example(np.ones((64, 64)))._replace(weights=np.ones((GRID, GRID), np.float32))
    assert np.isfinite(hand_crafted_features([example(np.zeros((64, 64))), whole])).all()


def test_a_row_is_the_mean_of_its_examples():
    images = np.random.default_rng(0).normal(size=(3, 64, 64))
    alone = [hand_crafted_features([example(image)])[0] for image in images]
    found = hand_crafted_features([example(image, row) for image, row in zip(images, (1, 0, 1), strict=True)])
    np.testing.assert_allclose(found, [alone[1], (alone[0] + alone[2]) / 2], rtol=1e-5)
    assert mean_of_rows([example(images[0], 0)], np.array([[1.0, 3.0]])) == pytest.approx(np.array([[1.0, 3.0]]))
