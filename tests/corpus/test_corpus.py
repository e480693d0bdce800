"""The corpus: what is read, what is refused and why, and that nothing is half-written."""

import csv
import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import cv2
import datasets
import kill_corpus
import numpy as np
import pydicom
import pytest
from datasets.arrow_writer import ArrowWriter
from kills_itself import KillsItself
from made_inputs import HASH_KEY, draw_breast

from dataset_scripts.corpus.build import build_corpus, main
from dataset_scripts.corpus.reader import FEATURES, Corpus
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.dicom import keyed_hash
from modeling_mammodino.tools import engine as engine_module
from modeling_mammodino.tools.engine import Stage, parse_arguments, run_stages

FIT = (128, 96)
KEY = HASH_KEY.encode()


def build(sources, output, collection="test", **options):
    options = {"tasks": 3, **options}
    return build_corpus(sources, output, FIT, MammoDinoImageProcessor(), collection, **options)


def images(folder):
    """Everything of the rows, the images as they are stored."""
    rows = Corpus(folder).rows
    return [rows[column] for column in rows.column_names]


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
    manifest = build([mixed_folder], tmp_path / "out")
    refused = list(csv.DictReader((tmp_path / "out.private" / "refused.csv").open()))
    bad = {"text.dcm", "empty.dcm", "truncated.dcm", "black.png", "photo.png", "dot.png"}
    assert {row["file"].rpartition("/")[2] for row in refused} == bad
    assert all(len(row["reason"]) > 30 and ";" in row["reason"] for row in refused)
    assert manifest["files_read"] == 4 and manifest["files_refused"] == 6 and manifest["files_ignored"] == 1
    assert manifest["rows"] == 3 + 6 and Corpus(tmp_path / "out").num_volumes == 4
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest


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


def test_images_are_those_of_the_image_processor(phantom_archive, phantom_corpus):
    """The stored image, put on a canvas of its own size, is what inference sees."""
    path = sorted(phantom_archive.rglob("*_2d.dcm"))[0]
    corpus = Corpus(phantom_corpus)
    volume_id = [mammogram.volume_id for mammogram, _ in corpus.image_processor.render_source(path, FIT, False, KEY)]
    row = corpus.rows["volume_id"].index(volume_id[0])
    stored, tissue = corpus.image(row)
    height, width = stored.shape
    processor = MammoDinoImageProcessor(size={"height": height, "width": width}, patch_size=1, do_normalize=False)
    seen = processor(path)
    np.testing.assert_array_equal(np.rint(seen["pixel_values"][0, 0] * 255), stored)
    assert tissue.mean() == pytest.approx(seen["tissue_mask"].mean(), abs=0.01)


def test_identifiers_leave_only_as_keyed_hashes(phantom_archive, phantom_corpus):
    rows = datasets.load_from_disk(str(phantom_corpus))
    assert set(rows["patient"]) == {keyed_hash(f"PHANTOM-{number:06d}", KEY) for number in range(12)}
    for path in phantom_corpus.iterdir():
        content = path.read_bytes()
        if path.suffix == ".arrow":
            assert b"PHANTOM" not in content and b"simulated" not in content


