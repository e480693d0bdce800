"""The study's page, generated from the result files alone: tables, a plot of what each idea is worth, and in words."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from matplotlib.figure import Figure

from training.evaluation.job_queue import QueuedJob
from training.evaluation.run_files import PREDICTIONS_FILE, RESULT_FILE
from training.evaluation.significance import TaskScores, score_task

from .design import FACTORS, FULL, FULL_EQUAL_IMAGES, HAND_MADE, PLAIN, PLAIN_LARGER_CROPS, UNTRAINED
from .readout import HEADS, TASKS

NUM_RESAMPLES = 1000
NEAR_SLICES = 10  # of BCS-DBT, whose slices are 1 mm apart: our choice
MAIN_TASKS = tuple(task.name for task in TASKS.values() if task.is_main)
ONE_ROW = (
    "A row, in another folder, to the last digit on the same machine; with `--real_slices DIR`, too, its figures on "
    "real slices:"
)
WHAT_IS_ASKED = (
    "*Density* is asked of whole breasts, by evenly spaced slices of a volume ({slices_per_volume} here). *Lesion* is "
    "asked of regions: of each lesion its box at its own slice, of breasts without one the box of another patient's "
    "lesion at the same place. *Cancer* (malignant or benign) and *lesion type* (of four) are asked of the lesions. "
    "Lesion and cancer of *whole breasts* stand in the tables of scores. A feature is the class token beside mean and "
    "maximum of the patch tokens, of the breast or in the box. Encoders see background where they did in pretraining. "
    "*Hand-crafted*: figures of brightness, contrast and edges instead of features, to say how much there is to see."
)
WHAT_TARGETS_SAY = (
    "*Target information* is what the teacher's targets of global crops tell of their image at the last step, from 0 "
    "(the entropy wall or collapse: nothing is learned any more) to 1; *rank* that of the class tokens of a batch."
)
AROUND = (
    *((other, f"{FULL} - {other}") for other in (PLAIN, PLAIN_LARGER_CROPS)),
    *((f"without {factor}", f"{FULL} - without {factor}") for factor in FACTORS),
)


def write_study(output: Path, runs: Sequence[QueuedJob], report: Path) -> Path:
    """Of what is done so far; its image lies beside it, under the same name. Raises ValueError where nothing is."""
    done = [
        (
            json.loads((run.output_dir / RESULT_FILE).read_text()),
            pandas.read_parquet(run.output_dir / PREDICTIONS_FILE),
        )
        for run in runs
        if (run.output_dir / RESULT_FILE).is_file()
    ]
    if not done:
        raise ValueError(f"{output}: no run is done yet")
    results = pandas.DataFrame([result for result, _ in done])
    names = list(dict.fromkeys(results["configuration"]))
    scores = {(task, head): score_of(done, task, head) for head in HEADS for task in TASKS}
    image = report.with_suffix(".png")
    report.parent.mkdir(parents=True, exist_ok=True)
    draw_differences(scores, names, image)
    size = done[0][0]["settings"]
    exception = f", except *{FULL_EQUAL_IMAGES}*, which saw as many images" if FULL_EQUAL_IMAGES in names else ""
    lines = [
        "# What is each idea worth?",
        "",
        "**Results on simulated breasts: they say what moves at this size, nothing about patients. Research use "
        "only.** This page is written by `python -m training.study`; do not edit it.",
        "",
        f"Size `{done[0][0]['size']}`: recipe `{size['recipe']}`, {size['pretraining_patients']} simulated patients to "
        f"learn from, {size['test_patients']} held out, seeds {', '.join(map(str, sorted(results['seed'].unique())))}. "
        f"Every configuration got the compute (matrix products) of {size['plain_steps']} steps of plain DINOv2"
        f"{exception}. AUC of frozen features (macro over classes), the mean over "
        f"seeds; in brackets 95 % intervals from {NUM_RESAMPLES} bootstrap resamples of patients; differences are "
        "paired. The intervals speak of other patients, not of other seeds: the spread over seeds stands beside.",
    ]
    lines += [
        "",
        WHAT_IS_ASKED.format(**size),
        "",
        "## Each idea, with a linear head",
        "",
        f"![differences]({image.name})",
        "",
    ]
    lines += difference_table(scores, names, "linear") + ["", "With k-NN:", ""] + difference_table(scores, names, "knn")
    lines += ["", "Bold: the interval excludes zero; of so many differences one in twenty does by chance."]
    lines += ["", "## In words", "", *verdict_lines(scores, names)]
    for head in HEADS[::-1]:
        lines += ["", f"## Scores, {head}", "", *score_lines(scores, names, head)]
    lines += ["", "## Pretraining", "", WHAT_TARGETS_SAY, "", *pretraining_lines(results, names)]
    lines += real_lines(results, names) + command_lines(results)
    report.write_text("\n".join(lines) + "\n")
    return report


def score_of(done: list[tuple[dict[str, Any], pandas.DataFrame]], task: str, head: str) -> TaskScores:
    predictions: dict[str, dict[int, pandas.DataFrame]] = {}
    for result, rows in done:
        chosen = rows[(rows["task"] == task) & (rows["head"] == head)]
        predictions.setdefault(result["configuration"], {})[result["seed"]] = chosen
    return score_task(predictions, "auc", NUM_RESAMPLES)


def compared(names: list[str]) -> list[tuple[str, str, str]]:
    """Label, a, b of the differences a - b that are shown: of everything on, and of each idea alone."""
    pairs = [(label, FULL, other) for other, label in AROUND]
    pairs += [(f"only {factor} - {PLAIN}", f"only {factor}", PLAIN) for factor in FACTORS]
    pairs += [(f"{FULL_EQUAL_IMAGES} - {PLAIN}", FULL_EQUAL_IMAGES, PLAIN), (f"{FULL} - {UNTRAINED}", FULL, UNTRAINED)]
    pairs += [(f"{PLAIN} - {UNTRAINED}", PLAIN, UNTRAINED), (f"{HAND_MADE} - {FULL}", HAND_MADE, FULL)]
    return [(label, a, b) for label, a, b in pairs if a in names and b in names]


def difference_table(scores: dict[tuple[str, str], TaskScores], names: list[str], head: str) -> list[str]:
    lines = ["| difference | " + " | ".join(MAIN_TASKS) + " |", "|---" * (len(MAIN_TASKS) + 1) + "|"]
    for label, a, b in compared(names):
        cells = []
        for task in MAIN_TASKS:
            found, _ = scores[task, head].difference(a, b)
            excludes_zero = found.low > 0 or found.high < 0
            cells.append(f"**{found.signed()}**" if excludes_zero else found.signed())
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def verdict_lines(scores: dict[tuple[str, str], TaskScores], names: list[str]) -> list[str]:
    """Of each difference the tasks and heads whose interval excludes zero, for better or worse."""
    lines = []
    for label, a, b in compared(names):
        found: dict[str, list[str]] = {"better": [], "worse": []}
        for task in MAIN_TASKS:
            for head in HEADS:
                apart, _ = scores[task, head].difference(a, b)
                if apart.low > 0 or apart.high < 0:
                    found["better" if apart.low > 0 else "worse"].append(f"{task} ({head})")
        said = "; ".join(f"{how} on {', '.join(tasks)}" for how, tasks in found.items() if tasks)
        lines.append(f"- *{label}*: {said or 'no interval excludes zero'}.")
    return lines


def score_lines(scores: dict[tuple[str, str], TaskScores], names: list[str], head: str) -> list[str]:
    lines = ["| configuration | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 1) + "|"]
    for name in names:
        cells = []
        for task in TASKS:
            each = scores[task, head]
            spread = np.std(list(each.by_seed[name].values()))
            cells.append(f"{each.score(name)}, seeds ±{spread:.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def pretraining_lines(results: pandas.DataFrame, names: list[str]) -> list[str]:
    """Steps of each configuration, and whether its teacher had anything to say at the end: means over seeds."""
    lines = ["| configuration | steps | target information | rank |", "|---" * 4 + "|"]
    for name in names:
        runs = results[results["configuration"] == name]
        if not runs["steps"].any():
            continue
        last = pandas.DataFrame(runs["pretraining"].tolist())[["target_information", "feature_rank"]].mean()
        steps = runs["steps"].mean()
        lines.append(f"| {name} | {steps:.0f} | {last['target_information']:.3f} | {last['feature_rank']:.1f} |")
    return lines


def real_lines(results: pandas.DataFrame, names: list[str]) -> list[str]:
    """On real slices: orderings of true neighbors against slices of other breasts of like density; lesion or none."""
    if not any(results["real"]):
        return []
    first = next(each for each in results["real"] if each)
    pairs = pandas.DataFrame(first["neighbors"])
    near = pairs["distance_slices"] <= NEAR_SLICES
    lines = [
        "",
        "## Real slices (BCS-DBT)",
        "",
        f"Neighbor consistency: {len(pairs)} pairs of slices of one volume, {pairs['distance_slices'].min()} to "
        f"{pairs['distance_slices'].max()} slices (mm) apart, of {pairs['patient'].nunique()} patients; {near.sum()} "
        f"pairs, of {pairs['patient'][near].nunique()} patients, lie within {NEAR_SLICES} mm. AUC of their cosine "
        "similarity over that of slices of other patients, of the half that is nearest in density. Density is "
        "estimated from the image: the collection does not give it. Lesion: slices with a box "
        f"({first['num_with_lesion']}) against those without ({first['num_slices'] - first['num_with_lesion']}), k-NN, "
        "other patients; too few for an interval that says anything.",
        "",
        f"| configuration | neighbors to {NEAR_SLICES} mm, AUC | all pairs, AUC | worst pair | similarity of pairs | "
        "highest of others | lesion, AUC |",
        "|---" * 7 + "|",
    ]
    for name in names:
        of_name = [each for each in results[results["configuration"] == name]["real"] if each]
        if not of_name:
            continue
        frames = [pandas.DataFrame(each["neighbors"]) for each in of_name]
        means = pandas.concat(frames)[["ordering_auc", "similarity", "nearest_other"]].mean()
        worst = min(frame["ordering_auc"].min() for frame in frames)
        lesion = np.mean([each["lesion_auc"] for each in of_name])
        close = np.mean([frame["ordering_auc"][near].mean() for frame in frames])
        cells = (close, means["ordering_auc"], worst, means["similarity"], means["nearest_other"], lesion)
        lines.append(f"| {name} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")
    return lines


def command_lines(results: pandas.DataFrame) -> list[str]:
    """What remakes a row, to the last digit on the same machine, and the pretraining commands of its runs."""
    lines = ["", "## Commands", "", ONE_ROW, "", "```"]
    lines += list(dict.fromkeys(results["remade_by"]))
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].iloc[0].items())
    return [*lines, "```", "", f"Made with {versions}."]


def draw_differences(scores: dict[tuple[str, str], TaskScores], names: list[str], output: Path) -> None:
    """Differences between encoders with their intervals, a panel a task, linear head."""
    rows = [each for each in compared(names) if HAND_MADE not in each]  # so far away that it would hide the others
    figure = Figure(figsize=(3.1 * len(MAIN_TASKS) + 2.5, 0.42 * len(rows) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(MAIN_TASKS), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, MAIN_TASKS, strict=True):
        for number, (_, a, b) in enumerate(rows):
            found, _ = scores[task, "linear"].difference(a, b)
            color = "#1b7f4d" if found.low > 0 else "#b3372f" if found.high < 0 else "#777777"
            panel.plot([found.low, found.high], [number, number], color=color, linewidth=2)
            panel.plot(found.value, number, "o", color=color, markersize=5)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(task, fontsize=10)
        panel.set_xlabel("difference in AUC", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=5)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=8)
    panels[0].invert_yaxis()
    figure.savefig(output, dpi=130)
