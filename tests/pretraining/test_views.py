"""Crops, masks and neighbors over many random draws, and samples as pure functions of their index."""

import math
import random
from contextlib import nullcontext
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from dataset_scripts.corpus.reader import Corpus
from training.pretraining.monitoring import tissue_shares
from training.pretraining.recipe import ViewsRecipe
from training.pretraining.views import sample
from training.pretraining.views.crops import TissueTable, cut, downsample_2x, sample_boxes, tissue_aware_crops
from training.pretraining.views.masks import block_mask, maskable_patches, stratified_mask_ratios
from training.pretraining.views.order import neighbor_reach, sample_neighbor
from training.pretraining.views.sample import PretrainingViews, collate

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
        (grid,) = table.grids(box[None], (7, 5))
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


def test_no_box_leaves_a_image_that_is_narrower_than_any_aspect():
    boxes = sample_boxes(np.random.default_rng(0), 64, (900, 60), (0.9, 1.0), RATIO)
    assert len(boxes) >= 1 and (boxes[:, 2:] > boxes[:, :2]).all() and boxes[:, 3].max() <= 60


def test_tissue_aware_crops_hold_their_minimum_where_plain_ones_do_not(tissue):
    table, rng = TissueTable(tissue, (300, 200)), np.random.default_rng(0)
    aware = tissue_aware_crops(rng, table, SCALE, RATIO, 0.7, count=2000)
    plain = tissue_aware_crops(rng, table, SCALE, RATIO, 0.0, count=2000)
    assert len(aware.boxes) == 2000 and aware.fit.all() and (aware.tissue_fractions >= 0.7).all()
    np.testing.assert_allclose(aware.tissue_fractions, table.fraction(aware.boxes))
    assert (plain.tissue_fractions < 0.7).mean() > 0.3
    assert len({tuple(box) for box in aware.boxes}) > 1900  # they vary


def test_tissue_aware_crops_have_the_law_of_plain_crops_that_hold_the_minimum(tissue):
    """The same as drawing plain boxes one at a time until one holds it, for each crop of an image."""
    table, rng = TissueTable(tissue, (300, 200)), np.random.default_rng(0)
    drawn = [tissue_aware_crops(rng, table, SCALE, RATIO, 0.6, count=8) for _ in range(400)]
    boxes = sample_boxes(rng, 20000, (300, 200), SCALE, RATIO)
    kept = boxes[table.fraction(boxes) >= 0.6]
    for place in (0, 7):  # the first crop and the last alike
        crops = np.stack([each.boxes[place] for each in drawn])
        error = kept.std(axis=0) / np.sqrt(len(crops))
        assert (np.abs(crops.mean(axis=0) - kept.mean(axis=0)) < 4 * error).all()
        np.testing.assert_allclose(crops.std(axis=0), kept.std(axis=0), rtol=0.15)


def test_where_no_crop_fits_those_of_most_tissue_are_taken_and_said(tissue):
    table = TissueTable(tissue * 0.3, (300, 200))
    crops = tissue_aware_crops(np.random.default_rng(0), table, SCALE, RATIO, 0.9, count=3, rounds=1)
    boxes = sample_boxes(np.random.default_rng(0), 64, (300, 200), SCALE, RATIO)
    assert not crops.fit.any()
    np.testing.assert_allclose(crops.tissue_fractions, np.sort(table.fraction(boxes))[:-4:-1])


