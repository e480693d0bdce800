"""A suite: what its YAML may say, and that a killed one repeats nothing and ends with the same table."""

import time
from pathlib import Path

import forked
import pandas as pd
import pytest
import yaml

from dataset_scripts.phantom.archive import PhantomParameters, write_archive
from training.benchmark import main
from training.evaluation.backbones.small_checkpoints import write_small_checkpoints
from training.evaluation.benchmark_report import PUBLISHED, UNCLEAR
from training.evaluation.benchmark_suite import read_suite
from training.evaluation.plots import draw_radar

NUM_RUNS = 8  # two tasks, two backbones, two seeds


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict:
    """A suite on a phantom of forty patients, all of it small."""
    folder = tmp_path_factory.mktemp("suite")
    parameters = PhantomParameters(num_slices=4, height_px=96, width_px=64, pixel_spacing_mm=1.9, slice_spacing_mm=9.0)
    write_archive(folder / "phantom", 40, seed=1, parameters=parameters)
    small = write_small_checkpoints(folder / "small")
    return {
        "seeds": [0, 1],
        "finetune": {"mode": "frozen", "dataloader_num_workers": 0, "slices_per_volume": 1, "num_resamples": 20},
        "num_resamples": 50,
        "backbones": [
            {"name": "ours", "kind": "mammodino", "source": str(small["mammodino"])},
            {"name": "DINOv2", "kind": "dinov2", "source": str(small["dinov2"])},
        ],
        "datasets": [
            {
                "name": "phantom",
                "data_dir": str(folder / "phantom"),
                "tasks": ["lesion", {"task": "density", "definition": "dense"}],
            }
        ],
    }


def write(path: Path, values: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def finished(values, tmp_path_factory) -> Path:
    """The folder of a suite that ran through."""
    folder = tmp_path_factory.mktemp("finished")
    main(["--config", str(write(folder / "suite.yaml", values | {"output_dir": str(folder)}))])
    return folder


def test_the_report_holds_every_task_backbone_and_the_papers_figures(finished):
    report = (finished / "report.md").read_text()
    assert f"{NUM_RUNS} of {NUM_RUNS} runs are done" in report and "Research use only" in report
    assert "phantom lesion (simulated)" in report and "phantom density (dense)" in report
    assert "ours against the best other backbone" in report and "0.918" in report
    assert "say nothing about patients" in report
    scores = pd.read_csv(finished / "scores.csv")
    assert set(scores["backbone"]) == {"ours", "DINOv2"} and set(scores["seed"]) == {0, 1}
    assert {"image", "breast_mean", "patient_attention"} <= set(scores["level"])
    # the table's cell is the mean over seeds of what the runs say
    runs = scores.query("task == 'lesion' and backbone == 'ours' and level == 'image' and metric == 'auc'")["value"]
    row = next(line for line in report.splitlines() if line.startswith("| phantom lesion"))
    assert f"{runs.mean():.3f}" in row.split("|")[4]


def test_started_again_nothing_is_run_and_the_report_is_the_same(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("result.json")}
    report = (finished / "report.md").read_text()
    main(["--config", str(finished / "suite.yaml")])
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("result.json")}
    assert len(before) == NUM_RUNS and (finished / "report.md").read_text() == report


def test_killed_and_started_again_it_repeats_nothing_and_ends_with_the_same_table(finished, values, tmp_path):
    suite = write(tmp_path / "suite.yaml", values | {"output_dir": str(tmp_path)})
    worker = forked.start(main, ["--config", str(suite)])
    deadline = time.monotonic() + 240
    while len(list(tmp_path.rglob("result.json"))) < 2 and time.monotonic() < deadline and worker.is_alive():
        time.sleep(0.02)
    worker.kill()
    worker.join()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert 2 <= len(done) < NUM_RUNS and not (tmp_path / "report.md").exists()
    main(["--config", str(suite)])
    assert all(path.stat().st_mtime_ns == at for path, at in done.items())
    assert (tmp_path / "report.md").read_text() == (finished / "report.md").read_text()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "scores.csv"), pd.read_csv(finished / "scores.csv"))


def test_a_run_that_fails_is_named_and_the_others_are_reported(finished, values, tmp_path, capsys):
    broken = {"name": "broken", "kind": "resnet50", "source": values["backbones"][1]["source"]}  # a DINOv2
    changed = values | {"output_dir": str(finished), "backbones": [*values["backbones"], broken], "seeds": [0]}
    with pytest.raises(SystemExit, match="2 of 6 runs failed"):
        main(["--config", str(write(tmp_path / "suite.yaml", changed))])
    report = (finished / "report.md").read_text()
    failures = report[report.index("## Failed") :].strip().splitlines()[2:]
    assert len(failures) == 2 and all("broken" in line and "resnet50" in line for line in failures)
    assert "4 of 6 runs are done" in report


