"""Identifiers planted wherever an archive can hold them: none may come out.

The commands run as a user runs them. What they leave, say and publish is searched byte by byte.
"""

import json
import os
import shutil
import stat
import subprocess
import zlib
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from canaries import Canaries, contents, plant
from dicom_builders import BREAST, CT, SLICES
from forked_python import forked_python
from hub_server import HubServer
from made_inputs import HASH_KEY, draw_breast
from PIL import Image, PngImagePlugin
from pretrain_runs import CROPS, TINY

from dataset_scripts.corpus.reader import encode_png
from dataset_scripts.phantom.archive import PhantomParameters, write_archive
from dataset_scripts.phantom.dicom import BreastInfo, mammogram_dataset

CHECKOUT = Path(__file__).parents[2]
PUSH = ["--license", "cc0-1.0", "--num_proc", 1]
NUM_PATIENTS, NUM_SLICES = 3, 4
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def canaries():
    return Canaries()


@pytest.fixture(scope="module")
def archive(tmp_path_factory, canaries):
    """A phantom archive with identifiers in headers, names, comments, and behind the end of files."""
    plain, folder = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("planted") / canaries.text()
    parameters = PhantomParameters(NUM_SLICES, height_px=128, width_px=96, pixel_spacing_mm=1.4, slice_spacing_mm=8.0)
    write_archive(plain, NUM_PATIENTS, seed=5, parameters=parameters)
    with pydicom.config.disable_value_validation():
        for path in sorted(plain.rglob("*.dcm")):
            dataset = pydicom.dcmread(path)
            plant(dataset, canaries)
            write(dataset, folder / canaries.text(), canaries)
        write_separate_slices(folder / f"{canaries.text()}.{canaries.text()}", canaries)
        last = write(dataset, folder, canaries)  # the same object once more
        write_odd_files(folder, dataset, last, canaries)
    write_images(folder, canaries)
    return folder


def write(dataset: pydicom.Dataset, folder: Path, canaries: Canaries, **options) -> Path:
    path = folder / f"{canaries.text()}.dcm"
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, **options)
    return path


def write_separate_slices(folder: Path, canaries: Canaries) -> None:
    """A DBT volume of one file a slice."""
    shared = {"SeriesInstanceUID": canaries.uid(), "StudyInstanceUID": canaries.uid(), "PatientID": canaries.text()}
    for number, pixels in enumerate(SLICES):
        dataset = mammogram_dataset(pixels, BreastInfo("PHANTOM", BREAST.laterality, BREAST.view, 2.5, 8.0))
        plant(dataset, canaries)
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CT
        for keyword, value in shared.items():
            canaries.planted.discard(dataset.get(keyword))
            setattr(dataset, keyword, value)
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient, dataset.InstanceNumber = [0, 0, 8 * number], number
        write(dataset, folder, canaries)


def write_odd_files(folder: Path, dataset: pydicom.Dataset, whole: Path, canaries: Canaries) -> None:
    """Cut off, with bytes behind the end, no image, private, of an unknown syntax, unreadable, linked to nothing."""
    content = whole.read_bytes()
    (folder / f"{canaries.text()}.dcm").write_bytes(content[:-3000] + canaries.text().encode())
    (folder / f"{canaries.text()}.dcm").write_text(canaries.text())
    (folder / f"scan.{canaries.text()}").write_text(canaries.text())
    dataset.SOPInstanceUID = canaries.uid()
    with write(dataset, folder, canaries).open("ab") as stream:
        stream.write(canaries.text().encode() + canaries.text().encode("utf-16-be"))
    dataset.SOPInstanceUID = canaries.uid()
    extensionless = folder / f"scan.{canaries.text()}"  # an image by its content
    dataset.save_as(extensionless)
    syntax, dataset.SOPInstanceUID = dataset.file_meta.TransferSyntaxUID, canaries.uid()
    dataset.file_meta.TransferSyntaxUID = canaries.uid()
    write(dataset, folder, canaries, implicit_vr=False, little_endian=True)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPInstanceUID, dataset.PhotometricInterpretation = canaries.uid(), canaries.text()
    write(dataset, folder, canaries)
    dataset.SOPInstanceUID, dataset.SOPClassUID = canaries.uid(), canaries.uid()
    del dataset.Rows
    write(dataset, folder, canaries)
    unreadable = folder / f"{canaries.text()}.dcm"
    unreadable.write_text(canaries.text())
    unreadable.chmod(0)  # root reads it all the same, and finds no DICOM
    (folder / f"{canaries.text()}.dcm").symlink_to(f"/nowhere/{canaries.text()}")
    with open(os.path.join(os.fsencode(folder), b"\xff" + canaries.text().encode() + b".dcm"), "wb") as stream:
        stream.write(canaries.text().encode())


