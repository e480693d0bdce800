"""A task's table: who is in which split, what is left out, and what is said where it cannot be made."""

import hashlib
import json
import logging

import datasets
import numpy as np
import pandas as pd
import pytest

from dataset_scripts.benchmarks import BENCHMARKS, get_benchmark
from dataset_scripts.benchmarks.index import SCHEMA, SPLITS, TASKS
from dataset_scripts.benchmarks.task import complete_splits, find_files, load_benchmark, load_task


@pytest.fixture
def own(tmp_path):
    """A function that writes a table of the given rows and, empty, the files that it names."""

    def write(rows):
        frame = pd.DataFrame(rows)
        for path in frame["path"]:
            (tmp_path / path).touch()
        frame.to_csv(tmp_path / "index.csv", index=False)
        return tmp_path

    return write


def population(patients=400, seed=0, split=None):
    """Rows of patients of one to four images, of which one in ten has cancer; density is of the patient."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(patients):
        density, ill = rng.choice(list("ABCD"), p=(0.1, 0.4, 0.4, 0.1)), rng.random() < 0.1
        for image in range(rng.integers(1, 5)):
            side = "LR"[image % 2]
            cancer = int(ill and side == "L")
            about = {"laterality": side, "density": density, "cancer": cancer}
            rows.append({"patient_id": f"p{number}", "path": f"p{number}_{image}.png", **about})
            if split:
                rows[-1]["split"] = split(number)
    return rows


def patients(table, split):
    return set(table["patient_id"][table["split"] == split])


@pytest.mark.parametrize("task", ["cancer", "density"])
def test_splits_are_stratified_and_patients_are_in_one(own, task):
    loaded = load_task("table", own(population()), task)
    table = loaded.table
    assert set(table["split"]) == set(SPLITS)
    assert not any(patients(table, a) & patients(table, b) for a in SPLITS for b in SPLITS if a < b)
    by_patient = table.groupby("patient_id").agg({"label": "max", "split": "first"})  # here the higher is the rarer
    if task == "density":
        assert loaded.classes == ("A", "B", "C", "D")
    for label, of_class in by_patient.groupby("label"):
        test, validation = ((of_class["split"] == split).sum() for split in ("test", "validation"))
        # to the nearest patient, of each class: what stratified means
        assert abs(test - 0.2 * len(of_class)) <= 0.5, label
        assert abs(validation - 0.15 * (len(of_class) - test)) <= 0.5, label


def test_a_patient_counts_for_its_rarest_class():
    """Ten patients have cancer on one side: five are held out, though their other sides are of the common class."""
    ill, well = [f"i{number}" for number in range(10)], [f"w{number}" for number in range(30)]
    of, labels = pd.Series(ill + ill + well), pd.Series([1] * 10 + [0] * 40)
    none = pd.Series([pd.NA] * 50, dtype="string")
    split = complete_splits(of, labels, none, seed=3, validation_fraction=0.2, test_fraction=0.5)
    assert of[(split == "test") & (labels == 1)].nunique() == 5
    assert of[(split == "test") & (labels == 0)].nunique() == 5 + 15
    assert of[(split == "validation") & (labels == 1)].nunique() == 1


def test_who_is_held_out_is_a_hash_of_seed_and_patient():
    """By another way: of 20 patients the 4 whose SHA-256 is lowest, then 2 of the rest."""
    of = pd.Series([f"p{number}" for number in range(20)])
    none, labels = pd.Series([pd.NA] * 20, dtype="string"), pd.Series([0] * 20)
    for seed in (0, 1):
        split = complete_splits(of, labels, none, seed=seed, validation_fraction=0.15, test_fraction=0.2)
        order = sorted(of, key=lambda each: hashlib.sha256(f"{seed} {each}".encode()).hexdigest())
        assert set(of[split == "test"]) == set(order[:4]) and set(of[split == "validation"]) == set(order[4:6])


def test_the_order_of_rows_says_nothing(own):
    rows = population(120)
    loaded = load_task("table", own(rows), "cancer", seed=5)
    shuffled = [rows[place] for place in np.random.default_rng(1).permutation(len(rows))]
    pd.testing.assert_frame_equal(loaded.table, load_task("table", own(shuffled), "cancer", seed=5).table)
    other = load_task("table", own(rows), "cancer", seed=6)
    assert patients(other.table, "test") != patients(loaded.table, "test")
    less = load_task("table", own(rows), "cancer", seed=5, validation_fraction=0.3)
    assert patients(less.table, "test") == patients(loaded.table, "test")


@pytest.mark.parametrize(
    "official", [("train", "test"), ("train", "validation"), ("train", "validation", "test")], ids="+".join
)
def test_official_splits_stay_and_only_train_gives(own, official):
    rows = population(200, split=lambda number: official[number % len(official)])
    loaded = load_task("table", own(rows), "cancer")
    stated = {row["patient_id"]: row["split"] for row in rows}
    now = dict(zip(loaded.table["patient_id"], loaded.table["split"], strict=True))
    moved = {each for each, split in now.items() if stated[each] != split}
    assert loaded.official == official and set(loaded.table["split"]) == set(SPLITS)
    assert {stated[each] for each in moved} <= {"train"} and bool(moved) == (len(official) < 3)
    for split in set(official) - {"train"}:
        assert patients(loaded.table, split) == {each for each, of in stated.items() if of == split}


def test_rows_without_an_official_split_are_left_out_and_counted(own, caplog):
    rows = population(100, split=lambda number: ("train", "test", None)[number % 3])
    loaded = load_task("table", own(rows), "cancer")
    without = sum(row["split"] is None for row in rows)
    assert loaded.counts["left_out"] == {"no official split": without}
    assert f"{without} rows without a split beside rows with one" in caplog.text
    assert {f"p{number}" for number in range(2, 100, 3)}.isdisjoint(loaded.table["patient_id"])


def test_counts_by_hand(own):
    def row(patient, image, side, cancer, split):
        return {"patient_id": patient, "path": image, "laterality": side, "cancer": cancer, "split": split}

    rows = [
        *(row("a", "a1", "L", 0, "train"), row("a", "a2", "L", 0, "train"), row("a", "a3", "R", 1, "train")),
        *(
            row("b", "b1", "L", 1, "validation"),
            row("b", "b2", "R", 0, "validation"),
            row("b", "b3", "R", None, "test"),
        ),
        *(row("c", "c1", "L", 1, "test"), row("c", "c2", "R", 0, "test")),
    ]
    loaded = load_task("table", own(rows), "cancer")  # b3 has no label, so that b is in one split
    assert loaded.counts == {
        "train": {"images": 3, "breasts": 2, "patients": 1, "classes": {"no cancer": 2, "cancer": 1}},
        "validation": {"images": 2, "breasts": 2, "patients": 1, "classes": {"no cancer": 1, "cancer": 1}},
        "test": {"images": 2, "breasts": 2, "patients": 1, "classes": {"no cancer": 1, "cancer": 1}},
        "left_out": {"no label by this definition": 1},
    }
    assert json.loads(json.dumps(loaded.counts)) == loaded.counts
    assert list(loaded.table) == [*SCHEMA, "file", "label"] and loaded.table["label"].dtype == "int64"


def test_a_patient_of_two_official_splits_is_refused(own):
    rows = population(100, split=lambda number: ("train", "test")[number % 2])
    rows.append({**rows[0], "path": "again.png", "split": "test"})
    with pytest.raises(ValueError, match="1 patients are in more than one of train, validation, test, first p0; a pat"):
        load_task("table", own(rows), "cancer")


def test_missing_files_are_counted_or_left_out_with_the_split_as_it_was(own, caplog):
    folder = own(population())
    whole = load_task("table", folder, "cancer")
    gone = whole.table["image_id"][10:14]
    for image in gone:
        (folder / image).unlink()
    with pytest.raises(ValueError) as caught:
        load_task("table", folder, "cancer")
    expected = f"{folder}: 4 of {len(whole.table)} image files are missing, first {folder / gone.iloc[0]}; complete the"
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
    with caplog.at_level(logging.INFO):
        rest = load_task("table", folder, "cancer", allow_missing=True)
    assert rest.counts["left_out"] == {"image file missing": 4} and "image file missing" in caplog.text
    left = whole.table[~whole.table["image_id"].isin(gone)].reset_index(drop=True)
    pd.testing.assert_frame_equal(rest.table, left)


def test_images_whose_file_nobody_can_tell_count_as_missing(tmp_path):
    index = pd.DataFrame({"image_id": ["x", "y"], "file": pd.array([None, str(tmp_path)], dtype="string")})
    with pytest.raises(ValueError, match="2 of 2 image files are missing, first of image x; complete the download"):
        find_files(index, tmp_path, False)  # the second is a folder


@pytest.mark.parametrize(("ill", "split"), [(1, "validation"), (2, "validation")])
def test_a_class_that_a_split_lacks_is_named(own, ill, split):
    rows = [{**row, "cancer": int(row["patient_id"] in [f"p{n}" for n in range(ill)])} for row in population(40)]
    folder = own(rows)
    with pytest.raises(ValueError) as caught:
        load_task("table", folder, "cancer")
    elsewhere = sum(row["cancer"] for row in rows)
    expected = f"{folder}, cancer (column): no image of class 'cancer' in {split}, {elsewhere} elsewhere; add patients"
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_three_patients_of_a_class_are_enough(own):
    rows = [{**row, "cancer": int(row["patient_id"] in ("p0", "p1", "p2"))} for row in population(40)]
    table = load_task("table", own(rows), "cancer").table
    assert table[table["label"] == 1].groupby("split")["patient_id"].nunique().to_dict() == dict.fromkeys(SPLITS, 1)


@pytest.mark.parametrize(
    ("name", "task", "options", "message"),
    [
        (
            "vindr",
            "cancer",
            {},
            "data set 'vindr': must be one of rsna, vindr_mammo, cbis_ddsm, cmmd, cdd_cesm, bcs_dbt",
        ),
        (
            "phantom",
            "age",
            {},
            "task 'age': phantom has no labels for it; it has cancer, lesion, birads, density, lesio",
        ),
        ("phantom", "cancer", {"definition": "x"}, "definition 'x': phantom defines cancer as simulated"),
        ("phantom", "cancer", {"test_fraction": 1.0}, "test_fraction=1.0: must be between 0 and 1"),
        ("phantom", "cancer", {"validation_fraction": 0}, "validation_fraction=0: must be between 0 and 1"),
    ],
)
def test_what_is_asked_wrongly_is_said(phantom_archive, name, task, options, message):
    with pytest.raises(ValueError) as caught:
        load_task(name, phantom_archive, task, **options)
    assert str(caught.value).startswith(message)


def test_the_phantom(phantom_archive):
    loaded = load_task("phantom", phantom_archive, "lesion")
    assert loaded.benchmark is BENCHMARKS["phantom"] and loaded.definition.name == "simulated" and loaded.official == ()
    assert loaded.table["label"].tolist() == loaded.table["lesion"].tolist()
    assert len(loaded.table) == 24 and sum(loaded.counts[split]["images"] for split in SPLITS) == 24


def test_as_datasets(phantom_archive):
    loaded, rows = (load(*("phantom", phantom_archive, "lesion")) for load in (load_task, load_benchmark))
    assert isinstance(rows, datasets.DatasetDict) and list(rows) == list(SPLITS)
    assert rows["test"].features["label"].names == ["no lesion", "lesion"]
    for split in SPLITS:
        table = loaded.table[loaded.table["split"] == split]
        for name in ("file", "label", "patient_id", "density", "boxes", "lesion_types", "cancer"):
            assert rows[split][name][:] == table[name].tolist(), name


def test_every_data_set_is_known_and_its_definitions_can_be_told_apart():
    names = ["rsna", "vindr_mammo", "cbis_ddsm", "cmmd", "cdd_cesm", "bcs_dbt", "embed_open_data", "phantom"]
    assert list(BENCHMARKS) == names and get_benchmark("table").name == "table"
    for benchmark in BENCHMARKS.values():
        of = [(each.task, each.name) for each in benchmark.definitions]
        assert len(set(of)) == len(of) and {task for task, _ in of} <= set(TASKS)
        assert all(len(set(each.classes)) == len(each.classes) >= 2 for each in benchmark.definitions)
