"""With every idea of MammoDINO's off the views are plain DINOv2's, and each can be turned off alone."""

import json

import cv2
import numpy as np
import pytest
from pretrain_runs import CROPS, TINY, train

from dataset_scripts.corpus.reader import Corpus
from training.pretraining.recipe import ViewsRecipe, load_recipe
from training.pretraining.views.masks import maskable_patches
from training.pretraining.views.sample import PretrainingViews, photometric

SIZES = {"global_crop_size": 64, "local_crop_size": 32, "num_local_crops": 4}
QUIET = {"jitter_probability": 0.0, "blur_probability": [0.0] * 3, "horizontal_flip_probability": 0.0}
SAMPLES = 48


def draw(corpus, slice_pairs: bool = False, **changes) -> list[dict]:
    recipe = ViewsRecipe(**SIZES, **changes)
    views = PretrainingViews(Corpus(corpus), recipe, 8, seed=0, global_batch_size=SAMPLES, slice_pairs=slice_pairs)
    return [views[index] for index in range(SAMPLES)]


def random_resized_crop(rng, height: int, width: int, scale, ratio) -> tuple[int, int, int, int]:
    """Oracle: torchvision's RandomResizedCrop.get_params, one try after another."""
    while True:
        area = height * width * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1])))
        h, w = round(np.sqrt(area / aspect)), round(np.sqrt(area * aspect))
        if 0 < w <= width and 0 < h <= height:
            y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return y, x, y + h, x + w


def test_plain_crops_have_the_law_of_random_resized_crop(phantom_corpus):
    off = draw(phantom_corpus, tissue_aware_crops=False)
    corpus, recipe, rng = Corpus(phantom_corpus), ViewsRecipe(), np.random.default_rng(0)
    shapes = [corpus.image(sample["row"])[0].shape for sample in off]
    for crops, scale in ((slice(0, 2), recipe.global_crop_scale), (slice(2, 6), recipe.local_crop_scale)):
        number = crops.stop - crops.start
        ours = np.concatenate([sample["boxes"][crops] for sample in off])
        theirs = np.array(
            [random_resized_crop(rng, *shape, scale, recipe.crop_ratio) for shape in shapes for _ in range(10 * number)]
        )
        error = np.sqrt(ours.var(axis=0) / len(ours) + theirs.var(axis=0) / len(theirs))
        assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 4 * error).all()
        np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.25)
    assert all(sample["crops_below_minimum"] == 0 for sample in off)  # there is no minimum


def test_each_switch_turns_off_one_idea_alone(phantom_corpus):
    least = {"global_min_tissue": 0.8, "local_min_tissue": 0.9}
    on = draw(phantom_corpus, slice_pairs=True, **least)
    plain_crops = draw(phantom_corpus, slice_pairs=True, tissue_aware_crops=False, **least)
    plain_masks = draw(phantom_corpus, slice_pairs=True, tissue_aware_masks=False, **least)
    no_pairs = draw(phantom_corpus, slice_pairs=False, **least)

    def low(samples) -> float:
        return np.mean(
            [sample["crop_tissue"][:2].min() < 0.8 for sample in samples if not sample["crops_below_minimum"]]
        )

    def background(samples) -> float:
        return np.mean([((sample["global_tissue"] == 0) & sample["masks"]).any() for sample in samples])

    assert low(on) == low(plain_masks) == low(no_pairs) == 0 < 0.1 < low(plain_crops)
    assert background(on) == background(plain_crops) == background(no_pairs) == 0 < background(plain_masks)
    assert all(sample["slice_pair"] is None for sample in no_pairs)
    for samples in (on, plain_crops, plain_masks):
        assert sum(sample["slice_pair"] is not None for sample in samples) == SAMPLES // 2
    for one, other in zip(on, plain_masks, strict=True):  # the masks are drawn last: crops are the same to the last bit
        np.testing.assert_array_equal(one["global_crops"], other["global_crops"])
    for one, other in zip(on, no_pairs, strict=True):
        np.testing.assert_array_equal(one["masks"], other["masks"])


