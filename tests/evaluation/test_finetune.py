"""The fine-tuning command: results, aggregation, repeats, kills, saved models, and one clear line for what is wrong."""

import json
import time
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from training.evaluation.finetuning.aggregation import score_levels
from training.evaluation.finetuning.image_classifier import open_classifier
from training.evaluation.run_settings import FinetuneSettings
from training.evaluation.significance import score_task
from training.finetune import finetune, main

from .small_runs import command_line, draw_table, short_run

LEVELS = ["image", *(f"{level}_{way}" for level in ("breast", "patient") for way in ("mean", "max", "attention"))]
PROBABILITIES = ["p_0", "p_1"]


@pytest.fixture(scope="module")
def frozen(drawn_table, folders, tmp_path_factory):
    """A finished linear probe: its settings, result and predictions."""
    settings = short_run(drawn_table, folders, tmp_path_factory.mktemp("frozen"))
    result = finetune(settings)
    return settings, result, pd.read_parquet(Path(settings.output_dir) / "predictions.parquet")


def test_a_result_says_everything_and_is_what_the_file_says(frozen):
    settings, result, _ = frozen
    assert json.loads((Path(settings.output_dir) / "result.json").read_text()) == result
    assert {
        "dataset", "task", "definition", "meaning", "classes", "backbone", "mode", "seed", "counts", "metrics",
        "notice", "settings", "versions", "command", "seconds", "table", "learned",
    } == result.keys()  # fmt: skip
    assert result["classes"] == ["no cancer", "cancer"] and result["counts"]["test"]["images"] > 0
    assert list(result["metrics"]) == LEVELS
    assert FinetuneSettings.parse(command_line(settings)) == settings == FinetuneSettings(**result["settings"])
    assert "Research use only" in result["notice"]


def test_predictions_are_of_held_out_images_and_give_the_scores(frozen):
    settings, result, predictions = frozen
    assert predictions["level"].unique().tolist() == LEVELS
    np.testing.assert_allclose(predictions[PROBABILITIES].sum(axis=1), 1)
    images = predictions[predictions["level"] == "image"]
    assert len(images) == result["counts"]["test"]["images"] and images["image_id"].is_unique
    assert roc_auc_score(images["label"], images["p_1"]) == pytest.approx(result["metrics"]["image"]["auc"][0])
    assert result["metrics"]["image"]["auc"][0] > 0.6  # bright spots are seen even by random weights
    again = score_levels(predictions, True, settings.num_resamples, settings.seed)
    assert again == result["metrics"]


def test_breasts_and_patients_have_the_mean_and_the_largest_probability_of_their_images(frozen):
    _, _, predictions = frozen
    images = predictions[predictions["level"] == "image"]
    for level, column in (("breast", "breast_id"), ("patient", "patient_id")):
        mean, largest = (
            predictions[predictions["level"] == f"{level}_{way}"].set_index(column) for way in ("mean", "max")
        )
        assert mean["image_id"].isna().all() and len(mean) == images[column].nunique()
        for name, of_group in images.groupby(column):
            assert mean.loc[name, "p_1"] == pytest.approx(of_group["p_1"].mean())
            assert largest.loc[name, "p_1"] == pytest.approx(of_group["p_1"].max())
            assert mean.loc[name, "label"] == of_group["label"].max()


def test_a_finished_run_returns_at_once_and_other_settings_are_refused(frozen, monkeypatch):
    settings, result, _ = frozen
    monkeypatch.setattr("training.finetune.load_task", None)  # any work would fail
    assert finetune(settings) == result
    with pytest.raises(ValueError, match=r"other settings: task \('cancer' -> 'density'\); give the same to go on, or"):
        finetune(FinetuneSettings(**{**result["settings"], "task": "density"}))
    index = Path(settings.data_dir) / "index.csv"
    before = index.read_text()
    index.write_text(before.replace(",1,", ",0,", 1))
    with pytest.raises(ValueError, match=r"other settings: label_table \('\w+' -> '\w+'\); give the same to go on, or"):
        finetune(settings)
    index.write_text(before)
    assert finetune(settings) == result
    elsewhere = {**result["settings"], "data_dir": "/elsewhere", "dataloader_num_workers": 7}
    assert finetune(FinetuneSettings(**elsewhere)) == result


def test_the_same_settings_give_the_same_predictions_and_another_seed_others(frozen, folders, tmp_path):
    settings, _, predictions = frozen
    again = FinetuneSettings(**{**vars(settings), "output_dir": str(tmp_path / "again")})
    finetune(again)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "again" / "predictions.parquet"), predictions)
    finetune(FinetuneSettings(**{**vars(settings), "output_dir": str(tmp_path / "other"), "seed": 1}))
    other = pd.read_parquet(tmp_path / "other" / "predictions.parquet")
    assert set(other["patient_id"]) != set(predictions["patient_id"])  # other patients are held out


