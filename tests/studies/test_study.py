"""The study: what is switched off, equal compute, neighbors by hand, and a small one from phantom to page."""

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pretrain_runs
import pytest
from made_inputs import draw_breast, random_encoder

from dataset_scripts.corpus import build
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.tools.files import write_json
from training import study as study_module
from training.evaluation.readout import NUM_RINGS, EncoderReader
from training.pretraining.recipe import load_recipe
from training.studies.design import (
    CANVAS_ALONE,
    FACTORS,
    FULL,
    HAND_CRAFTED,
    PLAIN,
    UNTRAINED,
    WITHOUT_CROPS,
    Configuration,
    Size,
    configurations,
    equal_compute_steps,
    mean_step_flops,
)
from training.studies.real_slices import RealSlices
from training.study import SIZES, Run, Study, main

RECIPE = ["study_small", "--output_dir", "unused"]
SMALL = ["--per_device_train_batch_size", "4", "--max_steps", "20"]


def test_each_idea_is_there_alone_and_left_out():
    found = {each.name: each for each in configurations()}
    assert len(found) == 5 + 2 * len(FACTORS)
    assert found[PLAIN].on == frozenset() and found[FULL].on == frozenset(FACTORS)
    for factor in FACTORS:
        assert found[f"only {factor}"].on == {factor}
        assert found[f"without {factor}"].on == frozenset(FACTORS) - {factor}


def test_what_is_off_is_off_in_the_recipe_and_all_else_is_equal():
    arguments = [*RECIPE, "--corpus", "unused"]
    full = load_recipe(arguments).flat()
    off = {name: set(settings) for name, settings in FACTORS.items()}
    assert all(full[name] for names in off.values() for name in names)
    for each in configurations():
        recipe = load_recipe(arguments + each.overrides()).flat()
        changed = {name for name in recipe if recipe[name] != full[name]}
        allowed = set().union(*(off[factor] for factor in FACTORS if factor not in each.on))
        allowed |= set(WITHOUT_CROPS) if each.without_crops else set()
        assert changed == allowed and all(not recipe[name] for name in allowed)


def test_without_crops_nothing_but_canvases_is_learned_from():
    canvas_alone = next(each for each in configurations() if each.name == CANVAS_ALONE)
    recipe = load_recipe([*RECIPE, "--corpus", "unused", *canvas_alone.overrides()])
    assert recipe.uses_canvas and recipe.uses_view_groups and not recipe.uses_crops


@pytest.mark.slow
def test_equal_compute_is_equal(phantom_corpus):
    arguments = [*RECIPE, "--corpus", str(phantom_corpus), *SMALL]
    size = Size("study_small", 0, 0, 0, plain_steps=1000)
    spent = {}
    for each in (Configuration(PLAIN, frozenset()), Configuration("slices", frozenset({"adjacent slices"})),
                 Configuration("tokens", frozenset({"tissue tokens"})),
                 Configuration("dense", frozenset({"dense regression"}))):  # fmt: skip
        steps = equal_compute_steps(size, each, arguments)
        spent[each.name] = steps * mean_step_flops(load_recipe(arguments + each.overrides()))
        if each.name in ("slices", "dense"):
            assert steps < 1000  # pairs of slices and canvases cost
        if each.name == "tokens":
            assert steps > 1000  # background costs nothing
    np.testing.assert_allclose(list(spent.values()), spent[PLAIN], rtol=2e-3)


@pytest.fixture(scope="module")
def slices(tmp_path_factory) -> RealSlices:
    """Made-up slices: two patients with two slices of one volume, five with one."""
    folder = tmp_path_factory.mktemp("slices")
    rows = []
    for patient in range(7):
        image = draw_breast(seed=patient)
        for number in (10, 13) if patient < 2 else (5,):
            name = f"{patient}-{number}.png"
            noise = np.random.default_rng(number).normal(0, 60, image.shape)
            (folder / "slices").mkdir(exist_ok=True)
            cv2.imwrite(
                str(folder / "slices" / name),
                np.where(image > 500, image + noise, image).clip(0, 4095).astype(np.uint16),
            )
            box = (30, 60, 12, 12) if patient < 3 else (None,) * 4
            rows.append((name, f"P{patient}", f"S{patient}", "lcc", number if patient != 6 else None, *box))
    columns = ["file", "PatientID", "StudyUID", "View", "Slice", "X", "Y", "Width", "Height"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "slices.csv", index=False)
    processor = MammoDinoImageProcessor(size={"height": 112, "width": 112}, patch_size=14)
    return RealSlices(folder, processor)


def test_pairs_are_of_one_volume(slices):
    assert [(slices.table["PatientID"][a], slices.table["PatientID"][b], d) for a, b, d in slices.pairs] == [
        ("P0", "P0", 3),
        ("P1", "P1", 3),
    ]


def test_the_others_are_of_other_patients_and_of_the_nearest_density(slices):
    others = slices.others(0)
    assert "P0" not in set(slices.table["PatientID"][others]) and len(others) == round(0.5 * 7)
    away = np.abs(slices.density - slices.density[0])
    left = [row for row in range(len(slices.table)) if row not in others and slices.table["PatientID"][row] != "P0"]
    assert away[others].max() <= away[left].min()