def test_a_stopped_build_goes_on_and_ends_the_same(phantom_archive, phantom_corpus, tmp_path, monkeypatch, caplog):
    archive = Path(shutil.copytree(phantom_archive, tmp_path / "archive"))
    made = kill_corpus.stop_after_two_shards(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        build([archive], tmp_path / "out", "phantom", rows_per_shard=16)
    assert len(list((tmp_path / "out").glob("*.arrow"))) == 2 and not list((tmp_path / "out").glob(".*"))
    with pytest.raises(FileNotFoundError, match="unfinished"):
        Corpus(tmp_path / "out")

    build([archive], tmp_path / "out", "phantom", rows_per_shard=16)
    assert len(made) == len(set(made)) > 2  # what was finished is not made again
    assert images(tmp_path / "out") == images(phantom_corpus)
    later = cv2.imwrite(str(archive / "later.png"), draw_breast())
    build([archive], tmp_path / "out", "phantom", rows_per_shard=16)  # nothing is left to do
    assert later and len(made) == len(set(made))
    assert [each[:30] for each in caplog.messages if " new " in each] == ["1 files are new in the archive"]


@pytest.mark.slow
def test_a_build_of_two_processes_that_is_killed_ends_as_one_that_is_not_by_one(phantom_archive, tmp_path):
    """At random moments and many times it is by `python -m tests.kill_corpus`."""
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    process = kill_corpus.start(phantom_archive, killed)
    while " 0 shards" in kill_corpus.state_of(killed) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and "complete" not in kill_corpus.state_of(killed)
    for output in (killed, undisturbed):
        main([*kill_corpus.command(phantom_archive, output)[3:], "--num_proc", "1"])
    assert kill_corpus.digests(killed) == kill_corpus.digests(undisturbed)
    assert len(list(killed.glob("*.arrow"))) > 2


def test_a_full_disk_is_said_and_what_is_finished_stands(phantom_archive, phantom_corpus, tmp_path, monkeypatch):
    write = ArrowWriter.write
    rows = []

    def write_until_full(writer, row, *others):
        rows.append(row)
        if len(rows) == 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, row, *others)

    monkeypatch.setattr(ArrowWriter, "write", write_until_full)
    arguments = [str(phantom_archive), "--output", str(tmp_path / "out"), "--height", "128", "--width", "96"]
    arguments += ["--collection", "phantom", "--rows_per_shard", "16", "--num_proc", "1"]
    with pytest.raises(SystemExit, match="No space left on device.*what is finished stands"):
        main(arguments)
    assert list((tmp_path / "out").glob("*.arrow")) and not list((tmp_path / "out").glob(".*"))
    main(arguments)
    assert images(tmp_path / "out") == images(phantom_corpus)


def test_one_corpus_has_one_set_of_settings(phantom_corpus, phantom_archive, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="fit"):
        build_corpus([phantom_archive], phantom_corpus, (64, 64), MammoDinoImageProcessor(), "phantom")
    with pytest.raises(ValueError, match="image_processor"):
        build_corpus([phantom_archive], phantom_corpus, FIT, MammoDinoImageProcessor(do_clahe=False), "phantom")
    with pytest.raises(ValueError, match="sources"):
        build_corpus([tmp_path], phantom_corpus, FIT, MammoDinoImageProcessor(), "phantom")
    monkeypatch.setenv("MAMMODINO_HASH_KEY", "another key that is long")
    with pytest.raises(ValueError, match="hash_key_check"):
        build_corpus([phantom_archive], phantom_corpus, FIT, MammoDinoImageProcessor(), "phantom")
    (tmp_path / "notes.txt").write_text("somebody's")
    with pytest.raises(ValueError, match="not empty"):
        build([phantom_archive], tmp_path)


def test_a_second_copy_enters_once(phantom_archive, tmp_path):
    whole = sorted(phantom_archive.rglob("*_2d.dcm"))[0].read_bytes()
    for name, content in (("a", whole[:-100]), ("b", whole), ("c", whole)):  # the first copy was cut off
        (tmp_path / f"{name}.dcm").write_bytes(content)
    manifest = build([tmp_path / "a.dcm", tmp_path / "b.dcm", tmp_path / "c.dcm"], tmp_path / "out")
    assert manifest["rows"] == 1 and manifest["files_refused"] == 2
    reasons = {"PixelData is truncated; fetch the file again": 1, "a copy of another file; one is enough": 1}
    assert manifest["refused_by_reason"] == reasons
    with (tmp_path / "out.private" / "refused.csv").open() as stream:
        assert [row["reason"] for row in csv.DictReader(stream)][1] == "a copy of file 1; one is enough"


def test_a_volume_of_one_file_a_slice_is_one_volume_in_order(phantom_archive, tmp_path):
    """As older vendors store DBT; the files' names run against the order of the slices."""
    whole = pydicom.dcmread(sorted(phantom_archive.rglob("*_dbt.dcm"))[0])
    groups = list(whole.PerFrameFunctionalGroupsSequence)
    del whole.PerFrameFunctionalGroupsSequence
    orientation = whole.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
    del whole.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices
    frames = whole.pixel_array
    for number, (frame, group) in enumerate(zip(frames, groups, strict=True)):
        whole.SOPInstanceUID = whole.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
        whole.NumberOfFrames, whole.PixelData = 1, frame.tobytes()
        whole.ImageOrientationPatient = orientation
        whole.ImagePositionPatient = group.PlanePositionSequence[0].ImagePositionPatient
        (tmp_path / "in").mkdir(exist_ok=True)
        whole.save_as(tmp_path / "in" / f"{9 - number}.dcm")
    build([tmp_path / "in"], tmp_path / "out")
    rows = Corpus(tmp_path / "out").rows
    assert rows["slice_index"] == [0, 1, 2, 3, 4, 5] and set(rows["num_slices"]) == {6}
    assert len(set(rows["volume_id"])) == 1 and rows["slice_spacing_mm"] == [6.0] * 6
    build([sorted(phantom_archive.rglob("*_dbt.dcm"))[0]], tmp_path / "whole")
    assert Corpus(tmp_path / "whole").rows["image"] == rows["image"]


