"""A corpus that is extended holds the rows of one build of all files, and what stood stands."""

import csv
import json
import logging
import shutil
from pathlib import Path

import cv2
import datasets
import kill_corpus
import pydicom
import pytest
from made_inputs import draw_breast
from pretrain_runs import recipe, train

from dataset_scripts.corpus.build import build_corpus, main
from dataset_scripts.corpus.reader import Corpus
from dataset_scripts.corpus.verify import verify_corpus
from modeling_mammodino import MammoDinoImageProcessor

FIT = (128, 96)
COUNTS = ("files_found", "files_read", "files_refused", "files_ignored", "rows", "volumes", "rows_by_kind",
          "doubtful_masks", "burned_in_annotations", "passed_over", "refused_by_reason")  # fmt: skip


def build(sources, output, **options):
    options = {"tasks": 3, "rows_per_shard": 16, **options}
    return build_corpus(sources, output, FIT, MammoDinoImageProcessor(), "phantom", **options)


def rows(folder: Path) -> set[tuple]:
    """All of each row, images as they are stored."""
    found = datasets.load_from_disk(str(folder))
    for name in ("image", "tissue"):
        found = found.cast_column(name, datasets.Image(decode=False))
    listed = [tuple(str(value) for value in row.values()) for row in found]
    assert len(set(listed)) == len(listed)
    return set(listed)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def archive(phantom_archive, tmp_path) -> Path:
    """Eight of twelve patients, a file that was cut off, and another that is no image."""
    folder = tmp_path / "archive"
    for patient in sorted(each for each in phantom_archive.iterdir() if each.is_dir())[:8]:
        shutil.copytree(patient, folder / patient.name)
    volume = sorted((folder / "PHANTOM-000003").glob("*_dbt.dcm"))[0]
    volume.write_bytes(volume.read_bytes()[:-3000])
    (folder / "notes.txt").write_text("left alone")
    return folder


def let_the_archive_grow(archive: Path, phantom_archive: Path) -> None:
    """The other patients, the file that was cut off whole, a copy, a PNG, damaged files."""
    shutil.copytree(phantom_archive, archive, dirs_exist_ok=True)
    shutil.copytree(archive / "PHANTOM-000000", archive / "again")
    cv2.imwrite(str(archive / "later.png"), draw_breast())
    (archive / "empty.dcm").write_bytes(b"")
    (archive / "notes2.txt").write_text("left alone")


@pytest.mark.slow
def test_an_extended_corpus_has_the_rows_of_one_build_of_all_files(archive, phantom_archive, tmp_path, capsys):
    before = build([archive], tmp_path / "out")
    stood = content(tmp_path / "out")
    begun = tmp_path / "out.private" / "job.json"
    older = {name: value for name, value in json.loads(begun.read_text()).items() if not name.startswith("first_")}
    begun.write_text(json.dumps(older))  # before there were extensions
    let_the_archive_grow(archive, phantom_archive)
    arguments = [str(archive), "--output", str(tmp_path / "out"), "--height", "128", "--width", "96", "--extend"]
    main([*arguments, "--collection", "phantom", "--num_proc", "1", "--tasks", "3"])
    after = json.loads((tmp_path / "out" / "manifest.json").read_text())
    once = build([archive], tmp_path / "once")
    assert before["rows"] < after["rows"] and f"{after['rows']} images" in capsys.readouterr().out
    assert rows(tmp_path / "out") == rows(tmp_path / "once")
    alike = {"a copy of an image in the corpus; one is enough": "a copy of another file; one is enough"}
    after["refused_by_reason"] = {alike.get(name, name): count for name, count in after["refused_by_reason"].items()}
    assert {name: after[name] for name in COUNTS} == {name: once[name] for name in COUNTS}
    assert after["files_refused"] == 3 and after["files_ignored"] == 3  # labels.csv is one
    shards = [name for name in stood if name.endswith(".arrow")]
    assert {name: (tmp_path / "out" / name).read_bytes() for name in shards} == {name: stood[name] for name in shards}
    assert after["shards"][: len(shards)] == before["shards"] and verify_corpus(tmp_path / "out") == []
    with (tmp_path / "out.private" / "refused.csv").open() as stream:
        refused = {Path(row["file"]).name: row["reason"] for row in csv.DictReader(stream)}
    assert set(refused) == {"empty.dcm", *(path.name for path in (archive / "again").glob("*.dcm"))}

    # and once more: another folder, whose files by the same name are other images, and nothing else
    shutil.copytree(archive / "PHANTOM-000001", tmp_path / "more" / "copies")
    cv2.imwrite(str(tmp_path / "more" / "later.png"), draw_breast(seed=1))
    cv2.imwrite(str(archive / "last.png"), draw_breast(seed=2))
    build([tmp_path / "more", archive], tmp_path / "out", extend=True)
    assert verify_corpus(tmp_path / "out") == [] and len(rows(tmp_path / "out")) == after["rows"] + 2
    stands, extension = content(tmp_path / "out"), tmp_path / "out.private" / "extension-001"
    for path in (tmp_path / "out" / "data-00003.arrow", extension / "shards" / "00003.json"):
        path.unlink()  # a shard is made again as verify says
    shutil.rmtree(extension / "engine" / "shards"), shutil.rmtree(extension / "engine" / "manifest")
    build([archive], tmp_path / "out", extend=True)
    assert content(tmp_path / "out") == stands
    build([archive], tmp_path / "out", extend=True)  # refused files are tried again, with the same end
    assert content(tmp_path / "out") == stands