def test_a_large_crop_is_read_from_half_the_image_and_looks_the_same():
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (701, 503)).astype(np.uint8), (0, 0), 6)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    for dtype in (np.uint8, np.uint16):
        whole = image.astype(dtype) * (257 if dtype == np.uint16 else 1)
        half = downsample_2x(whole)
        assert half.shape == (350, 251) and half.dtype == dtype
        boxes = sample_boxes(rng, 20, whole.shape, (0.4, 1.0), RATIO)
        for box in (*boxes, *(boxes // 2 * 2)):
            fine, coarse = (cut(whole, box, 98, each).astype(float) / np.iinfo(dtype).max for each in (None, half))
            shift = 0.02 if (box % 2).any() else 0.004  # odd sides move by a pixel
            assert np.abs(fine - coarse).mean() < shift < 0.1 < fine.std(), box
    small = np.array([3, 5, 190, 200])  # less than twice 98 high: the whole image is read
    assert np.array_equal(cut(image, small, 98), cut(image, small, 98, np.zeros_like(downsample_2x(image))))


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


def dinov2_mask(draw: random.Random, side: int, num_masked: int) -> np.ndarray:
    """Oracle: facebookresearch/dinov2, dinov2/data/masking.py, patch by patch; max_num_patches is half the grid."""
    mask, count = np.zeros((side, side), bool), 0
    while count < num_masked:
        most, added = min(num_masked - count, side * side / 2), 0
        for _ in range(10):
            area = draw.uniform(4, most)
            aspect = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if width < side and height < side:
                top, left = draw.randint(0, side - height), draw.randint(0, side - width)
                patches = [(y, x) for y in range(top, top + height) for x in range(left, left + width)]
                new = [each for each in patches if not mask[each]]
                if 0 < len(new) <= most:
                    for each in new:
                        mask[each] = True
                    added = len(new)
                    break
        if not added:
            break
        count += added
    return mask


@pytest.mark.parametrize("ratio", [0.03, 0.3, 0.5, 0.8])
def test_without_tissue_masks_have_the_law_of_dinov2s_generator(ratio):
    """Means over many masks: patches masked, where they lie, and how they hang together."""
    side, count = 8, 3000
    rng, draw, everywhere = np.random.default_rng(1), random.Random(1), np.ones((side, side), bool)
    ours = np.stack([block_mask(rng, ratio, everywhere) for _ in range(count)])
    theirs = np.stack([dinov2_mask(draw, side, int(ratio * side**2)) for _ in range(count)])

    def signs(masks: np.ndarray) -> np.ndarray:
        """(n, signs) of masks (n, h, w): size, squared size, pairs down and across, each patch."""
        size = masks.sum(axis=(1, 2)).astype(float)
        down = (masks[:, 1:] & masks[:, :-1]).sum(axis=(1, 2))
        across = (masks[:, :, 1:] & masks[:, :, :-1]).sum(axis=(1, 2))
        return np.column_stack((size, size**2, down, across, masks.reshape(len(masks), -1)))

    ours, theirs = signs(ours), signs(theirs)
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / count) + 1e-9
    deviations = np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) / error
    assert deviations.max() < 4.5 and (deviations < 2).mean() > 0.85, deviations


def test_a_mask_covers_its_ratio_of_the_breast_and_less_of_the_crop():
    tissue = np.zeros((16, 16), np.float32)
    tissue[:, :8] = 1
    allowed = maskable_patches(tissue, tissue_aware=True)
    masks = np.stack([block_mask(np.random.default_rng(seed), 0.5, allowed) for seed in range(50)])
    assert masks.mean() == pytest.approx(0.25, abs=0.01) and masks[:, :, :8].mean() == pytest.approx(0.5, abs=0.02)
    batch = {
        "masks": torch.from_numpy(np.concatenate((masks, np.zeros_like(masks)))),  # half of the crops are not masked
        "global_tissue": torch.from_numpy(tissue).expand(100, 16, 16),
        "crop_tissue": torch.ones(1),
        "crops_below_minimum": torch.zeros(1),
        "slice_pairs": torch.zeros(0),
    }
    shares = tissue_shares(batch)
    assert shares["tissue_in_masks"] == 1
    assert shares["masked_fraction"] == pytest.approx(masks.mean())
    assert shares["masked_tissue_fraction"] == pytest.approx(2 * masks.mean())


def test_masks_are_blocks():
    """A masked patch has masked neighbors far more often than at random."""
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