def test_orderings_by_hand(slices):
    features = np.random.default_rng(0).normal(size=(len(slices.table), 6)).astype(np.float32)
    found = slices.orderings(features)
    a, b, _ = slices.pairs[0]
    centered = features - features.mean(axis=0)
    cosine = [
        [
            centered[i] @ centered[j] / np.linalg.norm(centered[i]) / np.linalg.norm(centered[j])
            for j in range(len(centered))
        ]
        for i in range(len(centered))
    ]
    wins = [cosine[a][b] > cosine[end][other] for end in (a, b) for other in slices.others(end)]
    assert found["ordering_auc"][0] == pytest.approx(np.mean(wins))
    # features that know the volume and nothing else order all pairs right
    volumes = pd.get_dummies(slices.table["PatientID"]).to_numpy(float)
    assert (slices.orderings(volumes)["ordering_auc"] == 1).all()


def test_features_of_whole_slices_and_of_places_with_and_without_a_box(slices):
    encoder = random_encoder(image_size=112)
    found = slices.features(EncoderReader(encoder, MammoDinoImageProcessor(size={"height": 112, "width": 112})))
    width = encoder.config.hidden_size
    assert found["whole"].shape == (len(slices.table), width)
    assert found["region"].shape == (len(slices.table), NUM_RINGS * width) and np.isfinite(found["region"]).all()
    assert slices.has_lesion.tolist() == [True] * 5 + [False] * 4


@pytest.mark.slow
def test_a_small_study_from_phantom_to_page(tmp_path, monkeypatch, capsys):
    tiny = dataclasses.replace(
        SIZES["minutes"], pretraining_patients=12, learn_patients=16, test_patients=16, plain_steps=2,
        phantom=SIZES["minutes"].phantom | {"num_slices": 4, "height_px": 96, "width_px": 64, "pixel_spacing_mm": 1.9,
                                             "slice_spacing_mm": 9.0},
    )  # fmt: skip
    monkeypatch.setitem(SIZES, "minutes", tiny)

    def run_here(module, *arguments):
        """As `start` does in a process of its own, whose imports take longer than what it does."""
        commands = {"dataset_scripts.corpus": build.main, "training.pretrain": pretrain_runs.main}
        commands[module]([*map(str, arguments), *(["--num_proc", "1"] if module == "dataset_scripts.corpus" else [])])

    monkeypatch.setattr(study_module, "start", run_here)
    arguments = ["--size", "minutes", "--output", str(tmp_path), "--only", PLAIN, FULL, CANVAS_ALONE, UNTRAINED,
                 HAND_CRAFTED]  # fmt: skip
    main(arguments)
    page = (tmp_path / "report.md").read_text()
    assert f"{FULL} - {PLAIN}" in page and "Research use only" in page and (tmp_path / "report.png").is_file()
    results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(results) == 5 and json.loads((tmp_path / "settings.json").read_text())["size"] == "minutes"
    steps = {}
    for path in results:
        result = json.loads(path.read_text())
        steps[result["configuration"]] = result["steps"]
        assert ("python -m training.pretrain" in result["command"]) == (result["steps"] > 0)
    assert steps[PLAIN] == 2 and steps[FULL] >= 1 and steps[UNTRAINED] == steps[HAND_CRAFTED] == 0
    main(arguments)  # nothing is run again, and the page is the same
    assert results == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert (tmp_path / "report.md").read_text() == page
    assert not list(Path(tmp_path).rglob("*.tmp"))


# the first versions noted it in results alone
@pytest.mark.parametrize("noted_in", ["settings.json", "runs/untrained/seed-0/result.json"])
def test_another_size_in_a_folder_is_refused(tmp_path, noted_in):
    study = Study(tmp_path, SIZES["minutes"], "minutes", None)
    study.check_size()
    write_json(tmp_path / noted_in, {**study.about(), "seed": 0})
    study.check_size()
    for options in ([], ["--report_only"]):
        with pytest.raises(SystemExit, match=f"{noted_in}: is of --size minutes, .* or another --output"):
            main(["--size", "hour", "--output", str(tmp_path), *options])
    assert not (tmp_path / "phantom").exists()
    with pytest.raises(ValueError, match="'plain_steps': 5"):
        Study(tmp_path, dataclasses.replace(study.size, plain_steps=5), "minutes", None).check_size()


def test_what_a_run_warned_of_is_passed_on(tmp_path, caplog):
    study = Study(tmp_path, SIZES["minutes"], "minutes", None)
    run = Run(study, Configuration(PLAIN, frozenset()), 0)
    log = run.pretraining / "logs" / "warnings.jsonl"
    run.pass_warnings_on()  # of a run that never warned
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps({"step": 4, "warning": "entropy wall: uniform"}) + "\n")
    run.pass_warnings_on()
    assert caplog.messages == ["plain DINOv2, seed 0: step 4: entropy wall: uniform"]
