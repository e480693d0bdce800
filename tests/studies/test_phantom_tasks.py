"""What an archive asks: one volume a patient, the lesion at its own slice and place, other breasts where they have
tissue; hand-crafted features tell drawn lesions from tissue."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from dataset_scripts.phantom.archive import PhantomParameters, acquire_dbt, simulate_breast, write_archive
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.rendering import Placement
from training.evaluation.readout import MIN_TISSUE_FRACTION, NUM_RINGS, Canvas, region_features, whole_features
from training.studies.hand_crafted import HandCraftedReader
from training.studies.phantom_tasks import TASKS, PhantomImages, predictions

PARAMETERS = PhantomParameters(num_slices=6, height_px=128, width_px=96, pixel_spacing_mm=1.4, slice_spacing_mm=8)
PROCESSOR = MammoDinoImageProcessor(size={"height": 224, "width": 140}, patch_size=14)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> PhantomImages:
    labels = write_archive(tmp_path_factory.mktemp("phantom"), 12, parameters=PARAMETERS, views_per_patient=2)
    return PhantomImages(labels, PROCESSOR)


def test_one_volume_a_patient_of_either_view(images):
    assert images.table["patient"].is_unique and len(images.table) == 12 == len(images.centers)
    assert set(images.table["view"]) == {"CC", "MLO"} and set(images.table["kind"]) == {"dbt"}


def test_the_center_is_where_the_lesion_is(images):
    """Seen against the same breast without its lesion."""
    row = int(np.flatnonzero(images.table["lesion"] == 1)[0])
    here = images.table.iloc[row]
    number, view = int(here["patient"].removeprefix("PHANTOM-")), here["view"]
    with_it, without = (
        acquire_dbt(simulate_breast(PARAMETERS, 0, number, lesion=each, view=view)).astype(float)
        for each in (True, False)
    )
    change = np.abs(with_it - without)[int(here["lesion_slice"])]
    y, x = map(float, np.unravel_index(change.argmax(), change.shape))
    placement = images.regions[row].placement
    place = placement.boxes(np.array([[x, y, x, y]]))[0]
    size = placement.boxes(here[["x0", "y0", "x1", "y1"]].to_numpy(float)[None])[0]
    assert np.abs(images.centers[row] - place[[1, 0]]).max() < 0.5 * max(size[2] - size[0], size[3] - size[1])


def test_breasts_without_a_lesion_are_seen_where_they_have_tissue(images):
    for row in np.flatnonzero(images.table["lesion"] == 0):
        y, x = (images.centers[row] // PROCESSOR.patch_size).astype(int)
        assert images.regions[row].tissue[y, x] >= MIN_TISSUE_FRACTION - 0.2


def test_predictions_of_each_task_and_head(images):
    reader = HandCraftedReader((224, 140), 14)
    found = predictions(reader, images, images)
    for name, task in TASKS.items():
        rows = found[(found["task"] == name) & (found["head"] == "linear")]
        assert len(rows) == (images.table["lesion"].sum() if task.of_lesions else 12)
        assert np.allclose(rows.filter(like="p_").dropna(axis=1, how="all").sum(axis=1), 1)
    assert isinstance(found, pd.DataFrame)


def test_a_file_that_cannot_be_used_is_named(images, tmp_path):
    table = images.table.assign(file="none.dcm")
    table.to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(ValueError, match=r"12 of 12 files cannot be used: .*none.dcm"):
        PhantomImages(tmp_path / "labels.csv", PROCESSOR)


def test_hand_crafted_features_tell_specks_from_noise():
    rng, has_specks = np.random.default_rng(0), np.arange(40) < 20
    images = 100 + 12 * rng.normal(size=(40, 96, 64)) + 20 * rng.normal(size=(40, 1, 1))  # brightness says nothing
    images[:20, 32:64:8, 16:48:8] += 80
    tissue = np.ones((12, 8), np.float32)
    canvases = [Canvas(each.clip(0, 255).astype(np.uint8), tissue, Placement(1, 0, 1, 0)) for each in images]
    reader = HandCraftedReader((96, 64), 8)
    found = region_features(reader, canvases, np.full((40, 2), (48.0, 32.0)))
    width = reader.targets.num_statistics
    assert found.shape == (40, NUM_RINGS * width) and np.isfinite(found).all()
    middle = found[:, 2 * width : 3 * width]  # rings are narrower than a patch: the first may be empty
    assert max(roc_auc_score(has_specks, each) for each in middle.T) > 0.98
    brightness = middle[:, 0]
    assert roc_auc_score(has_specks, brightness) < 0.9
    whole = whole_features(reader, canvases)
    assert whole.shape == (40, 5 * width + 1) and np.isfinite(whole).all()


def test_statistics_are_those_that_dense_regression_predicts():
    reader = HandCraftedReader((96, 64), 8)
    pixels = torch.rand(1, 1, 96, 64)
    tissue = torch.ones(1, 12, 8)
    expected = reader.targets.statistics(pixels[:, 0], torch.ones(1, 96, 64, dtype=torch.bool)).view(1, 12, 8, -1)
    torch.testing.assert_close(reader.places(pixels, tissue, tissue > 0), expected)
