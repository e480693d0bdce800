"""The trust sheet: subgroups and sources against what was planted, and the sheet of a run on its own and other data."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from training.evaluation.finetuning.feature_cache import SliceFeatures
from training.evaluation.subgroups import groups_known, headline_level, probe_source, score_headline, score_subgroups
from training.finetune import finetune
from training.trust import main as trust
from training.trust import same_definition

from .small_runs import draw_table, short_run

RNG = np.random.default_rng(0)
NUM_PATIENTS = 120


def made_predictions() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two views a patient; scores that say little of machine Y's patients; three patients of machine Z."""
    patient = np.repeat(np.arange(NUM_PATIENTS), 2)
    machine = np.where(patient < 3, "Z", np.where(patient % 2, "Y", "X"))
    label = (patient // 2) % 2
    p = 1 / (1 + np.exp(-(np.where(machine == "Y", 0.3, 3) * (2 * label - 1) + RNG.normal(size=len(patient)))))
    table = pd.DataFrame({"image_id": [f"i{n}" for n in range(len(patient))], "patient_id": [f"p{n}" for n in patient]})
    table = table.assign(breast_id=table["patient_id"], view=["CC", "MLO"] * NUM_PATIENTS, machine=machine, label=label)
    table["age"] = np.where(patient % 5 == 0, np.nan, 45 + patient % 40)
    images = table.assign(level="image", p_0=1 - p, p_1=p)
    patients = images.groupby("patient_id", sort=False)[["label", "p_0", "p_1"]].mean().reset_index()
    return pd.concat([images, patients.assign(level="patient_mean", label=patients["label"].astype(int))]), table


def test_a_group_has_its_own_score_and_its_distance_to_the_others():
    predictions, table = made_predictions()
    found = score_subgroups(predictions, table, "density", "patient_mean", "auc", 200, 0)
    by_name = {(each["column"], each["group"]): each for each in found}
    patients = predictions[predictions["level"] == "patient_mean"].assign(
        machine=lambda rows: rows["patient_id"].map(
            table.drop_duplicates("patient_id").set_index("patient_id")["machine"]
        )
    )
    auc = {of: roc_auc_score(rows["label"], rows["p_1"]) for of, rows in (
        ("Y", patients[patients["machine"] == "Y"]), ("others", patients[patients["machine"] != "Y"])
    )}  # fmt: skip
    worse = by_name["machine", "Y"]
    assert worse["score"][0] == pytest.approx(auc["Y"]) and worse["level"] == "patient_mean"
    assert worse["gap"][0] == pytest.approx(auc["Y"] - auc["others"]) and worse["gap"][2] < 0
    assert "score" not in by_name["machine", "Z"] and by_name["machine", "Z"]["patients"] == 3
    assert by_name["view", "CC"]["level"] == "image" and by_name["view", "CC"]["units"] == NUM_PATIENTS
    assert {group for column, group in by_name if column == "age"} == {
        "under 50",
        "50 to 59",
        "60 to 69",
        "70 and over",
    }


def test_a_task_is_no_subgroup_of_itself_and_has_one_level():
    _, table = made_predictions()
    assert "machine" not in groups_known(table, "machine") and "machine" in groups_known(table, "density")
    ages = pd.DataFrame({"age": pd.array([-1, 999, 49.5, 50, 70, None], "Float64")})
    bands = groups_known(ages, "cancer")["age"].fillna("unknown").tolist()
    assert bands == ["unknown", "unknown", "under 50", "50 to 59", "70 and over", "unknown"]
    levels = ["image", "breast_max", "patient_mean"]
    assert [headline_level(task, levels) for task in ("cancer", "density", "mine")] == [
        "breast_max",
        "patient_mean",
        "image",
    ]
    assert headline_level("cancer", ["image"]) == "image"


def test_other_models_are_compared_on_the_same_rows():
    predictions, _ = made_predictions()
    shuffled = predictions.sample(frac=1, random_state=0).assign(p_1=lambda rows: 1 - rows["p_1"])
    score, rows = score_headline(predictions, {"same": predictions, "other": shuffled}, "image", "auc", 50, 0)
    np.testing.assert_allclose(rows["same"]["gap"], 0)
    assert rows["other"]["score"][0] == pytest.approx(1 - score[0]) and rows["other"]["gap"][1] > 0


def test_a_source_that_features_hold_is_found_and_one_that_they_do_not_hold_is_not():
    _, table = made_predictions()
    split = np.array(["train", "validation", "test"])[table["patient_id"].str[1:].astype(int) % 12 // 4]
    table = table.assign(split=split, machine=np.where(table["machine"] == "Z", "X", table["machine"]))
    noise = RNG.normal(size=(len(table), 6)).astype(np.float32)
    told = noise + 3 * (table["machine"] == "Y").to_numpy()[:, None]
    aucs = [probe_source(SliceFeatures(list(values[:, None]), table, {}), 50, 0) for values in (told, noise)]
    assert aucs[0]["auc"][1] > 0.95 and abs(aucs[1]["auc"][0] - 0.5) < 0.25
    assert abs(aucs[0]["auc_of_label"][0] - 0.5) < 0.1 and aucs[0]["column"] == "machine"
    by_label = table.assign(label=(table["machine"] == "Y").astype(int))
    assert probe_source(SliceFeatures(list(noise[:, None]), by_label, {}), 50, 0)["auc_of_label"][0] == 1
    assert "no column" in probe_source(SliceFeatures([], table.drop(columns="machine"), {}), 50, 0)["missing"]


def test_other_data_are_asked_for_the_definition_of_the_run(tmp_path):
    folder = draw_table(tmp_path)
    assert same_definition("table", folder, "density", "dense") == "dense"
    assert same_definition("table", folder, "density", "by the radiologist") is None  # theirs, the first


@pytest.mark.slow
def test_a_run_leaves_a_sheet_and_other_data_stand_beside_it(folders, tmp_path):
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
        table = pd.read_csv(draw_table(tmp_path / name) / "index.csv")
        number = table["patient_id"].str[1:].astype(int)
        table = table.assign(digitizer=np.where(number % 2, "A", "B"), age=40 + number)
        table.to_csv(tmp_path / name / "index.csv", index=False)
    run = tmp_path / "run"
    settings = short_run(tmp_path / "own", folders, run, baselines=True)
    result = finetune(settings)
    numbers = json.loads((run / "trust.json").read_text())
    assert numbers["headline"]["level"] == "breast_max"
    assert numbers["headline"]["score"] == pytest.approx(result["metrics"]["breast_max"]["auc"])
    assert set(numbers["rows"]) == {"untrained", "hand-crafted"}
    assert {each["column"] for each in numbers["subgroups"]} >= {"view", "machine"}
    assert cv2.imread(str(run / "trust.png")).std() > 10
    sheet = (run / "trust.md").read_text()
    assert sheet.index("AUC") < sheet.index("In one minute") < sheet.index("<details>") < sheet.index("patient_mean")
    assert "Other data: not tried" in sheet and "Research use only" in sheet

    trust([str(run), "--external", str(tmp_path / "other" / "index.csv")])  # the same breasts: the whole of them
    numbers = json.loads((run / "trust.json").read_text())
    assert numbers["external"]["index"]["patients"] == 24 and numbers["external"]["index"]["level"] == "breast_max"
    assert "On other data (index), as it is, it" in (run / "trust.md").read_text()
    assert "cancer counts as positive" in (run / "trust.md").read_text()
    trust([str(run), "--external", str(tmp_path / "own" / "index.csv")])  # another table of this name stands beside it
    assert len(json.loads((run / "trust.json").read_text())["external"]) == 2
    table = pd.read_csv(tmp_path / "other" / "index.csv")
    table.assign(cancer=table["cancer"].map({0: "no", 1: "yes"})).to_csv(tmp_path / "words.csv", index=False)
    with pytest.raises(
        SystemExit, match="its classes are no, yes, those of the run no cancer, cancer; name them alike"
    ):
        (tmp_path / "words.csv").rename(tmp_path / "other" / "words.csv")
        trust([str(run), "--external", str(tmp_path / "other" / "words.csv")])
