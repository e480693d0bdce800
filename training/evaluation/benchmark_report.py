"""The report of a suite: scores.csv, report.md and radar.png. Research use only.

The paper's published results (Zhou et al., arXiv 2510.11883; its tables are not public) are shown beside ours, marked
as theirs, never mixed with ours: splits, label definitions, resolution and fine-tuning of the paper are not published,
and some of its labels are not in the public data (`UNCLEAR`).
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from dataset_scripts.benchmarks import get_benchmark
from modeling_mammodino.tools.files import write_text

from .benchmark_suite import Job, Suite, SuiteTask
from .plots import draw_radar
from .reports import format_interval, markdown_table
from .runs import SETTINGS_FILE, check_same_settings, read_json
from .significance import TaskScores, holm, score_task
from .subgroups import HEADLINE_METRICS, headline_level, level_in_words
from .trust_sheet import SHEET, TRUST_FILE, verdicts


class Published(NamedTuple):
    dataset: str
    task: str
    metric: str
    by_backbone: dict[str, float]  # by the name that the paper gives a backbone


PUBLISHED = (
    Published("vindr_mammo", "cancer", "AUC", {"MammoDINO": 0.918, "ResNet50": 0.554, "MammoCLIP": 0.809}),
    Published("cbis_ddsm", "lesion", "AUC", {"MammoDINO": 0.932, "ResNet50": 0.919, "DINOv2": 0.902}),
    Published("cmmd", "birads", "F1", {"MammoDINO": 0.762, "DINOv2": 0.704, "ResNet50": 0.633}),
    Published("rsna", "density", "not named", {"MammoDINO": 0.759, "MammoCLIP": 0.748, "RadDINO": 0.740}),
)

UNCLEAR = {
    ("vindr_mammo", "cancer"): "VinDr-Mammo has no pathology; which BI-RADS the paper calls cancer is not said",
    (
        "cbis_ddsm",
        "lesion",
    ): "the paper says DDSM; CBIS-DDSM has no normal cases, so what it calls no lesion is unknown",
    ("cmmd", "birads"): "the public labels of CMMD have no BI-RADS, so this result cannot be tried",
    ("rsna", "density"): "the metric is not named",
}


def write_report(suite: Suite, jobs: Sequence[Job], failed: dict[str, str]) -> Path:
    """Report what is done so far; a function of the result files alone, so that a restarted suite ends the same.

    Returns: report.md. Raises ValueError where no run is done.
    """
    done = read_done(jobs)
    if not done:
        raise ValueError(f"{suite.output_dir}: no run is done; " + next(iter(failed.values()), "run the suite first"))
    ours = suite.ours_or_first
    levels: dict[SuiteTask, str] = {}
    predictions: dict[SuiteTask, dict[str, dict[int, pd.DataFrame]]] = defaultdict(lambda: defaultdict(dict))
    for job in jobs:
        if job.name in done:
            rows = pd.read_parquet(job.predictions_file)
            there = rows["level"].unique().tolist()
            level = suite.level if suite.level in there else headline_level(job.task.task, there)
            predictions[job.task][job.backbone.name][job.seed] = rows[rows["level"] == level]
            levels[job.task] = level
    scored = {
        task: score_task(by_backbone, HEADLINE_METRICS.get(task.task, "auc"), suite.num_resamples)
        for task, by_backbone in predictions.items()
    }
    suite.output_dir.mkdir(parents=True, exist_ok=True)
    every = every_score(jobs, done)
    every.to_csv(suite.output_dir / "scores.csv", index=False)
    names = [each.name for each in suite.backbones]
    table = pd.DataFrame(
        [[each.value(name) if name in each.by_seed else float("nan") for name in names] for each in scored.values()],
        index=[task.name for task in scored],
        columns=names,
    )
    caption = f"mean of {len(suite.seeds)} seeds; each spoke from lowest to highest score"
    has_radar = draw_radar(table, ours, suite.output_dir / "radar.png", caption)
    report = suite.output_dir / "report.md"
    lines = [*heading(suite, jobs, done), *score_table(scored, levels, names), *other_levels(every, levels, names)]
    lines += [*significance_table(scored, ours), *trust_section(suite, jobs, done)]
    lines += ["", "![radar plot](radar.png)" if has_radar else "No radar plot: it needs three tasks at least."]
    lines += [*paper_section(scored), *data_section(jobs, done), *failures(failed)]
    write_text(report, "\n".join(lines) + "\n")
    return report


def read_done(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return results by the job's name. Raises ValueError where one was run with other settings than the suite has
    now."""
    done = {}
    for job in jobs:
        if (result := read_json(job.result_file)) is None:
            continue
        check_same_settings(job.output_dir / SETTINGS_FILE, job.settings.what_is_computed())
        done[job.name] = result
    return done


