"""BCS-DBT: the lists' views set wrong headers and turned pixels right, once a volume; odd lists are named."""

import csv
import pickle
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from bcs_dbt_files import (
    CLASSIC,
    DESCRIPTIVE,
    LEFT,
    LISTS,
    RIGHT,
    SERIES,
    UNWINDOWED,
    half_turn,
    write_list,
    write_volume,
)
from dicom_builders import item

from dataset_scripts.corpus.bcs_dbt_volumes import COLUMNS, BcsDbtViews, View, image_side
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.dicom import iter_slices
from modeling_mammodino.image_io import ImageFile, InvalidImageError


@pytest.fixture
def listed(tmp_path):
    """A function from a View to BcsDbtViews that list the file above under it."""
    return lambda view: BcsDbtViews.from_csv(write_list(tmp_path / "list.csv", (view, CLASSIC, DESCRIPTIVE)))


@pytest.mark.parametrize("header_side", ["L", "R"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("text", "view", "upright"), [("lcc", ("L", "CC"), LEFT), ("rmlo2", ("R", "MLO"), RIGHT)])
def test_wrong_sides_and_turned_pixels_are_set_right(tmp_path, listed, text, view, upright, turned, header_side):
    assert image_side(upright[0]) == view[0]
    path = write_volume(tmp_path / "any" / "1-1.dcm", half_turn(upright) if turned else upright, header_side)
    views = listed(text)
    slices = list(views.correct(path, iter_slices(path, UNWINDOWED)))
    np.testing.assert_array_equal([each.pixels for each in slices], upright)
    assert {(each.laterality, each.view) for each in slices} == {view}
    assert all(each.pixels.flags.c_contiguous for each in slices)
    assert [each.slice_index for each in slices] == [0, 1, 2, 3]
    assert views.counts == {"known": 1, "turned": int(turned)}


def test_files_that_are_not_listed_stay_as_they_are_and_are_counted(tmp_path, listed):
    path = write_volume(tmp_path / "1-1.dcm", RIGHT, "R", series="1.2.3")
    views = listed("lcc")
    assert views.view_of(path) is None
    for each, plain in zip(views.correct(path, iter_slices(path)), iter_slices(path), strict=True):
        assert each.laterality == "R" and np.array_equal(each.pixels, plain.pixels)
    (tmp_path / "note.png").write_bytes(b"no DICOM file")
    views.correction(tmp_path / "note.png")
    assert views.counts == {"unknown": 2}


def test_the_first_frame_of_the_file_speaks_for_the_volume(tmp_path, listed):
    """Later slices with a marker on the far edge, and frames in reverse order of position."""
    slices = LEFT.copy()
    slices[1:, :, -1] = 4095
    path = write_volume(tmp_path / "1-1.dcm", slices, "L")
    dataset = pydicom.dcmread(path)
    groups = dataset.PerFrameFunctionalGroupsSequence
    positions = [group.PlanePositionSequence[0].ImagePositionPatient for group in groups]
    for group, position in zip(groups, reversed(positions), strict=True):
        group.PlanePositionSequence = [item(ImagePositionPatient=position)]
    dataset.save_as(path)
    views = listed("lcc")
    seen = [each.pixels for each in views.correct(path, iter_slices(path, UNWINDOWED))]
    np.testing.assert_array_equal(seen, slices[::-1])
    assert views.counts["turned"] == 0


@pytest.mark.parametrize("where", [CLASSIC, DESCRIPTIVE, f"manifest-161/{DESCRIPTIVE}", CLASSIC.split("/", 1)[1]])
def test_without_a_series_in_the_header_the_path_decides(tmp_path, listed, where):
    path = write_volume(tmp_path / where, LEFT, "R", series="")
    views = listed("lcc")
    assert views.view_of(path) == views.view_of(str(path)) == View("L", "CC")
    with open(path, "rb") as stream:
        assert views.view_of(ImageFile(stream, "file 3.dcm")) is None
        windows = "D:\\" + where.replace("/", "\\")
        assert views.view_of(ImageFile(stream, "file 3.dcm", identity=windows)) == View("L", "CC")
    assert views.view_of(write_volume(tmp_path / "elsewhere" / "1-1.dcm", LEFT, "R", series="")) is None


def test_windows_separators_in_the_list(tmp_path):
    rows = [("lcc", CLASSIC.replace("/", "\\"), DESCRIPTIVE.replace("/", "\\"))]
    views = BcsDbtViews.from_csv(write_list(tmp_path / "list.csv", *rows))
    assert views.view_of(write_volume(tmp_path / DESCRIPTIVE, LEFT, "R", series="")) == View("L", "CC")
    assert views.view_of(write_volume(tmp_path / "1-1.dcm", LEFT, "R")) == View("L", "CC")


def test_two_views_in_one_series_are_told_apart_by_the_path(tmp_path):
    second = CLASSIC.replace("1-1.dcm", "1-2.dcm")
    rows = [("lcc", CLASSIC, DESCRIPTIVE), ("rcc", second, DESCRIPTIVE.replace("1-1.dcm", "1-2.dcm"))]
    views = BcsDbtViews.from_csv(write_list(tmp_path / "list.csv", *rows))
    assert views.view_of(write_volume(tmp_path / second, RIGHT, "L")) == View("R", "CC")
    assert views.view_of(write_volume(tmp_path / "1-1.dcm", RIGHT, "L")) is None


def test_several_lists_and_other_processes(tmp_path):
    other = CLASSIC.replace(SERIES, "1.2.9"), DESCRIPTIVE.replace("20566", "20567")
    one = write_list(tmp_path / "train.csv", ("lcc", CLASSIC, DESCRIPTIVE))
    two = write_list(tmp_path / "test.csv", ("rmlo", *other))
    views = pickle.loads(pickle.dumps(BcsDbtViews.from_csv([one, str(two)])))
    path = write_volume(tmp_path / "1-1.dcm", LEFT, "L", series="1.2.9")
    assert views.view_of(path) == View("R", "MLO")
    corrected = list(map(pickle.loads(pickle.dumps(views.correction(path))), iter_slices(path)))
    assert {each.laterality for each in corrected} == {"R"}


def test_the_image_processor_sees_a_turned_file_as_the_upright_one(tmp_path, listed):
    processor = MammoDinoImageProcessor()
    upright = write_volume(tmp_path / "upright.dcm", LEFT, "L", series="1.2.3")
    turned = write_volume(tmp_path / "turned.dcm", half_turn(LEFT), "R")
    expected = list(processor.render_source(upright, (64, 64)))
    seen = list(processor.render_source(turned, (64, 64), correct=listed("lcc").correction(turned)))
    assert len(seen) == len(expected) == 4
    for (mammogram, rendered), (_, right) in zip(seen, expected, strict=True):
        assert mammogram.laterality == "L"
        np.testing.assert_array_equal(rendered.image, right.image)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("PatientID,StudyUID,View,descriptive_path\n", "no column classic_path"),
        ("", "no column PatientID"),
        ("PatientID,StudyUID,View,Normal\nP,S,lcc,1\n", "no column descriptive_path"),
        (f"{','.join(COLUMNS)}\nP,S,left cc,a/b/c/d,a/b/1.2/d\n", "line 2: View is 'left cc'"),
        (f"{','.join(COLUMNS)}\nP,S,lcc,a/b/c/d\n", "line 2: classic_path is empty"),
        (f"{','.join(COLUMNS)}\nP,S,,a/b/c/d,a/b/1.2/d\n", "line 2: View is empty"),
        (f"{','.join(COLUMNS)}\nP,S,lcc,a/b/c/d,b/1.2/d\n", "line 2: classic_path has 3 parts"),
        (f"{','.join(COLUMNS)}\nP,S,lcc,a/b/c/d,a/b/c/d\n", "classic_path: 'c' is not a SeriesInstanceUID"),
        (f"{','.join(COLUMNS)}\nP,S,lcc,a/b/c/d,a/b/1.2/d\nP,S,rcc,a/b/c/e,a/b/1.2/d\n", "line 3: View contradicts"),
        (b"PK\x03\x04\xff\xfe\x80 an xlsx", "not a CSV file"),
    ],
)
def test_odd_lists_are_named(tmp_path, content, words):
    path = tmp_path / "paths.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        BcsDbtViews.from_csv(path)
    assert words in str(caught.value) and str(path) in str(caught.value) and "as downloaded" in str(caught.value)


def test_a_listed_volume_that_cannot_be_read_is_refused(tmp_path, listed):
    path = write_volume(tmp_path / "1-1.dcm", LEFT, "L")
    path.write_bytes(path.read_bytes()[:-100])  # DBT-P02308 is cut short
    with pytest.raises(InvalidImageError, match="truncated"):
        listed("lcc").correction(path)


@pytest.mark.skipif(not LISTS.is_dir(), reason=f"the real lists and slices are not in {LISTS}")
def test_real_views_and_slices():
    lists = {name: list(csv.DictReader(open(LISTS / name))) for name in (path.name for path in LISTS.glob("*.csv"))}
    views = [row["View"] for rows in lists.values() for row in rows if row["View"]]
    assert len(views) > 19000 and all(map(View.parse, views))
    boxed = [row for row in lists["slices.csv"] if row["View"]]
    assert len(boxed) == 51  # exported with the collection's own code, so turned already
    for row in boxed:
        image = cv2.imread(str(LISTS / "slices" / Path(row["file"]).name), cv2.IMREAD_GRAYSCALE)
        assert image_side(image) == View.parse(row["View"]).laterality