@pytest.mark.parametrize("level", ["image", "patient_mean"])
def test_suites_read_the_predictions(frozen, level):
    rows = frozen[2][frozen[2]["level"] == level]
    scored = score_task({"a": {0: rows}, "b": {0: rows}}, "auc", 20)
    assert scored.value("a") == pytest.approx(frozen[1]["metrics"][level]["auc"][0])


@pytest.mark.parametrize("task,classes", [("density", 4), ("lesion_type", 2)])
def test_tasks_of_several_and_of_unordered_classes(task, classes, frozen, folders, drawn_table, tmp_path):
    cache = str(Path(frozen[0].output_dir) / "features")
    settings = short_run(drawn_table, folders, tmp_path / "run", task=task, cache_dir=cache, test_fraction=0.4)
    result = finetune(settings)
    assert len(result["classes"]) == classes and list(result["metrics"]) == LEVELS
    has = result["metrics"]["image"]
    assert ("quadratic_kappa" in has) == (task == "density") and ("sensitivity_at_90_specificity" in has) == (
        classes == 2
    )
    assert not (tmp_path / "run" / "features").exists()  # the other run's were there


def test_volumes_of_the_phantom_are_the_mean_of_their_slices(folders, phantom_archive, tmp_path):
    settings = short_run(phantom_archive, folders, tmp_path / "run", dataset="phantom", task="lesion")
    finetune(settings)
    (volume, *_), (head,) = sorted(Path(phantom_archive).rglob("*_dbt.dcm")), [tmp_path / "run" / "model"]
    backbone, layer, _ = open_classifier(head)
    images = pd.read_parquet(tmp_path / "run" / "predictions.parquet").query("level == 'image'")
    volume = Path(phantom_archive) / (images["image_id"][images["image_id"].str.contains("dbt")].iloc[0] + ".dcm")
    slices = list(backbone.preprocess(volume))
    with torch.inference_mode():
        inputs = {name: torch.from_numpy(np.stack([each[name] for each in slices])) for name in slices[0]}
        p = torch.softmax(layer(backbone(**inputs)), dim=1).mean(dim=0)
    row = images[images["image_id"] == volume.relative_to(phantom_archive).with_suffix("").as_posix()].iloc[0]
    assert len(slices) == 4
    np.testing.assert_allclose(row[PROBABILITIES].astype(float), p, atol=1e-4)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_fine_tuned_mammodino_opens_as_automodel_and_predicts_the_same(
    mode,
    folders,
    drawn_table,
    tmp_path,
):
    settings = short_run(drawn_table, folders, tmp_path / "run", mode=mode, class_imbalance="sampler")
    result = finetune(settings)
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "tuned_features").exists()
    assert len(result["learned"]["training"]["validation_scores"]) == 3
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True)
    assert model.config.id2label == {0: "no cancer", 1: "cancer"}
    images = pd.read_parquet(tmp_path / "run" / "predictions.parquet").query("level == 'image'")
    with torch.inference_mode():
        inputs = processor([drawn_table / name for name in images["image_id"]], return_tensors="pt")
        p = torch.softmax(model(**inputs).logits, dim=1)
    np.testing.assert_allclose(images[PROBABILITIES], p, atol=1e-4)
    assert "Research use only" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_another_backbone_is_tuned_and_kept_in_parts(folders, drawn_table, tmp_path):
    settings = short_run(
        drawn_table, folders, tmp_path / "run", mode="full", backbone="resnet50", num_train_epochs=1, bf16=True
    )
    finetune(settings)
    backbone, head, classes = open_classifier(tmp_path / "run" / "model")
    images = pd.read_parquet(tmp_path / "run" / "predictions.parquet").query("level == 'image'")
    for row in images[:3].to_dict("records"):
        image = next(backbone.preprocess(drawn_table / row["image_id"]))
        with torch.inference_mode():
            p = torch.softmax(head(backbone(torch.from_numpy(image["pixel_values"])[None])), dim=1)[0]
        np.testing.assert_allclose([row["p_0"], row["p_1"]], p, atol=0.05)  # bfloat16 there
    assert classes == ["no cancer", "cancer"]


def test_a_command_that_is_killed_goes_on_and_ends_with_the_same_result(
    folders,
    drawn_table,
    tmp_path,
):
    """A real kill of a real process, in the midst of training."""
    settings = {"mode": "full", "num_train_epochs": 6, "early_stopping_patience": 6, "save_model": False}
    whole = finetune(short_run(drawn_table, folders, tmp_path / "whole", **settings))
    killed = short_run(drawn_table, folders, tmp_path / "killed", **settings)
    run = forked.start(main, command_line(killed))
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed").glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert run.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    run.kill()
    run.join()
    assert not (tmp_path / "killed" / "result.json").exists()
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "features").rglob("*.parquet")}
    again = finetune(killed)
    assert again["metrics"] == whole["metrics"] and again["learned"] == whole["learned"]
    assert shards and shards == {path: path.stat().st_mtime_ns for path in shards}  # made once
    predictions = [pd.read_parquet(tmp_path / name / "predictions.parquet") for name in ("whole", "killed")]
    pd.testing.assert_frame_equal(*predictions)


