"""The leaderboard: probabilities of held-out folds, differences of one breast against the other, and the page."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from made_inputs import draw_breast, random_encoder
from safetensors.torch import load_file, save_file

from dataset_scripts.phantom.archive import PhantomParameters, write_archive
from modeling_mammodino import MammoDinoImageProcessor
from training.leaderboard import is_held_out, main, page, probabilities, read_tables, read_tasks

TASKS = {
    "finding": {"label": "finding"},
    "side": {"label": "finding", "difference": ["patient", "view"]},
    "finding, site A": {"label": "finding", "where": {"site": "A"}},
}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Forty patients of two sites, both breasts in one view; every second patient has a finding on one side."""
    rows = [
        {"file": f"{patient}_{side}.png", "patient": f"p{patient}", "view": "CC", "site": "AB"[patient // 2 % 2],
         "finding": int(patient % 2 and side == "LR"[patient // 4 % 2])}
        for patient in range(40) for side in "LR"
    ]  # fmt: skip
    return pd.DataFrame(rows)


def features_of(table: pd.DataFrame, signal: float) -> np.ndarray:
    """Patients differ much, findings a little: only the difference of the breasts shows them."""
    rng = np.random.default_rng(0)
    patients = {patient: rng.normal(size=4) * 10 for patient in table["patient"].unique()}
    base = np.stack([patients[patient] for patient in table["patient"]])
    return base + rng.normal(size=base.shape) * 0.1 + signal * table["finding"].to_numpy()[:, None]


def auc(found) -> float:
    labels, predicted, _ = found
    positive, negative = predicted[labels == 1, 1], predicted[labels == 0, 1]
    return float(np.mean(positive[:, None] > negative) + np.mean(positive[:, None] == negative) / 2)


def test_the_difference_of_breasts_shows_what_single_images_hide(table):
    found = probabilities(table, features_of(table, 1.0), TASKS)
    assert auc(found["side"]) > 0.95 > 0.75 > auc(found["finding"])


def test_without_signal_nothing_is_found_in_held_out_folds(table):
    found = probabilities(table, features_of(table, 0.0), TASKS)
    assert all(abs(auc(each) - 0.5) < 0.25 for each in found.values())


def test_where_chooses_rows_and_unusable_files_are_left_out(table):
    features = features_of(table, 1.0)
    features[:2] = np.nan
    found = probabilities(table, features, TASKS)
    assert len(found["finding"][0]) == 78 and len(found["finding, site A"][0]) == 38


def test_only_test_rows_are_scored(table):
    split = table["patient"].map(lambda patient: ("train", "train", "validation", "test", None)[int(patient[1:]) % 5])
    found = probabilities(table.assign(split=split), features_of(table, 1.0), {"finding": TASKS["finding"]})["finding"]
    assert set(found.patients) == {f"p{number}" for number in range(3, 40, 5)}


def test_patients_are_held_out_by_their_names_alone(table, tmp_path):
    sites = [tmp_path / site / "labels.csv" for site in "AB"]  # two tables, each with a column of its own
    for path, site in zip(sites, "AB", strict=True):
        path.parent.mkdir()
        of_site = table[table["site"] == site].rename(columns={"finding": f"finding_{site}"})
        of_site.to_csv(path, index=False)
    rule = {"salt": "a test", "percent": 30}
    both = read_tables(sites, {"finding_A", "finding_B"}, rule)
    assert len(both) == 80 and both["finding_A"].notna().sum() == both["finding_B"].notna().sum() == 40
    assert both["file"][0] == tmp_path / "A" / "0_L.png" and both["file"][79] == tmp_path / "B" / "39_R.png"
    held_out = {7, 9, 11, 15, 22, 25, 28, 32, 34}  # sha256("a test pN") modulo 100 is below 30; of p27 it is 30
    assert {number for number in range(40) if is_held_out(f"p{number}", **rule)} == held_out
    assert set(both["patient"][both["split"] == "test"]) == {f"p{number}" for number in held_out}
    assert set(both["patient"][both["split"] == "train"]) == {f"p{number}" for number in set(range(40)) - held_out}
    with pytest.raises(ValueError, match=r"column split, and the tasks held_out; leave one out"):
        table.assign(split="train").to_csv(sites[0], index=False)
        read_tables(sites, {"finding_B"}, rule)


def test_the_held_out_share_must_be_whole(tmp_path):
    for wrong in ("{salt: x}", "{salt: x, percent: 100}", "{salt: x, percent: many}", "{}", "30"):
        (tmp_path / "tasks.yaml").write_text(f"held_out: {wrong}\nfinding: {{label: finding}}")
        with pytest.raises(ValueError, match="held_out must have `salt`, a text, and `percent`"):
            read_tasks(tmp_path / "tasks.yaml")


def test_a_column_that_a_task_names_must_be_there(table, tmp_path):
    table.drop(columns="site").to_csv(tmp_path / "labels.csv", index=False)
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(TASKS))
    options = ["--labels", tmp_path / "labels.csv", "--tasks", tmp_path / "tasks.yaml", "--models", "hand=hand-crafted"]
    with pytest.raises(SystemExit, match=r"labels\.csv: no column site; it has file"):
        main([*map(str, options), "--output", str(tmp_path / "results.json")])


def test_a_task_of_one_class_is_refused_by_name(table):
    with pytest.raises(ValueError, match="task none: 1 classes"):
        probabilities(table, features_of(table, 1.0), {"none": {"label": "view"}})


def test_an_unknown_field_of_a_task_is_refused_by_name(tmp_path):
    (tmp_path / "tasks.yaml").write_text("side: {label: x, wher: {}}")
    with pytest.raises(ValueError, match="task 'side'"):
        read_tasks(tmp_path / "tasks.yaml")


@pytest.mark.slow
def test_encoders_and_features_stand_in_one_page(table, tmp_path):
    for file in table["file"]:
        cv2.imwrite(str(tmp_path / file), draw_breast(112, 84, seed=int(file.split("_")[0])))
    table.to_csv(tmp_path / "labels.csv", index=False)
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"finding": TASKS["finding"]}))
    random_encoder().save_pretrained(tmp_path / "encoder")
    MammoDinoImageProcessor(size={"height": 112, "width": 112}).save_pretrained(tmp_path / "encoder")
    checkpoint = tmp_path / "checkpoint-5"  # of this encoder, half way
    shutil.copytree(tmp_path / "encoder", checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    save_file({f"backbone.{name}": each for name, each in weights.items()}, checkpoint / "teacher.safetensors")
    (checkpoint / "recipe.yaml").write_text("max_steps: 10")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 5}')
    parameters = PhantomParameters(num_slices=4, height_px=96, width_px=64, pixel_spacing_mm=1.9, slice_spacing_mm=9)
    write_archive(tmp_path / "phantom", 24, parameters=parameters)
    write_archive(tmp_path / "tested", 16, parameters=parameters, first_patient=100)
    common = ["--labels", tmp_path / "labels.csv", "--tasks", tmp_path / "tasks.yaml", "--num_resamples", 50]
    common += ["--phantom", tmp_path / "phantom", tmp_path / "tested", "--cache", tmp_path / "cache"]
    models = [
        "--models",
        f"ours={tmp_path / 'encoder'}",
        f"untrained=untrained:{tmp_path / 'encoder'}",
        "hand=hand-crafted",
    ]
    about = ["--minutes", "ours=12", "--note", "ours=has seen them", "--speedrun", f"{tmp_path}=4"]
    main([str(each) for each in [*common, *models, *about, "--output", tmp_path / "results.json"]])
    result = json.loads((tmp_path / "results.json").read_text())
    rows = {name: row["scores"] for name, row in result["rows"].items()}
    assert list(rows) == ["ours", "untrained", "hand"]
    value, low, high = rows["ours"]["finding"]["minus_untrained"]
    assert value == pytest.approx(rows["ours"]["finding"]["auc"][0] - rows["untrained"]["finding"]["auc"][0])
    assert low <= value <= high and rows["hand"]["finding"]["patients"] == 40
    assert rows["ours"]["phantom lesion"]["images"] == 16 and rows["hand"]["phantom density"]["auc"][0] > 0.5
    assert result["speedrun"]["curve"] == [[2, rows["ours"]["finding"]["auc"][0]]]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    main([str(each) for each in [*common, *models, "--output", tmp_path / "again.json"]])
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    again = json.loads((tmp_path / "again.json").read_text())["rows"]
    assert {name: row["scores"] for name, row in again.items()} == rows
    edited = table.sample(frac=1, random_state=0).iloc[4:]  # in the same file: the cache is of other images
    edited.to_csv(tmp_path / "labels.csv", index=False)
    few = [*common[:4], *models[:2], "--output", tmp_path / "edited.json"]
    main([str(each) for each in [*few, "--cache", tmp_path / "cache"]])
    main([str(each) for each in [*few[:-1], tmp_path / "without.json"]])
    cached, without = ((tmp_path / f"{name}.json").read_text() for name in ("edited", "without"))
    assert cached == without
    main(["--results", str(tmp_path / "results.json"), "--output", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert "| ours |" in text and "80 images of 40 patients" in text and "Research use only" in text
    assert "has seen them" in text and "| 12 |" in text and "phantom cancer" in text
    assert f"AUC 0.80: not reached ({rows['ours']['finding']['auc'][0]:.3f} after 2)" in text


def test_a_source_that_is_neither_folder_nor_known_is_refused_by_name(tmp_path):
    (tmp_path / "labels.csv").write_text("file,patient,x\n")
    (tmp_path / "tasks.yaml").write_text("x: {label: x}")
    common = ["--labels", str(tmp_path / "labels.csv"), "--tasks", str(tmp_path / "tasks.yaml")]
    with pytest.raises(SystemExit):
        main([*common, "--models", "a=nowhere", "--output", str(tmp_path / "results.json")])
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("name", "folder"), [("leaderboard", "leaderboard"), ("leaderboard_first", "leaderboard/first")]
)
def test_the_committed_pages_are_made_of_the_committed_results(name, folder):
    docs = Path(__file__).parents[2] / "docs"
    results = [json.loads(path.read_text()) for path in sorted((docs / folder).glob("*.json"))]
    assert page(results) == (docs / f"{name}.md").read_text()
