"""Archives as they are: copies and containers that are damaged, files of other kinds, folders that cannot be read."""

import csv
import json
import os
import re
import resource
import struct
import tarfile
import threading
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from dicom_builders import CAPTURE, CT, SOP, build, save
from fsspec.implementations.zip import ZipFileSystem
from made_inputs import draw_breast
from pydicom import uid

from dataset_scripts.corpus import archive as corpus_archive
from dataset_scripts.corpus import shards as corpus_shards
from dataset_scripts.corpus.archive import file_system, list_archive, opened
from dataset_scripts.corpus.build import build_corpus, main
from dataset_scripts.corpus.reader import Corpus
from dataset_scripts.corpus.verify import verify_corpus
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.tools.walk import NOT_REGULAR, OF_SYSTEM

FIT = (64, 64)


def make(sources, output, tissue_finder="breast", **options):
    processor = MammoDinoImageProcessor(tissue_finder=tissue_finder)
    return build_corpus(sources, output, FIT, processor, **{"tasks": 2, **options})


def refusals(output: Path) -> dict[str, str]:
    with Path(f"{output}.private", "refused.csv").open(encoding="utf-8") as stream:
        return {row["file"].rpartition("/")[2]: row["reason"] for row in csv.DictReader(stream)}


def write_image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", draw_breast(seed=seed))[1].tobytes())
    return path


def mammogram(folder: Path, name: str, number: int, seed: int = 0, **elements) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return save(build(draw_breast(seed=seed), **{"SOPInstanceUID": f"1.2.{number}", **elements}), folder, name)