def test_neighbors_are_near_and_of_both_sides():
    rng, slices = np.random.default_rng(0), np.arange(20)
    recipe = ViewsRecipe(slice_max_distance_mm=3.0, slice_max_distance_slices=2)
    drawn = {sample_neighbor(rng, slices, 10, neighbor_reach(recipe, 1.0)) for _ in range(300)}
    assert drawn == {7, 8, 9, 11, 12, 13}
    assert {sample_neighbor(rng, slices, 0, neighbor_reach(recipe, None)) for _ in range(100)} == {1, 2}
    assert {sample_neighbor(rng, slices, 5, neighbor_reach(recipe, 10.0)) for _ in range(100)} == {4, 6}  # at least one
    assert sample_neighbor(rng, np.array([0, 40]), 0, neighbor_reach(recipe, 1.0)) is None  # those between are missing


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
        visited = [views.order[epoch * number + place] for place in range(number)]
        assert sorted(visited) == list(range(number))


def test_a_batch_holds_what_the_losses_reshape(views):
    batch = collate([views[index] for index in range(8)])
    assert batch["global_crops"].shape == (16, 1, 64, 64) and batch["local_crops"].shape == (16, 1, 32, 32)
    assert batch["masks"].shape == (16, 4, 4) and batch["masks"].dtype == torch.bool
    assert all(batch[name].dtype == torch.uint8 for name in ("global_crops", "local_crops", "slice_pairs"))
    torch.testing.assert_close(batch["global_crops"][8 + 3], torch.from_numpy(views[3]["global_crops"][1]))
    assert batch["masks"].flatten(1).any(1).sum() <= 8  # half of the global crops
    assert (batch["global_tissue"][batch["masks"]] > 0).all()  # masks keep to the breast
    assert (batch["crop_tissue"] >= 0.5).all() or batch["crops_below_minimum"].sum() > 0


class OnDevice:
    """A batch's tensor on a GPU that is not there; `done` is what was asked of it and of streams."""

    is_cuda = True

    def __init__(self, number: int, done: list):
        self.number, self.done = number, done

    def record_stream(self, stream):
        self.done.append(("in use", self.number, stream))


def test_a_batch_is_copied_on_a_stream_of_its_own_while_the_one_before_is_computed_with(monkeypatch):
    done: list = []
    copies = SimpleNamespace(record_event=lambda: done[-1])
    computing = SimpleNamespace(wait_event=lambda event: done.append(("wait for", event)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext() if stream is copies else None)

    def send(batch, device, non_blocking):
        assert non_blocking
        done.append(("copy", batch))
        return {"crops": OnDevice(batch, done)}

    monkeypatch.setattr(sample, "send_to_device", send)
    for batch in sample.on_device(range(3), torch.device("cuda")):
        done.append(("compute", batch["crops"].number))
    ready = [[("wait for", ("copy", each)), ("in use", each, computing), ("compute", each)] for each in range(3)]
    assert done == [("copy", 0), ("copy", 1), *ready[0], ("copy", 2), *ready[1], *ready[2]]
    monkeypatch.undo()
    batches = [{"crops": torch.ones(2)}, {"crops": torch.zeros(2)}]
    assert list(sample.on_device(batches, torch.device("cpu"))) == batches  # nothing to copy


def test_slice_pairs_share_one_crop_of_neighboring_slices(views):
    pairs = [sample["slice_pair"] for sample in (views[index] for index in range(48)) if sample["slice_pair"]]
    assert len(pairs) == 24  # half of the volumes are DBT
    slice_index = np.asarray(views.corpus.rows["slice_index"])
    volume_id = np.asarray(views.corpus.rows["volume_id"])
    for pair in pairs:
        anchor, neighbor = pair["rows"]
        assert volume_id[anchor] == volume_id[neighbor]
        assert abs(slice_index[anchor] - slice_index[neighbor]) == 1  # 6 mm slices: the next one only
    correlation = [np.corrcoef(*(each.ravel() for each in pair["pixels"]))[0, 1] for pair in pairs]
    assert np.median(correlation) > 0.8  # co-located
