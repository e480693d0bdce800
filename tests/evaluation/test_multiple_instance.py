"""Tissue tiles and the head over them: where tiles lie, what attention is, what is cached, and what is learned."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from made_inputs import draw_breast
from pyarrow import parquet

from dataset_scripts.benchmarks.task import load_task
from training.evaluation.backbones.registry import load_backbone
from training.evaluation.finetuning import feature_cache, heads
from training.evaluation.finetuning.feature_cache import Encoding, SliceFeatures, cached_features
from training.evaluation.finetuning.heads import LinearHead, mean_and_std
from training.evaluation.finetuning.image_classifier import open_classifier
from training.evaluation.finetuning.multiple_instance import (
    MultipleInstanceHead,
    fit_head,
    streamed_mean_and_std,
)
from training.evaluation.finetuning.predictor import Predictor
from training.evaluation.finetuning.tiles import Place, TiledSlice, TileReader, Tiling
from training.evaluation.metrics import auc
from training.finetune import finetune
from training.heat_map import main as heat_map

from .small_runs import short_run

SMALL = Tiling(canvas_height=160, tile_size=64)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape,size,overlap", [((300, 190), 64, 0.25), ((300, 190), 64, 0.0), ((50, 190), 64, 0.5)])
def test_tiles_cover_the_breast_overlap_and_have_tissue(shape, size, overlap):
    """Against the mask itself, tile by tile and pixel by pixel."""
    tissue = draw_breast(*shape) > 900
    tissue[-2:, -2:] = True  # a few pixels of a tile with too little
    places = Tiling(300, size, overlap, 0.05).places(tissue, 3)
    for each in places:
        inside = tissue[each.y : each.y + size, each.x : each.x + size].sum() / size**2
        assert each.tissue == pytest.approx(inside) and inside >= 0.05 and each.slice == 3 and each.size == size
    every = Tiling(300, size, overlap, 0.0).places(tissue)
    covered, left_out = np.zeros(shape, bool), np.zeros(shape, bool)
    for each in every:
        kept = any((each.x, each.y) == (other.x, other.y) for other in places)
        (covered if kept else left_out)[each.y : each.y + size, each.x : each.x + size] = True
    assert (covered | left_out).all() and (covered | ~tissue | left_out).all() and covered[tissue].mean() > 0.99
    for starts in (sorted({each.x for each in every}), sorted({each.y for each in every})):
        assert all(size - step >= overlap * size for step in np.diff(starts))
    assert not shape[0] > size or max(each.y for each in every) + size == shape[0]


def test_an_image_with_little_tissue_keeps_its_best_tile():
    tissue = np.zeros((200, 200), bool)
    tissue[150:153, 20:24] = True
    (best,) = Tiling(200, 64).places(tissue)
    assert best.tissue == pytest.approx(12 / 64**2)


def test_tiles_are_cut_from_the_rendered_image_and_padded_with_black():
    tiled = TiledSlice(np.arange(48, dtype=np.uint8).reshape(8, 6), np.ones((8, 6), bool), [Place(0, 2, 4, 6)])

    class Preprocess:
        def tile(self, image, tissue):
            return {"image": image, "tissue": tissue}

    ((place, inputs),) = tiled.inputs(Preprocess())
    np.testing.assert_array_equal(inputs["image"][:4, :4], tiled.image[4:, 2:])
    assert inputs["image"].shape == (6, 6) and not inputs["image"][4:].any() and not inputs["tissue"][:, 4:].any()


@pytest.mark.parametrize("kind", ["mammodino", "resnet50", "mammo_clip_efficientnet", "dinov2"])
def test_every_kind_of_preprocessing_takes_tiles(kind, folders, drawn_table):
    backbone = load_backbone(kind, folders[kind])
    file = sorted(drawn_table.glob("*.png"))[0]
    (tiled,) = TileReader(backbone.preprocess, SMALL)(file)
    whole = next(iter(backbone.preprocess(file)))
    assert tiled.image.shape[0] == 160 and len(tiled.places) > 3
    for _, inputs in tiled.inputs(backbone.preprocess):
        assert {name: each.shape for name, each in inputs.items()} == {name: each.shape for name, each in whole.items()}
        with torch.inference_mode():
            feature = backbone(**{name: torch.from_numpy(each)[None] for name, each in inputs.items()})
        assert feature.shape == (1, backbone.width) and feature.isfinite().all()


def test_a_tile_of_the_whole_image_is_the_whole_image(folders, drawn_table):
    """Tile and canvas of the encoder's size: what the encoder sees of the tile is what it sees of the view."""
    backbone = load_backbone("mammodino", folders["mammodino"])
    file = sorted(drawn_table.glob("*.png"))[0]
    (tiled,) = TileReader(backbone.preprocess, Tiling(64, 64))(file)
    ((_, tile),) = tiled.inputs(backbone.preprocess)
    (whole,) = backbone.preprocess(file)
    np.testing.assert_array_equal(tile["pixel_values"], whole["pixel_values"])
    np.testing.assert_array_equal(tile["tissue_mask"], whole["tissue_mask"])