def test_runs_of_other_settings_are_not_taken_for_these(finished, values, tmp_path):
    changed = values | {"output_dir": str(finished), "finetune": values["finetune"] | {"class_imbalance": "none"}}
    with pytest.raises(SystemExit, match=r"class_imbalance \('class_weights' -> 'none'\)"):
        main(["--config", str(write(tmp_path / "suite.yaml", changed))])


def test_a_label_table_is_reported_until_it_changes(values, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    phantom = Path(values["datasets"][0]["data_dir"])
    rows = pd.read_csv(phantom / "labels.csv").query("kind == 'ffdm'")
    rows.assign(file=[str(phantom / file) for file in rows["file"]]).to_csv(tmp_path / "labels.csv", index=False)
    datasets = [{"name": "table", "data_dir": "~/labels.csv", "tasks": ["lesion"]}]
    of_table = values | {"seeds": [0], "backbones": values["backbones"][:1], "datasets": datasets}
    of_table |= {"output_dir": str(tmp_path / "suite"), "level": "breast_max"}
    arguments = ["--config", str(write(tmp_path / "suite.yaml", of_table))]
    main(arguments)
    report = tmp_path / "suite" / "report.md"
    assert "| table lesion (column) | auc, one score a breast, max over its images |" in report.read_text()
    # a task without the level has its own
    (predictions,) = (tmp_path / "suite").rglob("predictions.parquet")
    pd.read_parquet(predictions).query("level != 'breast_max'").to_parquet(predictions)
    main([*arguments, "--report_only"])
    assert "| table lesion (column) | auc, one score an image |" in report.read_text()
    rows[:-1].to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(SystemExit, match="seed-0: holds a run of other settings: label_table"):
        main(arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"datasets": []}, "datasets: must be a list"),
        ({"backbones": [{"kind": "dinov2"}]}, "has no name"),
        ({"backbones": [{"name": "a", "kind": "vgg"}]}, "kind 'vgg' must be one of mammodino"),
        ({"backbones": [{"name": "a", "kind": "dinov2"}, {"name": "a", "kind": "resnet50"}]}, "is there twice"),
        ({"backbones": [{"name": 50, "kind": "resnet50"}]}, "backbones: name=50 must be text"),
        ({"seeds": [0, -1]}, "seeds"),
        ({"seeds": 3}, "seeds=3: must be of type list"),
        ({"num_resamples": 0}, "num_resamples=0: must be 1 or more"),
        ({"level": "patient"}, "level='patient': must be one of image, breast_mean"),
        ({"level": "breast_mean", "finetune": {"head": "mil"}}, "must be one of image, breast_max, patient_max"),
        ({"seed": [0]}, "unknown field 'seed'"),
        ({"ours": "theirs"}, "ours='theirs': must be one of ours, DINOv2"),
        ({"finetune": "frozen"}, "finetune='frozen': must be of type dict"),
        ({"finetune": {"seed": 3}}, "seed is set by the suite itself"),
        ({"finetune": {"mode": "half"}}, "mode='half'"),
        ({"finetune": {"modus": "full"}}, "modus"),
        ({"datasets": [{"name": "mnist", "data_dir": "x", "tasks": ["cancer"]}]}, "'mnist': must be one of rsna"),
        ({"datasets": [{"name": "cmmd", "data_dir": None, "tasks": ["cancer"]}]}, "data_dir=None must be text"),
        ({"datasets": [{"name": "cmmd", "data_dir": "x", "tasks": ["birads"]}]}, "cmmd has no labels for it"),
        ({"datasets": [{"name": "vindr_mammo", "data_dir": "x", "tasks": [{"task": "cancer", "definition": "y"}]}]},
         "defines cancer as birads_4_5"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_yaml_is_said_in_one_line(values, tmp_path, change, words):
    path = write(tmp_path / "suite.yaml", values | {"output_dir": str(tmp_path)} | change)
    with pytest.raises(ValueError) as error:
        read_suite(path)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_shipped_suite_is_the_papers():
    suite = read_suite(Path(__file__).parents[2] / "training" / "suites" / "paper.yaml")
    assert {task.dataset for task in suite.tasks} == {"rsna", "vindr_mammo", "cbis_ddsm", "cmmd", "cdd_cesm"}
    kinds = {"resnet50", "convnextv2", "dinov2", "rad_dino", "biomedclip", "mammo_clip_efficientnet", "untrained"}
    assert kinds < {each.kind for each in suite.backbones}
    assert len(list(suite.jobs())) == 3 * len(suite.tasks) * len(suite.backbones)
    assert {(each.dataset, each.task) for each in PUBLISHED} == set(UNCLEAR)


def test_a_radar_needs_three_spokes(tmp_path):
    scores = pd.DataFrame({"a": [0.5, 0.6, 0.7], "b": [0.6, float("nan"), 0.7]}, index=["x one", "y two", "z three"])
    assert not draw_radar(scores[:2], "a", tmp_path / "radar.png", "two")
    assert draw_radar(scores, "a", tmp_path / "radar.png", "three") and (tmp_path / "radar.png").stat().st_size > 10_000