def body(height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    inside = ((y - height / 2) / (0.35 * height)) ** 2 + ((x - width / 2) / (0.4 * width)) ** 2 < 1
    return np.where(inside, 1000 + 60 * np.sin(x / 9 + seed), 20).astype(np.uint16)


def write_slices(folder: Path, count: int, pixels=body, **of_each) -> list[Path]:
    """CT, a file a slice; `of_each` gives elements by the slice's number."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(count):
        elements = {name: value(index) for name, value in of_each.items()}
        elements = {"SOPInstanceUID": f"1.2.4.{index}", "InstanceNumber": index, **elements}
        dataset = build(pixels(seed=index), SOPClassUID=CT, Modality="CT", SeriesInstanceUID="1.2.9", **elements)
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        paths.append(save(dataset, folder, f"s{index:04d}.dcm"))
    return paths


def test_files_of_one_relative_path_in_two_sources_are_two_images(tmp_path):
    for number, site in enumerate(("benign", "malignant")):
        write_image(tmp_path / site / "0000.png", seed=number)
        write_image(tmp_path / site / "same.png", seed=9)
    manifest = make([tmp_path / "benign", tmp_path / "malignant"], tmp_path / "out")
    assert manifest["rows"] == manifest["volumes"] == 3
    assert manifest["refused_by_reason"] == {"a copy of another file; one is enough": 1}
    assert verify_corpus(tmp_path / "out") == []


def test_different_images_of_one_sop_instance_uid_are_all_kept(tmp_path):
    """As anonymizers leave them that give all files one UID."""
    for number in range(5):
        mammogram(tmp_path / "in", f"{number}.dcm", 1, seed=number, PatientID=f"P{number}")
    manifest = make([tmp_path / "in"], tmp_path / "out")
    assert manifest["rows"] == manifest["volumes"] == 5 and not manifest["files_refused"]
    assert len(set(Corpus(tmp_path / "out").volume_column("patient"))) == 5
    assert verify_corpus(tmp_path / "out") == []


def test_where_the_larger_copy_is_cut_off_the_whole_one_enters(tmp_path):
    mammogram(tmp_path / "in", "whole.dcm", 1, syntax=uid.JPEGLSLossless)
    cut = mammogram(tmp_path / "in", "cut.dcm", 1)
    cut.write_bytes(cut.read_bytes()[:-20000])
    assert cut.stat().st_size > (tmp_path / "in" / "whole.dcm").stat().st_size
    mammogram(tmp_path / "in", "z_other_syntax.dcm", 1, syntax=uid.RLELossless)
    assert make([tmp_path / "in"], tmp_path / "out")["rows"] == 1
    reasons = refusals(tmp_path / "out")
    assert "truncated" in reasons["cut.dcm"]
    assert sum("a copy of file" in reason for reason in reasons.values()) == 1 and len(reasons) == 2


def test_a_damaged_slice_is_replaced_by_its_copy(tmp_path):
    paths = write_slices(tmp_path / "in", 4, ImagePositionPatient=lambda index: [0, 0, 2 * index])
    whole = paths[2].read_bytes()
    (tmp_path / "in" / "copy.dcm").write_bytes(whole)
    paths[2].write_bytes(whole[:-100] + b"")
    (tmp_path / "in" / "a_longer_but_no_better.dcm").write_bytes(whole[:-2000])
    manifest = make([tmp_path / "in"], tmp_path / "out", "body")
    assert manifest["rows"] == 4 and manifest["volumes"] == 1 and manifest["files_refused"] == 2
    (tmp_path / "in" / "copy.dcm").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="none of 6 files could be used"):  # a volume enters whole or not at all
        make([tmp_path / "in"], tmp_path / "none", "body")


def test_a_scout_of_another_size_is_refused_and_its_series_enters(tmp_path):
    write_slices(tmp_path / "in", 5, lambda seed: body(64, 48 if seed == 0 else 64))
    manifest = make([tmp_path / "in"], tmp_path / "out", "body")
    assert manifest["rows"] == 4 and manifest["volumes"] == 1
    assert list(refusals(tmp_path / "out")) == ["s0000.dcm"]
    assert "scout" in refusals(tmp_path / "out")["s0000.dcm"]


def test_no_error_of_one_file_stops_a_build(tmp_path, monkeypatch):
    write_image(tmp_path / "in" / "a.png", 1), write_image(tmp_path / "in" / "b.png", 2)
    make_row, calls = corpus_shards.make_row, []

    def fail_once(*given):
        calls.append(given)
        if len(calls) == 1:
            raise KeyError("a fault of ours")
        return make_row(*given)

    monkeypatch.setattr(corpus_shards, "make_row", fail_once)
    assert make([tmp_path / "in"], tmp_path / "out")["rows"] == 1
    assert "KeyError" in refusals(tmp_path / "out")["a.png"]
    assert "a fault of ours" in next(Path(f"{tmp_path}/out.private/notes").iterdir()).read_text()


def test_spacing_is_that_of_the_positions(tmp_path):
    write_slices(tmp_path / "in", 4, ImagePositionPatient=lambda i: [0, 0, 2.5 * i], SliceThickness=lambda i: 5)
    make([tmp_path / "in"], tmp_path / "out", "body")
    assert set(Corpus(tmp_path / "out").rows["slice_spacing_mm"]) == {2.5}


@pytest.mark.parametrize("order", ["phase by phase", "position by position"])
def test_phases_of_one_series_are_volumes_of_their_own(tmp_path, order):
    place = (lambda i: i % 3) if order == "phase by phase" else (lambda i: i // 2)
    write_slices(tmp_path / "in", 6, ImagePositionPatient=lambda i: [0, 0, 2.5 * place(i)])
    manifest = make([tmp_path / "in"], tmp_path / "out", "body")
    assert manifest["volumes"] == 2 and manifest["rows"] == 6
    rows = Corpus(tmp_path / "out").rows
    assert rows["slice_index"] == [0, 1, 2] * 2 and set(rows["slice_spacing_mm"]) == {2.5}
    assert verify_corpus(tmp_path / "out") == []


@pytest.mark.slow
def test_a_series_of_more_files_than_may_be_open(tmp_path):
    write_slices(tmp_path / "in", 300, ImagePositionPatient=lambda i: [0, 0, 0.6 * i])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, before[1]))
    try:
        assert make([tmp_path / "in"], tmp_path / "out", "body")["rows"] == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_of_many_files_one_is_open_at_a_time(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(bytes([number]) * 10)
    with opened(list_archive([str(tmp_path)]).files) as images:
        streams = [image.stream for image in images]
        assert [stream.read(4) for stream in streams] == [bytes([n]) * 4 for n in range(3)]
        assert [stream.raw.inner is not None for stream in streams] == [False, False, True]
        assert streams[0].tell() == 4 and streams[0].read() == bytes(6) and streams[1].seek(0, 2) == 10
    assert not any(stream.raw.inner for stream in streams)


def make_others(folder: Path) -> None:
    mammogram(folder, "mg.dcm", 1)
    mammogram(folder, "us.dcm", 2, seed=2, SOPClassUID=SOP + "6.1", Modality="US", BodyPartExamined="LIVER")
    mammogram(folder, "chest.dcm", 3, seed=3, SOPClassUID=SOP + "1", Modality="CR", BodyPartExamined="CHEST")
    mammogram(folder, "old_cr.dcm", 4, seed=4, SOPClassUID=SOP + "1", Modality="CR", BodyPartExamined="BREAST")
    mammogram(folder, "dose.dcm", 5, seed=5, SOPClassUID=CAPTURE, Modality="SR")
    mammogram(folder, "film.dcm", 6, seed=6, SOPClassUID=CAPTURE)
    mammogram(folder, "crop.dcm", 7, seed=7, SOPClassUID=CAPTURE, SeriesDescription="cropped images")
    mammogram(folder, "nothing_said.dcm", 8, seed=8, SOPClassUID=CAPTURE, Modality="")
    mammogram(folder, "smuggled.dcm", 9, seed=9, SOPClassUID=CAPTURE, Modality="DOE^JANE")


def test_a_reason_that_holds_a_uid_is_private_and_the_corpus_can_be_published(tmp_path):
    mammogram(tmp_path / "in", "mg.dcm", 1)
    odd = mammogram(tmp_path / "in", "odd.dcm", 2, seed=2)
    content, known = odd.read_bytes(), uid.ExplicitVRLittleEndian.encode() + bytes(1)
    unknown = b"1.2.840.10008.99.9.1"  # of the same length
    assert content.count(known) == 1 and len(known) == len(unknown)
    odd.write_bytes(content.replace(known, unknown))
    manifest = make([tmp_path / "in"], tmp_path / "out")
    assert unknown.decode() in refusals(tmp_path / "out")["odd.dcm"]
    assert list(manifest["refused_by_reason"].values()) == [1] and "(a DICOM UID)" in str(manifest)
    assert verify_corpus(tmp_path / "out") == []
    with pytest.raises(ValueError, match="collection='/data/site': .* a path of a local machine"):
        make([tmp_path / "in"], tmp_path / "other", collection="/data/site")


def test_other_modalities_do_not_enter(tmp_path):
    make_others(tmp_path / "in")
    manifest = make([tmp_path / "in"], tmp_path / "out")
    assert manifest["rows"] == 3 and manifest["modalities"] == ["MG"]
    reasons = refusals(tmp_path / "out")
    assert set(reasons) == {f"{n}.dcm" for n in ("us", "chest", "dose", "crop", "nothing_said", "smuggled")}
    assert reasons["us.dcm"] == "Modality is US, not MG; leave it out, or give --modalities"
    assert manifest["refused_by_reason"][reasons["us.dcm"]] == 1 and "JANE" not in str(reasons)
    chosen = make([tmp_path / "in"], tmp_path / "chosen", modalities=["US", "NONE"])
    assert chosen["rows"] == 2 and verify_corpus(tmp_path / "chosen") == []


def test_images_with_a_doubtful_mask_are_left_out_on_request(tmp_path):
    write_image(tmp_path / "in" / "breast.png")
    report = np.repeat(np.linspace(0, 240, 300).astype(np.uint8)[:, None], 200, axis=1)
    cv2.imwrite(str(tmp_path / "in" / "report.png"), report)
    assert make([tmp_path / "in"], tmp_path / "all")["rows"] == 2
    confidence = Corpus(tmp_path / "all").rows["mask_confidence"]  # of the breast, of the report
    assert confidence[1] < confidence[0]
    least = sum(confidence) / 2
    manifest = make([tmp_path / "in"], tmp_path / "sure", min_mask_confidence=least)
    assert manifest["rows"] == 1 and manifest["min_mask_confidence"] == least
    assert f"mask confidence below {least:g}" in refusals(tmp_path / "sure")["report.png"]
    with pytest.raises(ValueError, match="min_mask_confidence"):
        make([tmp_path / "in"], tmp_path / "never", min_mask_confidence=3)


@pytest.fixture
def containers(tmp_path) -> Path:
    """Zips of four mammograms: whole, and with one that is damaged, of Deflate64, behind a password; tars cut short."""
    names = [f"p{number}/im.dcm" for number in range(4)]
    for number, name in enumerate(names):
        mammogram((tmp_path / "src" / name).parent, "im.dcm", number, seed=number)
    with zipfile.ZipFile(tmp_path / "good.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in names:
            packed.write(tmp_path / "src" / name, name)
        packed.writestr("__MACOSX/p0/._im.dcm", b"metadata")
    good, info = (tmp_path / "good.zip").read_bytes(), packed.getinfo(names[1])
    directory = good.find(struct.pack("<I", 0x02014B50))
    while good[directory + 46 : directory + 46 + len(names[1])] != names[1].encode():
        directory = good.find(struct.pack("<I", 0x02014B50), directory + 1)

    def write(name: str, changes: dict[int, int]) -> None:
        changed = bytearray(good)
        for at, value in changes.items():
            changed[at] = value
        (tmp_path / name).write_bytes(changed)

    middle = info.header_offset + 40 + info.compress_size // 2
    write("damaged.zip", {at: good[at] ^ 0x5A for at in range(middle, middle + 40)})
    write("deflate64.zip", {info.header_offset + 8: 9, directory + 10: 9})
    write("encrypted.zip", {info.header_offset + 6: good[info.header_offset + 6] | 1, directory + 8: 1})
    (tmp_path / "cut.zip").write_bytes(good[:-2000])
    with tarfile.open(tmp_path / "all.tar", "w") as packed:
        for name in names:
            packed.add(tmp_path / "src" / name, name)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "all.tar").read_bytes()[: 3 * 125000])
    return tmp_path


@pytest.mark.parametrize(
    ("name", "reason"),
    [("damaged", "(BadZipFile|error)"), ("deflate64", "Deflate64"), ("encrypted", "behind a password")],
)
def test_one_member_of_a_zip_that_cannot_be_unpacked_is_refused(containers, tmp_path, name, reason):
    manifest = make([f"zip://::{tmp_path}/{name}.zip"], tmp_path / "out")
    assert manifest["rows"] == 3 and manifest["files_refused"] == 1
    (given,) = manifest["refused_by_reason"]
    assert re.search(reason, given) and "im.dcm" not in given
    assert manifest["passed_over"] == {OF_SYSTEM: 1}


def test_a_container_that_cannot_be_opened_is_named(containers, tmp_path):
    for address in (f"zip://::{tmp_path}/cut.zip", f"tar://::{tmp_path}/cut.tar"):
        with pytest.raises(SystemExit, match=r"^corpus: .*cut\.(zip|tar): cannot be opened \(\w+\); .*again"):
            main([address, "--output", str(tmp_path / "out"), "--num_proc", "1"])
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.private").exists()


def test_a_zip_is_opened_once_for_all_its_files(containers, tmp_path, monkeypatch):
    made, init = [], ZipFileSystem.__init__
    monkeypatch.setattr(ZipFileSystem, "__init__", lambda self, *a, **k: made.append(1) or init(self, *a, **k))
    file_system.cache_clear()
    address = f"zip://::{tmp_path}/good.zip"
    for file in list_archive([address]).files:
        with opened([file]) as (image,):
            assert len(image.stream.read()) == file.size() > 0
    assert len(made) <= 2  # the second to tell the root of the address


@pytest.mark.parametrize("suffix", [".gz", ".dcm"])
def test_an_archive_without_a_usable_image_says_so_and_why(tmp_path, suffix):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.dcm").with_suffix(suffix).write_bytes(b"<html>403 Forbidden</html>")
    said = "2 were refused, the reasons are in .*refused.csv" if suffix == ".dcm" else "ignored: 2 .gz"
    for _ in range(2):  # the same command says the same
        with pytest.raises(SystemExit, match=f"^corpus: none of 2 files could be used: .*{said}"):
            main([str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--num_proc", "1", "--tasks", "2"])
    assert len(refusals(tmp_path / "out")) == (2 if suffix == ".dcm" else 0)


def test_a_folder_that_cannot_be_listed_is_refused_by_name_and_the_rest_is_built(tmp_path, monkeypatch, capsys):
    write_image(tmp_path / "in" / "a" / "1.png"), write_image(tmp_path / "in" / "locked" / "2.png")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    main([str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--num_proc", "1"])
    assert "1 images of 1 volumes from 1 files; 0 files and 1 folders refused" in capsys.readouterr().out
    assert "Permission denied" in refusals(tmp_path / "out")["locked"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["folders_unlisted"] == 1
    assert verify_corpus(tmp_path / "out") == []


def test_a_folder_of_a_store_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    class Store(corpus_archive.AbstractFileSystem):
        def ls(self, path, detail=True):
            if path == "root/b":
                raise PermissionError(13, "Permission denied")
            names = {"root": ["root/a", "root/b", "root/.Trash"], "root/a": ["root/a/1.png"]}[path]
            return [{"name": each, "type": "file" if each.endswith("png") else "directory"} for each in names]

    found = corpus_archive._walk_store(Store(), "root")
    assert found.files == ["root/a/1.png"] and list(found.unlisted) == ["root/b"]
    assert found.passed_over == {"root/.Trash": OF_SYSTEM}


def test_pipes_are_passed_over_and_linked_folders_entered(tmp_path):
    write_image(tmp_path / "in" / "own.png", 1), write_image(tmp_path / "elsewhere" / "p.png", 2)
    os.mkfifo(tmp_path / "in" / "pipe.dcm")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    manifest = make([tmp_path / "in"], tmp_path / "out")
    assert manifest["rows"] == 2 and manifest["passed_over"] == {NOT_REGULAR: 1}


def test_names_of_any_kind(tmp_path):
    """A folder with `::` is no address; a name that is not UTF-8 does not spoil the list of refusals."""
    folder = tmp_path / "x::y"
    write_image(folder / "a::b.png", 1)
    (folder / os.fsdecode(b"bad\xff.dcm")).write_bytes(b"nothing")
    assert make([folder], tmp_path / "out")["rows"] == 1
    assert list(refusals(tmp_path / "out")) == [r"bad\udcff.dcm"]


def test_a_tilde_in_an_option_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "home" / "in" / "a.png")
    main(["~/in", "--output=~/out", "--num_proc", "1"])
    assert Corpus(tmp_path / "home" / "out").num_volumes == 1 and not (tmp_path / "~").exists()


def test_of_two_builds_on_one_output_the_second_is_refused(tmp_path, monkeypatch):
    write_image(tmp_path / "in" / "a.png")
    monkeypatch.setattr("dataset_scripts.corpus.build.LOCK_SECONDS", 0)
    render, raised = corpus_shards.render_shard, []

    def build_meanwhile(*given):
        with pytest.raises(ValueError, match="another build is at work") as error:
            make([tmp_path / "in"], tmp_path / "out")
        raised.append(error)
        render(*given)

    monkeypatch.setattr(corpus_shards, "render_shard", build_meanwhile)
    assert make([tmp_path / "in"], tmp_path / "out")["rows"] == 1 and len(raised) == 1


def test_a_build_outside_the_main_thread(tmp_path):
    write_image(tmp_path / "in" / "a.png")
    results = []

    def work():
        results.append(make([tmp_path / "in"], tmp_path / "out")["rows"])
        with pytest.raises(RuntimeError, match="num_proc=1"):
            make([tmp_path / "in"], tmp_path / "out", num_proc=2)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [1]