def write_images(folder: Path, canaries: Canaries) -> None:
    image = Image.fromarray((draw_breast(seed=9) >> 4).astype(np.uint8))
    comment = PngImagePlugin.PngInfo()
    comment.add_text("Patient", canaries.text())
    comment.add_text("Study", canaries.text(), zip=True)
    comment.add_itxt("Name", canaries.text(), lang=canaries.text())
    image.save(folder / f"{canaries.text()}.png", pnginfo=comment)
    exif = Image.Exif()
    exif[0x010E], exif[0x0132], exif[0x9C9B] = canaries.text(), canaries.date(), canaries.text().encode("utf-16-le")
    image.save(folder / f"{canaries.text()}.jpg", exif=exif, comment=canaries.text().encode())
    image.save(folder / f"{canaries.text()}.tif", description=canaries.text(), artist=canaries.text())
    pgm = cv2.imencode(".pgm", np.asarray(image))[1].tobytes()
    (folder / f"{canaries.text()}.pgm").write_bytes(pgm.replace(b"P5\n", f"P5\n# {canaries.text()}\n".encode(), 1))


class User:
    """Runs commands; their temporary files, caches and home lie in one folder, which is searched like the rest."""

    def __init__(self, home: Path, hub: HubServer):
        self.home, self.said = home, b""
        self.environment = {**hub.environment(home / "hub"), "TMPDIR": str(home), "HOME": str(home)}
        self.environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "0"

    def run(self, *command: object, rc: int = 0, **changes: str) -> bytes:
        done = subprocess.run(
            [self.home / "python", "-m", *map(str, command)],
            cwd=CHECKOUT,
            env={name: value for name, value in {**self.environment, **changes}.items() if value},
            capture_output=True,
        )
        assert done.returncode == rc, done.stderr.decode()[-3000:]
        self.said += done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def user(tmp_path_factory, hub_server):
    user = User(tmp_path_factory.mktemp("home"), hub_server)
    with forked_python(user.home, user.environment):
        yield user


@pytest.fixture(scope="module")
def built(archive, tmp_path_factory, user):
    folder = tmp_path_factory.mktemp("built") / "corpus"
    user.run("dataset_scripts.corpus", archive, "--output", folder, "--height", 128, "--width", 96, "--num_proc", 2)
    return folder


def leaks(canaries: Canaries, places: Iterable[bytes]) -> set[str]:
    """Canaries found, and the key of the hashes."""
    found: set[str] = set()
    for content in places:
        found |= canaries.found_in(content) | ({"the key"} if HASH_KEY.encode() in content else set())
    return found


def test_identifiers_were_planted_and_images_were_read(archive, canaries, built):
    assert canaries.kinds["text"] > 60_000 and canaries.kinds["uid"] > 10_000 and canaries.kinds["number"] > 5_000
    assert canaries.kinds["date"] > 20_000 and canaries.kinds["time"] > 10_000 and canaries.kinds["age"] > 10
    there = set().union(*(canaries.found_in(each, among_digits=True) for each in contents(archive.parent)))
    assert canaries.planted - there == set()  # so the search below can find them
    manifest = json.loads((built / "manifest.json").read_text())
    volumes = NUM_PATIENTS + 2  # two of the odd files are one more volume each
    assert manifest["rows_by_kind"] == {"dbt": volumes * NUM_SLICES + len(SLICES), "ffdm": NUM_PATIENTS, "unknown": 4}
    assert manifest["files_refused"] == 8 and manifest["files_ignored"] == 1
    assert sum(manifest["passed_over"].values()) == 1  # the link to nothing


def test_no_identifier_is_in_the_corpus_or_in_what_was_said(canaries, built, user):
    assert leaks(canaries, contents(built)) == set()
    user.run("dataset_scripts.corpus.verify", built, "--num_proc", 2)
    assert leaks(canaries, [user.said]) == set()
    assert b"as they were built" in user.said and b"refused.csv" in user.said


