"""A run is seen: log, tracker, speed, k-NN and images, and collapse named when it comes."""

import importlib.util
import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pandas
import pytest
import torch
import yaml
from pretrain_runs import CROPS, TINY, launch, log, recipe, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino import MammoDinoConfig, MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.tools.examine import feature_colors
from modeling_mammodino.tools.visualize import draw_features
from training import features
from training.pretraining.export import published_recipe
from training.pretraining.feature_images import corpus_images
from training.pretraining.monitoring import CollapseWatch, KnnProbe, feature_rank, read_warnings, target_statistics
from training.pretraining.processes import Processes
from training.pretraining.recipe import load_recipe


@pytest.fixture(scope="module")
def labels(phantom_archive, tmp_path_factory) -> Path:
    """The phantom's files with a label that an image shows, and one without."""
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    table = pandas.read_csv(phantom_archive / "labels.csv")
    table["file"] = [str(phantom_archive / file) for file in table["file"]]
    table["kind"] = table["kind"].where(table.index != 0)  # an empty cell is left out
    table.assign(patient=table["patient"], one="same").to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def run(phantom_corpus, labels, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("seen")
    arguments = ["--max_steps", "5", "--logging_steps", "2", "--save_steps", "5", "--report_to", "tensorboard"]
    arguments += ["--knn_labels", str(labels), "--knn_task", "kind", "--knn_steps", "3", "--visualization_steps", "4"]
    train(recipe(phantom_corpus, output, *arguments))
    return output


def test_a_line_is_written_where_something_is_due(run):
    lines = {line["step"]: line for line in log(run)}
    assert list(lines) == [0, 2, 3, 4, 5]
    assert [step for step, line in lines.items() if "knn_auc" in line] == [0, 3, 5]
    assert all(0 <= line.get("knn_auc", 0) <= 1 for line in lines.values())
    seen = {"loss", "loss_ibot", "target_entropy", "prototype_entropy", "target_information", "feature_rank",
            "tissue_in_crops", "tissue_in_masks", "images_per_second", "mfu", "data_wait_seconds", "seconds_left",
            "peak_memory_gib", "learning_rate"}  # fmt: skip
    for step in (2, 3, 4, 5):
        assert seen <= lines[step].keys()
        assert 0 < lines[step]["mfu"] < 1.2 and 0.1 < lines[step]["peak_memory_gib"] < 100
        assert 0 <= lines[step]["data_wait_fraction"] <= 1
    assert lines[2]["seconds_left"] > lines[4]["seconds_left"] > lines[5]["seconds_left"] == 0


def test_the_tracker_holds_what_the_log_holds(run):
    events = EventAccumulator(str(run / "logs" / "mammodino"))
    events.Reload()
    for name in ("loss", "mfu", "knn_auc", "target_entropy"):
        expected = {line["step"]: line[name] for line in log(run) if name in line}
        assert {each.step: each.value for each in events.Scalars(name)} == pytest.approx(expected, rel=1e-6)
    assert [each.step for each in events.Images("features")] == [0, 4, 5]
    (settings,) = (run / "logs" / "mammodino").glob("*/hparams.yml")
    assert yaml.safe_load(settings.read_text())["hidden_size"] == 32 and str(run) not in settings.read_text()


def test_images_are_of_the_same_breasts_and_of_other_features(run):
    names = sorted(path.name for path in (run / "images").iterdir())
    assert names == ["step-000000.png", "step-000004.png", "step-000005.png"]
    first, last = (cv2.imread(str(run / "images" / name)) for name in (names[0], names[-1]))
    assert first.shape == last.shape
    below_title = [each[80:].astype(int) for each in (first, last)]
    colored = np.logical_or(*(np.ptp(each, axis=-1) > 20 for each in below_title))
    differs = (below_title[0] != below_title[1]).any(axis=-1)
    assert not differs[~colored].any() and differs[colored].mean() > 0.2  # the gray images, and their features


def test_labels_and_their_task_stay_at_home(run, labels):
    exported = run / "encoder" / "recipe.yaml"
    assert "knn_" not in exported.read_text() and labels.name not in (run / "encoder" / "README.md").read_text()
    again = load_recipe([str(exported), "--corpus", "c", "--output_dir", "o"])  # asks for no labels
    assert again.run.knn_steps == 0 and again.run.visualization_steps == 4
    assert not {"knn_labels", "knn_task", "knn_steps"} & published_recipe(again).keys()


def test_seeing_changes_nothing_that_is_computed(run, phantom_corpus, tmp_path):
    train(recipe(phantom_corpus, tmp_path, "--max_steps", "5", "--save_steps", "5", "--visualization_steps", "0"))
    a, b = ((path / "checkpoint-5" / "student.safetensors").read_bytes() for path in (run, tmp_path))
    assert a == b and not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--report_to", "wandb"], "report_to='wandb': not installed; pip install wandb"),
        (["--knn_steps", "2", "--knn_task", "kind", "--knn_labels", "nowhere.csv"], "knn_labels=nowhere.csv: no such"),
        (["--knn_steps", "2", "--knn_task", "color", "--knn_labels", "LABELS"], "no column color; it has file"),
        (["--knn_steps", "2", "--knn_task", "one", "--knn_labels", "LABELS"], "knn_task=one: .*at least two classes"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_step(
    phantom_corpus, labels, tmp_path, arguments, message, monkeypatch
):
    find_spec = importlib.util.find_spec  # wandb may be installed here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    arguments = [str(labels) if each == "LABELS" else each for each in arguments]
    with pytest.raises(ValueError, match=message):
        train(recipe(phantom_corpus, tmp_path, "--max_steps", "2", *arguments))
    assert not (tmp_path / "logs").exists() and not list(tmp_path.glob("checkpoint-*"))


def test_recipes_refuse_half_of_a_knn_and_unknown_trackers(tmp_path):
    where = ["--corpus", "c", "--output_dir", "o"]
    with pytest.raises(ValueError, match="knn_steps=5: needs knn_labels, a CSV, and knn_task"):
        load_recipe([CROPS, *where, "--knn_steps", "5", "--knn_task", "cancer"])
    (tmp_path / "recipe.yaml").write_text("report_to: mlflow")
    with pytest.raises(ValueError, match="report_to='mlflow': must be tensorboard, trackio, wandb, none"):
        load_recipe([str(tmp_path / "recipe.yaml"), *where])


def test_a_file_that_cannot_be_read_is_refused_by_name(labels, tmp_path):
    table, size = pandas.read_csv(labels), {"size": {"height": 64, "width": 48}, "patch_size": 16}
    (tmp_path / "broken.png").write_bytes(b"no image")
    table.loc[3, "file"] = str(tmp_path / "broken.png")
    table.to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(ValueError, match=r"labels.csv: .*broken.png"):
        KnnProbe(tmp_path / "labels.csv", "kind", MammoDinoImageProcessor(**size), Processes())
    table.loc[3, "file"] = "gone.png"
    table.to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(ValueError, match="1 of its files do not exist, .*gone.png first"):
        KnnProbe(tmp_path / "labels.csv", "kind", MammoDinoImageProcessor(**size), Processes())


def test_knn_finds_what_images_show_and_nothing_that_they_do_not(tmp_path, monkeypatch):
    """Bright breasts against dark ones, three images a patient: 1; a label that is drawn: about 0.5. A set too large
    for memory is read anew, to the same score."""
    rng, rows = np.random.default_rng(0), []
    for number in range(60):
        bright, name = number // 3 % 2, f"{number}.png"
        image = np.zeros((64, 48), np.uint8)
        image[8:56, :36] = rng.integers(60, 90, (48, 36)) + 20 * np.arange(36) // 36 * (1 if bright else -1)
        cv2.imwrite(str(tmp_path / name), image)
        rows.append({"file": name, "patient": f"p{number // 3}", "bright": bright, "drawn": rng.integers(2)})
    pandas.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    torch.manual_seed(0)
    encoder = MammoDinoModel(MammoDinoConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64,
                                             patch_size=16, layerscale_value=1.0)).eval()  # fmt: skip
    processor = MammoDinoImageProcessor(size={"height": 64, "width": 48}, patch_size=16)
    probe = KnnProbe(tmp_path / "labels.csv", "bright", processor, Processes())
    assert all(not set(probe.patients[a]) & set(probe.patients[b]) for a, b in probe.folds)
    score = probe.auc(encoder)
    assert score > 0.95 and 0.3 < KnnProbe(tmp_path / "labels.csv", "drawn", processor, Processes()).auc(encoder) < 0.7
    monkeypatch.setattr("training.pretraining.monitoring.MAX_CACHE_BYTES", 0)
    streamed = KnnProbe(tmp_path / "labels.csv", "bright", processor, Processes())
    assert not isinstance(streamed.images, list) and streamed.auc(encoder) == pytest.approx(score)


HEALTHY = {"target_entropy": 0.8, "prototype_entropy": 0.95, "target_information": 0.15, "feature_rank": 30.0}


def test_collapse_is_named_once_at_either_end_and_said_to_be_over():
    watch = CollapseWatch(patience_steps=10)
    collapsed = {**HEALTHY, "target_entropy": 0.02, "prototype_entropy": 0.03}
    assert watch.check(1, HEALTHY) == []
    (message,) = watch.check(2, collapsed)
    assert message.startswith("collapse, since step 2") and "learning_rate" in message
    assert watch.check(3, collapsed) == []
    assert watch.check(4, HEALTHY) == ["collapse: over"]
    wall = {**HEALTHY, "target_entropy": 0.995, "prototype_entropy": 1.0, "target_information": 0.005}
    assert [watch.check(step, wall) for step in (10, 19)] == [[], []]  # a fresh network shows it, too
    (message,) = watch.check(20, wall)
    assert "entropy wall, since step 10" in message and "teacher_temperature" in message
    assert watch.check(30, wall) == [] and watch.check(31, HEALTHY) == ["entropy wall: over"]
    flat = {**HEALTHY, "feature_rank": 1.2}
    assert watch.check(40, flat) == []
    assert "koleo_weight" in watch.check(50, flat)[0]
    same = {**HEALTHY, "prototype_entropy": 0.8, "target_information": 0.0}
    assert watch.check(60, same) == ["collapse of features: over"]
    assert "collapse of information" in watch.check(70, same)[0]


def test_signs_of_collapse_have_known_values():
    """Uniform targets, one target for all, and one for each: information is 0 at both ends."""
    uniform, same, telling = torch.full((8, 16), 1 / 16), torch.eye(16)[:1].repeat(8, 1), torch.eye(16)
    for targets, expected in ((uniform, (1, 1, 0)), (same, (0, 0, 0)), (telling, (0, 1, 1))):
        assert list(target_statistics(targets).values()) == pytest.approx(expected, abs=1e-6)
    assert feature_rank(torch.eye(6)) == pytest.approx(6, rel=1e-3)
    assert feature_rank(torch.ones(6, 4)) == pytest.approx(1, rel=1e-3)


def test_a_run_that_collapses_says_so(phantom_corpus, tmp_path, caplog):
    """One prototype gets everything where its center is taken away and targets are sharp."""
    arguments = ["--teacher_targets", "centering", "--teacher_temperature_start", "0.001", "--teacher_temperature",
                 "0.001", "--layerscale_value", "0.00001", "--num_prototypes", "4096", "--max_steps", "2"]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        train(recipe(phantom_corpus, tmp_path, *arguments))
    assert [line["prototype_entropy"] < 0.1 for line in log(tmp_path)][0]
    assert sum("step 1: collapse, since step 1" in each.getMessage() for each in caplog.records) == 1
    (warning,) = [each for each in read_warnings(tmp_path) if each["warning"].startswith("collapse, since")]
    assert warning["step"] == 1 and "learning_rate" in warning["warning"]


@pytest.fixture(scope="module")
def encoder() -> MammoDinoModel:
    torch.manual_seed(0)
    config = MammoDinoConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=16,
                             layerscale_value=1.0)  # fmt: skip
    return MammoDinoModel(config).eval()


