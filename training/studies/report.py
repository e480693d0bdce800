"""The study's page, generated from the result files alone: tables, a plot of what each idea is worth, and in words."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from modeling_mammodino.tools.files import write_text
from training.evaluation.reports import excludes_zero, format_interval, markdown_table
from training.evaluation.runs import PREDICTIONS_FILE, RESULT_FILE, QueuedJob
from training.evaluation.significance import TaskScores, score_task

from .design import CANVAS_ALONE, FACTORS, FULL, HAND_CRAFTED, PLAIN, UNTRAINED
from .phantom_tasks import HEADS, TASKS

NUM_RESAMPLES = 1000
NEAR_SLICES = 10  # of BCS-DBT, whose slices are 1 mm apart: our choice
REAL_COLUMNS = (
    "configuration", f"neighbors to {NEAR_SLICES} mm, AUC", "all pairs, AUC", "worst pair", "similarity of pairs",
    "highest of others",
)  # fmt: skip
# label, a, b of the differences a - b: of everything on, of each idea alone, and of yardsticks
DIFFERENCES = (
    (f"{FULL} - {PLAIN}", FULL, PLAIN),
    *((f"{CANVAS_ALONE} - {other}", CANVAS_ALONE, other) for other in (PLAIN, FULL)),
    *((f"{FULL} - without {factor}", FULL, f"without {factor}") for factor in FACTORS),
    *((f"only {factor} - {PLAIN}", f"only {factor}", PLAIN) for factor in FACTORS),
    (f"{FULL} - {UNTRAINED}", FULL, UNTRAINED),
    (f"{PLAIN} - {UNTRAINED}", PLAIN, UNTRAINED),
    (f"{HAND_CRAFTED} - {FULL}", HAND_CRAFTED, FULL),
)

TEMPLATE = Path(__file__).with_name("report_template.md")

Scores = dict[tuple[str, str], TaskScores]  # by task and head


def write_study(output: Path, runs: Sequence[QueuedJob], report: Path) -> Path:
    """Write the page of what is done so far; its image lies beside it, under the same name.

    Raises ValueError where nothing is done.
    """
    done = [
        (json.loads((run.output_dir / RESULT_FILE).read_text()), pd.read_parquet(run.output_dir / PREDICTIONS_FILE))
        for run in runs
        if (run.output_dir / RESULT_FILE).is_file()
    ]
    if not done:
        raise ValueError(f"{output}: no run is done yet")
    results = pd.DataFrame([result for result, _ in done])
    names = list(dict.fromkeys(results["configuration"]))
    scores = {(task, head): score_of(done, task, head) for head in HEADS for task in TASKS}
    compared = [(label, a, b) for label, a, b in DIFFERENCES if a in names and b in names]
    image = report.with_suffix(".png")
    report.parent.mkdir(parents=True, exist_ok=True)
    draw_differences(scores, compared, image)
    template = jinja2.Template(TEMPLATE.read_text(), keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    page = template.render(
        size=done[0][0]["size"],
        settings=done[0][0]["settings"],
        seeds=", ".join(map(str, sorted(results["seed"].unique()))),
        names=names,
        num_resamples=NUM_RESAMPLES,
        image=image.name,
        differences={head: difference_table(scores, compared, head) for head in HEADS},
        verdicts=verdicts(scores, compared),
        scores={head: score_table(scores, names, head) for head in HEADS},
        pretraining=pretraining_table(results, names),
        real=real_figures(results, names),
        commands="\n".join(dict.fromkeys(results["remade_by"])),
        versions=", ".join(f"{name} {number}" for name, number in results["versions"].iloc[0].items()),
    )
    write_text(report, page)
    return report


def table(columns: Sequence[str], rows: list[list[str]]) -> str:
    return "\n".join(markdown_table(columns, rows))


def score_of(done: list[tuple[dict[str, Any], pd.DataFrame]], task: str, head: str) -> TaskScores:
    """Return the scores of all configurations on one task."""
    predictions: dict[str, dict[int, pd.DataFrame]] = {}
    for result, rows in done:
        chosen = rows[(rows["task"] == task) & (rows["head"] == head)]
        predictions.setdefault(result["configuration"], {})[result["seed"]] = chosen
    return score_task(predictions, "auc", NUM_RESAMPLES)


def difference_table(scores: Scores, compared: list[tuple[str, str, str]], head: str) -> str:
    """Return the differences as a table, bold where the interval excludes zero."""
    rows = []
    for label, a, b in compared:
        found = [scores[task, head].difference(a, b)[0] for task in TASKS]
        cells = [format_interval(each, signed=True) for each in found]
        bold = [f"**{cell}**" if excludes_zero(each) else cell for cell, each in zip(cells, found, strict=True)]
        rows.append([label, *bold])
    return table(["difference", *TASKS], rows)


def verdicts(scores: Scores, compared: list[tuple[str, str, str]]) -> str:
    """Return of each difference the tasks and heads whose interval excludes zero, for better or worse."""
    lines = []
    for label, a, b in compared:
        found: dict[str, list[str]] = {"better": [], "worse": []}
        for task in TASKS:
            for head in HEADS:
                apart, _ = scores[task, head].difference(a, b)
                if excludes_zero(apart):
                    found["better" if apart.low > 0 else "worse"].append(f"{task} ({head})")
        said = "; ".join(f"{how} on {', '.join(tasks)}" for how, tasks in found.items() if tasks)
        lines.append(f"- *{label}*: {said or 'no interval excludes zero'}.")
    return "\n".join(lines)


def score_table(scores: Scores, names: list[str], head: str) -> str:
    """Return every score with its interval and the spread over seeds."""

    def cell(name: str, each: TaskScores) -> str:
        return f"{format_interval(each.score(name))}, seeds ±{np.std(list(each.by_seed[name].values())):.3f}"

    rows = [[name, *(cell(name, scores[task, head]) for task in TASKS)] for name in names]
    return table(["configuration", *TASKS], rows)


def pretraining_table(results: pd.DataFrame, names: list[str]) -> str:
    """Return steps and what the teacher's targets said, means over seeds."""
    rows = []
    for name in names:
        runs = results[results["configuration"] == name]
        if runs["steps"].any():
            last = (
                pd.DataFrame(runs["pretraining"].tolist())
                .reindex(columns=["target_information", "feature_rank"])
                .mean()
            )
            steps, information, rank = runs["steps"].mean(), last["target_information"], last["feature_rank"]
            rows.append([name, f"{steps:.0f}", f"{information:.3f}", f"{rank:.1f}"])
    return table(["configuration", "steps", "target information", "rank"], rows)