def test_tiles_are_memory_mapped_with_their_places_and_a_killed_cache_goes_on(
    folders, drawn_table, tmp_path, monkeypatch
):
    monkeypatch.setattr(feature_cache, "IMAGES_PER_SHARD", 2)
    backbone = load_backbone("mammodino", folders["mammodino"])
    table = load_task("table", drawn_table, "cancer").table[:5]
    encoding, cut, lives = Encoding(tiling=SMALL), TiledSlice.inputs, [3]

    def dies(self, preprocess):
        if not lives[0]:
            raise KeyboardInterrupt
        lives[0] -= 1
        return cut(self, preprocess)

    monkeypatch.setattr(TiledSlice, "inputs", dies)
    with pytest.raises(KeyboardInterrupt):
        cached_features(backbone, table, tmp_path, "drawn", encoding)
    lives[0] = 3  # two of five are there
    found = cached_features(backbone, table, tmp_path, "drawn", encoding)
    assert lives == [0]
    names = {}
    for path in tmp_path.rglob("features-*.parquet"):
        names |= {row["image_id"]: row for row in parquet.read_table(path).to_pylist()}
    for row, features in zip(found.table.itertuples(), found.rows, strict=True):
        assert isinstance(features, np.memmap) and features.dtype == np.float16
        (tiled,) = TileReader(backbone.preprocess, SMALL)(row.file)
        stored = [names[row.image_id][name] for name in Place._fields]
        assert list(zip(*stored, strict=True)) == tiled.places
        with torch.inference_mode():
            for values, (_, inputs) in zip(features, cut(tiled, backbone.preprocess), strict=True):
                expected = backbone(**{name: torch.from_numpy(each)[None] for name, each in inputs.items()})[0]
                np.testing.assert_allclose(values, expected, atol=4e-3)


def make_head(num_features: int = 12, num_classes: int = 3) -> MultipleInstanceHead:
    torch.manual_seed(0)
    head = MultipleInstanceHead(num_features, num_classes, True, SMALL).eval()
    head.std.fill_(1), head.tile_std.fill_(1)
    for part in (head.attention.attention.weight, head.classifier.weight):
        torch.nn.init.normal_(part)
    return head


def test_attention_sums_to_one_and_the_order_of_tiles_says_nothing():
    head, image = make_head(), torch.tensor([0, 0, 1, 0, 1, 1, 1])
    slices, tiles = torch.randn(2, 12), torch.randn(7, 12)
    _, attention = head.look(tiles, image, 2)
    np.testing.assert_allclose([attention[image == each].sum().item() for each in (0, 1)], 1, rtol=1e-5)
    assert attention[image == 0].std() > 0.01
    order = torch.tensor([6, 3, 0, 5, 1, 2, 4])
    found = head(slices, torch.arange(2), tiles, image)
    torch.testing.assert_close(head(slices, torch.arange(2), tiles[order], image[order]), found)
    torch.testing.assert_close(head(slices[:1], torch.arange(1), tiles[image == 0], image[image == 0]), found[:1])


def test_the_map_of_tiles_is_their_mean_where_they_overlap():
    head = make_head()
    tissue = draw_breast(100, 70) > 900
    places = Tiling(100, 32).places(tissue)
    tiles = RNG.normal(size=(len(places), 12)).astype(np.float16)
    found = head.tile_map(TiledSlice(tissue.astype(np.uint8), tissue, places), tiles).values
    attention = head.look(torch.from_numpy(tiles).float(), torch.zeros(len(tiles), dtype=torch.int64), 1)[1].tolist()
    for y, x in ((50, 10), (37, 25), (70, 30), (0, 69)):
        over = [
            weight * len(tiles)
            for weight, place in zip(attention, places, strict=True)
            if place.y <= y < place.y + 32 and place.x <= x < place.x + 32
        ]
        expected = np.mean(over) if tissue[y, x] and over else np.nan
        np.testing.assert_allclose(found[y, x], expected, rtol=1e-5)