def test_colors_are_of_the_breast_and_of_one_space(encoder, phantom_corpus):
    processor = MammoDinoImageProcessor(size={"height": 128, "width": 96}, patch_size=16)
    shown = corpus_images(Corpus(phantom_corpus), processor, 4)
    assert shown["pixel_values"].shape == (4, 1, 128, 96) and shown["tissue_mask"].shape == (4, 8, 6)
    colors, inside = feature_colors(encoder, **shown), shown["tissue_mask"].numpy() > 0
    assert colors.shape == (4, 8, 6, 3) and (colors[~inside] == 0).all()
    assert colors.min() >= 0 and colors.max() <= 1 and colors[inside].std(axis=0).min() > 0.1
    twice = {name: torch.cat((tensor, tensor)) for name, tensor in shown.items()}
    again = feature_colors(encoder, **twice)
    np.testing.assert_allclose(again[:4], again[4:], atol=1e-6)  # one image has one coloring
    np.testing.assert_allclose(again[:4][inside], colors[inside], atol=0.1)  # percentiles interpolate otherwise
    assert np.ptp(draw_features(encoder, **shown, title="t"), axis=2).max() > 50


def test_a_corpus_image_is_seen_as_its_file_is(phantom_archive, phantom_corpus):
    """Place, side and standardization: of all images the nearest to a mammogram is its own. They are not equal, as
    the corpus' image was equalized before it is resized to this canvas."""
    corpus = Corpus(phantom_corpus)
    processor = MammoDinoImageProcessor(
        **corpus.manifest["image_processor"], size={"height": 128, "width": 96}, patch_size=16
    )
    shown = corpus_images(corpus, processor, corpus.num_volumes)["pixel_values"]
    files = sorted(phantom_archive.rglob("*_2d.dcm"))
    of_files = torch.cat([processor(path, return_tensors="pt")["pixel_values"] for path in files])
    distances = (shown[:, None] - of_files[None]).abs().mean(dim=(2, 3, 4))  # (volumes, files)
    nearest = distances.min(dim=0)
    assert len(nearest.indices.unique()) == len(files) and (nearest.values < 0.3).all()