def test_a_run_with_all_switched_off_has_dinov2s_losses_alone(phantom_corpus, tmp_path):
    off = ["--tissue_aware_crops", "false", "--tissue_aware_masks", "false"]
    off += ["--adjacent_slice_weight", "0", "--adjacent_patch_weight", "0"]
    where = ["--corpus", str(phantom_corpus), "--output_dir", str(tmp_path)]
    train(load_recipe([CROPS, *where, *TINY, *off, "--max_steps", "2"]))
    for line in map(json.loads, (tmp_path / "logs" / "log.jsonl").read_text().splitlines()):
        assert line["slice_pairs"] == 0 and not any("adjacent" in name for name in line)
        dinov2 = line["loss_dino_global"] + line["loss_dino_local"] + line["loss_ibot"] + 0.1 * line["loss_koleo"]
        assert line["loss"] == pytest.approx(dinov2, rel=1e-5)
        assert line["masked_tissue_fraction"] > 0


def test_masks_without_tissue_may_cover_every_patch():
    tissue = np.zeros((16, 16), np.float32)
    tissue[:, :3] = 1
    assert maskable_patches(tissue, tissue_aware=False).all()
    assert maskable_patches(tissue, tissue_aware=True).sum() == 48
    assert maskable_patches(0 * tissue, tissue_aware=True).all()  # a crop without breast is masked like any other


def test_quiet_views_are_the_crops_themselves(phantom_corpus):
    """With jitter, blur and flips off, pixels and tissue are those of the box."""
    for sample in draw(phantom_corpus, **QUIET)[:10]:
        pixels, tissue = Corpus(phantom_corpus).image(sample["row"])
        y0, x0, y1, x1 = sample["boxes"][2]
        crop = pixels[y0:y1, x0:x1]
        method = cv2.INTER_AREA if min(crop.shape) >= 32 else cv2.INTER_CUBIC
        np.testing.assert_array_equal(sample["local_crops"][0, 0], cv2.resize(crop, (32, 32), interpolation=method))
        assert sample["local_tissue"][0].mean() == pytest.approx(sample["crop_tissue"][2], abs=1e-5)


def test_flips_turn_pixels_and_tissue_together(phantom_corpus):
    straight = draw(phantom_corpus, **QUIET)
    turned = draw(phantom_corpus, **{**QUIET, "horizontal_flip_probability": 1.0}, vertical_flip_probability=1.0)
    for one, other in zip(straight, turned, strict=True):
        for key in ("global_crops", "global_tissue", "local_crops", "local_tissue"):
            np.testing.assert_array_equal(one[key][..., ::-1, ::-1], other[key])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_photometric_changes_are_those_of_torchvision(dtype):
    """ColorJitter's brightness, contrast about the mean, each clipped; solarization at one half, of global 2 alone."""
    full = np.iinfo(dtype).max
    crop = np.random.default_rng(0).integers(0, full, (20, 20), endpoint=True).astype(dtype)
    recipe = ViewsRecipe(jitter_probability=1.0, blur_probability=[0.0] * 3, solarize_probability=1.0)
    draws = np.random.default_rng(7).random(6)
    brightness, contrast = 0.6 + 0.8 * draws[1], 0.6 + 0.8 * draws[2]
    bright = np.clip(crop / full * brightness, 0, 1)
    expected = np.clip(bright.mean() + contrast * (bright - bright.mean()), 0, 1)
    found = [photometric(np.random.default_rng(7), crop, recipe, number) for number in range(3)]
    solarized = np.where(expected >= 0.5, 1 - expected, expected)
    for pixels, of_unit in zip(found, (expected, solarized, expected), strict=True):
        assert pixels.dtype == np.uint8
        np.testing.assert_allclose(pixels, 255 * of_unit, atol=0.5 + 255e-5)  # rounded to the nearest


def test_blur_is_a_gaussian_of_the_recipes_width():
    point = np.zeros((33, 33), np.uint8)
    point[16, 16] = 255
    recipe = ViewsRecipe(jitter_probability=0.0, blur_probability=[1.0, 0.0, 1.0], blur_sigma_px=[1.5, 1.5])
    blurred, sharp = (photometric(np.random.default_rng(0), point, recipe, number) for number in range(2))
    y, x = np.mgrid[-16:17, -16:17]
    gaussian = np.exp(-(x**2 + y**2) / (2 * 1.5**2)) * (np.maximum(abs(x), abs(y)) <= 4)
    np.testing.assert_allclose(blurred, 255 * gaussian / gaussian.sum(), atol=0.5 + 255e-4)
    assert sharp[16, 16] == 255 and sharp.sum() == 255
