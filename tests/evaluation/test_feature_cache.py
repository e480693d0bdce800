"""Cached features: what the encoder gives, each image once, whatever is killed, replaced, damaged or shared."""

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dataset_scripts.benchmarks.task import load_task
from training.evaluation.backbones.registry import load_backbone
from training.evaluation.finetuning import feature_cache
from training.evaluation.finetuning.feature_cache import Encoding, cached_features


@dataclass
class CountedImages:
    """A backbone's own images, counted; killed after `lives`."""

    images: object
    lives: int = 10**9
    seen: list = field(default_factory=list)

    def __call__(self, file, slices=None, slices_per_volume=4):
        if len(self.seen) >= self.lives:
            raise KeyboardInterrupt
        self.seen.append(Path(file).name)
        yield from self.images(file, slices, slices_per_volume)

    def settings(self):
        return self.images.settings()


@pytest.fixture
def table(drawn_table) -> pd.DataFrame:
    return load_task("table", drawn_table, "cancer").table[:12]


@pytest.fixture
def backbone(folders):
    backbone = load_backbone("mammodino", folders["mammodino"])
    backbone.preprocess = CountedImages(backbone.preprocess)
    return backbone


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_cache, "IMAGES_PER_SHARD", 5)


def test_features_are_the_encoders_in_the_order_of_the_table(backbone, table, tmp_path, small_shards):
    shuffled = table.sample(frac=1, random_state=0).reset_index(drop=True)
    found = cached_features(backbone, shuffled, tmp_path, "drawn", Encoding(batch_size=4))
    assert found.table["image_id"].tolist() == shuffled["image_id"].tolist() and not found.refused
    for row, values in zip(shuffled.itertuples(), found.values, strict=True):
        (image,) = backbone.preprocess(row.file)
        with torch.inference_mode():
            expected = backbone(**{name: torch.from_numpy(each)[None] for name, each in image.items()})[0]
        np.testing.assert_allclose(values, expected, atol=1e-5)
    assert len(list(tmp_path.rglob("features-*.parquet"))) == 3


def test_every_image_is_read_once_however_many_ask(backbone, table, tmp_path):
    first = cached_features(backbone, table[:8], tmp_path, "drawn", Encoding())
    second = cached_features(backbone, table, tmp_path, "drawn", Encoding())
    assert sorted(backbone.preprocess.seen) == sorted(Path(file).name for file in table["file"])
    np.testing.assert_array_equal(first.values, second.values[:8])


def test_another_encoder_or_choice_of_slices_has_a_place_of_its_own(backbone, table, tmp_path):
    few = table[:2]
    for encoding in (Encoding(), Encoding(slices_per_volume=2), Encoding(bf16=True)):
        cached_features(backbone, few, tmp_path, "drawn", encoding)
    with torch.no_grad():
        next(backbone.model.parameters()).add_(0.1)
    cached_features(backbone, few, tmp_path, "drawn", Encoding())
    assert len(backbone.preprocess.seen) == 8
    assert len(list((tmp_path / "drawn").iterdir())) == 4


def test_a_killed_run_loses_one_shard_at_most_and_ends_the_same(backbone, table, tmp_path, small_shards):
    whole = cached_features(backbone, table, tmp_path / "whole", "drawn", Encoding())
    backbone.preprocess.seen.clear()
    backbone.preprocess.lives = 8  # in the second shard of five
    with pytest.raises(KeyboardInterrupt):
        cached_features(backbone, table, tmp_path, "drawn", Encoding())
    backbone.preprocess.seen.clear()
    backbone.preprocess.lives = 10**9
    again = cached_features(backbone, table, tmp_path, "drawn", Encoding())
    assert len(backbone.preprocess.seen) == 7  # of twelve
    np.testing.assert_array_equal(again.values, whole.values)


