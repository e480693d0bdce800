"""A newcomer's table, its own column and class names, through every command with the same file."""

import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from made_inputs import draw_breast, random_encoder

from modeling_mammodino import MammoDinoImageProcessor
from training.card import main as card
from training.detect import main as detect
from training.finetune import main as finetune
from training.probe import main as probe

NUM_PATIENTS = 24


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    """Both breasts of each patient; the left of every second has a bright mass, boxed in columns."""
    folder, rows = tmp_path_factory.mktemp("own"), []
    for number in range(NUM_PATIENTS):
        for side in ("left", "right"):
            row = {"file": f"images/mammogram_{number}_{side}.png", "patient": f"P-{number:03d}", "laterality": side}
            plane, has_mass = draw_breast(120, 84, seed=number, side=side), side == "left" and number % 2
            if has_mass:
                cv2.circle(plane, (30, 60), 12, 4095, -1)
                row |= {"x0": 18, "y0": 48, "x1": 43, "y1": 73}
            (folder / row["file"]).parent.mkdir(exist_ok=True)
            cv2.imwrite(str(folder / row["file"]), plane)
            rows.append(row | {"finding": "mass" if has_mass else "normal", "lesion": int(has_mass)})
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    return folder / "labels.csv"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    random_encoder().save_pretrained(folder)
    MammoDinoImageProcessor(size={"height": 112, "width": 84}, patch_size=14).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Encoder\n\n## Results\n\nNone.\n\n## Use\n")
    return str(folder)


QUICK = ("--dataloader_num_workers", "0", "--num_resamples", "20", "--test_fraction", "0.3", "--validation_fraction",
         "0.3")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mode,head", [("frozen", "linear"), ("frozen", "mil"), ("lora", "linear")])
def test_finetune(labels, encoder, tmp_path, mode, head, capsys):
    finetune(["--labels", str(labels), "--task", "finding", "--source", encoder, "--mode", mode, "--output_dir",
              str(tmp_path), "--num_train_epochs", "1", "--classes", "normal,mass", "--head", head, "--canvas_height",
              "168", "--tile_size", "84", *QUICK])  # fmt: skip
    way = "max" if head == "mil" else "mean"
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["classes"] == ["normal", "mass"] and result["dataset"] == "table"
    assert f"--labels {labels}" in result["command"] and "--data_dir" not in result["command"]
    predictions = pd.read_parquet(tmp_path / "predictions.parquet")
    breasts = predictions[predictions["level"] == f"breast_{way}"]
    assert set(breasts["breast_id"].str[-1]) == {"L", "R"} and len(breasts) == result["counts"]["test"]["breasts"]
    patients = predictions[predictions["level"] == f"patient_{way}"]
    assert patients["label"].sum() == sum(
        int(name[2:]) % 2 for name in patients["patient_id"]
    )  # the worst of its breasts


@pytest.mark.slow
def test_probe_and_card(labels, encoder, tmp_path, capsys):
    output = tmp_path / "probe.json"
    probe(["--models", f"mine={encoder}", "--labels", str(labels), "--tasks", "finding", "laterality", "--output",
           str(output), "--num_resamples", "20"])  # fmt: skip
    tasks = json.loads(output.read_text())["tasks"]
    assert tasks["finding"]["classes"] == ["mass", "normal"] and tasks["laterality"]["classes"] == ["L", "R"]
    card([encoder, "--results", str(output), "--dataset", "own images"])
    assert "| finding |" in (Path(encoder) / "README.md").read_text()


@pytest.mark.slow
def test_detect(labels, encoder, tmp_path, capsys):
    detect(["--labels", str(labels), "--encoder", encoder, "--output_dir", str(tmp_path), "--num_train_epochs", "0",
            "--map_width", "32", "--decoder_layers", "1", "--num_queries", "10", *QUICK])  # fmt: skip
    lesions = pd.read_parquet(tmp_path / "lesions.parquet")
    np.testing.assert_array_equal(lesions[["x0", "y0", "x1", "y1"]].drop_duplicates(), [[18, 48, 43, 73]])


@pytest.mark.parametrize("command", [finetune, probe])
def test_missing_files_are_refused_alike_before_any_image_is_read(labels, encoder, tmp_path, command):
    table = pd.read_csv(labels)
    for file in table["file"][1:]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"no image")
    table.to_csv(tmp_path / "labels.csv", index=False)
    given = {
        finetune: ["--task", "finding", "--source", encoder, "--output_dir", str(tmp_path / "run")],
        probe: ["--tasks", "finding", "--models", encoder, "--output", str(tmp_path / "probe.json")],
    }
    with pytest.raises(SystemExit, match=r"1 of 48 image files are missing, first .*mammogram_0_left\.png; complete"):
        command(["--labels", str(tmp_path / "labels.csv"), *given[command]])
