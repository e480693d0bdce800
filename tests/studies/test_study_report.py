"""The study's page on made-up predictions: what is better is said to be, what is not is not, and figures are right."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from training.evaluation.runs import PREDICTIONS_FILE, RESULT_FILE, write_json, write_parquet
from training.studies.design import FULL, PLAIN
from training.studies.phantom_tasks import HEADS, TASKS
from training.studies.report import write_study

NUM_PATIENTS = 200


def predictions(skill: dict[str, float], seed: int) -> pd.DataFrame:
    """Binary tasks; the score is the label times the skill, and noise."""
    rng, parts = np.random.default_rng(seed), []
    labels = np.random.default_rng(0).integers(0, 2, NUM_PATIENTS)
    for task in TASKS:
        for head in HEADS:
            p = 1 / (1 + np.exp(-(skill.get(task, 0) * labels + rng.normal(size=NUM_PATIENTS))))
            ids = [f"P{number:03d}" for number in range(NUM_PATIENTS)]
            columns = {"image_id": ids, "patient_id": ids, "label": labels, "p_0": 1 - p, "p_1": p}
            parts.append(pd.DataFrame({"task": task, "head": head, **columns}))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def runs(tmp_path):
    skills = {PLAIN: {"density": 1.0, "cancer": 2.0}, FULL: {"density": 3.0, "cancer": 0.2}}
    settings = {
        "recipe": "made_up",
        "pretraining_patients": 1,
        "learn_patients": 1,
        "test_patients": NUM_PATIENTS,
        "plain_steps": 9,
    }
    found = []
    for number, (name, skill) in enumerate(skills.items()):
        for seed in (0, 1):
            folder = tmp_path / f"{number}-{seed}"
            folder.mkdir()
            write_parquet(folder / PREDICTIONS_FILE, predictions(skill, 10 * number + seed))
            about = {"configuration": name, "seed": seed, "size": "made up", "steps": 9, "real": {}, "versions": {}}
            about["pretraining"] = {"target_information": 0.25 * number + 0.1 * seed, "feature_rank": 7.0}
            about |= {"settings": settings, "remade_by": f"remake {name}"}
            write_json(folder / RESULT_FILE, about)
            found.append(SimpleNamespace(name=name, output_dir=folder))
    return found


def test_what_is_better_and_worse_is_said(runs, tmp_path):
    page = write_study(tmp_path, runs, tmp_path / "page.md").read_text()
    verdict = next(line for line in page.splitlines() if line.startswith(f"- *{FULL} - {PLAIN}*"))
    assert verdict.endswith(": better on density (knn), density (linear); worse on cancer (knn), cancer (linear).")
    difference = np.mean(
        [
            roc_auc_score(rows["label"], rows["p_1"]) * (1 if name == FULL else -1) * 2
            for name, rows in (
                (run.name, pd.read_parquet(run.output_dir / PREDICTIONS_FILE).query("task == 'density'"))
                for run in runs
            )
            for rows in [rows[rows["head"] == "linear"]]
        ]
    )
    row = next(line for line in page.splitlines() if line.startswith(f"| {FULL} - {PLAIN} |"))
    assert row.split("|")[2].strip().startswith(f"**{difference:+.3f} [")
    assert f"| {FULL} | 9 | 0.300 | 7.0 |" in page  # steps, and what the teacher's targets said: means over seeds
    assert "remake MammoDINO" in page and (tmp_path / "page.png").stat().st_size > 1000


def test_real_neighbors_near_and_all(runs, tmp_path):
    for number, run in enumerate(runs):
        found = json.loads((run.output_dir / RESULT_FILE).read_text())
        orderings = [1.0, 0.5 + 0.1 * number, 0.3]
        found["real"] = {
            "neighbors": {"patient": ["A", "A", "B"], "distance_slices": [1, 10, 11], "similarity": [0.9, 0.8, 0.7],
                           "nearest_other": [0.2] * 3, "ordering_auc": orderings},
        }  # fmt: skip
        write_json(run.output_dir / RESULT_FILE, found)
    page = write_study(tmp_path, runs, tmp_path / "page.md").read_text()
    assert "3 pairs" in page and "2 pairs, of 1 patients" in page
    # the second run of a name has 0.1 more on the pair of 10 mm; the pair of 11 mm counts among all only
    assert f"| {PLAIN} | {(1 + 0.55) / 2:.4f} | {(1 + 0.55 + 0.3) / 3:.4f} | 0.3000 |" in page
    assert f"| {FULL} | {(1 + 0.75) / 2:.4f} | {(1 + 0.75 + 0.3) / 3:.4f} | 0.3000 |" in page


def test_nothing_done_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no run is done yet"):
        write_study(tmp_path, [SimpleNamespace(output_dir=tmp_path)], tmp_path / "page.md")
