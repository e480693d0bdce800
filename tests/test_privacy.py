"""Identifiers planted wherever an archive can hold them: none may come out.

The commands run as a user runs them. What they leave, say and publish is searched byte by byte.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from conftest import HASH_KEY, draw_breast
from hub_server import HubServer
from PIL import Image, PngImagePlugin
from pydicom.datadict import DicomDictionary
from pydicom.tag import Tag
from test_pretrain import TINY

from dataset_scripts.phantom import PhantomParameters, write_archive

CHECKOUT = Path(__file__).parents[1]
# what the reader needs to see an image; a planted value would only have the file refused
NEEDED = {
    *("PhotometricInterpretation", "Modality", "ImageType", "PresentationIntentType", "SOPClassUID", "VOILUTFunction"),
    *("SpecificCharacterSet", "ImageLaterality", "Laterality", "FrameLaterality", "PixelPresentation", "Signature"),
    *("BurnedInAnnotation", "RecognizableVisualFeatures", "NumberOfFrames", "WindowCenter", "WindowWidth"),
    *("RescaleSlope", "RescaleIntercept", "PixelSpacing", "ImagerPixelSpacing", "TransferSyntaxUID", "ViewPosition"),
    *("SpacingBetweenSlices", "SliceThickness", "NominalScannedPixelSpacing", "ImagePositionPatient"),
    *("ImageOrientationPatient", "LossyImageCompression"),
}
TEXTS = {"LO", "SH", "PN", "LT", "ST", "UT", "UC", "AE", "CS", "UR"}


class Canaries:
    """Makes unique values, and finds them again."""

    def __init__(self) -> None:
        self.planted: set[str] = set()

    def text(self) -> str:
        self.planted.add(value := f"QZ{len(self.planted):05d}XJ")
        return value

    def date(self) -> str:
        number = len(self.planted)
        self.planted.add(value := f"{1890 + number // 336}{1 + number // 28 % 12:02d}{1 + number % 28:02d}")
        return value

    def uid(self) -> str:
        self.planted.add(value := f"1.2.840.99887766.{len(self.planted)}.5544332211")
        return value

    def found_in(self, content: bytes) -> set[str]:
        """In any case, as UTF-8, Latin or UTF-16; dates also where they are written with dashes."""
        plain = content.lower().replace(b"\0", b"")
        undashed = plain.replace(b"-", b"")
        return {value for value in self.planted if value.lower().encode() in (undashed if value.isdigit() else plain)}


def plant(dataset: pydicom.Dataset, canaries: Canaries) -> None:
    """Into every attribute of the dictionary that takes a text, a date or a UID, and into what is nested."""
    for tag, (vr, _, _, retired, keyword) in DicomDictionary.items():
        if not keyword or retired or keyword in NEEDED or Tag(tag).group in (0x0000, 0x0002, 0x0004, 0xFFFE):
            continue
        if vr in TEXTS:
            dataset.add_new(tag, vr, canaries.text())
        elif vr in ("DA", "DT"):
            dataset.add_new(tag, vr, canaries.date() + ("120000" if vr == "DT" else ""))
        elif vr == "UI" and "UID" in keyword:
            dataset.add_new(tag, vr, canaries.uid())
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.SourceApplicationEntityTitle = canaries.text()
    for group in (0x0009, 0x0029, 0x7FDF):
        block = dataset.private_block(group, canaries.text(), create=True)
        block.add_new(1, "LO", canaries.text())
        block.add_new(2, "UN", canaries.text().encode())
        block.add_new(3, "DA", canaries.date())
    nested = [element.value for element in dataset if element.VR == "SQ"]
    for item in (item for sequence in nested for item in sequence):
        item.PatientComments, item.StudyDate, item.CodeMeaning = canaries.text(), canaries.date(), canaries.text()
    dataset.preamble = canaries.text().encode().ljust(128, b"\0")


@pytest.fixture(scope="module")
def canaries():
    return Canaries()


@pytest.fixture(scope="module")
def archive(tmp_path_factory, canaries):
    """A phantom archive with identifiers in headers, names, comments, and behind the end of files."""
    plain, folder = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("planted") / canaries.text()
    parameters = PhantomParameters(num_slices=4, height_px=128, width_px=96, pixel_spacing_mm=1.4, slice_spacing_mm=8.0)
    write_archive(plain, 4, seed=5, parameters=parameters)
    for path in sorted(plain.rglob("*.dcm")):
        with pydicom.config.disable_value_validation():
            dataset = pydicom.dcmread(path)
            plant(dataset, canaries)
            target = folder / canaries.text() / f"{canaries.text()}.dcm"
            target.parent.mkdir(parents=True)
            dataset.save_as(target)
    shutil.copy(target, folder / f"{canaries.text()}.dcm")  # a second copy
    (folder / f"{canaries.text()}.dcm").write_bytes(target.read_bytes()[:-2000] + canaries.text().encode())  # cut off
    (folder / f"{canaries.text()}.{canaries.text()}").write_text(canaries.text())  # no image
    (folder / f"{canaries.text()}.dcm").write_text(canaries.text())
    with pydicom.config.disable_value_validation():
        dataset.SOPClassUID, dataset.SOPInstanceUID = canaries.uid(), canaries.uid()
        del dataset.Rows
        dataset.save_as(folder / f"{canaries.text()}.dcm")  # a private object
        dataset.PhotometricInterpretation, dataset.Rows = canaries.text(), 128
        dataset.SOPInstanceUID = canaries.uid()
        dataset.save_as(folder / f"{canaries.text()}.dcm")
        dataset.file_meta.TransferSyntaxUID = canaries.uid()
        dataset.save_as(folder / f"{canaries.text()}.dcm", implicit_vr=False, little_endian=True)
    picture = Image.fromarray((draw_breast(seed=9) >> 4).astype(np.uint8))
    comment = PngImagePlugin.PngInfo()
    comment.add_text("Patient", canaries.text())
    picture.save(folder / f"{canaries.text()}.png", pnginfo=comment)
    exif = Image.Exif()
    exif[0x010E], exif[0x0132] = canaries.text(), canaries.text()
    picture.save(folder / f"{canaries.text()}.jpg", exif=exif, comment=canaries.text().encode())
    pgm = cv2.imencode(".pgm", np.asarray(picture))[1].tobytes()
    (folder / f"{canaries.text()}.pgm").write_bytes(pgm.replace(b"P5\n", f"P5\n# {canaries.text()}\n".encode(), 1))
    return folder


def run(*command, env=None) -> bytes:
    done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=CHECKOUT, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(archive, tmp_path_factory):
    """The corpus, and what the command said."""
    folder = tmp_path_factory.mktemp("built") / "corpus"
    said = run("dataset_scripts.corpus", archive, "--output", folder, "--height", 128, "--width", 96, "--num_proc", 2)
    return folder, said


def contents(folder: Path) -> bytes:
    return b"\n".join(
        str(path.name).encode() + b"\n" + path.read_bytes() for path in folder.rglob("*") if path.is_file()
    )


def test_identifiers_were_planted_and_images_were_read(archive, canaries, built):
    assert len(canaries.planted) > 8000
    manifest = json.loads((built[0] / "manifest.json").read_text())
    assert manifest["rows"] >= 4 * 5 + 3 and manifest["files_refused"] >= 5 and manifest["files_ignored"] == 1
    there = canaries.found_in(contents(archive) + str(list(archive.parent.rglob("*"))).encode())
    assert canaries.planted - there == set()  # they are in the archive, so that the search below can find them


def test_no_identifier_is_in_the_corpus_or_in_what_was_said(canaries, built):
    folder, said = built
    assert canaries.found_in(contents(folder)) == set()
    assert canaries.found_in(said) == set()
    assert canaries.found_in(run("dataset_scripts.verify", folder, "--num_proc", 1)) == set()


def test_what_names_files_is_private_and_the_key_is_nowhere(canaries, built):
    private = Path(f"{built[0]}.private")
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert canaries.found_in((private / "refused.csv").read_bytes())  # there, files are named
    assert HASH_KEY.encode() not in contents(private) + contents(built[0]) + built[1]


def test_the_search_finds_what_is_kept_on_purpose(archive, canaries, tmp_path):
    name = canaries.text()
    run("dataset_scripts.corpus", sorted(archive.rglob("*.png"))[0], "--output", tmp_path / "out", "--collection", name)
    assert canaries.found_in(contents(tmp_path / "out")) == {name}
    canaries.planted.discard(name)


def test_no_identifier_is_published(canaries, built, hub_server: HubServer, tmp_path):
    folder, environment = built[0], hub_server.environment(tmp_path)
    said = run("dataset_scripts.push_corpus", folder, "someone/private", "--license", "cc0-1.0", env=environment)
    said += run("training.pretrain", "demo", "--corpus", folder, "--output_dir", tmp_path / "run", *TINY,
                "--max_steps", 2, env=environment)  # fmt: skip
    encoder = tmp_path / "run" / "encoder"
    said += run("modeling_mammodino.cli", "push", encoder, "someone/encoder", "--private", env=environment)
    published = [*hub_server.files("someone/private", kind="dataset").values()]
    published += hub_server.files("someone/encoder").values()
    assert len(published) > 10
    for content in (*published, said, contents(tmp_path / "run"), os.fsencode(str(list(hub_server.messages.values())))):
        assert canaries.found_in(content) == set()