def heading(suite: Suite, jobs: Sequence[Job], done: dict[str, Any]) -> list[str]:
    lines = [
        "# Benchmark",
        "",
        "**Research use only. Not a medical device.**",
        "",
        f"{len(done)} of {len(jobs)} runs are done. Scores are means over seeds {', '.join(map(str, suite.seeds))}, "
        "one level a task, fixed by the task, on held-out patients; in brackets 95 % intervals from "
        f"{suite.num_resamples} bootstrap resamples of patients.",
    ]
    if any(job.task.dataset == "phantom" for job in jobs):
        lines += ["", "**Results on the phantom are results on simulated breasts. They say nothing about patients.**"]
    return lines


def score_table(scored: dict[SuiteTask, TaskScores], levels: dict[SuiteTask, str], names: list[str]) -> list[str]:
    rows = []
    for task, each in scored.items():
        best = each.best_of(list(each.by_seed))
        cells = ["" if name not in each.by_seed else format_interval(each.score(name)) for name in names]
        cells = [f"**{cell}**" if name == best else cell for name, cell in zip(names, cells, strict=True)]
        rows.append([task.name, f"{each.metric}, {level_in_words(levels[task])}", each.num_patients, *cells])
    return ["", *markdown_table(["task", "metric", "patients", *names], rows)]


def other_levels(every: pd.DataFrame, levels: dict[SuiteTask, str], names: list[str]) -> list[str]:
    """Return the means over seeds at the other levels, folded."""
    rows = []
    for task, headline in levels.items():
        own = every[
            (every[["dataset", "task", "definition"]] == [task.dataset, task.task, task.definition]).all(axis=1)
        ]
        own = own[own["metric"] == HEADLINE_METRICS.get(task.task, "auc")]
        means = own.groupby(["level", "backbone"], sort=False)["value"].mean().unstack().reindex(columns=names)
        for level, values in means.drop(index=headline).iterrows():
            rows.append([task.name, level, *("" if pd.isna(each) else f"{each:.3f}" for each in values)])
    table = markdown_table(["task", "level", *names], rows)
    return ["", "<details><summary>Other levels</summary>", "", *table, "", "</details>"]


def trust_section(suite: Suite, jobs: Sequence[Job], done: dict[str, Any]) -> list[str]:
    """Return what the trust sheet of our first run of each task says."""
    lines = ["", f"## What the numbers of {suite.ours_or_first} are worth", ""]
    for job in jobs:
        trust = read_json(job.output_dir / TRUST_FILE) if job.settings.baselines and job.name in done else None
        if trust is not None:
            place = (job.output_dir / SHEET).relative_to(suite.output_dir).as_posix()
            lines += [f"<details open><summary>{job.task.name}, seed {job.seed}</summary>", ""]
            lines += [f"- {mark} {sentence}" for mark, sentence in verdicts(trust)]
            lines += ["", f"[its trust sheet]({place})", "", "</details>", ""]
    return lines if len(lines) > 3 else []


