"""Labeled data sets for `datasets`: images without loss, refusals counted, a cache that goes by content."""

import io
import logging
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pydicom
import pytest
from bcs_dbt_files import CLASSIC, DESCRIPTIVE, RIGHT, half_turn, write_list, write_volume
from dicom_builders import RAMP, build, save, volume
from made_inputs import draw_breast
from PIL import Image

import dataset_scripts.benchmarks  # noqa: F401 (makes the names known to load_dataset)
from dataset_scripts import benchmarks as benchmark_names
from dataset_scripts.benchmarks.builder import REFUSED, BenchmarkBuilder, BenchmarkImageReader, as_png
from dataset_scripts.benchmarks.task import load_task
from dataset_scripts.corpus.reader import decode_png
from modeling_mammodino.dicom import iter_slices
from modeling_mammodino.image_io import InvalidImageError

datasets.disable_progress_bars()


@pytest.fixture
def build_rows(tmp_path):
    """A function that builds a data set and returns its rows by split."""

    def build_rows(name, data_dir, config=None, num_proc=None, **options):
        builder = BenchmarkBuilder(
            cache_dir=str(tmp_path / "cache"), dataset_name=name, config_name=config, data_dir=str(data_dir), **options
        )
        builder.download_and_prepare(num_proc=num_proc)
        return builder.as_dataset()

    return build_rows


@pytest.fixture
def own(tmp_path):
    """A table of 30 patients with an image each, a third of them with cancer."""
    folder = tmp_path / "own"
    folder.mkdir()
    for number in range(30):
        Image.fromarray(draw_breast(64, 48, seed=number)).save(folder / f"p{number}.png")
    rows = [{"patient_id": f"p{n}", "path": f"p{n}.png", "cancer": int(n % 3 == 0)} for n in range(30)]
    pd.DataFrame(rows).to_csv(folder / "index.csv", index=False)
    return folder


def stored(row):
    return np.asarray(row["image"])


def test_stored_values_come_back_from_a_image(phantom_archive, build_rows):
    """The phantom's window maps its 12 bits onto the whole range, so that each value can be told from its image."""
    rows = build_rows("phantom", phantom_archive)["train"]  # no official split: all in train
    assert len(rows) == 12 * (4 + 1) and set(rows["split"]) == {"train"}
    for row in rows.select(range(0, len(rows), 7)):
        pixels = pydicom.dcmread(phantom_archive / row["path"]).pixel_array
        frame = pixels if row["slice_index"] == -1 else pixels[row["slice_index"]]
        image = stored(row)
        assert image.dtype == np.uint16
        np.testing.assert_array_equal(np.rint(image / 65535 * 4095), frame)
        assert row["num_slices"] == (1 if row["slice_index"] == -1 else 6)
    assert {row["slice_index"] for row in rows if row["num_slices"] == 6} == {0, 2, 3, 5}


def test_labels_and_splits_are_those_of_the_task(phantom_archive, build_rows):
    built, task = build_rows("phantom", phantom_archive, "lesion"), load_task("phantom", phantom_archive, "lesion")
    assert built["train"].features["label"].names == list(task.classes)
    for split in ("train", "validation", "test"):
        table = task.table[task.table["split"] == split].set_index("image_id")
        assert set(built[split]["image_id"]) == set(table.index)
        assert all(row["label"] == table["label"][row["image_id"]] for row in built[split].remove_columns("image"))
    every = build_rows("phantom", phantom_archive)["train"].remove_columns("image")
    assert every.features["density_dense"].names == ["not dense", "dense"]
    for row in every:
        assert row["density_four"] == "ABCD".index(row["density"]) and row["lesion_simulated"] == row["lesion"]
        assert (row["lesion_type_simulated"] is None) == (not row["lesion_types"])


def test_boxed_slices_have_their_boxes_and_no_others(phantom_archive, build_rows):
    rows = build_rows("phantom", phantom_archive, boxed_slices=True)["train"].remove_columns("image")
    volumes = [row for row in rows if row["num_slices"] == 6]
    for row in volumes:
        assert [box["slice"] for box in row["boxes"]] == ([row["slice_index"]] if row["lesion"] else [])
    ill = [row["image_id"] for row in volumes if row["lesion"]]
    assert ill and len(set(ill)) == len(ill)  # one slice each
    assert sum(not row["lesion"] for row in volumes) == 4 * (12 - len(ill))
    spread = build_rows("phantom", phantom_archive, slices_per_volume=0)["train"].remove_columns("image")
    assert sum(len(row["boxes"]) for row in spread if row["num_slices"] == 6) == len(ill)
    assert len(spread) == 12 * 7