@pytest.mark.slow
def test_until_an_extension_is_whole_the_corpus_is_as_it_was_and_the_command_goes_on(
    archive, phantom_archive, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    build([archive], tmp_path / "out")
    stood = content(tmp_path / "out")
    build([archive], tmp_path / "out", extend=True)  # there is only the file that was cut off to try again
    assert content(tmp_path / "out") == stood
    let_the_archive_grow(archive, phantom_archive)
    made = kill_corpus.stop_after_two_shards(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        build([archive], tmp_path / "out", extend=True)
    assert content(tmp_path / "out") == stood and verify_corpus(tmp_path / "out") == []
    build([archive], tmp_path / "out")
    assert "an extension was stopped: --extend goes on with it" in caplog.messages
    assert content(tmp_path / "out") == stood

    build([archive], tmp_path / "out", extend=True)
    assert len(made) == len(set(made)) > 2  # what was finished is not made again
    build([archive], tmp_path / "once")
    assert rows(tmp_path / "out") == rows(tmp_path / "once") and verify_corpus(tmp_path / "out") == []


def as_slices(volume: Path, folder: Path) -> list[Path]:
    """A DBT volume as older vendors store it, a file a slice."""
    whole = pydicom.dcmread(volume)
    frames, groups = whole.pixel_array, list(whole.PerFrameFunctionalGroupsSequence)
    shared = whole.SharedFunctionalGroupsSequence[0]
    whole.ImageOrientationPatient = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    del whole.PerFrameFunctionalGroupsSequence
    folder.mkdir()
    for number, (frame, group) in enumerate(zip(frames, groups, strict=True)):
        whole.SOPInstanceUID = whole.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
        whole.NumberOfFrames, whole.PixelData = 1, frame.tobytes()
        whole.ImagePositionPatient = group.PlanePositionSequence[0].ImagePositionPatient
        whole.save_as(folder / f"{number}.dcm")
    return sorted(folder.iterdir())


def test_what_would_change_a_row_that_stands_is_refused_or_gets_a_name_of_its_own(phantom_archive, tmp_path):
    """Late slices of a volume; other images under the UID of one; copies of those."""
    slices = as_slices(sorted(phantom_archive.rglob("*_dbt.dcm"))[0], tmp_path / "slices")
    mammograms = sorted(phantom_archive.rglob("*_2d.dcm"))[:2]
    archive = tmp_path / "archive"
    archive.mkdir()
    for path in slices[:4]:
        shutil.copy(path, archive)
    same = pydicom.dcmread(mammograms[0])
    shutil.copy(mammograms[0], archive / "first.dcm")
    build([archive], tmp_path / "out")
    for path in slices[3:]:
        shutil.copy(path, archive / f"late{path.name}")
    other = pydicom.dcmread(mammograms[1])
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = same.SOPInstanceUID
    for name in ("other.dcm", "other_again.dcm"):
        other.save_as(archive / name)
    build([archive], tmp_path / "out", extend=True)
    other.save_as(archive / "other_at_last.dcm")
    manifest = build([archive], tmp_path / "out", extend=True)
    assert verify_corpus(tmp_path / "out") == [] and (manifest["rows"], manifest["volumes"]) == (6, 3)
    with (tmp_path / "out.private" / "refused.csv").open() as stream:
        refused = {Path(row["file"]).name: row["reason"] for row in csv.DictReader(stream)}
    late = {f"late{path.name}" for path in slices[3:]}
    assert {name for name, reason in refused.items() if "comes too late" in reason} == late
    assert refused.keys() - late == {"other_again.dcm", "other_at_last.dcm"}


def test_an_extension_has_the_settings_and_the_key_of_its_corpus(archive, tmp_path, monkeypatch):
    build([archive], tmp_path / "out")
    (archive / "empty.dcm").write_bytes(b"")
    with pytest.raises(ValueError, match="min_mask_confidence"):
        build([archive], tmp_path / "out", extend=True, min_mask_confidence=0.5)
    monkeypatch.setenv("MAMMODINO_HASH_KEY", "another key that is long")
    with pytest.raises(ValueError, match="hash_key_check"):
        build([archive], tmp_path / "out", extend=True)
    assert not list((tmp_path / "out.private").glob("extension*"))


@pytest.mark.slow
def test_a_run_learns_from_an_extended_corpus(archive, phantom_archive, tmp_path):
    build([archive], tmp_path / "out")
    let_the_archive_grow(archive, phantom_archive)
    build([archive], tmp_path / "out", extend=True)
    encoder = train(recipe(tmp_path / "out", tmp_path / "run", "--max_steps", "2"))
    assert f"{len(Corpus(tmp_path / 'out').rows)} images of" in (encoder / "README.md").read_text()
