"""The whole chain on simulated data: `python -m training.demo --output runs/demo`, which `make demo` calls.

Phantom archive -> corpus -> two pretrainings -> probe -> report. Every step is a command that a user would type on an
archive of their own; the report lists them.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from training.pretraining.recipe import load_recipe
from training.studies.design import mean_step_flops

from .chain import Chain
from .probe import UNTRAINED, format_results

NUM_PRETRAINING_PATIENTS, NUM_TEST_PATIENTS = 300, 200
FIRST_TEST_PATIENT = 10_000
TASKS = ("density", "lesion", "cancer")
STEPS = 300
PLAIN = ["--tissue_aware_crops", "false", "--tissue_aware_masks", "false", "--adjacent_slice_weight", "0"]
OURS_NAME, PLAIN_NAME = "MammoDINO", "plain DINOv2"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    output, python = options.output, sys.executable
    output.mkdir(parents=True, exist_ok=True)
    chain = Chain("demo")

    phantom = [python, "-m", "dataset_scripts.phantom", "--seed", options.seed, "--num_proc", os.cpu_count() or 1]
    chain.run(*phantom, "--output", output / "train", "--num_patients", NUM_PRETRAINING_PATIENTS)
    chain.run(
        *phantom,
        "--output",
        output / "test",
        "--num_patients",
        NUM_TEST_PATIENTS,
        "--first_patient",
        FIRST_TEST_PATIENT,
    )
    corpus = [python, "-m", "dataset_scripts.corpus", output / "train", "--collection", "phantom"]
    chain.run(*corpus, "--output", output / "corpus")
    pretrain = [python, "-m", "accelerate.commands.launch", "--cpu", "-m", "training.pretrain", "demo"]
    pretrain += ["--corpus", output / "corpus", "--seed", options.seed]
    steps = steps_of_plain(["demo", "--corpus", str(output / "corpus"), "--output_dir", str(output)])
    chain.run(*pretrain, "--output_dir", output / "mammodino", "--max_steps", STEPS)
    chain.run(*pretrain, "--output_dir", output / "plain", "--max_steps", steps, *PLAIN)
    volume = sorted((output / "test").rglob("*_dbt.dcm"))[0]
    chain.run(python, "-m", "training.preview", volume, "--output", output / "preview.png", "--recipe", "demo")
    chain.run(
        python, "-m", "modeling_mammodino.tools.cli", "inspect", volume, "--model", output / "mammodino" / "encoder",
        "--output", output / "inspect.png",
    )  # fmt: skip
    chain.run(
        python, "-m", "training.probe",
        "--models", f"{OURS_NAME}={output / 'mammodino' / 'encoder'}", f"{PLAIN_NAME}={output / 'plain' / 'encoder'}",
        "--labels", output / "train" / "labels.csv", "--test_labels", output / "test" / "labels.csv",
        "--tasks", *TASKS, "--seed", options.seed, "--output", output / "probe.json",
    )  # fmt: skip
    encoder = output / "mammodino" / "encoder"
    chain.run(python, "-m", "training.card", encoder, "--results", output / "probe.json", "--dataset", "phantom")
    check_opens(encoder, volume)
    results = json.loads((output / "probe.json").read_text())
    (output / "report.md").write_text(report(results, chain.done, options.seed, steps))
    print(f"\nreport: {output / 'report.md'}  encoder: {encoder}")


def steps_of_plain(recipe: list[str]) -> int:
    """Of plain DINOv2, which cost what STEPS of ours do, by the matrix products of their batches."""
    ours, plain = (mean_step_flops(load_recipe(arguments)) for arguments in (recipe, recipe + PLAIN))
    return round(STEPS * ours / plain)


def check_opens(folder: Path, volume: Path) -> None:
    """Opens the Hub folder as a user does, without naming a class of this package."""
    from transformers import AutoModel
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    features = model(**processor(volume, return_tensors="pt")).pooler_output
    print(f"AutoModel opens {folder}: {volume.name} gives features {tuple(features.shape)}")


def report(results: dict[str, Any], commands: list[tuple[str, float]], seed: int, plain_steps: int) -> str:
    tasks = results["tasks"]
    any_task = next(iter(tasks.values()))
    lines = [
        "# MammoDINO demo: phantom results",
        "",
        "**These are results on simulated breasts. They say whether the chain works and what moves at this size, "
        "nothing about patients. Research use only.**",
        "",
        f"Frozen features of a small encoder, evaluated on {any_task['test_patients']} held-out phantom patients "
        f"({any_task['test_images']} files: a DBT volume and a mammogram each); probes learned on "
        f"{any_task['learning_images']} files of the pretraining patients. One seed ({seed}). AUC (macro over classes, "
        f"one against the rest) with 95 % intervals from {results['num_resamples']} bootstrap resamples of patients.",
        "",
        f"- *{UNTRAINED}*: the same architecture, random weights.",
        f"- *{PLAIN_NAME}*: random crops and masks, no slice loss; {plain_steps} steps to our {STEPS}: equal compute.",
        f"- *{OURS_NAME}*: tissue-aware crops and masks, adjacent-slice loss.",
        "",
        format_results(results),
        "",
        "Differences on the same resamples:",
        "",
        "| task | head | ours - untrained | ours - plain |",
        "|---|---|---|---|",
    ]
    for task, result in tasks.items():
        for head in ("knn", "logistic"):
            cells = [
                "{:+.3f} [{:+.3f}, {:+.3f}]".format(*result[head]["difference"][f"{OURS_NAME} - {other}"])
                for other in (UNTRAINED, PLAIN_NAME)
            ]
            lines.append(f"| {task} | {head} | {cells[0]} | {cells[1]} |")
    lines += ["", verdict(tasks), "", "## What student and teacher see", "", "![views](preview.png)", ""]
    lines += ["## What the encoder sees", "", "![input](inspect.png)", ""]
    lines += ["## What the teacher's features see", "", f"![features](mammodino/images/step-{STEPS:06d}.png)", ""]
    lines += ["## The run", "", "![pretraining](mammodino/encoder/pretraining.png)", "", "## Commands", "", "```"]
    lines += [f"{command}    # {seconds:.0f} s" for command, seconds in commands] + ["```", ""]
    return "\n".join(lines)


def verdict(tasks: dict[str, Any]) -> str:
    """Where an interval excludes zero, in words, for better or worse."""
    found = []
    for task, result in tasks.items():
        for head in ("knn", "logistic"):
            for other in (UNTRAINED, PLAIN_NAME):
                _, low, high = result[head]["difference"][f"{OURS_NAME} - {other}"]
                if low > 0 or high < 0:
                    found.append(f"{'better' if low > 0 else 'worse'} than {other} on {task} ({head})")
    rest = "every other difference may be chance at this size."
    return f"{OURS_NAME} is " + "; ".join(found) + "; " + rest if found else "No difference here excludes zero."


if __name__ == "__main__":
    main()
