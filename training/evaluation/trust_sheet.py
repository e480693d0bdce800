"""The trust sheet of a run: what a stranger needs to say in a minute what its number is worth. Research use only.

trust.json holds every number, trust.md and trust.png show them: one headline, untrained and hand-crafted features
beside it, other data, calibration, subgroups, and whether features tell the source.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from modeling_mammodino.tools.files import write_json, write_text

from .plots import NOTICE, drawable, save_figure
from .reports import excludes_zero, format_interval, markdown_table
from .runs import read_json
from .subgroups import level_in_words

TRUST_FILE, SHEET, FIGURE = "trust.json", "trust.md", "trust.png"
THIS = "this run"
CHANCE = {"auc": 0.5}
GOOD, BAD, PLAIN = "#2b7bba", "#c44e52", "#777777"
TELLS_SOURCE = 0.8  # AUC from which the sheet warns; our choice
BLURRED = 0.08  # calibration error that right probabilities show, from which it says little; our choice


def write_sheet(folder: Path, trust: dict[str, Any], metrics: dict[str, Any]) -> Path:
    """Write trust.json, trust.md and trust.png of a run; `metrics` are those of result.json, of every level."""
    write_json(folder / TRUST_FILE, trust)
    trust = read_json(folder / TRUST_FILE) or {}  # as plain numbers, None where undefined
    draw_sheet(trust, folder / FIGURE)
    write_text(folder / SHEET, "\n".join(sheet_lines(trust, metrics)) + "\n")
    return folder / SHEET


def sheet_lines(trust: dict[str, Any], metrics: dict[str, Any]) -> list[str]:
    head = trust["headline"]
    metric = metric_in_words(head)
    positive = f"; {list(head['classes'])[1]} counts as positive" if len(head["classes"]) == 2 else ""
    lines = [
        f"# {trust['title']}",
        "",
        f"**{metric} {format_interval(head['score'])}**, {level_in_words(head['level'])}; {head['units']} scores "
        f"of {head['patients']} patients that nothing was learned from. " + told_chance(head),
        "",
        f"Classes: {', '.join(f'{name} ({count})' for name, count in head['classes'].items())}{positive}. "
        f"{trust['meaning']} "
        f"The level is fixed by the task, not by the result. In brackets 95 % intervals over patients. **{NOTICE}**",
        "",
        "## In one minute",
        "",
        *(f"- {mark} {sentence}" for mark, sentence in verdicts(trust)),
        "",
        f"![scores, reliability, subgroups]({FIGURE})",
        "",
        "## Beside it",
        "",
        *rows_table(trust),
        "",
        "## Calibration",
        "",
        *calibration_lines(trust),
        "",
        "## Subgroups",
        "",
        *subgroup_lines(trust),
        "",
        "## Do the features tell the source?",
        "",
        source_sentence(trust["source_probe"])[1],
    ]
    names = list(next(iter(metrics.values())))
    rows = [[level, *(format_interval(scores[name]) for name in names)] for level, scores in metrics.items()]
    lines += ["", "<details><summary>Every level and metric</summary>", "", *markdown_table(["level", *names], rows)]
    lines += ["", "</details>", "", "<details><summary>How it was made</summary>", "", f"    {trust['command']}", ""]
    return [*lines, HOW, "", "</details>"]


HOW = (
    "Scores are of the head's probabilities as they are; calibration (temperature and a bias a class, bias-corrected "
    "temperature scaling) was fitted on the validation part. ECE: bins of equal counts, ten at most. Brier: the mean "
    "squared error of the probabilities. A gap is a group's score less that of all others on the same resamples of "
    "patients; the groups were not chosen by the result, those of few patients (ten, or three of a class) are not "
    "scored, and of several intervals one in twenty misses by chance. "
    "Untrained: the same architecture with random weights, where nothing else is said; hand-crafted: some hundred "
    "statistics of brightness and texture; both under a linear probe on the same patients. External: this run as it is "
    "on other data, nothing fitted there."
)


def metric_in_words(head: dict[str, Any]) -> str:
    return {"auc": "AUC"}.get(head["metric"], head["metric"].replace("_", " "))


def told_chance(head: dict[str, Any]) -> str:
    return f"Chance is {CHANCE[head['metric']]}." if head["metric"] in CHANCE else ""


def verdicts(trust: dict[str, Any]) -> list[tuple[str, str]]:
    """Return marks and sentences: what speaks for the number, what against it, what is not known."""
    head = trust["headline"]
    yes, no, open_ = "✔", "✘", "?"
    found = []
    if head["metric"] in CHANCE:
        value, low, high = (np.nan if each is None else each for each in head["score"])
        width = f" {head['patients']} patients tell it to about {(high - low) / 2:.2f}."
        better = low > CHANCE[head["metric"]]
        found.append(
            (yes, "Better than chance." + width) if better else (no, "Not shown to be better than chance." + width)
        )
    for name, row in trust["rows"].items():
        gap, is_better = row["gap"], row["gap"][1] is not None and row["gap"][1] > 0
        says = "better than" if is_better else "not shown to be better than"
        found.append((yes if is_better else no, f"It is {says} {name} features: {format_interval(gap, signed=True)}."))
    if not trust["rows"]:
        found.append((open_, "Untrained and hand-crafted features were not asked (`--baselines False`)."))
    if not trust["external"]:
        found.append((open_, "**Other data: not tried.** `python -m training.trust RUN --external LABELS.csv`"))
    for name, each in trust["external"].items():
        kept = each["score"][0] is not None and each["score"][0] >= (head["score"][1] or 0)
        words = "holds: not below the interval here" if kept else "does not hold: below the interval here"
        about = f"{format_interval(each['score'])}, {each['patients']} patients; its probabilities are off by "
        about += f"{each['calibration']['ece'][0]:.3f} there"
        found.append((yes if kept else no, f"On other data ({name}), as it is, it {words}, {about}."))
    found.append(calibration_sentence(trust["calibration"]["after"]))
    scored = [each for each in trust["subgroups"] if each.get("gap")]
    few = len(trust["subgroups"]) - len(scored)
    untold = f" Of {few} further groups there are too few patients." if few else ""
    worse = [each for each in scored if each["gap"][2] is not None and each["gap"][2] < 0]
    if worse:
        named = "; ".join(
            f"{each['column']} {each['group']}: {format_interval(each['score'])}, to the others "
            f"{format_interval(each['gap'], True)}"
            for each in worse
        )
        found.append((no, f"Of {len(scored)} groups it is worse in {named}.{untold}"))
    elif scored:
        least = min(scored, key=lambda each: each["score"][0])
        found.append(
            (
                yes,
                f"No group of {len(scored)} is shown to be worse than the others; the lowest is {least['column']} "
                f"{least['group']}, {format_interval(least['score'])}.{untold}",
            )
        )
    else:
        found.append((open_, "Subgroups: not known. Give columns density, view, machine, site or age."))
    found.append(source_sentence(trust["source_probe"]))
    return found


def calibration_sentence(after: dict[str, Any]) -> tuple[str, str]:
    right, most = after["ece_if_perfect"]
    off = f"they are off by {after['ece'][0]:.3f} in the mean, where right ones would seem off by {right:.3f}, at most "
    off += f"{most:.3f}."
    if after["ece"][0] > most:
        return "✘", f"Calibrated probabilities cannot be read as frequencies here: {off}"
    if right > BLURRED:
        return "?", f"Whether calibrated probabilities can be read as frequencies, so few scores do not tell: {off}"
    return "✔", f"Calibrated probabilities can be read as frequencies here: {off}"


def source_sentence(probe: dict[str, Any]) -> tuple[str, str]:
    if "missing" in probe:
        return "?", f"Whether features tell the source is not known: {probe['missing']}."
    tells = probe["auc"][0] is not None and probe["auc"][0] >= TELLS_SOURCE
    says = f"Features {'tell' if tells else 'hardly tell'} the {probe['column']} of an image: AUC "
    says += f"{format_interval(probe['auc'])} of {', '.join(probe['classes'])}; the label alone tells it with "
    says += f"{format_interval(probe['auc_of_label'])}."
    if tells:
        says += f" Where the label goes with the {probe['column']}, a score over all may be the {probe['column']}'s: "
        says += f"read the score within each {probe['column']} under Subgroups."
    return "✘" if tells else "✔", says


def rows_table(trust: dict[str, Any]) -> list[str]:
    head = trust["headline"]
    rows = [[f"**{THIS}**", "held-out patients", head["units"], f"**{format_interval(head['score'])}**", ""]]
    for name, row in trust["rows"].items():
        rows.append([name, "the same", head["units"], format_interval(row["score"]), format_interval(row["gap"], True)])
    for name, each in trust["external"].items():
        where = f"{name}, {each['patients']} patients"
        rows.append([f"{THIS}, as it is", where, each["units"], format_interval(each["score"]), "other patients"])
    columns = ["features", "tested on", "scores", metric_in_words(head), f"{THIS} less it"]
    return markdown_table(columns, rows)


def calibration_lines(trust: dict[str, Any]) -> list[str]:
    calibration = trust["calibration"]
    rows = [
        [
            name,
            format_interval(each["ece"]),
            "{:.3f}, at most {:.3f}".format(*each["ece_if_perfect"]),
            format_interval(each["brier"]),
        ]
        for name, each in (
            ("as the head says", calibration["before"]),
            ("calibrated", calibration["after"]),
            *((f"calibrated, on {name}", each["calibration"]) for name, each in trust["external"].items()),
        )
    ]
    bias = ", ".join(f"{each:+.2f}" for each in calibration["bias"])
    return [
        f"Temperature {calibration['temperature']:.2f}, biases {bias}, of the validation part "
        f"({calibration['validation_units']} scores).",
        "",
        *markdown_table(["probabilities", "ECE", "ECE if they were right", "Brier"], rows),
    ]


def subgroup_lines(trust: dict[str, Any]) -> list[str]:
    if not trust["subgroups"]:
        return ["Not known: no column density, view, machine, site or age with two groups."]
    rows = []
    for each in trust["subgroups"]:
        score = format_interval(each["score"]) if each.get("score") else "too few patients"
        gap = each.get("gap")
        cell = format_interval(gap, True) if gap else ""
        cell = f"**{cell}**" if gap and None not in gap and excludes_zero(gap) else cell
        rows.append([each["column"], each["group"], each["level"], each["units"], each["patients"], score, cell])
    return markdown_table(
        ["of", "group", "level", "scores", "patients", metric_in_words(trust["headline"]), "gap"], rows
    )


def draw_sheet(trust: dict[str, Any], output: Path) -> None:
    """Draw the scores beside each other, the reliability plot, and the subgroups."""
    head = trust["headline"]
    shown = [each for each in trust["subgroups"] if each.get("score")]
    height = max(4.8, 1.6 + 0.26 * len(shown))
    figure = Figure(figsize=(15, height), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    metric = metric_in_words(head)
    rows = [(THIS, head["score"], "black")]
    rows += [(name, row["score"], PLAIN) for name, row in trust["rows"].items()]
    rows += [(f"external: {name}", each["score"], BAD) for name, each in trust["external"].items()]
    _forest(left, rows, head, f"{metric}, {level_in_words(head['level'])}")
    _reliability(middle, trust)
    groups = [(THIS, head["score"], "black")]
    for each in shown:
        level = "" if each["level"] == head["level"] else f", {each['level']}"
        name = f"{each['column']} {each['group']} ({each['patients']}{level})"
        gap = each.get("gap")
        worse = bool(gap) and gap[2] is not None and gap[2] < 0
        groups.append((name, each["score"], BAD if worse else GOOD))
    _forest(right, groups, head, "subgroups (patients); red: worse than the others")
    figure.suptitle(f"{drawable(trust['title'])}: {metric} {format_interval(head['score'])}. {NOTICE}", fontsize=11)
    save_figure(figure, output, dpi=110)


def _forest(axis: Any, rows: list[tuple[str, list[float], str]], head: dict[str, Any], title: str) -> None:
    for place, (_, score, color) in enumerate(rows):
        value, low, high = (np.nan if each is None else each for each in score)
        axis.plot([low, high], [place, place], color=color, linewidth=2)
        axis.plot([value], [place], "o", color=color)
        axis.annotate(
            f"{value:.3f}", (value, place), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8
        )
    axis.set_yticks(range(len(rows)), [drawable(row[0]) for row in rows], fontsize=9)
    axis.set_ylim(len(rows) - 0.4, -0.7)
    axis.axvline(head["score"][0], color="black", linewidth=0.6, linestyle=":")
    if head["metric"] in CHANCE:
        axis.axvline(CHANCE[head["metric"]], color=PLAIN, linewidth=0.8, linestyle="--")
        axis.annotate("chance", (CHANCE[head["metric"]], len(rows) - 0.5), fontsize=8, color=PLAIN, ha="left")
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.3)


def _reliability(axis: Any, trust: dict[str, Any]) -> None:
    axis.plot([0, 1], [0, 1], color=PLAIN, linewidth=0.8, linestyle="--")
    parts = [("as the head says", trust["calibration"]["before"], PLAIN)]
    parts += [("calibrated", trust["calibration"]["after"], GOOD)]
    parts += [(f"calibrated, on {name}", each["calibration"], BAD) for name, each in trust["external"].items()]
    for name, each, color in parts:
        said, was, count = np.array(each["bins"]).T
        label = f"{drawable(name)}: ECE {each['ece'][0]:.3f}"
        axis.plot(said, was, "-o", color=color, markersize=4, linewidth=1.2, label=label)
        if name == "calibrated":
            error = 1.96 * np.sqrt(np.clip(was * (1 - was), 0, None) / count)
            axis.errorbar(said, was, error, color=color, linewidth=0, elinewidth=1, alpha=0.6)
    classes = list(trust["headline"]["classes"])
    name = classes[1] if len(classes) == 2 else "the most probable class"
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel=f"probability of {drawable(name)}", ylabel="how often it was so")
    axis.set_title("reliability, bins of equal counts", fontsize=10)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    axis.grid(alpha=0.3)
