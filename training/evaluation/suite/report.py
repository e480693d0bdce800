"""The report of a suite: scores.csv, report.md and radar.png. Research use only."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from dataset_scripts.benchmarks import get_benchmark
from training.evaluation.reports import format_interval, markdown_table
from training.evaluation.run_files import read_json
from training.evaluation.significance import TaskScores, holm, score_task

from .paper import PUBLISHED, published_table
from .radar_plot import draw_radar
from .suite import HEADLINE_METRICS, Job, Suite, SuiteTask


def write_report(suite: Suite, jobs: Sequence[Job], failed: dict[str, str]) -> Path:
    """Of what is done so far; a function of the result files alone, so that a restarted suite ends with the same one.

    Returns: report.md. Raises ValueError where no run is done.
    """
    done = read_done(jobs)
    if not done:
        raise ValueError(f"{suite.output_dir}: no run is done; " + next(iter(failed.values()), "run the suite first"))
    ours = suite.ours or suite.backbones[0].name
    predictions: dict[SuiteTask, dict[str, dict[int, pandas.DataFrame]]] = defaultdict(lambda: defaultdict(dict))
    for job in jobs:
        if job.name in done:
            rows = pandas.read_parquet(job.predictions_file)
            predictions[job.task][job.backbone.name][job.seed] = rows[rows["level"] == suite.level]
    scored = {
        task: score_task(by_backbone, HEADLINE_METRICS[task.task], suite.num_resamples)
        for task, by_backbone in predictions.items()
    }
    suite.output_dir.mkdir(parents=True, exist_ok=True)
    every_score(jobs, done).to_csv(suite.output_dir / "scores.csv", index=False)
    names = [each.name for each in suite.backbones]
    table = pandas.DataFrame(
        [[each.value(name) if name in each.by_seed else float("nan") for name in names] for each in scored.values()],
        index=[task.name for task in scored],
        columns=names,
    )
    caption = (
        f"{level_in_words(suite.level)}, mean of {len(suite.seeds)} seeds; each spoke from lowest to highest score"
    )
    has_radar = draw_radar(table, ours, suite.output_dir / "radar.png", caption)
    report = suite.output_dir / "report.md"
    lines = [*heading(suite, jobs, done), *score_table(scored, names), *significance_table(scored, ours)]
    lines += ["", "![radar plot](radar.png)" if has_radar else "No radar plot: it needs three tasks at least."]
    lines += [*paper_section(scored), *data_section(jobs, done), *failures(failed)]
    report.write_text("\n".join(lines) + "\n")
    return report


def read_done(jobs: Sequence[Job]) -> dict[str, Any]:
    """Results by the job's name. Raises ValueError where one was run with other settings than the suite has now."""
    done = {}
    for job in jobs:
        if (result := read_json(job.result_file)) is None:
            continue
        for name, value in job.settings.what_is_computed().items():
            if result["settings"][name] != value:
                raise ValueError(
                    f"{job.output_dir}: was run with {name}={result['settings'][name]!r}, the suite says {value!r}; "
                    "give another output_dir, or remove that folder"
                )
        done[job.name] = result
    return done


def level_in_words(level: str) -> str:
    unit, _, how = level.partition("_")
    return f"one score {'an' if unit == 'image' else 'a'} {unit}" + (f", {how} over its images" if how else "")


def heading(suite: Suite, jobs: Sequence[Job], done: dict[str, Any]) -> list[str]:
    lines = [
        "# Benchmark",
        "",
        "**Research use only. Not a medical device.**",
        "",
        f"{len(done)} of {len(jobs)} runs are done. Scores are means over seeds {', '.join(map(str, suite.seeds))}, "
        f"{level_in_words(suite.level)}, on held-out patients; in brackets 95 % intervals from {suite.num_resamples} "
        "bootstrap resamples of patients.",
    ]
    if any(job.task.dataset == "phantom" for job in jobs):
        lines += ["", "**Results on the phantom are results on simulated breasts. They say nothing about patients.**"]
    return lines


def score_table(scored: dict[SuiteTask, TaskScores], names: list[str]) -> list[str]:
    rows = []
    for task, each in scored.items():
        best = each.best_of(list(each.by_seed))
        cells = ["" if name not in each.by_seed else str(each.score(name)) for name in names]
        cells = [f"**{cell}**" if name == best else cell for name, cell in zip(names, cells, strict=True)]
        rows.append([task.name, each.metric, each.num_patients, *cells])
    return ["", *markdown_table(["task", "metric", "patients", *names], rows)]


def significance_table(scored: dict[SuiteTask, TaskScores], ours: str) -> list[str]:
    """Ours against the other backbone of the highest score: the best of several, so that the comparison is hard."""
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
    """The paper's figures, and ours of the same data set and task beside them."""
    lines = ["", "## The paper's figures", ""]
    lines += ["Theirs, from arXiv 2510.11883; no other figure of its tables is public. Not reproduced here.", ""]
    lines += published_table()
    for published in PUBLISHED:
        for task, each in scored.items():
            if (task.dataset, task.task) == (published.dataset, published.task):
                ours = ", ".join(f"{name} {each.score(name)}" for name in each.by_seed)
                lines += ["", f"Ours on {task.name}, {each.metric}: {ours}."]
    return lines


def data_section(jobs: Sequence[Job], done: dict[str, Any]) -> list[str]:
    """What was predicted, in words, and on how much, from the first run of each task."""
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


def every_score(jobs: Sequence[Job], done: dict[str, Any]) -> pandas.DataFrame:
    """A row a run, level and metric, with its interval."""
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
    return pandas.DataFrame(rows)
