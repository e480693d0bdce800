"""Export: Parquet that opens without code, a true card, nothing of a header, nothing where sharing is forbidden."""

import json
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pydicom
import pytest
import yaml
from canaries import Canaries, contents, plant
from hub_server import HubServer

from dataset_scripts.benchmarks import BENCHMARKS
from dataset_scripts.benchmarks import export as module
from dataset_scripts.benchmarks.builder import BenchmarkBuilder
from dataset_scripts.benchmarks.export import export, license_id, main, push_export

datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def exported(phantom_archive, tmp_path_factory):
    return export("phantom", phantom_archive, tmp_path_factory.mktemp("exports") / "phantom")


def opened(folder, tmp_path):
    return datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))


@pytest.mark.slow
def test_an_export_opens_in_another_process_and_is_the_data_set(exported, phantom_archive, tmp_path):
    command = (
        "import datasets, hashlib, json, sys\n"
        f"rows = datasets.load_dataset({str(exported)!r}, split='train', cache_dir={str(tmp_path / 'other')!r})\n"
        "assert not any(name.startswith(('dataset_scripts', 'modeling_mammodino')) for name in sys.modules)\n"
        "print(json.dumps([hashlib.sha256(row['image'].tobytes()).hexdigest() for row in rows]))"
    )
    ran = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    builder = BenchmarkBuilder(cache_dir=str(tmp_path / "cache"), dataset_name="phantom", data_dir=str(phantom_archive))
    builder.download_and_prepare()
    built, rows = builder.as_dataset(split="train"), opened(exported, tmp_path)["train"]
    assert len(json.loads(ran.stdout.splitlines()[-1])) == len(built) == len(rows) == 60
    assert rows.features == built.features
    assert rows.remove_columns("image")[:] == built.remove_columns("image")[:]
    for ours, theirs in zip(built, rows, strict=True):
        assert np.asarray(theirs["image"]).dtype == np.uint16
        np.testing.assert_array_equal(np.asarray(ours["image"]), np.asarray(theirs["image"]))
    assert {path.relative_to(exported).parts[0] for path in exported.rglob("*")} == {"README.md", "data"}