def test_mean_and_deviation_of_streamed_rows():
    rows = [(3 + RNG.normal(size=(count, 4)) * (1, 2, 0, 5)).astype(np.float16) for count in (3, 50, 20)]
    for found, expected in zip(streamed_mean_and_std(rows), mean_and_std(np.concatenate(rows)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def haystacks(num_patients: int = 160) -> tuple[SliceFeatures, SliceFeatures]:
    """Two views of a patient, 20 tiles each. In the first view of a sick patient one tile stands out, and the others
    make up for it: the mean of the tiles, which is the whole view's feature, says nothing."""
    slices, tiles, rows = [], [], []
    for patient in range(num_patients):
        for view in range(2):
            sick = int(patient % 2 == 0 and view == 0)
            values = RNG.normal(size=(20, 8)).astype(np.float32)
            values[RNG.integers(20), 0] += 6 * sick
            values -= values.mean(axis=0) - 0.3 * RNG.normal(size=8)
            slices.append(values.mean(axis=0, keepdims=True))
            tiles.append(values.astype(np.float16))
            part = ("train", "train", "validation", "test")[patient // 2 % 4]
            rows.append({"image_id": f"{patient}-{view}", "patient_id": f"p{patient}", "split": part, "label": sick})
    table = pd.DataFrame(rows).assign(breast_id=lambda each: each["patient_id"] + "-L")
    return SliceFeatures(slices, table, {}), SliceFeatures(tiles, table, {})


def test_the_head_finds_the_needle_that_the_mean_cannot_and_views_give_the_largest():
    slices, tiles = haystacks()
    probe = LinearHead(np.zeros((2, 8)), np.zeros(2))
    head = fit_head(slices, tiles, probe, SMALL, True, True, seed=0)
    found = Predictor(head, True).predict(slices.of("test"), tiles.of("test"))
    assert found["level"].unique().tolist() == ["image", "breast_max", "patient_max"]
    images, patients = (found[found["level"] == level] for level in ("image", "patient_max"))
    means = np.concatenate(slices.values[slices.table["split"] == "test"][:, :1])
    assert abs(auc(images["label"].to_numpy(), np.stack((-means, means), 1)) - 0.5) < 0.15
    for level in (images, patients):
        assert auc(level["label"].to_numpy(), level[["p_0", "p_1"]].to_numpy()) > 0.9
    largest = images.groupby("patient_id")["p_1"].max()
    np.testing.assert_allclose(patients.set_index("patient_id")["p_1"], largest[patients["patient_id"]], rtol=1e-6)
    assert patients["label"].mean() == 0.5 and images["label"].mean() == 0.25


def test_the_same_seed_gives_the_same_head_and_breasts_need_not_be_known(monkeypatch):
    monkeypatch.setattr(heads, "NUM_EPOCHS", 2)
    slices, tiles = haystacks(24)
    slices.table["breast_id"] = None
    probe = LinearHead(RNG.normal(size=(2, 8)), np.zeros(2))
    first, second = (
        Predictor(fit_head(slices, tiles, probe, SMALL, True, False, seed=0), True).predict(slices, tiles)
        for _ in range(2)
    )
    pd.testing.assert_frame_equal(first, second)
    assert first["level"].unique().tolist() == ["image", "patient_max"]


@pytest.mark.slow
def test_a_run_of_tiles_predicts_again_from_its_folder_and_is_drawn(folders, drawn_table, tmp_path):
    settings = short_run(drawn_table, folders, tmp_path / "run", head="mil", canvas_height=160, tile_size=64)
    result = finetune(settings)
    assert list(result["metrics"]) == ["image", "breast_max", "patient_max"]
    backbone, head, classes = open_classifier(tmp_path / "run" / "model")
    assert classes == ["no cancer", "cancer"] and head.tiling == SMALL and result["learned"]["parameters"] < 50_000
    images = pd.read_parquet(tmp_path / "run" / "predictions.parquet").query("level == 'image'")
    for row in images[:3].itertuples():
        file = drawn_table / row.image_id
        (tiled,), (whole,) = TileReader(backbone.preprocess, head.tiling)(file), backbone.preprocess(file)
        with torch.inference_mode():
            slices, tiles = (
                torch.cat([backbone(**{k: torch.from_numpy(v)[None] for k, v in each.items()}) for each in inputs])
                for inputs in ([whole], [inputs for _, inputs in tiled.inputs(backbone.preprocess)])
            )
            p = head(slices, torch.zeros(1, dtype=torch.int64), tiles, torch.zeros(len(tiles), dtype=torch.int64))[0]
        np.testing.assert_allclose([row.p_0, row.p_1], p, atol=2e-3)  # tiles were kept in float16
    heat_map([str(file), "--model", str(folders["mammodino"]), "--head", str(tmp_path / "run" / "model"), "--output",
              str(tmp_path / "map.png")])  # fmt: skip
    assert cv2.imread(str(tmp_path / "map.png")).shape[1] == pytest.approx(2 * 3.2 * 200, abs=2)


def test_attention_over_the_slices_of_an_image_starts_as_their_mean(folders, phantom_archive, tmp_path):
    settings = {"dataset": "phantom", "task": "lesion", "cache_dir": str(tmp_path / "cache")}
    found = {}
    for head in ("linear", "attention"):
        finetune(short_run(phantom_archive, folders, tmp_path / head, head=head, **settings))
        found[head] = pd.read_parquet(tmp_path / head / "predictions.parquet")
    linear, attention = (found[head].query("level == 'image'")["p_1"].to_numpy() for head in ("linear", "attention"))
    assert found["linear"]["level"].tolist() == found["attention"]["level"].tolist()
    assert np.abs(linear - attention).max() < 0.5
    _, pooling, _ = open_classifier(tmp_path / "attention" / "model")
    assert json.loads((tmp_path / "attention" / "model" / "classifier.json").read_text())["head"] == {
        "kind": "attention"
    }
    assert pooling.classifier.weight.shape[0] == 2


def test_heads_of_cached_features_are_for_frozen_encoders(folders, drawn_table, tmp_path):
    with pytest.raises(ValueError, match="head=mil: learns on the features of a frozen encoder; give --mode frozen"):
        short_run(drawn_table, folders, tmp_path, head="mil", mode="lora")


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np, pandas as pd
from training.evaluation.backbones.registry import load_backbone
from training.evaluation.finetuning import heads
from training.evaluation.finetuning.feature_cache import Encoding, SliceFeatures, cached_features
from training.evaluation.finetuning.multiple_instance import fit_head
from training.evaluation.finetuning.predictor import Predictor
from training.evaluation.finetuning.tiles import Tiling

heads.NUM_EPOCHS = 1  # all hold the same

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

encoder, files, folder = Path(sys.argv[1]), sorted(Path(sys.argv[2]).glob("*.png"))[:2], Path(sys.argv[3])
num_images, num_tiles, width = 1000, 60, 768
backbone, before = load_backbone("mammodino", str(encoder)), peak()
table = pd.DataFrame({"image_id": [each.name for each in files], "file": [str(each) for each in files]})
cached_features(backbone, table, folder, "drawn", Encoding(tiling=Tiling(canvas_height=4096)))
encoded = peak()
stored = np.lib.format.open_memmap(folder / "t.npy", "w+", np.float16, (num_images * num_tiles, width))
for start in range(0, len(stored), 6000):
    stored[start : start + 6000] = np.random.default_rng(start).normal(size=(6000, width))
del stored
rows = np.split(np.load(folder / "t.npy", mmap_mode="r"), num_images)
names = [f"p{number // 4}" for number in range(num_images)]
table = pd.DataFrame({"image_id": range(num_images), "patient_id": names, "breast_id": names, "label": 0})
table["split"] = "train"
table.loc[700:, "split"], table.loc[850:, "split"] = "validation", "test"
table.loc[::3, "label"] = 1
slices = SliceFeatures([each[:1].astype(np.float32) for each in rows], table, {})
tiles, probe = SliceFeatures(rows, table, {}), heads.LinearHead(np.zeros((2, width)), np.zeros(2))
Predictor(fit_head(slices, tiles, probe, Tiling(), True, True, 0), True).predict(slices, tiles)
print(encoded - before, peak() - before)
"""


@pytest.mark.slow
def test_a_thousand_images_of_a_large_canvas_hold_less_than_a_gigabyte(folders, drawn_table, tmp_path):
    """Peak resident memory, mapped pages included, over that of the imports: of encoding some on a canvas of 4096 px,
    and of training on features of the number and size of 1,000."""
    command = [sys.executable, "-c", MEMORY, str(folders["mammodino"]), str(drawn_table), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    encoded, trained = map(float, done.stdout.split())
    assert encoded < 1024 and trained < 1024
