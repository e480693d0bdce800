"""The corpus: what is read, what is refused and why, and that nothing is half-written."""

import csv
import json

import cv2
import datasets
import numpy as np
import pytest
from conftest import draw_breast

from dataset_scripts import corpus as corpus_module
from dataset_scripts.corpus import build_corpus, main
from dataset_scripts.corpus_reader import FEATURES, Corpus
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.dicom import keyed_hash

FIT = (128, 96)


def build(sources, output, **options):
    return build_corpus(sources, output, FIT, MammoDinoImageProcessor(), "test", b"key", **options)


@pytest.fixture
def mixed_folder(tmp_path, phantom_archive):
    """Good files of every kind, among files that cannot be used."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    cv2.imwrite(str(folder / "good.png"), draw_breast())
    cv2.imwrite(str(folder / "good.pgm"), draw_breast(seed=1))
    cv2.imwrite(str(folder / "good.jpg"), (draw_breast(seed=2) >> 4).astype(np.uint8))
    volume = sorted(phantom_archive.rglob("*_dbt.dcm"))[0].read_bytes()
    (folder / "no_suffix").write_bytes(volume)
    (folder / "text.dcm").write_text("these are not the bytes of an image")
    (folder / "empty.dcm").write_bytes(b"")
    (folder / "truncated.dcm").write_bytes(volume[: len(volume) // 2])
    cv2.imwrite(str(folder / "black.png"), np.zeros((100, 100), np.uint8))
    cv2.imwrite(str(folder / "photo.png"), np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
    cv2.imwrite(str(folder / "dot.png"), np.full((1, 1), 9, np.uint8))
    (folder / "notes.txt").write_text("left alone")
    return folder


def test_bad_files_are_named_with_their_reason_and_the_rest_is_built(mixed_folder, tmp_path):
    report = build([mixed_folder], tmp_path / "out")
    refused = {row["file"]: row["reason"] for row in csv.DictReader((tmp_path / "out" / "refused.csv").open())}
    bad = {"text.dcm", "empty.dcm", "truncated.dcm", "black.png", "photo.png", "dot.png"}
    assert {path.rpartition("/")[2] for path in refused} == bad
    assert all(path.rpartition("/")[2] in reason and len(reason) > 30 for path, reason in refused.items())
    assert report["files_read"] == 4 and report["files_refused"] == 6 and report["files_ignored"] == {".txt": 1}
    assert report["rows"] == 3 + 6 and Corpus(tmp_path / "out").num_volumes == 4
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_rows_have_the_schema_and_volumes_stand_together(phantom_corpus):
    rows = datasets.load_from_disk(str(phantom_corpus))
    assert rows.features == FEATURES and len(rows) == 12 * (6 + 1)
    corpus = Corpus(phantom_corpus)
    assert corpus.num_volumes == 24
    for volume in range(corpus.num_volumes):
        block = corpus.rows_of(volume)
        kinds = set(rows[block.start : block.stop]["kind"])
        assert corpus.slice_indices(block).tolist() == list(range(len(block)))
        assert kinds == ({"dbt"} if len(block) > 1 else {"ffdm"})
    row = rows[0]
    assert row["laterality"] in "LR" and row["view"] in ("CC", "MLO") and row["source"] == "phantom"
    assert corpus.slice_spacing_mm(corpus.rows_of(0).start) in (6.0, None)


def test_pictures_are_those_of_the_image_processor(phantom_archive, phantom_corpus):
    """The stored picture, put on a canvas of its own size, is what inference sees."""
    path = sorted(phantom_archive.rglob("*_2d.dcm"))[0]
    corpus = Corpus(phantom_corpus)
    volume_id = [mammogram.volume_id for mammogram, _ in corpus.image_processor.render_source(path, FIT, False, b"key")]
    row = corpus.rows["volume_id"].index(volume_id[0])
    stored, tissue = corpus.picture(row)
    height, width = stored.shape
    processor = MammoDinoImageProcessor(size={"height": height, "width": width}, patch_size=1, do_normalize=False)
    seen = processor(path)
    np.testing.assert_array_equal(np.rint(seen["pixel_values"][0, 0] * 255), stored)
    assert tissue.mean() == pytest.approx(seen["tissue_mask"].mean(), abs=0.01)


def test_identifiers_leave_only_as_keyed_hashes(phantom_archive, phantom_corpus):
    rows = datasets.load_from_disk(str(phantom_corpus))
    assert set(rows["patient"]) == {keyed_hash(f"PHANTOM-{number:06d}", b"key") for number in range(12)}
    for path in phantom_corpus.iterdir():
        content = path.read_bytes()
        if path.suffix == ".arrow":
            assert b"PHANTOM" not in content and b"simulated" not in content


def test_processes_change_nothing(phantom_archive, phantom_corpus, tmp_path):
    build([phantom_archive], tmp_path / "two", num_proc=2)
    one, two = (datasets.load_from_disk(str(folder)) for folder in (phantom_corpus, tmp_path / "two"))
    assert one["volume_id"] == two["volume_id"] and one["slice_index"] == two["slice_index"]
    assert [each["bytes"] for each in one.cast_column("image", datasets.Image(decode=False))["image"]] == [
        each["bytes"] for each in two.cast_column("image", datasets.Image(decode=False))["image"]
    ]


def test_a_stopped_build_goes_on_and_ends_the_same(phantom_archive, phantom_corpus, tmp_path, monkeypatch):
    read, seen = corpus_module.read_file, []

    def stop_in_the_middle(path, **options):
        seen.append(path)
        if len(seen) == 15:
            raise KeyboardInterrupt
        return read(path, **options)

    monkeypatch.setattr(corpus_module, "read_file", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        build([phantom_archive], tmp_path / "out", shard_bytes=50_000)
    whole = len(list((tmp_path / "out").glob("shard-*.json")))
    assert whole > 1 and not list((tmp_path / "out").glob(".*.tmp"))
    with pytest.raises(ValueError, match="unfinished"):
        Corpus(tmp_path / "out")

    seen.clear()
    monkeypatch.setattr(corpus_module, "read_file", lambda path, **options: seen.append(path) or read(path, **options))
    build([phantom_archive], tmp_path / "out", shard_bytes=50_000)
    assert 0 < len(seen) < 24  # what was finished is not read again
    one, two = Corpus(phantom_corpus), Corpus(tmp_path / "out")
    assert one.rows["volume_id"] == two.rows["volume_id"]
    assert one.rows["image"] == two.rows["image"]


def test_one_corpus_has_one_set_of_settings(phantom_corpus, phantom_archive):
    with pytest.raises(ValueError, match="fit"):
        build_corpus([phantom_archive], phantom_corpus, (64, 64), MammoDinoImageProcessor(), "phantom", b"key")
    with pytest.raises(ValueError, match="hash_key_check"):
        build_corpus([phantom_archive], phantom_corpus, FIT, MammoDinoImageProcessor(), "phantom", b"other")


def test_a_second_copy_enters_once(phantom_archive, tmp_path):
    path = sorted(phantom_archive.rglob("*_2d.dcm"))[0]
    for name in ("a", "b"):
        (tmp_path / f"{name}.dcm").write_bytes(path.read_bytes())
    report = build([tmp_path / "a.dcm", tmp_path / "b.dcm"], tmp_path / "out")
    assert report["rows"] == 1 and report["files_refused"] == 1


def test_sixteen_bits_on_request(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), draw_breast())
    main([str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), "--bit_depth", "16"])
    picture, _ = Corpus(tmp_path / "out").picture(0)
    assert picture.dtype == np.uint16 and len(np.unique(picture)) > 1000


def test_a_missing_or_empty_source_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SystemExit, match="nothing"):
        main([str(tmp_path / "nothing"), "--output", str(tmp_path / "out")])