def test_slices_are_numbered_as_frames_of_the_file(tmp_path):
    """Frames that lie in reverse order of position: box and number count frames, whatever their place."""
    path = save(volume(levels=(5, 6, 7, 8), positions=(3, 2, 1, 0), shape=(40, 40)), tmp_path)
    box = {"x0": 1.0, "y0": 1.0, "x1": 2.0, "y1": 2.0, "slice": 1, "label": "mass"}
    every = BenchmarkImageReader(slices_per_volume=0).read(path, [box])
    assert [each.slice_index for each in every] == [3, 2, 1, 0]
    assert [decode_png(each.png)[0, 0] for each in every] == [807, 707, 607, 507]
    assert [len(each.boxes) for each in every] == [0, 0, 1, 0]
    (one,) = BenchmarkImageReader(boxed_slices=True).read(path, [box])
    assert one.slice_index == 1 and decode_png(one.png)[0, 0] == 607 and one.boxes == [box]
    assert all(each.boxes is None for each in BenchmarkImageReader().read(path, None))
    with pytest.raises(InvalidImageError, match="a box is on slice 4 of 4"):
        BenchmarkImageReader().read(path, [{**box, "slice": 4}])


def test_monochrome1_window_and_modality_are_applied(tmp_path):
    plain = save(build(RAMP, WindowCenter=2048, WindowWidth=4096), tmp_path, "plain.dcm")
    inverse = save(build(4095 - RAMP, 12, "MONOCHROME1", WindowCenter=2048, WindowWidth=4096), tmp_path, "inverse.dcm")
    scaled = save(
        build(RAMP, WindowCenter=1, WindowWidth=4, RescaleSlope=0.001, RescaleIntercept=-1), tmp_path, "s.dcm"
    )
    read = {path: decode_png(BenchmarkImageReader().read(path)[0].png) for path in (plain, inverse, scaled)}
    np.testing.assert_array_equal(read[plain], np.rint(RAMP / 4095 * 65535))
    np.testing.assert_array_equal(np.rint(read[inverse] / 65535 * 4095), RAMP)
    seen = (RAMP * 0.001 - 1 - 0.5) / 3 + 0.5  # PS3.3 C.11.2.1.2.1
    np.testing.assert_allclose(read[scaled], np.clip(seen, 0, 1) * 65535, atol=0.6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_images_without_a_window_stay_as_they_are(tmp_path, dtype):
    plane = draw_breast(80, 60, seed=1)
    plane = (plane >> 4).astype(np.uint8) if dtype == np.uint8 else plane
    Image.fromarray(plane).save(tmp_path / "a.png")
    (read,) = BenchmarkImageReader().read(tmp_path / "a.png")
    np.testing.assert_array_equal(decode_png(read.png), plane)
    assert decode_png(read.png).dtype == dtype and (read.slice_index, read.num_slices) == (-1, 1)
    path = save(build(plane, 8 if dtype == np.uint8 else 16), tmp_path)
    np.testing.assert_array_equal(decode_png(BenchmarkImageReader().read(path)[0].png), plane)


def test_a_jpeg_is_kept_as_it_decodes(tmp_path):
    Image.fromarray((draw_breast(80, 60) >> 4).astype(np.uint8)).save(tmp_path / "a.jpg", quality=60)
    (read,) = BenchmarkImageReader().read(tmp_path / "a.jpg")
    np.testing.assert_array_equal(decode_png(read.png), np.asarray(Image.open(tmp_path / "a.jpg")))


def test_values_without_a_full_scale_are_refused(tmp_path):
    half = decode_png(as_png(np.array([[0.0, 0.5], [1.0, 0.25]], np.float32)))
    np.testing.assert_array_equal(half, [[0, 32768], [65535, 16384]])
    for values in ([[-0.5, 1.0]], [[0.0, 1.5]], [[0.0, np.nan]]):
        with pytest.raises(InvalidImageError, match="without a window or VOI LUT; give it one"):
            as_png(np.array(values, np.float32))
    path = save(build(RAMP, RescaleSlope=1, RescaleIntercept=-1000), tmp_path)
    with pytest.raises(InvalidImageError, match="values from -1000 to 3095 without a window"):
        BenchmarkImageReader().read(path)


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_broken_image_is_named_and_counted_and_the_rest_goes_on(own, build_rows, tmp_path, num_proc, caplog):
    (own / "p4.png").write_bytes((own / "p4.png").read_bytes()[:200])
    (own / "p6.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        built = build_rows("table", own, "cancer", num_proc=num_proc)
    kept = {row for split in built.values() for row in split["image_id"]}
    assert kept == {f"p{number}.png" for number in range(30)} - {"p4.png", "p6.png"}
    assert "table: 2 of 30 images could not be read and are left out" in caplog.text
    if num_proc is None:  # else it is a worker that says so
        assert "p4.png is left out: " in caplog.text and "p6.png is left out: " in caplog.text
    (log,) = (tmp_path / "cache").rglob(REFUSED)
    assert len(log.read_text().splitlines()) == 2 and str(own) not in log.read_text()
    builder = BenchmarkBuilder(
        cache_dir=str(tmp_path / "cache"), dataset_name="table", config_name="cancer", data_dir=str(own)
    )
    builder.download_and_prepare()  # from the cache
    assert [each["image_id"] for each in builder.refused()] == ["p4.png", "p6.png"]
    assert "broken or cut short" in builder.refused()[0]["reason"]


def test_a_volume_of_which_a_slice_is_broken_is_left_out_whole(phantom_archive, build_rows, tmp_path):
    archive = shutil.copytree(phantom_archive, tmp_path / "archive")
    broken = sorted(archive.rglob("*_dbt.dcm"))[0]
    broken.write_bytes(broken.read_bytes()[: -3 * 128 * 96])
    rows = build_rows("phantom", archive)["train"]
    assert len(rows) == 12 * 5 - 4 and broken.parent.name in set(rows["patient_id"])


def test_a_data_set_of_which_nothing_can_be_read_is_refused(own, build_rows):
    for path in own.glob("*.png"):
        path.write_text("no image")
    with pytest.raises(ValueError, match="table: none of 30 images can be read: not a readable image"):
        build_rows("table", own, "cancer")


def test_the_cache_goes_by_content(own, build_rows, tmp_path):
    def builder():
        return BenchmarkBuilder(cache_dir=str(tmp_path / "cache"), dataset_name="table", data_dir=str(own))

    assert build_rows("table", own)["train"].num_rows == 30
    first = builder()
    assert first.hash == builder().hash

    table = pd.read_csv(own / "index.csv")
    Image.fromarray(draw_breast(64, 48, seed=99)).save(own / "more.png")
    table.loc[30] = ["more", "more.png", 1]
    table.to_csv(own / "index.csv", index=False)
    assert build_rows("table", own)["train"].num_rows == 31  # datasets alone would give 30

    content, before = (own / "p1.png").read_bytes(), builder().hash
    (own / "p1.png").write_bytes((own / "p2.png").read_bytes())
    changed = build_rows("table", own)["train"]
    assert builder().hash != before
    by_name = {row["image_id"]: stored(row) for row in changed}
    np.testing.assert_array_equal(by_name["p1.png"], by_name["p2.png"])
    (own / "p1.png").write_bytes(content)
    os.utime(own / "p1.png", ns=(0, 0))  # the same size and content, another time: built anew rather than not
    assert builder().hash not in (before, first.hash)


@pytest.mark.slow
def test_load_dataset_knows_the_names(own, tmp_path):
    options = {"data_dir": str(own), "cache_dir": str(tmp_path / "cache")}
    rows = datasets.load_dataset("table", "cancer", num_proc=2, **options)
    assert {name: split.num_rows for name, split in rows.items()} == {"train": 21, "validation": 3, "test": 6}
    streamed = datasets.load_dataset("table", "cancer", streaming=True, **options)
    for split, of in rows.items():
        assert streamed[split].num_shards == of.num_rows  # whatever number of workers can share them
        for mapped, each in zip(of, streamed[split], strict=True):
            assert mapped["label"] == each["label"] and np.array_equal(stored(mapped), stored(each))
    assert datasets.load_dataset("table", split="train", **options).num_rows == 30
    other = datasets.load_dataset("table", "cancer", seed=1, **options)
    assert set(other["test"]["patient_id"]) != set(rows["test"]["patient_id"])
    named = datasets.load_dataset("table", "cancer", data_files="index.csv", **options)  # spares a listing
    assert named["test"]["image_id"][:] == rows["test"]["image_id"][:]
    workers = torch_loader(streamed["train"])
    assert sorted(workers) == sorted(rows["train"]["image_id"])


def torch_loader(rows):
    """Image ids as two worker processes of a DataLoader hand them out."""
    from torch.utils.data import DataLoader

    return [row["image_id"] for row in DataLoader(rows, batch_size=None, num_workers=2)]


def test_what_load_dataset_cannot_do_is_one_line(own, tmp_path, monkeypatch):
    monkeypatch.chdir(own)  # where datasets looks without a data_dir
    cache = {"cache_dir": str(tmp_path / "cache")}
    for arguments, message in (
        (("phantom", "cancer"), "phantom: give data_dir"),
        (("phantom", "age"), "BuilderConfig 'age' not found. Available: ['default', 'cancer'"),
        (("vindr_mammo", "birads"), "no breast-level_annotations.csv; give the folder of VinDr-Mammo"),
        (("table", "birads"), "task 'birads': table has no labels for it; it has cancer"),
    ):
        data_dir = None if "give data_dir" in message else str(own)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            datasets.load_dataset(*arguments, data_dir=data_dir, **cache)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_number_of_slices_that_cannot_be_is_refused(own, build_rows):
    with pytest.raises(ValueError, match="slices_per_volume=-1: must be 0 .all slices. or more"):
        build_rows("table", own, slices_per_volume=-1)


def test_other_versions_of_datasets_do_without_the_names(monkeypatch, caplog):
    import datasets.packaged_modules as packaged

    known = dict(packaged._PACKAGED_DATASETS_MODULES)
    assert benchmark_names.register(["csv", "phantom"])
    assert packaged._PACKAGED_DATASETS_MODULES == known  # what was known stays what it was
    monkeypatch.delattr(packaged, "_PACKAGED_DATASETS_MODULES")
    with caplog.at_level(logging.INFO):
        assert not benchmark_names.register(["phantom"])
    assert "use BenchmarkBuilder" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [None, 2])
def test_bcs_dbt_is_turned_right(tmp_path, build_rows, num_proc):
    """Half a turn and a wrong side in the header: the image is that of the list's view, in which its boxes are."""
    folder = tmp_path / "bcs"
    write_volume(folder / DESCRIPTIVE, half_turn(RIGHT), "L")
    write_volume(folder / "second" / DESCRIPTIVE.replace("P00013", "P00014"), half_turn(RIGHT), "L", series="1.2.3")
    key = "DBT-P00013,DBT-S00163,rcc"
    (folder / "BCS-DBT-labels-train-v2.csv").write_text(
        f"PatientID,StudyUID,View,Normal,Actionable,Benign,Cancer\n{key},0,0,0,1\n"
    )
    (folder / "BCS-DBT-boxes-train-v2.csv").write_text(
        f"PatientID,StudyUID,View,Subject,Slice,X,Y,Width,Height,Class,AD,VolumeSlices\n{key},1,2,5,6,7,8,cancer,0,4\n"
    )
    write_list(folder / "BCS-DBT-file-paths-train-v2.csv", ("rcc", CLASSIC, DESCRIPTIVE))
    (row,) = build_rows("bcs_dbt", folder, boxed_slices=True, num_proc=num_proc)["train"]
    assert (row["laterality"], row["view"], row["slice_index"], row["num_slices"]) == ("R", "CC", 2, 4)
    assert row["boxes"] == [{"x0": 5, "y0": 6, "x1": 12, "y1": 14, "slice": 2, "label": "cancer"}]
    np.testing.assert_array_equal(np.rint(stored(row) / 65535 * 4095), RIGHT[2])
    plain = next(iter_slices(folder / DESCRIPTIVE, indices=[2])).pixels
    assert not np.array_equal(np.rint(plain * 65535), stored(row))


def test_only_pixels_travel(own, build_rows):
    """Texts, profiles and EXIF of an image stay behind."""
    from PIL import PngImagePlugin

    image, about = Image.open(own / "p1.png"), PngImagePlugin.PngInfo()
    image.load()
    about.add_text("Comment", "DOE^JANE")
    exif = Image.Exif()
    exif[0x010E] = "DOE^JANE"
    image.save(own / "p1.png", pnginfo=about, exif=exif)
    assert b"DOE^JANE" in (own / "p1.png").read_bytes()
    rows = build_rows("table", own)["train"].cast_column("image", datasets.Image(decode=False))
    for row in rows:
        content = row["image"]["bytes"]
        assert b"DOE^JANE" not in content and row["image"]["path"] is None
        assert Image.open(io.BytesIO(content)).info == {}


def test_a_folder_is_found_from_home(own, build_rows, monkeypatch):
    monkeypatch.setenv("HOME", str(own.parent))
    assert build_rows("table", Path("~") / own.name)["train"].num_rows == 30


def test_real_slices_stay_as_they_are(real_slices, build_rows, tmp_path):
    """Gray JPEGs stored as RGB: one of the three equal planes."""
    files = real_slices[:4]
    rows = [{"patient_id": path.name[:10], "path": str(path), "density": "ABCD"[n]} for n, path in enumerate(files)]
    pd.DataFrame(rows).to_csv(tmp_path / "slices.csv", index=False)
    built = build_rows("table", tmp_path / "slices.csv")["train"]
    assert len(built) == len(files)
    for row in built:
        np.testing.assert_array_equal(stored(row), np.asarray(Image.open(row["path"]))[..., 0])