def test_the_card_says_what_is_in_the_files(exported, tmp_path):
    head, _, text = (exported / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
    head = yaml.safe_load(head)
    assert head["license"] == "cc0-1.0" and "research-use-only" in head["tags"]
    assert head["task_categories"] == ["image-classification", "object-detection"]
    assert "Research use only: not a medical device" in text and 'load_dataset("phantom", split="train")' in text
    rows = opened(exported, tmp_path)["train"].remove_columns("image").to_pandas()
    assert f"| train | {len(rows)} | {rows['image_id'].nunique()} | 12 | 12 |" in text
    assert (
        "|\n\nThere is no official split: all is in train; hold out patients. No patient is in more than one." in text
    )
    for definition in BENCHMARKS["phantom"].definitions:
        column = f"{definition.task}_{definition.name}"
        assert f"`{column}`, {definition.task} ({definition.name}): {definition.meaning}." in text
        section = text.partition(f"`{column}`,")[2]
        for place, name in enumerate(definition.classes):
            assert f"\n| {name} | {(rows[column] == place).sum()} |" in section.partition("\n`")[0]
    assert "up to 4 slices, evenly spaced" in text and "Nothing that the data set's metadata name." in text
    assert all(f"- {note}" in text for note in BENCHMARKS["phantom"].notes)


def test_a_task_with_what_was_left_out(phantom_archive, tmp_path):
    archive = shutil.copytree(phantom_archive, tmp_path / "archive")
    volumes = sorted(archive.rglob("*_dbt.dcm"))
    volumes[0].write_bytes(volumes[0].read_bytes()[:-5000])
    volumes[1].unlink()
    folder, spelt = tmp_path / "out" / "lesions", {"_": "--data_dir", "-": "--data-dir"}
    for name in spelt.values():
        options = [name, str(archive), "--output", str(folder), "--task", "lesion", "--seed", "2", "--num-proc", "1"]
        main(["phantom", *options, "--boxed-slices", "--allow_missing"])
        rows, text = opened(folder, tmp_path), (folder / "README.md").read_text()
        assert list(rows) == ["train", "validation", "test"] and rows["train"].features["label"].names[1] == "lesion"
        assert sum(len(set(split["image_id"])) for split in rows.values()) == 22
        assert "no official split. Held out here by patient, stratified, with seed 2: validation and test. No" in text
        assert "- image file missing: 1 images" in text and "the slices that have a box, and where it has none" in text
        left_out = text.partition("## Left out\n")[2].partition("\n## ")[0]
        assert left_out.count(": 1 images\n") == 2 and str(tmp_path) not in text
        shutil.rmtree(folder)


@pytest.mark.slow
def test_nothing_of_a_header_travels(phantom_archive, tmp_path):
    """Identifiers in every attribute that takes one; files and patients of labels.csv keep their names."""
    canaries = Canaries()
    archive = shutil.copytree(phantom_archive, tmp_path / "archive")
    planted = sorted(archive.rglob("*.dcm"))[:2]  # a volume and a mammogram
    with pydicom.config.disable_value_validation():
        for path in planted:
            dataset = pydicom.dcmread(path)
            plant(dataset, canaries)
            dataset.save_as(path)
            assert canaries.found_in(path.read_bytes(), among_digits=True)
    folder = export("phantom", archive, tmp_path / "phantom")
    for content in contents(folder):
        assert not canaries.found_in(content)
    rows = opened(folder, tmp_path)["train"].cast_column("image", datasets.Image(decode=False))
    of_planted = [row for row in rows if archive / row["path"] in planted]
    assert len(of_planted) == 4 + 1
    for row in of_planted:
        assert not canaries.found_in(row.pop("image")["bytes"]) and not canaries.found_in(json.dumps(row).encode())


@pytest.mark.parametrize("name", ["rsna", "vindr_mammo", "table"])
def test_what_may_not_be_passed_on_is_refused_before_anything_is_read(name, hub: HubServer, tmp_path):
    for options in (["--output", str(tmp_path / "out")], ["--push-to-hub", "someone/copy"]):
        with pytest.raises(
            SystemExit, match=f"export: {name} is not exported: .*For your own use read it where it lies"
        ):
            main([name, "--data-dir", str(tmp_path / "nowhere"), *options])
    assert list(tmp_path.iterdir()) == [] and not hub.requests


def test_a_license_that_allows_sharing_is_one_that_the_hub_knows():
    known = {"cc-by-3.0", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0"}
    assert {license_id(each.license) for each in BENCHMARKS.values() if not each.no_sharing} <= known
    assert license_id("Kaggle competition rules") == license_id("CC BY-NC-ND 9.0") == "other"


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"])
def test_an_export_that_fails_leaves_nothing(phantom_archive, tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(module, "make_card", fail)
    with pytest.raises(SystemExit, match="export: No space left" if isinstance(error, OSError) else "130"):
        main(["phantom", "--data-dir", str(phantom_archive), "--output", str(tmp_path / "out"), "--num_proc", "1"])
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_one_line(exported, phantom_archive, tmp_path):
    for arguments, message in (
        (["phantom", "--output", str(exported)], "exists and is not an empty folder; give another output"),
        (["fantom", "--output", str(tmp_path / "out")], "data set 'fantom': must be one of rsna"),
        (["cmmd", "--output", str(tmp_path / "out")], "CMMD_clinicaldata_revision.xlsx; give the folder"),
        (["phantom", "--output", str(tmp_path / "o"), "--task", "birads", "--definition", "x"], "definition 'x'"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--data-dir", str(phantom_archive), "--num-proc", "1"])
        assert str(caught.value).startswith("export: ") and message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit):
        main(["phantom", "--data-dir", str(phantom_archive)])  # argparse: neither --output nor --push-to-hub
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_to_the_hub_and_back(phantom_archive, hub: HubServer, tmp_path, capsys):
    main(["phantom", "--data-dir", str(phantom_archive), "--push_to_hub", "someone/phantom", "--num-proc", "1"])
    assert capsys.readouterr().out.strip().endswith("someone/phantom")
    files = hub.files("someone/phantom", kind="dataset")
    assert set(files) == {"README.md", "data/train-00000-of-00001.parquet"}
    assert hub.repos["dataset/someone/phantom"]["private"]
    assert b'load_dataset("someone/phantom", split="train")' in files["README.md"]
    command = "import datasets; rows = datasets.load_dataset('someone/phantom', split='train'); print(len(rows))"
    shown = subprocess.run(
        [sys.executable, "-c", command], env=hub.environment(tmp_path), capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0 and shown.stdout.strip() == "60", shown.stderr[-2000:]
    assert not hub.messages.keys() - hub.commits.keys()


def test_a_repository_of_another_export_or_for_everybody_is_left_alone(exported, hub: HubServer, tmp_path):
    push_export(exported, "someone/export", public=True)
    before = hub.files("someone/export", kind="dataset")
    assert not hub.repos["dataset/someone/export"]["private"]
    with pytest.raises(ValueError, match="someone/export exists and is public; nothing was sent"):
        push_export(exported, "someone/export")
    hub.requests.clear()
    push_export(exported, "someone/export", public=True)  # the same once more: only the card is sent
    assert not any("lfs-put" in path for _, path in hub.requests)
    other = shutil.copytree(exported, tmp_path / "other")
    (shard,) = (other / "data").iterdir()
    shard.write_bytes(shard.read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"1 files of another data set, data/train-.*; nothing was sent"):
        push_export(other, "someone/export", public=True)
    shard.rename(shard.with_name("test-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match="1 files of another data set"):
        push_export(other, "someone/export", public=True)
    assert hub.files("someone/export", kind="dataset") == before


def test_a_hub_out_of_reach(phantom_archive, hub: HubServer, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    folder = tmp_path / "phantom"
    options = ["--output", str(folder), "--push-to-hub", "someone/far", "--num-proc", "1"]
    with pytest.raises(SystemExit, match="export: the Hub cannot be reached"):
        main(["phantom", "--data-dir", str(phantom_archive), *options])
    assert len(opened(folder, tmp_path)["train"]) == 60  # what was written stands