def edit(folder: Path, change) -> None:
    table = pd.read_csv(folder / "index.csv", dtype=str)
    change(table).to_csv(folder / "index.csv", index=False)


def one_class_rare(table):
    patients = table["patient_id"].unique()
    return table.assign(cancer=(table["patient_id"] == patients[0]).astype(int))


def spoil_images_of_cancer(folder: Path) -> None:
    table = pd.read_csv(folder / "index.csv")
    for path in table["path"][table["cancer"] == 1]:
        (folder / path).write_bytes(b"no image")


@pytest.mark.parametrize(
    "spoil,changes,message",
    [
        (lambda folder: (folder / "p03_CC.png").unlink(), {}, r"1 of 48 image files are missing, first .*p03_CC\.png"),
        (lambda folder: edit(folder, lambda t: t.assign(cancer=3)), {}, "its column has one class only, 3; a task has"),
        (lambda folder: edit(folder, lambda t: t.rename(columns={"path": "scan"})), {}, "no column file; it has"),
        (lambda folder: edit(folder, lambda t: t.rename(columns={"cancer": "malignant"})), {}, "no labels for it"),
        (lambda folder: edit(folder, one_class_rare), {}, "no image of class 'cancer' in"),
        (spoil_images_of_cancer, {}, r"every image of class 'cancer' was refused; 16 images in all, the first"),
        (None, {"backbone": "dinov2", "source": "mammodino"}, "model_type=mammodino, and dinov2 takes"),
        (None, {"source": "/nowhere"}, "backbone mammodino, source /nowhere"),
        (None, {"data_dir": "/nowhere"}, "/nowhere: no such folder"),
        (None, {"dataset": "mias"}, "data set 'mias': must be one of"),
        (None, {"definition": "strict"}, "definition 'strict': table defines cancer as column"),
        (
            None,
            {"task": "density", "metric_for_best_model": "sensitivity_at_90_specificity"},
            "density with 4 classes has",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(spoil, changes, message, folders, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    draw_table(folder)
    settings = vars(short_run(folder, folders, tmp_path / "run"))
    if spoil:
        spoil(folder)
    if changes.get("source") in folders:
        changes = {**changes, "source": str(folders[changes["source"]])}
    with pytest.raises(SystemExit, match=message) as refused:
        main(command_line(FinetuneSettings(**{**settings, **changes})))
    line = str(refused.value)
    assert line.startswith("finetune: ") and "\n" not in line and len(line) < 400
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"labels": "l.csv"}, "labels=l.csv: give either labels, or dataset and data_dir"),
        ({"mode": "half"}, "mode='half': must be frozen, full, lora"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
        ({"learning_rate": "fast"}, "learning_rate='fast': must be of type float"),
        ({"test_fraction": 1.5}, "test_fraction=1.5: must be 0.01 to 0.9"),
        ({"backbone": "vgg"}, "backbone='vgg': must be mammodino"),
        ({"data_dir": ""}, "data_dir: must be given, as --data_dir ..., or --labels TABLE.csv"),
        ({"source": ""}, "source: backbone mammodino has no published weights"),
        ({"mode": "lora", "last_layers": 2}, "last_layers=2: are read of a frozen encoder"),
        ({"layerwise_decay": 0.7}, "layerwise_decay=0.7: of a frozen encoder nothing is trained"),
        ({"mode": "full", "backbone": "resnet50", "gradient_checkpointing": True}, "backbone resnet50 is no transform"),
    ],
)
def test_settings_are_refused_by_name(changes, message, drawn_table, folders, tmp_path):
    settings = vars(short_run(drawn_table, folders, tmp_path))
    with pytest.raises(ValueError, match=message):
        FinetuneSettings(**{**settings, **changes})


def test_a_folder_is_for_one_run_and_a_run_is_one_process(frozen, folders, drawn_table, tmp_path, monkeypatch):
    from filelock import FileLock

    settings = short_run(drawn_table, folders, tmp_path)
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another run is at work there"):
        finetune(settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="frozen encoder is one process: start it without accelerate launch"):
        finetune(settings)
    monkeypatch.delenv("WORLD_SIZE")
    (Path(frozen[0].output_dir) / "result.json").write_text("{")
    with pytest.raises(ValueError, match="result.json: is no JSON"):
        finetune(frozen[0])


def test_images_that_are_missing_may_be_left_out(folders, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    draw_table(folder)
    (folder / "p04_CC.png").unlink()
    (folder / "p05_CC.png").write_bytes(b"no image")
    result = finetune(short_run(folder, folders, tmp_path / "run", allow_missing=True))
    assert result["counts"]["left_out"] == {"image file missing": 1} and result["counts"]["refused"] == 1