def significance_table(scored: dict[SuiteTask, TaskScores], ours: str) -> list[str]:
    """Compare ours with the best of the other backbones, the hardest comparison."""
    compared = []
    for task, each in scored.items():
        others = [name for name in each.by_seed if name != ours]
        if ours in each.by_seed and others:
            best = each.best_of(others)
            compared.append((task.name, best, *each.difference(ours, best)))
    if not compared:
        return []
    lines = [
        "",
        f"## {ours} against the best other backbone",
        "",
        "Paired on the same patients and seeds; p is two-sided, adjusted for the number of tasks (Holm).",
        "",
    ]
    rows = [
        [task, best, format_interval(difference, signed=True), f"{p_value:.4f}", f"{adjusted:.4f}"]
        for (task, best, difference, p_value), adjusted in zip(
            compared, holm([row[-1] for row in compared]), strict=True
        )
    ]
    return [*lines, *markdown_table(["task", "best other", "difference", "p", "adjusted p"], rows)]


def paper_section(scored: dict[SuiteTask, TaskScores]) -> list[str]:
    """Return the paper's results, and ours of the same data set and task beside them."""
    lines = ["", "## The paper's results", ""]
    lines += ["Theirs, from arXiv 2510.11883; no other number of its tables is public. Not reproduced here.", ""]
    lines += published_table()
    for published in PUBLISHED:
        for task, each in scored.items():
            if (task.dataset, task.task) == (published.dataset, published.task):
                ours = ", ".join(f"{name} {format_interval(each.score(name))}" for name in each.by_seed)
                lines += ["", f"Ours on {task.name}, {each.metric}: {ours}."]
    return lines


def published_table() -> list[str]:
    """Return the published results as lines of Markdown, each with what is unclear about it."""
    rows = [
        [
            *(each.dataset, each.task, each.metric),
            ", ".join(f"{name} {value:.3f}" for name, value in each.by_backbone.items()),
            UNCLEAR[each.dataset, each.task],
        ]
        for each in PUBLISHED
    ]
    return markdown_table(["data set", "task", "metric", "the paper's results", "unclear"], rows)


def data_section(jobs: Sequence[Job], done: dict[str, Any]) -> list[str]:
    """Return what was predicted and on how much, from the first run of each task."""
    lines = ["", "## The tasks", ""]
    told: dict[str, list[str]] = {}
    for job in jobs:
        if job.name in done and job.task.name not in told:
            result = done[job.name]
            told[job.task.name] = [
                f"- **{job.task.name}**: {result['meaning']} Classes: {', '.join(result['classes'])}."
            ]
            told[job.task.name] += [f"  - {split}: {told_counts(c)}" for split, c in result["counts"].items()]
    lines += [line for each in told.values() for line in each]
    for name in dict.fromkeys(job.task.dataset for job in jobs):
        lines += ["", *(f"- {name}: {note}" for note in get_benchmark(name).notes)]
    return lines


def told_counts(counts: Any) -> str:
    return json.dumps(counts, ensure_ascii=False).removeprefix("{").removesuffix("}").replace('"', "")


def failures(failed: dict[str, str]) -> list[str]:
    if not failed:
        return []
    return ["", "## Failed", "", *(f"- {name}: {reason}" for name, reason in failed.items())]


def every_score(jobs: Sequence[Job], done: dict[str, Any]) -> pd.DataFrame:
    """Return a row a run, level and metric, with its interval."""
    rows = []
    for job in jobs:
        for level, metrics in done.get(job.name, {}).get("metrics", {}).items():
            for metric, (value, low, high) in metrics.items():
                rows.append(
                    {
                        "dataset": job.task.dataset, "task": job.task.task, "definition": job.task.definition,
                        "backbone": job.backbone.name, "kind": job.backbone.kind, "seed": job.seed,
                        "level": level, "metric": metric, "value": value, "low": low, "high": high,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)