def test_processes_take_turns_and_repeat_nothing(backbone, table, tmp_path):
    """Two at once, as threads with locks of their own: the second waits and finds the features."""
    found = []
    runs = [
        threading.Thread(
            target=lambda: found.append(cached_features(backbone, table, tmp_path, "drawn", Encoding()).values)
        )
        for _ in range(2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(backbone.preprocess.seen) == 12
    np.testing.assert_array_equal(*found)


def test_images_of_another_table_that_look_alike_have_features_of_their_own(backbone, table, tmp_path):
    image_id, found = table["image_id"].iloc[0], []
    for folder, file in zip("ab", table["file"][:2], strict=True):
        copy = tmp_path / folder / "image.png"
        copy.parent.mkdir()
        copy.write_bytes(Path(file).read_bytes().ljust(200_000, b"\0"))  # of one size and time, as in archives
        os.utime(copy, (1e9, 1e9))
        rows = table[:1].assign(image_id=image_id, file=str(copy))
        found.append(cached_features(backbone, rows, tmp_path / "cache", "table", Encoding()).values[0])
    assert np.abs(found[0] - found[1]).max() > 1e-4


def test_replaced_files_and_damaged_shards_are_encoded_again(backbone, table, tmp_path, caplog):
    copies = table[:3].copy()
    for row in copies.itertuples():
        copy = tmp_path / Path(row.file).name
        copy.write_bytes(Path(row.file).read_bytes())
        copies.loc[row.Index, "file"] = str(copy)
    before = cached_features(backbone, copies, tmp_path, "drawn", Encoding())
    Path(copies["file"].iloc[0]).write_bytes(Path(copies["file"].iloc[2]).read_bytes())
    after = cached_features(backbone, copies, tmp_path, "drawn", Encoding())
    assert len(backbone.preprocess.seen) == 4
    np.testing.assert_allclose(after.values[0], before.values[2], atol=1e-6)
    np.testing.assert_array_equal(after.values[1:], before.values[1:])
    for shard in tmp_path.rglob("features-*.parquet"):
        shard.write_bytes(shard.read_bytes()[:100])
    again = cached_features(backbone, copies, tmp_path, "drawn", Encoding())
    np.testing.assert_allclose(again.values, after.values, atol=1e-6)
    assert "damaged" in caplog.text


def test_what_cannot_be_used_is_left_out_named_and_tried_again(backbone, table, tmp_path, caplog):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    rows = table[:3].copy()
    rows.loc[rows.index[1], "file"] = str(bad)
    for _ in range(2):
        found = cached_features(backbone, rows, tmp_path / "cache", "drawn", Encoding())
    assert len(found.values) == len(found.table) == 2 and found.image.tolist() == [0, 1]
    assert list(found.refused) == [rows["image_id"].iloc[1]] and "bad.png" in caplog.text
    assert backbone.preprocess.seen.count("bad.png") == 2
    with pytest.raises(ValueError, match="none of 1 images can be used; the first: .*bad.png"):
        cached_features(backbone, rows[1:2], tmp_path / "cache", "drawn", Encoding())
    bad.unlink()
    with pytest.raises(ValueError, match="bad.png: cannot be read"):
        cached_features(backbone, rows, tmp_path / "cache", "drawn", Encoding())


def test_the_slices_of_volumes_stay_together_and_workers_change_nothing(
    folders, phantom_archive, tmp_path, monkeypatch
):
    monkeypatch.setattr("training.evaluation.finetuning.feature_cache.FILES_PER_WORKER", 1)
    table = load_task("phantom", phantom_archive, "lesion", test_fraction=0.3, validation_fraction=0.3).table[:6]
    backbone = load_backbone("mammodino", folders["mammodino"])
    alone = cached_features(backbone, table, tmp_path / "alone", "phantom", Encoding(slices_per_volume=3, batch_size=5))
    slices = np.where(table["file"].str.contains("dbt"), 3, 1)
    assert alone.image.tolist() == np.repeat(np.arange(6), slices).tolist()
    encoding = Encoding(slices_per_volume=3, batch_size=5, num_workers=1)
    beside = cached_features(backbone, table, tmp_path / "beside", "phantom", encoding)
    np.testing.assert_array_equal(beside.values, alone.values)


def test_features_that_are_no_numbers_are_refused(backbone, table, tmp_path):
    with torch.no_grad():
        next(backbone.model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="png: features of .* are not finite; its weights are damaged"):
        cached_features(backbone, table[:1], tmp_path, "drawn", Encoding())
