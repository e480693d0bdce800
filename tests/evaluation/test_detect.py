"""The command of detection on drawn breasts with bright lesions: it learns, goes on after a kill, returns, refuses."""

import json
import shlex
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from made_inputs import TINY_ENCODER, draw_breast, random_encoder

from dataset_scripts.corpus.bcs_dbt_volumes import BcsDbtViews, View
from modeling_mammodino import InvalidImageError, MammoDinoImageProcessor
from training.detect import main, run_detection
from training.evaluation.detection import train_detector
from training.evaluation.detection.boxes import load_boxes
from training.evaluation.detection.data import LesionImageRenderer
from training.evaluation.detection.detector import cell_loss, load_detector
from training.evaluation.detection.lesion_metrics import Found, evaluate
from training.evaluation.run_settings import DetectionSettings

NUM_PATIENTS = 30
FRACTIONS = {"test_fraction": 0.3, "validation_fraction": 0.2}


@pytest.fixture(scope="module")
def drawn_table(tmp_path_factory) -> Path:
    """An image a patient, of either breast; two in three have a bright ellipse, with its box."""
    folder, rows = tmp_path_factory.mktemp("drawn"), []
    for number in range(NUM_PATIENTS):
        side, rng = ("left", "right")[number % 2], np.random.default_rng(number)
        plane, boxes = draw_breast(200, 140, seed=number), []
        if number % 3:
            (x, y), (a, b) = rng.integers((25, 70), (60, 130)), rng.integers(11, 17, 2)
            cv2.ellipse(plane, (int(x), int(y)), (int(a), int(b)), 0, 0, 360, 4095, -1)
            x0, x1 = (x - a, x + a + 1) if side == "left" else (140 - (x + a + 1), 140 - (x - a))
            boxes = [{"x0": x0, "y0": y - b, "x1": x1, "y1": y + b + 1, "slice": -1, "label": "mass"}]
        cv2.imwrite(str(folder / f"{number:02d}.png"), plane if side == "left" else plane[:, ::-1])
        rows.append({"patient_id": f"p{number:02d}", "path": f"{number:02d}.png", "lesion": int(bool(boxes))})
        rows[-1]["boxes"] = json.dumps(boxes, default=int)
    pd.DataFrame(rows).to_csv(folder / "index.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    assert TINY_ENCODER["patch_size"] == 14
    random_encoder().save_pretrained(folder)
    MammoDinoImageProcessor(size={"height": 112, "width": 84}, patch_size=14).save_pretrained(folder)
    return folder


def short_run(data_dir: Path, encoder: Path, output: Path, **changes) -> DetectionSettings:
    chosen = {
        "dataset": "table",
        "data_dir": str(data_dir),
        "encoder": str(encoder),
        "output_dir": str(output),
        **FRACTIONS,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "map_width": 32,
        "decoder_layers": 2,
        "num_queries": 8,
        "learning_rate": 3e-3,
        "encoder_learning_rate": 3e-4,
        "num_resamples": 50,
        "dataloader_num_workers": 0,
    }
    return DetectionSettings(**{**chosen, **changes})


@pytest.fixture(scope="module")
def finished(drawn_table, encoder_folder, tmp_path_factory) -> tuple[DetectionSettings, dict]:
    settings = short_run(drawn_table, encoder_folder, tmp_path_factory.mktemp("runs") / "run", num_train_epochs=35)
    return settings, run_detection(settings)


def test_a_trained_detector_finds_what_an_untrained_one_does_not(finished, drawn_table, encoder_folder, tmp_path):
    _, trained = finished
    untrained = run_detection(short_run(drawn_table, encoder_folder, tmp_path, num_train_epochs=0))
    assert untrained["evaluated"] == trained["evaluated"] == {"images": {"images": 9, "patients": 9, "lesions": 6}}
    map_50, at_1 = (trained["metrics"]["images"][name] for name in ("map_50", "sensitivity_at_1"))
    assert map_50[0] > 0.3 > 0.05 > untrained["metrics"]["images"]["map_50"][2]
    assert at_1[0] > 0.8 > untrained["metrics"]["images"]["sensitivity_at_1"][0]
    assert not (tmp_path / "model").exists() and untrained["learned"] == {}


def test_what_is_written_agrees_with_the_result(finished):
    settings, result = finished
    output = Path(settings.output_dir)
    assert json.loads((output / "result.json").read_text()) == json.loads(json.dumps(result))
    assert not (output / "checkpoints").exists() and not (output / "images").exists()
    for name in ("detections.png", "froc.png"):
        assert cv2.imread(str(output / name)).std() > 20
    predictions, lesions = (pd.read_parquet(output / f"{name}.parquet") for name in ("predictions", "lesions"))
    corners = ["x0", "y0", "x1", "y1"]
    assert (predictions[corners].min().min() >= 0) and predictions[["x1", "y1"]].max().le([140, 200]).all()
    found = []
    for image, truth in lesions.groupby("image_id"):
        of = predictions[predictions["image_id"] == image]
        slices = np.zeros(len(of), int)
        boxes, scores = of[corners].to_numpy(), of["score"].to_numpy()
        found.append(
            Found(image, image, 1, truth[corners].to_numpy(), truth["slice"].to_numpy(), boxes, slices, scores)
        )
    for image in set(predictions["image_id"]) - set(lesions["image_id"]):
        of = predictions[predictions["image_id"] == image]
        none, slices = np.empty((0, 4)), np.zeros(len(of), int)
        found.append(
            Found(image, image, 1, none, np.zeros(0, int), of[corners].to_numpy(), slices, of["score"].to_numpy())
        )
    again = evaluate(found, "center", 0.2, 10, seed=0)
    for name, score in result["metrics"]["images"].items():
        assert again[name].value == pytest.approx(score[0])
    detector, processor = load_detector(output / "model")
    assert detector.config.num_queries == 8 and processor.size["width"] == 84
    epochs = result["learned"]["epochs"]
    assert len(epochs) == 35 and epochs[-1]["loss"] < 0.6 * epochs[0]["loss"]


def test_a_finished_run_returns_and_other_settings_are_refused(finished, monkeypatch):
    settings, result = finished
    monkeypatch.setattr("training.detect.run", None)  # would not be called
    assert run_detection(settings)["metrics"] == json.loads(json.dumps(result["metrics"]))
    again = shlex.split(settings.command())[3:]
    main(again)
    with pytest.raises(SystemExit, match=r"detect: .*seed \(0 -> 1\)"):
        main([*again, "--seed", "1"])


def test_a_killed_run_goes_on_to_the_same_end(drawn_table, encoder_folder, tmp_path, monkeypatch):
    whole = run_detection(short_run(drawn_table, encoder_folder, tmp_path / "whole"))
    settings, calls = short_run(drawn_table, encoder_folder, tmp_path / "killed"), []

    def killed(*arguments):
        calls.append(1)
        if len(calls) > 4:  # three steps an epoch and one of validation
            raise KeyboardInterrupt
        return cell_loss(*arguments)

    monkeypatch.setattr(train_detector, "cell_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        run_detection(settings)
    assert not (tmp_path / "killed" / "result.json").exists()
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
    calls.clear()
    monkeypatch.setattr(train_detector, "cell_loss", lambda *arguments: calls.append(1) or cell_loss(*arguments))
    resumed = run_detection(settings)
    assert len(calls) == 4  # the second epoch alone
    assert resumed["metrics"] == whole["metrics"] and resumed["learned"] == whole["learned"]
    for name in ("predictions", "lesions"):
        pd.testing.assert_frame_equal(
            *(pd.read_parquet(tmp_path / run / f"{name}.parquet") for run in ("whole", "killed"))
        )


def test_refused_images_are_counted_and_options_of_training_taken(drawn_table, encoder_folder, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in drawn_table.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    order = [f"{number:02d}.png" for number in range(NUM_PATIENTS)]
    for name in order[::10]:
        (folder / name).write_bytes(b"no image")
    options = {"drop_path_rate": 0.2, "gradient_checkpointing": True, "layerwise_decay": 0.7}
    result = run_detection(short_run(folder, encoder_folder, tmp_path / "run", num_train_epochs=1, **options))
    assert load_detector(tmp_path / "run" / "model")[0].config.backbone_config.drop_path_rate == 0.2
    assert result["counts"]["refused"] == 3
    of_test = {image.image_id for image in load_boxes("table", folder, **FRACTIONS).images["test"]}
    assert result["evaluated"]["images"]["images"] == len(of_test) - len(of_test & set(order[::10]))


@pytest.mark.parametrize("lesions_alone", [False, True])
def test_where_no_lesion_can_be_tested_the_first_refusal_is_named(
    drawn_table, encoder_folder, tmp_path, monkeypatch, lesions_alone
):
    images = load_boxes("table", drawn_table, **FRACTIONS).images["test"]
    broken = [each.file for each in images if len(each.lesions) or not lesions_alone]
    assert len(broken) == (6 if lesions_alone else 9)
    read = LesionImageRenderer.__call__

    def refuse(renderer, file, *arguments, **options):
        if file in broken:
            raise InvalidImageError(file, "is damaged")
        return read(renderer, file, *arguments, **options)

    monkeypatch.setattr(LesionImageRenderer, "__call__", refuse)
    refusal = f"test: no image with a lesion is left; {len(broken)} images were refused, the first: {broken[0]}"
    with pytest.raises(ValueError, match=refusal):
        run_detection(short_run(drawn_table, encoder_folder, tmp_path, num_train_epochs=0))
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset": "nothing"}, "data set 'nothing'"),
        ({"encoder": "no/folder/here"}, "no such folder"),
        ({"image_height": 100}, "multiples of patch_size=14"),
        ({"map_width": 48}, "map_width=48: must be a multiple of 32"),
        ({"hit": "sometimes"}, "hit"),
        ({"data_dir": "/nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(drawn_table, encoder_folder, tmp_path, changes, message, capsys):
    chosen = {"dataset": "table", "data_dir": drawn_table, "encoder": encoder_folder, "output_dir": tmp_path, **changes}
    with pytest.raises(SystemExit) as refusal:
        main([part for name, value in chosen.items() for part in (f"--{name}", str(value))])
    said = str(refusal.value) + capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "result.json").exists()


def test_boxes_of_bcs_dbt_lie_in_the_turned_image(phantom_archive, tmp_path):
    """A volume stored upside down and mirrored, as some of that collection are, comes out as the upright one."""
    upright = next(phantom_archive.rglob("L_*_dbt.dcm"))
    dataset = pydicom.dcmread(upright)
    dataset.PixelData = np.ascontiguousarray(dataset.pixel_array[:, ::-1, ::-1]).tobytes()
    turned = tmp_path / "patient" / "study" / "1.2.3" / "1-1.dcm"
    turned.parent.mkdir(parents=True)
    dataset.save_as(turned)
    view = View("L", upright.name.split("_")[1])
    views = BcsDbtViews({}, {turned.parts[-4:]: view, upright.parts[-4:]: view})
    renderer = LesionImageRenderer(MammoDinoImageProcessor(size={"height": 128, "width": 96}, patch_size=16), views)
    for frame in (1, 4):
        (one,), (other,) = renderer(str(upright), [frame]), renderer(str(turned), [frame])
        np.testing.assert_array_equal(other.image, one.image)
        assert other.placement == one.placement
    assert views.counts["turned"] == 2