def test_what_names_files_is_private_and_the_key_is_nowhere(canaries, built):
    private = Path(f"{built}.private")
    assert {path.name for path in built.parent.iterdir()} == {built.name, private.name}
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert canaries.found_in((private / "refused.csv").read_bytes())  # there, files are named
    assert not any(HASH_KEY.encode() in content for content in contents(private))


def test_no_identifier_is_published(canaries, built, user, hub_server: HubServer, tmp_path):
    user.run("dataset_scripts.corpus.push", built, "someone/private", *PUSH)
    user.run("training.pretrain", CROPS, "--corpus", built, "--output_dir", tmp_path / "run", *TINY, "--max_steps", 2)
    user.run("modeling_mammodino.tools.cli", "push", tmp_path / "run" / "encoder", "someone/encoder", "--private")
    sent = {path.name for path in built.iterdir()} | {"README.md"}
    assert set(hub_server.files("someone/private", kind="dataset")) == sent
    assert "model.safetensors" in hub_server.files("someone/encoder")
    spoken = json.dumps([hub_server.requests, hub_server.messages, list(hub_server.repos)]).encode()
    # all that was ever uploaded, not only what stands in the repositories now
    assert leaks(canaries, [*contents(hub_server.folder), spoken]) == set()
    assert leaks(canaries, [*contents(tmp_path / "run"), *contents(user.home), user.said]) == set()


def test_a_corpus_with_a_file_of_the_archive_in_it_is_not_published(
    archive, canaries, built, user, hub_server, tmp_path
):
    corpus = shutil.copytree(built, tmp_path / "corpus")
    for path in [path for path in archive.iterdir() if path.is_file()][:5]:
        shutil.copy(path, corpus / f"scan{path.suffix if path.suffix in ('.png', '.dcm') else ''}")
    before = len(hub_server.requests)
    user.run("dataset_scripts.corpus.push", corpus, "someone/more", *PUSH, rc=1)
    assert hub_server.requests[before:] == []
    assert leaks(canaries, [user.said]) == set()


def test_the_search_finds_what_is_kept_on_purpose(archive, user, hub_server: HubServer, tmp_path):
    """The same commands, with the one text of the user's own that is published; and a key from a file."""
    own, key = Canaries(), "another key, from a file, long enough"
    name = own.text()
    (tmp_path / "key").write_text(key)
    image = next(archive.glob("*.png"))
    user.run("dataset_scripts.corpus", image, "--output", tmp_path / "out", "--collection", name,
             "--hash_key_file", tmp_path / "key", MAMMODINO_HASH_KEY="")  # fmt: skip
    user.run("dataset_scripts.corpus.push", tmp_path / "out", "someone/named", *PUSH)
    for file in ("data-00000.arrow", "manifest.json"):
        assert own.found_in((tmp_path / "out" / file).read_bytes()) == {name}
    assert own.found_in(hub_server.files("someone/named", kind="dataset")["README.md"]) == {name}
    for folder in (tmp_path / "out", tmp_path / "out.private", hub_server.folder, user.home):
        assert not any(key.encode() in content for content in contents(folder))


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16-le", "utf-16-be", "utf-16"])
@pytest.mark.parametrize("case", [str.upper, str.lower])
def test_the_search_finds_every_spelling(encoding, case):
    own = Canaries()
    values = [own.text(), own.uid(), own.date(), own.time(), own.number(), own.of("AS")]
    for value in values:
        spelled = case(f"a note of {value}, and so on").encode(encoding)
        assert own.found_in(b"\x01\xff" + spelled) == {value}
    date = values[2]
    assert own.found_in(f"{date[:4]}-{date[4:6]}-{date[6:]}T10:00".encode()) == {date}
    assert own.found_in(f"{date}120000".encode()) == {date}
    assert own.found_in(f"0.{date}1".encode()) == set()  # digits of a number


def test_the_search_looks_into_images():
    own = Canaries()
    drawn, said = own.text(), own.text()
    pixels = np.frombuffer(drawn.encode().ljust(64, b"."), np.uint8).reshape(8, 8)
    png = encode_png(pixels)
    text = b"Name\0\0" + zlib.compress(said.encode())
    png = png[:33] + len(text).to_bytes(4, "big") + b"zTXt" + text + b"\0\0\0\0" + png[33:]
    assert drawn.encode() not in png and said.encode() not in png
    assert said in own.found_in(b"before" + png + b"behind")
