"""Crops, masks and neighbours over many random draws, and samples as pure functions of their index."""

import numpy as np
import pytest
import torch

from dataset_scripts.corpus_reader import Corpus
from training.recipe import ViewsRecipe
from training.views.crops import TissueTable, sample_boxes, tissue_aware_crop
from training.views.masks import block_mask, stratified_mask_ratios
from training.views.sample import PretrainingViews, collate
from training.views.slices import sample_neighbour

SCALE, RATIO = (0.1, 0.8), (0.75, 4 / 3)


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """Breast fraction of 30 x 20 cells: a half-disc with soft edges."""
    y, x = np.mgrid[:30, :20]
    return np.clip(1.5 - np.hypot((y - 15) / 12, x / 14) * 1.2, 0, 1).astype(np.float32)


def area_oracle(tissue, box, shape):
    """Breast fraction of a box, pixel by pixel at eight times the resolution."""
    fine = np.kron(tissue, np.ones((8 * shape[0] // tissue.shape[0], 8 * shape[1] // tissue.shape[1])))
    y0, x0, y1, x1 = box * 8
    return fine[y0:y1, x0:x1].mean()


def test_tissue_table_agrees_with_counting_pixels(tissue):
    shape = (120, 80)
    table, rng = TissueTable(tissue, shape), np.random.default_rng(0)
    boxes = sample_boxes(rng, 50, shape, SCALE, RATIO)
    for box, fraction in zip(boxes, table.fraction(boxes), strict=True):
        assert fraction == pytest.approx(area_oracle(tissue, box, shape), abs=1e-6)
    for box in boxes[:5]:
        grid = table.grid(box, (7, 5))
        assert grid.mean() == pytest.approx(table.fraction(box[None])[0], abs=1e-6)
        assert grid.min() >= 0 and grid.max() <= 1


def test_plain_boxes_have_the_law_of_random_resized_crop():
    boxes = sample_boxes(np.random.default_rng(0), 20000, (400, 400), (0.2, 0.5), RATIO)
    height, width = (boxes[:, 2] - boxes[:, 0]), (boxes[:, 3] - boxes[:, 1])
    area, aspect = height * width / 400**2, width / height
    assert boxes.min() >= 0 and boxes.max() <= 400 and len(boxes) == 20000
    assert area.min() > 0.195 and area.max() < 0.505 and area.mean() == pytest.approx(0.35, abs=0.005)
    assert np.log(aspect).mean() == pytest.approx(0, abs=0.01) and aspect.max() < 1.36
    assert boxes[:, 0][height < 300].mean() == pytest.approx((400 - height[height < 300]).mean() / 2, rel=0.05)


def test_no_box_leaves_a_picture_that_is_narrower_than_any_aspect():
    boxes = sample_boxes(np.random.default_rng(0), 64, (900, 60), (0.9, 1.0), RATIO)
    assert len(boxes) >= 1 and (boxes[:, 2:] > boxes[:, :2]).all() and boxes[:, 3].max() <= 60


def test_tissue_aware_crops_hold_their_minimum_where_plain_ones_do_not(tissue):
    table, rng = TissueTable(tissue, (300, 200)), np.random.default_rng(0)
    aware = [tissue_aware_crop(rng, table, SCALE, RATIO, 0.7) for _ in range(2000)]
    plain = [tissue_aware_crop(rng, table, SCALE, RATIO, 0.0) for _ in range(2000)]
    assert all(crop.fits and crop.tissue_fraction >= 0.7 for crop in aware)
    assert np.mean([crop.tissue_fraction < 0.7 for crop in plain]) > 0.3
    assert len({tuple(crop.box) for crop in aware}) > 1900  # they vary


def test_where_no_crop_fits_the_one_of_most_tissue_is_taken_and_said(tissue):
    table = TissueTable(tissue * 0.3, (300, 200))
    crop = tissue_aware_crop(np.random.default_rng(0), table, SCALE, RATIO, 0.9, rounds=1)
    boxes = sample_boxes(np.random.default_rng(0), 64, (300, 200), SCALE, RATIO)
    assert not crop.fits and crop.tissue_fraction == pytest.approx(table.fraction(boxes).max())


def test_masks_keep_to_what_may_be_masked_and_near_their_ratio():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    allowed = np.hypot(y - 8, x) < 11
    for ratio in (0.1, 0.3, 0.5):
        masks = np.stack([block_mask(rng, ratio, allowed) for _ in range(300)])
        reached = masks.sum(axis=(1, 2)) / allowed.sum()
        assert not (masks & ~allowed).any()
        assert reached.max() <= ratio and reached.mean() > 0.85 * ratio
        assert masks.any(axis=0)[allowed].mean() > 0.98  # every allowed patch can be masked
    assert not block_mask(rng, 0.0, allowed).any()


def test_masks_are_blocks():
    """A masked patch has masked neighbours far more often than at random."""
    rng = np.random.default_rng(0)
    masks = np.stack([block_mask(rng, 0.4, np.ones((16, 16), bool)) for _ in range(200)])
    both = (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, :-1].sum()
    assert both > 0.75


def test_mask_ratios_are_stratified_over_the_batch():
    for seed in range(20):
        ratios = stratified_mask_ratios(np.random.default_rng(seed), 16, 0.5, (0.1, 0.5))
        drawn = np.sort(ratios[ratios > 0])
        assert len(drawn) == 8
        edges = np.linspace(0.1, 0.5, 9)
        assert (drawn >= edges[:-1]).all() and (drawn <= edges[1:]).all()


def test_neighbours_are_near_and_of_both_sides():
    rng, slices = np.random.default_rng(0), np.arange(20)
    drawn = {sample_neighbour(rng, slices, 10, 1.0, 3.0, 1) for _ in range(300)}
    assert drawn == {7, 8, 9, 11, 12, 13}
    assert {sample_neighbour(rng, slices, 0, None, 3.0, 2) for _ in range(100)} == {1, 2}
    assert {sample_neighbour(rng, slices, 5, 10.0, 3.0, 2) for _ in range(100)} == {4, 6}  # at least one slice
    assert sample_neighbour(rng, np.array([0, 40]), 0, 1.0, 3.0, 2) is None  # the slices between are missing


@pytest.fixture(scope="module")
def views(phantom_corpus) -> PretrainingViews:
    recipe = ViewsRecipe(global_crop_size=64, local_crop_size=32, num_local_crops=2)
    return PretrainingViews(Corpus(phantom_corpus), recipe, patch_size=16, seed=5, global_batch_size=8)


def test_a_sample_is_a_pure_function_of_seed_and_index(views, phantom_corpus):
    again = PretrainingViews(Corpus(phantom_corpus), views.recipe, 16, seed=5, global_batch_size=8)
    other = PretrainingViews(Corpus(phantom_corpus), views.recipe, 16, seed=6, global_batch_size=8)
    order = np.random.default_rng(0).permutation(30)
    drawn = {int(index): again[int(index)] for index in order}  # in another order, across epochs
    for index in range(30):
        here, there = views[index], drawn[index]
        assert here["row"] == there["row"]
        for key in ("global_crops", "local_crops", "masks", "boxes", "crop_tissue"):
            np.testing.assert_array_equal(here[key], there[key])
    assert any(views[index]["row"] != other[index]["row"] for index in range(8))


def test_an_epoch_visits_every_volume_once(views):
    number = views.corpus.num_volumes
    for epoch in range(3):
        visited = [views.volume_of(epoch * number + place) for place in range(number)]
        assert sorted(visited) == list(range(number))


def test_a_batch_holds_what_the_losses_reshape(views):
    batch = collate([views[index] for index in range(8)])
    assert batch["global_crops"].shape == (16, 1, 64, 64) and batch["local_crops"].shape == (16, 1, 32, 32)
    assert batch["masks"].shape == (16, 4, 4) and batch["masks"].dtype == torch.bool
    torch.testing.assert_close(batch["global_crops"][8 + 3], torch.from_numpy(views[3]["global_crops"][1]))
    assert batch["masks"].flatten(1).any(1).sum() <= 8  # half of the global crops
    assert (batch["global_tissue"][batch["masks"]] > 0).all()  # masks keep to the breast
    assert (batch["crop_tissue"] >= 0.5).all() or batch["crops_below_minimum"].sum() > 0


def test_slice_pairs_share_one_crop_of_neighbouring_slices(views):
    pairs = [sample["slice_pair"] for sample in (views[index] for index in range(48)) if sample["slice_pair"]]
    assert len(pairs) == 24  # half of the volumes are DBT
    slice_index = np.asarray(views.corpus.rows["slice_index"])
    volume_id = np.asarray(views.corpus.rows["volume_id"])
    for pair in pairs:
        anchor, neighbour = pair["rows"]
        assert volume_id[anchor] == volume_id[neighbour]
        assert abs(slice_index[anchor] - slice_index[neighbour]) == 1  # 6 mm slices: the next one only
    correlation = [np.corrcoef(*(each.ravel() for each in pair["pixels"]))[0, 1] for pair in pairs]
    assert np.median(correlation) > 0.8  # co-located
