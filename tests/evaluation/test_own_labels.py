"""A newcomer's table, its own column and class names, through every command with the same file."""

import json
import shutil
from pathlib import Path

import cv2
import forked
import numpy as np
import pandas as pd
import pytest
import torch
from made_inputs import draw_breast, random_encoder
from transformers import AutoModelForImageClassification, AutoProcessor

from modeling_mammodino import MammoDinoImageProcessor
from training.card import main as card
from training.detect import main as detect
from training.finetune import main as finetune
from training.predict import main as predict
from training.predict import read_files_and_tables
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


RUNS = {  # name: how it differs
    "linear": (), "attention": ("--head", "attention"), "lora": ("--mode", "lora"), "full": ("--mode", "full"),
    "tiles": ("--head", "mil", "--canvas_height", "168", "--tile_size", "84"),
    "resnet": ("--backbone", "resnet50", "--source", "RESNET"),
}  # fmt: skip
DETECT = ("--num_train_epochs", "1", "--map_width", "32", "--decoder_layers", "1", "--num_queries", "10")


@pytest.fixture(scope="module")
def runs(labels, encoder, folders, tmp_path_factory) -> dict[str, Path]:
    """A finished run of every kind, by name."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name, changes in RUNS.items():
        found[name] = folder / name
        chosen = [str(folders["resnet50"]) if each == "RESNET" else each for each in changes]
        finetune(["--labels", str(labels), "--task", "finding", "--source", encoder, "--output_dir", str(found[name]),
                  "--num_train_epochs", "1", "--classes", "normal,mass", "--baselines", "False",
                  *QUICK, *chosen])  # fmt: skip
    found["boxes"] = folder / "boxes"
    detect(["--labels", str(labels), "--encoder", encoder, "--output_dir", str(found["boxes"]), *DETECT, *QUICK])
    return found


@pytest.fixture(scope="module")
def predicted(labels, runs, tmp_path_factory) -> dict[str, pd.DataFrame]:
    """What a fresh process predicts with every run, on the table, a file that is none and one that is not there."""
    folder = tmp_path_factory.mktemp("predicted")
    table = pd.read_csv(labels).drop(columns=["finding", "lesion"])
    table["file"] = [str(labels.parent / file) for file in table["file"]]
    (folder / "text.png").write_text("no image")
    bad = [{"file": str(folder / name), "patient": "P-bad", "laterality": "L"} for name in ("text.png", "none.png")]
    pd.concat([table, pd.DataFrame(bad)]).to_csv(folder / "new.csv", index=False)
    for name, run in runs.items():
        forked.run(predict, [str(run), str(folder / "new.csv"), "--output", str(folder / f"{name}.parquet")])
    return {name: pd.read_parquet(folder / f"{name}.parquet") for name in runs}


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Order by level and names; an image goes by the name of its file, wherever that is."""
    rows = rows.assign(image_id=rows["image_id"].map(lambda name: Path(name).name, na_action="ignore"))
    return rows.sort_values(["level", "patient_id", "breast_id", "image_id"], ignore_index=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_fresh_process_predicts_what_the_run_did_on_its_test_part(runs, predicted, name):
    stored = in_order(pd.read_parquet(runs[name] / "predictions.parquet"))
    new = predicted[name]
    tested = new[new["patient_id"].isin(stored["patient_id"])]
    assert set(stored["level"]) >= {"image", "breast_max", "patient_max"}
    for column, own in {"p_mass": "calibrated_1", "uncalibrated_mass": "p_1", "p_normal": "calibrated_0"}.items():
        np.testing.assert_allclose(in_order(tested)[column], stored[own], atol=1e-5)
    assert (new["class"][new["p_mass"] > 0.5] == "mass").all()
    images = new[new["level"] == "image"]
    assert (
        len(images) == 2 * NUM_PATIENTS + 2 and images["mask_confidence"][images["refused"].isna()].between(0, 1).all()
    )
    refused = images.set_index(images["file"].map(lambda file: Path(file).name))["refused"].dropna()
    assert set(refused.index) == {"text.png", "none.png"} and "No such file" in refused["none.png"]


@pytest.mark.slow
def test_a_fresh_process_finds_the_boxes_that_the_run_did(runs, predicted):
    columns = ["x0", "y0", "x1", "y1", "score"]
    stored = pd.read_parquet(runs["boxes"] / "predictions.parquet")
    found = predicted["boxes"].assign(
        image_id=lambda rows: rows["file"].map(lambda f: Path(f).name, na_action="ignore")
    )
    boxes = found[found["level"] == "box"]
    for name, own in stored.groupby("image_id"):
        of_image = boxes[boxes["image_id"] == Path(name).name].sort_values(columns)
        np.testing.assert_allclose(of_image[columns], own.sort_values(columns)[columns], atol=1e-4)
    images = found[found["level"] == "image"].set_index("image_id")["score"].dropna()
    assert images.equals(boxes.groupby("image_id")["score"].max()[images.index].rename("score"))
    assert {"breast", "patient"} < set(found["level"]) and found["refused"].notna().sum() == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "lora", "full"])