def real_figures(results: pd.DataFrame, names: list[str]) -> dict[str, Any]:
    """Return orderings of true neighbors against slices of other breasts of like density, and lesion or none; nothing
    where no run saw real slices."""
    if not any(results["real"]):
        return {}
    first = next(each for each in results["real"] if each)
    pairs = pd.DataFrame(first["neighbors"])
    near = pairs["distance_slices"] <= NEAR_SLICES
    rows = []
    for name in names:
        of_name = [each for each in results[results["configuration"] == name]["real"] if each]
        if not of_name:
            continue
        frames = [pd.DataFrame(each["neighbors"]) for each in of_name]
        means = pd.concat(frames)[["ordering_auc", "similarity", "nearest_other"]].mean()
        worst = min(frame["ordering_auc"].min() for frame in frames)
        close = np.mean([frame["ordering_auc"][near].mean() for frame in frames])
        cells = (close, means["ordering_auc"], worst, means["similarity"], means["nearest_other"])
        rows.append([name, *(f"{cell:.4f}" for cell in cells)])
    return {
        "pairs": len(pairs),
        "nearest": pairs["distance_slices"].min(),
        "farthest": pairs["distance_slices"].max(),
        "patients": pairs["patient"].nunique(),
        "near": near.sum(),
        "near_patients": pairs["patient"][near].nunique(),
        "near_slices": NEAR_SLICES,
        "table": table(REAL_COLUMNS, rows),
    }


def draw_differences(scores: Scores, compared: list[tuple[str, str, str]], output: Path) -> None:
    """Draw differences between encoders with their intervals, a panel a task, linear head."""
    rows = [each for each in compared if HAND_CRAFTED not in each]  # so far away that it would hide the others
    figure = Figure(figsize=(3.1 * len(TASKS) + 2.5, 0.42 * len(rows) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(TASKS), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, TASKS, strict=True):
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
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=8)
    panels[0].invert_yaxis()
    figure.savefig(output, dpi=130)
