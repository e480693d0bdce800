"""Regions of the study: the box is where the lesion is, other breasts have tissue there; features by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from made_inputs import random_encoder

from dataset_scripts.phantom.archive import PhantomParameters, acquire_dbt, simulate_breast, write_archive
from modeling_mammodino import MammoDinoImageProcessor
from training.studies.readout import MIN_TISSUE_FRACTION, Example, features_of, regions, whole_slices

PATCH, CANVAS = 14, (224, 140)
PARAMETERS = PhantomParameters(num_slices=6, height_px=128, width_px=96, pixel_spacing_mm=1.4, slice_spacing_mm=8)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Folder, table of volumes, image processor."""
    folder = tmp_path_factory.mktemp("phantom")
    table = pd.read_csv(write_archive(folder, 12, parameters=PARAMETERS))
    processor = MammoDinoImageProcessor(size=dict(zip(("height", "width"), CANVAS, strict=True)), patch_size=PATCH)
    return folder, table[table["kind"] == "dbt"].reset_index(drop=True), processor


def test_one_region_a_volume_with_pixels_and_tissue_of_the_same_place(archive):
    folder, table, processor = archive
    found = regions(table, folder, processor)
    assert [each.row for each in found] == list(range(len(table))) and set(table["lesion"]) == {0, 1}
    for each, lesion, frame in zip(found, table["lesion"], table["lesion_slice"].fillna(-1), strict=True):
        grid = each.tissue_mask.shape
        assert each.pixel_values.shape == (1, PATCH * grid[0], PATCH * grid[1]) and grid == each.weights.shape
        assert each.weights.min() >= 0 and each.weights.max() <= PATCH**2 + 1e-3 and each.weights.any()
        if lesion:
            image = processor(str(folder / table["file"][each.row]), slices_per_volume=0)
            whole = image["pixel_values"][int(frame), 0]
            places = np.lib.stride_tricks.sliding_window_view(whole, each.pixel_values.shape[1:])
            assert (places[::PATCH, ::PATCH] == each.pixel_values[0]).all(axis=(2, 3)).any()  # the lesion's own slice
        else:
            assert np.average(each.tissue_mask, weights=each.weights) >= MIN_TISSUE_FRACTION


def test_the_box_covers_the_lesion(archive):
    """Seen against the same breast without its lesion, what differs lies in the patches of the box."""
    folder, table, processor = archive
    row = int(np.flatnonzero(table["lesion"] == 1)[0])
    here = table.iloc[row]
    index = int(here["patient"].removeprefix("PHANTOM-"))
    with_it, without = (simulate_breast(PARAMETERS, 0, index, lesion=lesion) for lesion in (True, False))
    change = np.abs(acquire_dbt(with_it).astype(float) - acquire_dbt(without))[int(here["lesion_slice"])]
    y, x = np.unravel_index(change.argmax(), change.shape)
    assert here["x0"] <= x < here["x1"] and here["y0"] <= y < here["y1"]
    example = regions(table, folder, processor)[row]
    sides_px = np.array([here["x1"] - here["x0"], here["y1"] - here["y0"]], float)
    scale = np.sqrt(example.weights.sum() / sides_px.prod())
    assert 1.0 < scale < 2.5  # of the canvas over the file: nothing of the box is cut off


def test_a_file_that_cannot_be_used_is_named(archive, tmp_path):
    _, table, processor = archive
    with pytest.raises(ValueError, match="dbt.dcm"):
        regions(table, tmp_path, processor)
    with pytest.raises(ValueError, match=r"1 of 1 files cannot be used: .*none.dcm"):
        whole_slices([tmp_path / "none.dcm"], processor, 1)


@pytest.mark.parametrize("drops_background", [True, False])
def test_features_by_hand(drops_background):
    encoder, rng = random_encoder(image_size=56), np.random.default_rng(0)
    tissue = np.ones((4, 4), np.float32)
    tissue[:, 3] = 0
    weights = np.zeros((4, 4), np.float32)
    weights[1, 1], weights[2, 1] = 3, 1
    examples = [Example(row, rng.normal(size=(1, 56, 56)).astype(np.float32), tissue, weights) for row in (0, 1, 1)]
    found = features_of(encoder, examples, drops_background)
    tokens = []
    for each in examples:
        mask = torch.from_numpy(tissue)[None] if drops_background else None
        with torch.inference_mode():
            tokens.append(encoder(torch.from_numpy(each.pixel_values)[None], tissue_mask=mask).last_hidden_state[0])
    by_hand = []
    for each in tokens:
        patches = each[1 + encoder.config.num_register_tokens :].reshape(4, 4, -1)
        upper, lower = patches[1, 1], patches[2, 1]
        by_hand.append(torch.cat((each[0], 0.75 * upper + 0.25 * lower, torch.maximum(upper, lower))).numpy())
    np.testing.assert_allclose(found[0], by_hand[0], atol=1e-5)
    np.testing.assert_allclose(found[1], (by_hand[1] + by_hand[2]) / 2, atol=1e-5)