def test_linear_heads_of_a_mammodino_open_as_an_auto_model(labels, runs, predicted, name):
    folder, rows = runs[name] / "model", predicted[name]
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__name__ == "MammoDinoForImageClassification" and model.config.id2label[1] == "mass"
    rows = rows[(rows["level"] == "image") & rows["refused"].isna()][:4]
    inputs = AutoProcessor.from_pretrained(folder, trust_remote_code=True)(rows["file"].tolist(), return_tensors="pt")
    with torch.inference_mode():
        found = torch.softmax(model(**inputs).logits, dim=1)[:, 1]
    np.testing.assert_allclose(found, rows["uncalibrated_mass"], atol=1e-5)
    for other, reason in {"tiles": "tiles beside", "attention": "by attention", "resnet": "resnet50 under"}.items():
        assert not (runs[other] / "model" / "config.json").exists()
        assert reason in (runs[other] / "model" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "tiles"])
def test_images_and_folders_are_predicted_as_csv_with_heat_maps(labels, runs, tmp_path, name):
    for folder, file in zip("ab", sorted((labels.parent / "images").iterdir()), strict=False):
        (tmp_path / "in" / folder).mkdir(parents=True)
        shutil.copy(file, tmp_path / "in" / folder / "1-1.png")
    command = [str(runs[name]), str(tmp_path / "in/a/1-1.png"), str(tmp_path / "in/b"), "--output",
               str(tmp_path / "found.csv"), "--heat_maps", str(tmp_path / "maps")]  # fmt: skip
    predict(command)
    found = pd.read_csv(tmp_path / "found.csv")
    assert found["level"].tolist() == ["image", "image"]  # nobody said whose they are
    maps = [tmp_path / "maps" / folder / "1-1.png.png" for folder in "ab"]
    assert [cv2.imread(str(path)).std() > 20 for path in maps] == [True, True]
    with pytest.raises(SystemExit, match="a/1-1.png.png exists; give another folder"):  # may be of another image
        predict(command)


def test_a_table_knows_more_of_a_file_than_its_folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "labels.csv").write_text("file,patient,laterality\na.png,p1,L\n")
    for sources in ([tmp_path, tmp_path / "labels.csv"], [tmp_path / "labels.csv", tmp_path]):
        table = read_files_and_tables(sources).set_index("file")
        assert len(table) == 2 and table.loc[str(tmp_path / "a.png"), "breast_id"] == "p1_L"


@pytest.mark.slow
def test_what_cannot_predict_is_said_with_its_remedy(labels, runs, tmp_path, capsys):
    file, output = str(next((labels.parent / "images").iterdir())), str(tmp_path / "found.parquet")
    for changes, message in (
        ({"run": labels.parent}, "no result.json; give the output_dir of a finished run"),
        ({"run": runs["resnet"], "more": ["--heat_maps", "maps"]}, "--heat_maps: is the head of resnet50"),
        ({"run": runs["boxes"], "more": ["--heat_maps", "maps"]}, "--heat_maps: a detector has boxes instead"),
        ({"output": "found.txt"}, "--output found.txt: give a name that ends in .csv or .parquet"),
        ({"files": str(labels.parent / "nothing.csv")}, "nothing.csv: no such file"),
    ):
        chosen = {"run": runs["linear"], "files": file, "output": output, "more": [], **changes}
        with pytest.raises(SystemExit, match=message):
            predict([str(chosen["run"]), chosen["files"], "--output", chosen["output"], *chosen["more"]])
    (tmp_path / "run").mkdir()
    shutil.copy(runs["linear"] / "result.json", tmp_path / "run")
    with pytest.raises(SystemExit, match="kept no model, as it was run with --save_model False; run it again"):
        predict([str(tmp_path / "run"), file, "--output", output])


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
def test_breasts_and_patients_have_the_class_of_their_worst_view(labels, runs):
    result = json.loads((runs["linear"] / "result.json").read_text())
    assert result["classes"] == ["normal", "mass"] and result["dataset"] == "table"
    assert f"--labels {labels}" in result["command"] and "--data_dir" not in result["command"]
    predictions = pd.read_parquet(runs["linear"] / "predictions.parquet")
    breasts, patients = (predictions[predictions["level"] == f"{level}_mean"] for level in ("breast", "patient"))
    assert set(breasts["breast_id"].str[-1]) == {"L", "R"} and len(breasts) == result["counts"]["test"]["breasts"]
    assert patients["label"].sum() == sum(int(name[2:]) % 2 for name in patients["patient_id"])


@pytest.mark.slow
def test_boxes_in_columns_are_detected(runs):
    lesions = pd.read_parquet(runs["boxes"] / "lesions.parquet")
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
