"""`mammodino embed --engine`: an archive in shares, row for row what one process makes, also where it is killed."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import cv2
import datasets
import numpy as np
import pandas as pd
import pyarrow.dataset
import pyarrow.parquet
import pytest
from made_inputs import draw_breast, random_encoder

from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.dicom import Instance
from modeling_mammodino.tools import embed as embed_module
from modeling_mammodino.tools import engine as engine_module

BROKEN = "cut.dcm"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    random_encoder(patch_size=16, image_size=64).save_pretrained(folder)
    MammoDinoImageProcessor(size={"height": 128, "width": 96}, patch_size=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def archive(phantom_archive, tmp_path_factory) -> Path:
    """Three volumes of six slices, two images, a file that is broken."""
    folder = tmp_path_factory.mktemp("archive")
    volumes = sorted(phantom_archive.rglob("*_dbt.dcm"))
    for name, volume in zip(("a.dcm", "c.dcm", "e.dcm"), volumes[:3], strict=True):
        shutil.copy(volume, folder / name)
    cv2.imwrite(str(folder / "b.png"), draw_breast(seed=1))
    cv2.imwrite(str(folder / "d.png"), draw_breast(seed=2))
    (folder / BROKEN).write_bytes(volumes[0].read_bytes()[:-5000])
    return folder


@pytest.fixture
def embed(mammodino, archive, checkpoint, monkeypatch):
    """The command with shares of seven images, so that here there are four of them."""
    monkeypatch.setattr(embed_module, "IMAGES_PER_SHARE", 7)
    return lambda output, *options: mammodino("embed", archive, "--model", checkpoint, "--output", output, *options)


@pytest.fixture
def expected(mammodino, archive, checkpoint, tmp_path) -> pd.DataFrame:
    mammodino("embed", archive, "--model", checkpoint, "--output", tmp_path / "whole.parquet")
    return pd.read_parquet(tmp_path / "whole.parquet")


def assert_same(folder: Path, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(pyarrow.dataset.dataset(folder).to_table().to_pandas(), expected)
    refused = [path.with_name(f"{path.name}.refused.csv").read_text() for path in (folder, folder.with_name("whole"))]
    assert refused[0] == refused[1] and BROKEN in refused[0]
    assert not folder.with_name(f"{folder.name}.parts").exists()


@pytest.mark.slow
def test_two_processes_make_one_data_set_row_for_row_that_of_one(embed, expected, tmp_path, capsys):
    embed(folder := tmp_path / "features", "--engine", "local", "--num_proc", "2")
    assert "20 rows of 5 files; 1 refused" in capsys.readouterr().out
    assert_same(folder, expected)
    assert len(list(folder.iterdir())) > 1  # parts and nothing else
    assert all(path.name == f"part-{number:05d}.parquet" for number, path in enumerate(sorted(folder.iterdir())))
    opened = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(opened.with_format("numpy")["embedding"], np.stack(expected["embedding"]))
    of_one = pyarrow.parquet.read_schema(tmp_path / "whole.parquet").metadata
    assert pyarrow.dataset.dataset(folder).schema.metadata == of_one


@pytest.mark.parametrize("options", [(), ("--pool_volumes",)])
def test_a_killed_run_goes_on_with_what_is_not_done(embed, expected, tmp_path, monkeypatch, options):
    write, done = embed_module.write_features, []

    def killed(files, output, *given, **volumes):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(output.name)
        return write(files, output, *given, **volumes)

    folder, one = tmp_path / "features", ("--engine", "local", "--num_proc", "1")
    monkeypatch.setattr(embed_module, "write_features", killed)
    with pytest.raises(SystemExit):
        embed(folder, *one, *options)
    assert not folder.exists() and len(list((tmp_path / "features.parts" / "table").glob("*.parquet"))) == 2
    with pytest.raises(SystemExit, match="holds the beginning of a run with other files or options"):
        embed(folder, *one, *options, "--pool", "both")
    monkeypatch.setattr(embed_module, "write_features", lambda files, output, *given, **volumes: (
        done.append(output.name), write(files, output, *given, **volumes))[1])  # fmt: skip
    embed(folder, *one, *options)
    assert done == sorted(set(done)) and len(done) > 2  # each part once
    if options:
        frame = pyarrow.dataset.dataset(folder).to_table().to_pandas()
        assert frame["path"].tolist() == expected["path"].drop_duplicates().tolist()
    else:
        assert_same(folder, expected)
    with pytest.raises(SystemExit, match="features exists; give another --output, or --overwrite"):
        embed(folder, *one, *options)
    (folder / "notes.txt").write_text("somebody's")
    with pytest.raises(SystemExit, match="features exists"):
        embed(folder, *one, *options, "--overwrite")


def test_a_last_task_that_was_killed_may_run_again(tmp_path):
    output = tmp_path / "features"
    archive = embed_module.Archive(Namespace(output=output), {}, "", tmp_path / "features.parts")
    archive.table(0).parent.mkdir(parents=True)
    archive.table(0).write_bytes(b"features")
    archive.record(0).parent.mkdir()
    archive.record(0).write_text(json.dumps({"rows": 1, "refused": {}}))
    for _ in range(2):
        embed_module.Gather(archive, {})(None, 0, 1)
        assert [path.read_bytes() for path in output.iterdir()] == [b"features"]


def test_volumes_stay_whole_in_a_share_and_shares_keep_the_order_of_the_archive(tmp_path, monkeypatch):
    """Files of a volume that lie apart, as under names without order, come to the share of its first."""
    monkeypatch.setattr(embed_module, "IMAGES_PER_SHARE", 3)
    archive = embed_module.Archive(None, {}, "", tmp_path)
    slices = {number: Instance(f"s{number}", "v", 1, float(-number), None, "1 x 1") for number in (1, 4, 6)}
    single = {0: Instance("a", "a", 1, None, None), 2: None, 3: Instance("b", "b", 5, None, None), 5: None}
    found = slices | single
    for task in range(2):
        lines = "".join(json.dumps(found[number]) + "\n" for number in range(task, 7, 2))
        archive.instances(task, 2).parent.mkdir(exist_ok=True)
        archive.instances(task, 2).write_text(lines)
    embed_module.ShareOut(archive, 2)(None, 0, 1)
    shares = [json.loads(line) for line in archive.shares.read_text().splitlines()]
    assert shares == [[[0], [6, 4, 1]], [[2], [3]], [[5]]]  # slices in order of position


def test_an_engine_that_is_not_installed_is_said(embed, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "multiprocess", None)
    with pytest.raises(SystemExit, match=r"--engine needs datatrove: pip install 'mammodino\[train\]'"):
        embed(tmp_path / "features", "--engine", "local")
    assert not list(tmp_path.iterdir())
