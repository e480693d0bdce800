"""The pre-flight check against closed forms, on images that share nothing, and in a run, which it leaves as it is."""

import numpy as np
import pytest
import torch
from pretrain_runs import log, tiny, train, weights
from pretrain_runs import recipe as tiny_recipe

from training.pretraining import preflight
from training.pretraining.monitoring import read_warnings
from training.pretraining.preflight import describe, gaussian_information, learned_nothing, shared_information
from training.pretraining.views.sample import PretrainingViews


class MadeUpCorpus:
    """Images of 64 x 64 that `draw` gives."""

    num_volumes = 100
    kinds = ["ffdm"] * num_volumes

    class image_processor:  # noqa: N801 (an attribute of a corpus)
        mean_and_std = (0.5, 0.25)

    def __init__(self, draw):
        self.draw = draw

    def image(self, row):
        return self.draw(np.random.default_rng(row)), np.ones((8, 8), np.float32)

    def rows_of(self, volume):
        return range(volume, volume + 1)

    def volume_column(self, name):
        return [None] * self.num_volumes


def noise(rng):
    return rng.integers(0, 256, (64, 64), dtype=np.uint8)


def shades(rng):
    """Each image has a brightness, contrast and grain of its own."""
    mean, spread, cells = rng.uniform(80, 170), rng.uniform(10, 60), 2 ** rng.integers(2, 6)
    grain = np.kron(rng.standard_normal((cells, cells)), np.ones((64 // cells, 64 // cells)))
    return np.clip(mean + spread * grain, 0, 255).astype(np.uint8)


def of_corpus(draw, *arguments):
    recipe = tiny(*arguments, "--adjacent_slice_weight", "0")
    views = PretrainingViews(MadeUpCorpus(draw), recipe.views, 16, seed=0, global_batch_size=8, slice_pairs=False)
    return shared_information(views, recipe), recipe


@pytest.mark.parametrize("rows,draws,tolerance", [(4000, 1, 0.03), (40, 300, 0.05)])
def test_information_of_correlated_gaussians_is_the_closed_form(rows, draws, tolerance):
    rng, correlations = np.random.default_rng(0), np.array([0.9, 0.5, 0.0])
    mix = rng.standard_normal((3, 3))  # which changes no information
    found = []
    for _ in range(draws):
        first, second = rng.standard_normal((2, rows, 3))
        second = correlations * first + np.sqrt(1 - correlations**2) * second
        found.append(gaussian_information(first @ mix, second * 10 + 3))
    assert np.mean(found) == pytest.approx(-np.log(1 - correlations**2).sum() / 2, abs=tolerance)


def test_equal_views_share_much_and_independent_ones_nothing():
    rows = np.random.default_rng(0).standard_normal((200, 12))
    assert gaussian_information(rows, rows) > 50
    assert abs(gaussian_information(rows, rows[::-1].copy()[np.roll(np.arange(200), 1)])) < 0.35
    with pytest.raises(ValueError, match="20 pairs of views"):
        gaussian_information(rows[:20], rows[:20])


def test_crops_of_noise_share_nothing_which_is_warned_of():
    shared, recipe = of_corpus(noise)
    values, warnings = describe(shared, recipe)
    assert abs(shared["global_crops"]) < 0.3 and "raise global_crop_scale" in warnings[0]
    assert values["shared_information_global_crops"] == pytest.approx(shared["global_crops"] / np.log(64))


def test_whole_images_without_jitter_share_what_they_hold():
    plain = ["--brightness", "0", "--contrast", "0", "--blur_probability", "0", "0", "0", "--crop_ratio", "1", "1"]
    whole, recipe = of_corpus(shades, "--global_crop_scale", "1.0", "1.0", *plain)
    parts, _ = of_corpus(shades)
    assert whole["global_crops"] > 20 > parts["global_crops"] > 1 and not describe(whole, recipe)[1]


def test_statistics_are_of_what_is_seen_alone():
    images = torch.rand(2, 32, 24)
    seen = torch.zeros(2, 32, 24, dtype=torch.bool)
    seen[:, 8:20, 4:18] = True
    found = preflight.view_statistics(images, seen)
    assert found.shape == (2, 12) and found.isfinite().all()
    inside = images[0][8:20, 4:18].double()
    assert found[0, 0] == pytest.approx(float(inside.mean()))
    assert found[0, 1] == pytest.approx(float(inside.std(correction=0).log()), abs=1e-4)


def test_a_run_is_the_same_with_it_and_says_what_it_found(phantom_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "FEWEST_PAIRS", 2)
    monkeypatch.setattr(preflight, "gaussian_information", lambda first, second: 0.01 * first.shape[1])
    for name in ("true", "false"):
        steps = ["--max_steps", "2", "--save_steps", "2", "--preflight", name]
        train(tiny_recipe(phantom_corpus, tmp_path / name, *steps))
    on, off = (weights(tmp_path / name / "checkpoint-2") for name in ("true", "false"))
    assert on.keys() == off.keys() and all(torch.equal(on[key], off[key]) for key in on)
    assert log(tmp_path / "true")[0] | {"step": 0, "shared_nats_global_crops": 0.12} == log(tmp_path / "true")[0]
    warned = [each["warning"] for each in read_warnings(tmp_path / "true")]
    assert any("two views (global crops) share 0.12 nats" in each for each in warned)
    assert not read_warnings(tmp_path / "false") and "shared_nats_global_crops" not in log(tmp_path / "false")[0]


def lines_of(values):
    return [{"step": 10 * (number + 1), "loss": 1.0, "loss_x": value} for number, value in enumerate(values)]


def test_losses_that_stay_are_warned_of_and_those_that_fall_are_not():
    rng = np.random.default_rng(0)
    still = 5 + 0.1 * rng.standard_normal(10)
    assert "raise learning_rate" in learned_nothing(lines_of(still))
    assert learned_nothing(lines_of(still - 0.15 * np.arange(10))) is None
    assert learned_nothing(lines_of(still[:4])) is None  # too few to tell
    bends = [1.087, 0.922, 0.814, 0.798, 0.762, 0.761, 0.778, 0.758, 0.767, 0.739]  # falls fast, then slowly
    assert learned_nothing(lines_of(bends)) is None


def test_a_run_that_does_not_learn_says_so(phantom_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("training.pretraining.monitoring.FIRST_STEPS", 6)
    rates = ["--learning_rate", "0", "--min_learning_rate", "0"]
    train(tiny_recipe(phantom_corpus, tmp_path, "--max_steps", "6", *rates))
    assert any("nothing is learned" in each["warning"] for each in read_warnings(tmp_path))
