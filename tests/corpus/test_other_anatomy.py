"""The schema on another anatomy: an axial CT stack from DICOM files through a corpus and a pretraining run."""

import json

import numpy as np
import pytest
from dicom_builders import CT, build, save
from pretrain_runs import CROPS, TINY

from dataset_scripts.corpus.build import main as build_corpus
from dataset_scripts.corpus.reader import Corpus
from dataset_scripts.corpus.verify import verify_corpus
from modeling_mammodino import InvalidImageError, MammoDinoImageProcessor
from modeling_mammodino.breast_segmentation import find_body
from modeling_mammodino.tools.model_files import check_recipe
from training.pretrain import train
from training.pretraining.recipe import ViewsRecipe, load_recipe
from training.pretraining.views.order import neighbor_reach, sample_neighbor

SHAPE, SPACING_MM = (128, 160), 5.0


def axial_slice(z: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A made-up trunk at height z in 0..1, Hounsfield units (H, W) int16, and its mask: soft tissue with two lungs and
    a spine, on a table."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] / SHAPE[0] - [[[0.47]], [[0.625]]]

    def ellipse(at, axes):
        return ((y - at[0]) / axes[0]) ** 2 + ((x - at[1]) / axes[1]) ** 2 < 1

    body = ellipse((0, 0), (0.28 + 0.05 * z, 0.42 + 0.05 * z))
    lungs = (
        ellipse((-0.03, -0.2), (0.15, 0.12 * z)) | ellipse((-0.03, 0.2), (0.15, 0.12 * z)) if z > 0 else ~body & False
    )
    table = (y > 0.42) & (y < 0.44)
    units = np.full(SHAPE, -1000.0)
    units[body | table], units[lungs], units[ellipse((0.2, 0), (0.06, 0.05))] = 40, -850, 700
    return (units + 15 * rng.normal(size=SHAPE)).astype(np.int16), body


def write_series(folder, patient: int, num_slices: int = 6) -> None:
    """One file a slice, in any order of names, as scanners export them."""
    for index in range(num_slices):
        units, _ = axial_slice(index / num_slices, 100 * patient + index)
        dataset = build(
            np.clip(units + 1024, 0, None).astype(np.uint16),
            16,
            SOPClassUID=CT,
            Modality="CT",
            SOPInstanceUID=f"1.2.3.{patient}.{index + 1}",
            SeriesInstanceUID=f"1.2.4.{patient}",
            StudyInstanceUID=f"1.2.5.{patient}",
            PatientID=f"trunk {patient}",
            RescaleIntercept="-1024",
            RescaleSlope="1",
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            ImagePositionPatient=[0, 0, index * SPACING_MM],
            InstanceNumber=index + 1,
        )
        save(dataset, folder, f"{(index * 5) % num_slices}_{patient}.dcm")


@pytest.mark.parametrize("z", [0.0, 0.5, 1.0])
def test_the_body_is_found_with_its_lungs_and_without_the_table(z):
    units, truth = axial_slice(z, seed=0)
    for image in (units, units.astype(np.float32), ((units + 1024) // 16).clip(0, 255).astype(np.uint8)):
        found = find_body(image)
        overlap = (found.mask & truth).sum() / (found.mask | truth).sum()
        assert overlap > 0.97 and not found.mask[-10:].any()
        assert 0.8 < found.confidence < 1 and found.outside_fraction == pytest.approx(1 - found.confidence)
    assert found.warning  # the table


def test_no_body_is_found_in_nothing():
    for image in (np.zeros((64, 64), np.uint8), np.full((64, 64), np.nan, np.float32), np.zeros((0, 4), np.uint8)):
        assert not find_body(image).mask.any() and find_body(image).confidence == 0
    speck = np.zeros((64, 64), np.uint8)
    speck[30:33, 30:33] = 255
    with pytest.raises(InvalidImageError, match="no body found"):
        MammoDinoImageProcessor(tissue_finder="body")(speck)


def test_a_finder_is_a_saved_setting_that_is_checked(tmp_path):
    with pytest.raises(ValueError, match="tissue_finder='lung': must be one of breast, body"):
        MammoDinoImageProcessor(tissue_finder="lung")
    MammoDinoImageProcessor(tissue_finder="body").save_pretrained(tmp_path)
    again = MammoDinoImageProcessor.from_pretrained(tmp_path)
    units, truth = axial_slice(0.5, seed=0)
    rows, columns = np.flatnonzero(truth.any(axis=1)), np.flatnonzero(truth.any(axis=0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1  # the body fills the width of the canvas
    expected = truth.sum() / (height * width) * (height / width)
    assert float(again(units.astype(np.float32))["tissue_mask"].mean()) == pytest.approx(expected, rel=0.1)
    assert again.tissue_finder == "body"


def test_a_body_is_never_flipped():
    units, _ = axial_slice(0.5, seed=0)
    lopsided = units.astype(np.float32)
    lopsided[:, 90:] = -1000
    processor = MammoDinoImageProcessor(tissue_finder="body", do_clahe=False)
    left, right = (processor(each)["tissue_mask"][0] > 0 for each in (lopsided, lopsided[:, ::-1]))
    # the straight side is cut off at the right, and stays there; on the mirror image it stays at the left
    for mask, straight in ((left, -1), (right, 0)):
        columns = mask[:, np.flatnonzero(mask.any(axis=0))]
        assert columns[:, straight].sum() > 2 * columns[:, -1 - straight].sum()


def test_axial_neighbors_are_the_slices_above_and_below():
    recipe, rng, slices = ViewsRecipe(slice_pairing="axial"), np.random.default_rng(0), np.arange(20)
    assert (recipe.slice_max_distance_mm, recipe.slice_max_distance_slices) == (3.0, 2)

    def pair(slices: np.ndarray, position: int, spacing_mm: float | None) -> int | None:
        return sample_neighbor(rng, slices, position, neighbor_reach(recipe, spacing_mm))

    assert {pair(slices, 10, 0.5) for _ in range(100)} == {9, 11}  # thin slices: still the next ones
    assert {pair(slices, 0, None) for _ in range(20)} == {1}
    assert pair(slices, 10, 5.0) is None  # too thick to show the same thing
    assert pair(np.array([0, 2]), 0, 1.0) is None  # the slice between is missing


@pytest.mark.slow
def test_a_pretraining_run_on_ct(tmp_path):
    (tmp_path / "ct").mkdir()
    for patient in range(1, 5):
        write_series(tmp_path / "ct", patient)
    build_corpus(
        [str(tmp_path / "ct"), "--output", str(tmp_path / "corpus"), "--tissue_finder", "body", "--num_proc", "1"]
    )
    assert verify_corpus(tmp_path / "corpus") == []
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.num_volumes == 4 and len(corpus.rows) == 24 and set(corpus.kinds) == {"unknown"}
    assert corpus.slice_indices(corpus.rows_of(2)).tolist() == list(range(6)) and corpus.slice_spacing_mm(0) == 5
    _, tissue = corpus.image(5)
    _, truth = axial_slice(5 / 6, seed=105)
    rows, columns = np.flatnonzero(truth.any(axis=1)), np.flatnonzero(truth.any(axis=0))
    assert tissue.mean() == pytest.approx(truth[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean(), abs=0.1)

    axial = ["--slice_pairing", "axial", "--slice_max_distance_mm", "6", "--kind_weights", "unknown=1"]
    where = ["--corpus", str(tmp_path / "corpus"), "--output_dir", str(tmp_path / "run")]
    encoder = train(load_recipe([CROPS, *where, *TINY, *axial, "--max_steps", "3", "--save_steps", "3"]))
    lines = [json.loads(line) for line in (tmp_path / "run" / "logs" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(np.isfinite(list(line.values())).all() for line in lines)
    assert all(line["slice_pairs"] == 8 and line["loss_adjacent_slice"] > 0 for line in lines)
    assert all(line["tissue_in_crops"] > 0.5 for line in lines)
    assert not list(check_recipe((encoder / "recipe.yaml").read_bytes()))  # may be published, its weights of kinds too
    processor = MammoDinoImageProcessor.from_pretrained(encoder)
    assert processor.tissue_finder == "body"
    mask = processor(sorted((tmp_path / "ct").iterdir())[0])["tissue_mask"]
    assert 0.1 < mask.mean() < 0.9