def test_features_of_files_are_drawn_by_command(encoder, phantom_archive, tmp_path):
    encoder.save_pretrained(tmp_path / "model")
    MammoDinoImageProcessor(size={"height": 128, "width": 96}, patch_size=16).save_pretrained(tmp_path / "model")
    files = sorted(map(str, phantom_archive.rglob("*.dcm")))[:2]
    features.main([*files, "--model", str(tmp_path / "model"), "--output", str(tmp_path / "features.png")])
    figure = cv2.imread(str(tmp_path / "features.png"))
    assert min(figure.shape[:2]) > 300 and np.ptp(figure.astype(int), axis=2).max() > 100  # features are in color
    with pytest.raises(SystemExit, match="features: .*gone.png"):
        features.main(["gone.png", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "no.png")])


@pytest.mark.slow
def test_two_processes_share_the_files_of_the_knn_and_wait_for_the_slower(phantom_corpus, labels, tmp_path):
    """One of them takes longer over its share than a collective of the training waits."""
    scores = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        arguments = [CROPS, "--corpus", str(phantom_corpus), "--output_dir", str(output), *TINY, "--max_steps", "2"]
        arguments += ["--per_device_train_batch_size", str(8 // processes), "--drop_path_rate", "0"]
        arguments += ["--knn_labels", str(labels), "--knn_task", "kind", "--knn_steps", "2"]
        launch(processes, *arguments, module="tests.slow_process")
        scores.append([line["knn_auc"] for line in log(output) if "knn_auc" in line])
    assert len(scores[0]) == 2 and scores[0] == pytest.approx(scores[1], abs=0.02)


@pytest.mark.slow
def test_the_log_of_two_processes_is_their_mean(phantom_corpus, tmp_path):
    """The same samples alone and shared by two: the same crops, so the same breast in them, and the same first loss."""
    lines = {}
    for processes, batch_size in ((1, 8), (2, 4)):
        output = tmp_path / str(processes)
        arguments = [CROPS, "--corpus", str(phantom_corpus), "--output_dir", str(output), *TINY, "--max_steps", "1"]
        arguments += ["--per_device_train_batch_size", str(batch_size), "--drop_path_rate", "0"]
        launch(processes, *arguments, "--teacher_targets", "centering", "--warmup_steps", "0")
        lines[processes] = json.loads((output / "logs" / "log.jsonl").read_text())
    for name in ("tissue_in_crops", "loss_dino_global", "target_entropy", "prototype_entropy", "feature_rank"):
        assert lines[2][name] == pytest.approx(lines[1][name], rel=2e-3), name
