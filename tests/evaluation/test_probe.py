"""Scores against oracles, patients as the unit, and probes that find what is there and not what is not."""

import json

import numpy as np
import pandas as pd
import pytest

from modeling_mammodino import MammoDinoConfig, MammoDinoImageProcessor, MammoDinoModel
from training.evaluation.metrics import auc, bootstrap_auc, bootstrap_weights
from training.probe import Features, evaluate, format_results, main, split_patients, split_rows


def test_auc_counts_ordered_pairs():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 60), rng.normal(size=60).round(1)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert auc(labels, np.stack((-scores, scores), axis=1)) == pytest.approx(np.mean(pairs))


def test_auc_of_many_classes_is_the_mean_of_one_against_the_rest():
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 3, 90), rng.dirichlet((1, 1, 1), 90)
    each = [
        auc((labels == c).astype(int), np.stack((1 - probabilities[:, c], probabilities[:, c]), 1)) for c in range(3)
    ]
    assert auc(labels, probabilities) == pytest.approx(np.mean(each))
    assert np.isnan(auc(np.zeros(5, int), np.ones((5, 2)) / 2))


def test_a_resample_takes_patients_whole():
    patients = np.array(["a", "a", "b", "c", "c", "c"])
    for counts in np.concatenate(list(bootstrap_weights(patients, 50, seed=0))):
        assert counts[0] == counts[1] and counts[3] == counts[4] == counts[5]
        assert counts[0] + counts[2] + counts[3] == 3


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Two normal scores at distance 1 have AUC Phi(1 / sqrt 2) = 0.760; 95 % intervals should nearly always hold it."""
    rng, held = np.random.default_rng(0), 0
    for repeat in range(40):
        labels = np.repeat([0, 1], 40)
        scores = rng.normal(size=80) + labels
        probabilities = {"m": np.stack((-scores, scores), 1)}
        interval = bootstrap_auc(labels, probabilities, np.arange(80), 150, seed=repeat)[0]["m"]
        held += interval.low <= 0.760 <= interval.high
    assert 34 <= held <= 40


def made_up_features(informative: bool, seed: int, patients: int = 120) -> Features:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, patients)
    table = pd.DataFrame({"patient": [f"p{seed}-{n}" for n in range(patients)], "cancer": label})
    noise = rng.normal(size=(patients, 8))
    return Features(table, {"good": noise + informative * 1.5 * label[:, None], "noise": noise})


def test_a_probe_finds_what_is_there_and_nothing_else():
    result = evaluate(made_up_features(True, 0), made_up_features(True, 1), "cancer", 200, seed=0)
    for head in ("knn", "logistic"):
        value, low, high = result[head]["auc"]["good"]
        assert low <= value <= high and value > 0.95
        assert 0.35 < result[head]["auc"]["noise"][0] < 0.65
        assert result[head]["difference"]["good - noise"][1] > 0.2
    assert result["test_patients"] == 120 and result["classes"] == ["0", "1"]


def test_a_split_keeps_patients_apart():
    features = made_up_features(True, 0)
    table = pd.concat([features.table] * 2, ignore_index=True)  # two images a patient
    doubled = Features(table, {name: np.concatenate([rows] * 2) for name, rows in features.by_model.items()})
    learn, test = split_patients(doubled, "cancer", 0.4, seed=0)
    assert not set(learn.table["patient"]) & set(test.table["patient"])
    assert 0.3 < len(test.table) / len(table) < 0.6 and len(learn.by_model["good"]) == len(learn.table)


def test_rows_without_a_label_are_left_out(tmp_path):
    """Of any task, the first, by which patients are split, as well."""
    features = made_up_features(True, 0)
    features.table.loc[::5, "cancer"] = np.nan
    learn, test = split_patients(features, "cancer", 0.4, seed=0)
    result = evaluate(learn, test, "cancer", 20, seed=0)
    assert result["learning_images"] + result["test_images"] == 96 and result["classes"] == ["0.0", "1.0"]


def test_the_split_of_a_table_is_kept_and_must_part_patients():
    table = pd.DataFrame({"patient": list("aabbcc"), "cancer": [0, 1] * 3, "split": ["train"] * 3 + ["test"] * 3})
    with pytest.raises(ValueError, match="split: 1 patients are in train and in test, b first; see"):
        split_rows(table, "cancer", 0.4, 0)
    learn, test = split_rows(table.assign(split=["train"] * 2 + ["validation", None] + ["test"] * 2), "cancer", 0.4, 0)
    assert learn.tolist() == [0, 1, 2] and test.tolist() == [4, 5]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16, "image_size": 64}
    MammoDinoModel(MammoDinoConfig(**config)).save_pretrained(folder)
    MammoDinoImageProcessor(size={"height": 128, "width": 96}, patch_size=16).save_pretrained(folder)
    return folder


def test_the_command_evaluates_files(model_folder, phantom_archive, tmp_path, capsys):
    """Twelve patients are too few to evaluate by; the command, the table and the left-out file are what is tested."""
    table = pd.read_csv(phantom_archive / "labels.csv")
    extra = {"file": "missing.png", "patient": "nobody", "lesion": 1}
    labels = phantom_archive / "with_missing.csv"
    pd.concat([table, pd.DataFrame([extra])]).to_csv(labels, index=False)
    (phantom_archive / "missing.png").write_bytes(b"")
    main(["--models", f"tiny={model_folder}", "--labels", str(labels), "--tasks", "lesion", "--num_resamples", "20",
          "--output", str(tmp_path / "probe.json")])  # fmt: skip
    results = json.loads((tmp_path / "probe.json").read_text())
    lesion = results["tasks"]["lesion"]
    assert lesion["learning_images"] + lesion["test_images"] == 24
    assert set(lesion["knn"]["auc"]) == {"untrained", "tiny"}
    assert format_results(results) in capsys.readouterr().out


def test_where_no_image_of_the_test_split_can_be_used_no_other_is_held_out(model_folder, phantom_archive, tmp_path):
    table = pd.read_csv(phantom_archive / "labels.csv").query("kind == 'ffdm'").assign(split="train")
    table["file"] = [str(phantom_archive / file) for file in table["file"]]
    for name in ("0.png", "1.png"):
        (tmp_path / name).touch()
        table.loc[len(table) * 2] = {"file": name, "patient": name, "lesion": int(name[0]), "split": "test"}
    table.to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(SystemExit, match="none of its files of split test can be used; the reasons stand above"):
        main(["--models", str(model_folder), "--labels", str(tmp_path / "labels.csv"), "--tasks", "lesion",
              "--output", str(tmp_path / "probe.json")])  # fmt: skip


def test_bad_tables_are_refused_by_name(model_folder, phantom_archive, tmp_path):
    common = ["--models", str(model_folder), "--labels", str(phantom_archive / "labels.csv"), "--output", "x.json"]
    with pytest.raises(SystemExit, match="no column age"):
        main([*common, "--tasks", "age"])
    with pytest.raises(SystemExit, match="patients are in both tables"):
        main([*common, "--tasks", "lesion", "--test_labels", str(phantom_archive / "labels.csv")])
    for number in range(20):
        (tmp_path / f"{number}.png").touch()  # no images: nothing is read
    header = "file,patient,cancer\n"
    rows = [f"{n}.png,p{n},{n % 2}" for n in range(20)]
    for changed, words in (
        ("3.png,,1", "labels.csv, row 4: patient is '', but must not be empty; fill it, or take the row out"),
        (",p3,1", "labels.csv, row 4: file is ''"),
    ):
        (tmp_path / "labels.csv").write_text(header + "\n".join([*rows[:3], changed, *rows[4:]]))
        with pytest.raises(SystemExit, match=words):
            main([*common[:3], str(tmp_path / "labels.csv"), *common[4:], "--tasks", "cancer"])
    for table, words in (
        ([f"{n}.png,p,{n % 2}" for n in range(20)], "labels.csv: 1 patients; a held-out part needs 2"),
        ([f"{n}.png,p{n},{40 + 1.37 * n}" for n in range(20)], "task cancer: no value occurs 2 times"),
        ([f"{n}.png,p{n},1" for n in range(20)], r"task cancer: learning patients have \['1'\]"),
        ([f"{n}.png,p{n},{n % 2}" for n in range(4)], "task cancer: 2 learning patients; logistic regression needs 4"),
        ([f"{n}x.png,p{n},{n % 2}" for n in range(20)], "20 of 20 image files are missing, first .*0x.png; complete"),
    ):
        (tmp_path / "labels.csv").write_text(header + "\n".join(table))
        with pytest.raises(SystemExit, match=words):
            main([*common[:3], str(tmp_path / "labels.csv"), *common[4:], "--tasks", "cancer"])
    one_class = made_up_features(True, 0)
    one_class.table["cancer"] = 1
    with pytest.raises(ValueError, match="task cancer"):
        evaluate(one_class, one_class, "cancer", 10, 0)