def test_an_archive_in_a_zip_is_the_same(phantom_archive, phantom_corpus, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", phantom_archive)
    build([f"zip://::{archive}"], tmp_path / "out", "phantom")
    assert images(tmp_path / "out") == images(phantom_corpus)


@pytest.mark.slow
@pytest.mark.parametrize("interrupts", [signal.default_int_handler, signal.SIG_IGN], ids=["ctrl-c", "background"])
def test_a_worker_that_dies_stops_the_stage(tmp_path, request, interrupts):
    """Also in a shell's background, where the interrupt of Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, interrupts)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(ChildProcessError, match="signal 9"):
        run_stages([Stage("shards", KillsItself(), 2)], "local", 2, tmp_path / "logs", {})


SBATCH = """\
#!/bin/sh
# Slurm on this machine, at once: every task of the array one after the other
export RUN_OFFSET=0 SLURM_CPUS_PER_TASK=3 SLURM_NODELIST=here SLURM_NODEID=0 SLURM_JOB_ID=7
for script; do :; done
array=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for task in $(seq 0 "${array:-0}"); do
    SLURM_ARRAY_TASK_ID=$task sh "$script" 1>&2 || exit 1
done
echo "Submitted batch job 7"
"""
SRUN = '#!/bin/sh\n[ "$SRUN_CPUS_PER_TASK" = 3 ] || exit 1\nshift 3\nexec "$@"\n'  # without -l -n 1
SCONTROL = '#!/bin/sh\necho "$3"\n'  # show hostnames: the one node


@pytest.mark.slow
def test_on_slurm_the_corpus_is_the_same(phantom_archive, phantom_corpus, tmp_path, monkeypatch, capsys):
    """Each task from a script of its own, in a process that knows nothing of the command that sent it off."""
    for name, content in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    arguments = ["--height", "128", "--width", "96", "--collection", "phantom", "--tasks", "1", "--engine", "slurm"]
    arguments += ["--engine_args", "partition=cpu", "time=00:10:00"]
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    main([str(phantom_archive), "--output", str(tmp_path / "out"), *arguments])
    assert "sent off" in capsys.readouterr().out
    assert images(tmp_path / "out") == images(phantom_corpus)


def test_ray_is_given_each_stage(tmp_path, monkeypatch):
    """Ray itself is not installed with the tests."""
    ran = []

    class Executor:
        def __init__(self, pipeline, tasks, workers, logging_dir, num_cpus):
            self.told = pipeline, tasks, workers, num_cpus

        def run(self):
            ran.append(self.told)

    monkeypatch.setattr(engine_module, "executor", lambda engine: Executor)
    steps = [KillsItself(), KillsItself()]
    assert run_stages([Stage("a", steps[0], 3), Stage("b", steps[1], 1)], "ray", 2, tmp_path, {"num_cpus": 1})
    assert ran == [([steps[0]], 3, 2, 1), ([steps[1]], 1, 1, 1)]


@pytest.mark.parametrize(("given", "message"), [("partition", "NAME=VALUE"), ("nonsense=1", "partition")])
def test_engine_arguments_are_those_of_datatrove(given, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments("slurm", [given])
    assert parse_arguments("slurm", ["partition=cpu", "mem_per_cpu_gb=4"]) == {"partition": "cpu", "mem_per_cpu_gb": 4}


def test_sixteen_bits_on_request(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), draw_breast())
    main([str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), "--bit_depth", "16"])
    image, _ = Corpus(tmp_path / "out").image(0)
    assert image.dtype == np.uint16 and len(np.unique(image)) > 1000


def test_a_missing_or_empty_source_is_said(tmp_path):
    with pytest.raises(SystemExit, match="nowhere: no such file or folder"):
        main([str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SystemExit, match="nothing"):
        main([str(tmp_path / "nothing"), "--output", str(tmp_path / "out")])
