"""The demos on simulated data: lists of commands that a user would type on an archive of their own.

    python -m training.demo --output runs/demo                        # make demo
    python -m training.demo --benchmark --output runs/benchmark_demo  # make benchmark-demo

The demo: phantom archive, corpus, pretraining by the recipe of few images and of plain DINOv2 at equal compute, probe
of whole breasts and of lesions in their places, model card; a report that lists the commands. The benchmark demo: every
task and every baseline under one head, then a detector; its baselines have small random weights, so that it shows that
the suite runs and says nothing about the published models.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import yaml

from dataset_scripts.benchmarks.index import TASKS as BENCHMARK_TASKS
from modeling_mammodino.tools.command import command_line, user_path
from training.evaluation.backbones.small_checkpoints import write_small_checkpoints
from training.evaluation.reports import excludes_zero, format_interval, markdown_table
from training.pretraining.recipe import load_recipe
from training.studies.design import PLAIN, Configuration, mean_step_flops

from .commands import run
from .probe import HEADS, UNTRAINED, format_results

TASKS, REGION_TASKS = ("density",), ("lesion",)
PATIENTS = {"train": 200, "test": 400}
VIEWS = 2  # of a breast to learn from: they have its density and lesion in common, and not the exact tissue
STEPS, BENCHMARK_STEPS = 200, 40
FIRST_TEST_PATIENT = 10_000
SUITE_PROCESSES = 2
# the phantom's breasts are small: patches of 6 mm, and a short run
RECIPE = ("small_data", "--model_size", "nano", "--patch_size", "8", "--image_height", "256", "--image_width", "160",
          "--warmup_steps", "0.1", "--teacher_momentum", "0.95", "--teacher_momentum_end", "0.95")  # fmt: skip
# the study's, with the larger crops that suit it better (docs/trials.md, 13)
PLAIN_RECIPE = ("study_small", *Configuration(PLAIN, frozenset()).overrides(), "--global_crop_scale", "0.15", "0.6",
                "--local_crop_scale", "0.03", "0.15", "--dataloader_num_workers", "1")  # fmt: skip
OURS_NAME, PLAIN_NAME = "MammoDINO", PLAIN
TEMPLATE = Path(__file__).with_name("demo_template.md")
OTHERS = (UNTRAINED, PLAIN_NAME)
# a look at the command: a narrow detector of one short epoch finds little
QUICK_DETECTION = (
    *("--num_train_epochs", 1, "--map_width", 32, "--decoder_layers", 1, "--num_queries", 10, "--num_resamples", 100),
    *("--slices_per_volume", 1, "--lesion_slice_reach", 0, "--test_slices_per_volume", 1),
    *("--dataloader_num_workers", 0),
)

Command = tuple[str | Path | int, ...]  # a module and its arguments


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=user_path, help="default: runs/demo, runs/benchmark_demo")
    parser.add_argument("--seed", type=int, default=0, help="of phantom, pretraining and probe (not with --benchmark)")
    parser.add_argument("--benchmark", action="store_true", help="the benchmark demo")
    options = parser.parse_args(arguments)
    with command_line("benchmark demo" if options.benchmark else "demo"):
        if options.benchmark:
            benchmark_demo(options.output or Path("runs/benchmark_demo"))
        else:
            demo(options.output or Path("runs/demo"), options.seed)


def demo(output: Path, seed: int) -> None:
    done = run_all(*phantom_and_corpus(output, output, PATIENTS, "--seed", seed, views=VIEWS))
    volume = sorted((output / "test").rglob("*_dbt.dcm"))[0]
    where = ("--corpus", str(output / "corpus"), "--seed", str(seed))
    steps = steps_of_plain([*where, "--output_dir", str(output)])
    encoder, plain = output / "mammodino" / "encoder", output / "plain" / "encoder"
    pretrain = ("accelerate.commands.launch", "--cpu", "-m", "training.pretrain")
    done += run_all(
        (*pretrain, *RECIPE, *where, "--output_dir", output / "mammodino", "--max_steps", STEPS),
        (*pretrain, *PLAIN_RECIPE, *where, "--output_dir", output / "plain", "--max_steps", steps),
        ("modeling_mammodino.tools.cli", "inspect", volume, "--model", encoder, "--output", output / "inspect.png"),
        ("training.probe", "--models", f"{OURS_NAME}={encoder}", f"{PLAIN_NAME}={plain}",
         "--labels", output / "train" / "labels.csv", "--test_labels", output / "test" / "labels.csv",
         "--tasks", *TASKS, "--region_tasks", *REGION_TASKS, "--pool", "class", "--slices_per_volume", 1,
         "--seed", seed, "--output", output / "probe.json"),
        ("training.card", encoder, "--results", output / "probe.json", "--dataset", "phantom"),
    )  # fmt: skip
    check_opens(encoder, volume)
    results = json.loads((output / "probe.json").read_text())
    (output / "report.md").write_text(report(results, done, seed, steps))
    print(f"\nreport: {output / 'report.md'}  encoder: {encoder}")


def benchmark_demo(output: Path) -> None:
    phantom, encoder, suite = output / "phantom", output / "mammodino" / "encoder", output / "suite.yaml"
    run_all(
        *phantom_and_corpus(output, phantom, {"train": 240, "test": 160}),
        ("training.pretrain", *RECIPE, "--corpus", output / "corpus", "--visualization_steps", 0,
         "--output_dir", output / "mammodino", "--max_steps", BENCHMARK_STEPS),
    )  # fmt: skip
    suite.write_text(yaml.safe_dump(make_suite(output, phantom, encoder), sort_keys=False))
    run_all(("training.benchmark", "--config", suite), processes=SUITE_PROCESSES)
    run_all(
        ("training.detect", "--dataset", "phantom", "--data_dir", phantom, "--encoder", encoder,
         "--output_dir", output / "detect", *QUICK_DETECTION),
    )  # fmt: skip
    print(f"\nreport: {output / 'benchmark' / 'report.md'}  radar plot: {output / 'benchmark' / 'radar.png'}")


def phantom_and_corpus(
    output: Path, phantom: Path, patients: dict[str, int], *more: str | int, views: int = 1
) -> Iterator[Command]:
    """Yield the commands that simulate archives in PHANTOM/train, of so many views a breast, and PHANTOM/test, of one,
    and make OUTPUT/corpus."""
    simulate: Command = ("dataset_scripts.phantom", *more, "--num_proc", os.cpu_count() or 1, "--num_patients")
    for part, first, each in (("train", 0, views), ("test", FIRST_TEST_PATIENT, 1)):
        numbers = (patients[part], "--first_patient", first, "--views_per_patient", each)
        yield (*simulate, *numbers, "--output", phantom / part)
    yield "dataset_scripts.corpus", phantom / "train", "--collection", "phantom", "--output", output / "corpus"


def run_all(*commands: Command, processes: int = 1) -> list[tuple[str, float]]:
    """Run one command after another; see `training.commands.run`."""
    return [run(*map(str, each), processes=processes) for each in commands]


def steps_of_plain(where: list[str]) -> int:
    """Return the steps of plain DINOv2 that cost what STEPS of ours do, by the matrix products of their networks."""
    ours, plain = (mean_step_flops(load_recipe([*recipe, *where])) for recipe in (RECIPE, PLAIN_RECIPE))
    return round(STEPS * ours / plain)


def check_opens(folder: Path, volume: Path) -> None:
    """Open the Hub folder as a user does, without naming a class of this package."""
    from transformers import AutoModel
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    features = model(**processor(volume, return_tensors="pt")).pooler_output
    print(f"AutoModel opens {folder}: {volume.name} gives features {tuple(features.shape)}")


def make_suite(output: Path, phantom: Path, encoder: Path) -> dict[str, Any]:
    """Return a suite of every task, our encoder, its untrained twin and every baseline, three seeds."""
    small = write_small_checkpoints(output / "small")
    backbones = [("MammoDINO", "mammodino", encoder), ("untrained", "untrained", encoder)]
    backbones += [
        (f"{kind} (small, random)", kind, path)
        for kind, path in small.items()
        if kind not in ("mammodino", "untrained")
    ]
    return {
        "output_dir": str(output / "benchmark"),
        "seeds": [0, 1, 2],
        "ours": "MammoDINO",
        "finetune": {"mode": "frozen", "dataloader_num_workers": 0, "save_model": False},
        "backbones": [{"name": name, "kind": kind, "source": str(path)} for name, kind, path in backbones],
        "datasets": [{"name": "phantom", "data_dir": str(phantom), "tasks": list(BENCHMARK_TASKS)}],
    }


def report(results: dict[str, Any], commands: list[tuple[str, float]], seed: int, plain_steps: int) -> str:
    """Return the report as Markdown. commands: each with its seconds."""
    tasks = results["tasks"]
    differences = [
        [task, head, *(format_interval(difference(result, head, other), signed=True) for other in OTHERS)]
        for task, result in tasks.items()
        for head in HEADS
    ]
    return jinja2.Template(TEMPLATE.read_text(), keep_trailing_newline=True, undefined=jinja2.StrictUndefined).render(
        first=next(iter(tasks.values())),
        num_resamples=results["num_resamples"],
        seed=seed,
        steps=STEPS,
        plain_steps=plain_steps,
        **{"ours": OURS_NAME, "plain": PLAIN_NAME, "untrained": UNTRAINED},
        scores=format_results(results),
        differences="\n".join(markdown_table(["task", "head", "ours - untrained", "ours - plain"], differences)),
        verdict=verdict(tasks),
        commands=commands,
    )


def difference(result: dict[str, Any], head: str, other: str) -> list[float]:
    """Return value, low and high of our AUC less another encoder's on one task."""
    return result[head]["difference"][f"{OURS_NAME} - {other}"]


def verdict(tasks: dict[str, Any]) -> str:
    """Say where an interval excludes zero, for better or worse."""
    found = [
        f"{'better' if apart[1] > 0 else 'worse'} than {other} on {task} ({head})"
        for task, result in tasks.items()
        for head in HEADS
        for other in OTHERS
        if excludes_zero(apart := difference(result, head, other))
    ]
    rest = "every other difference may be chance at this size."
    return f"{OURS_NAME} is " + "; ".join(found) + "; " + rest if found else "No difference here excludes zero."


if __name__ == "__main__":
    main()
