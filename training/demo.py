"""The demos on simulated data: lists of commands that a user would type on an archive of their own.

    python -m training.demo --output runs/demo                        # make demo
    python -m training.demo --benchmark --output runs/benchmark_demo  # make benchmark-demo

The demo: phantom archive, corpus, a short pretraining by the recipe of few images, and how this encoder, the shipped
one and untrained ones do on other simulated patients: density of whole breasts, lesions in their places; a report that
lists the commands. The benchmark demo: every task and every baseline under one head, then a detector; its baselines
have small random weights, so that it shows that the suite runs and says nothing about the published models.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import yaml

from dataset_scripts.benchmarks.index import TASKS as BENCHMARK_TASKS
from modeling_mammodino.tools.command import SHIPPED, CommandParser, command_line, user_path
from training.evaluation.backbones.small_checkpoints import write_small_checkpoints
from training.evaluation.reports import excludes_zero, format_interval

from .commands import run
from .leaderboard import score_table

PATIENTS = {"train": 120, "test": 300}
VIEWS = 2  # of a breast to learn from: they have its density and lesion in common, and not the exact tissue
STEPS, BENCHMARK_STEPS = 560, 40
FIRST_TEST_PATIENT = 10_000
SUITE_PROCESSES = 2
# the phantom's breasts are small: patches of 6 mm, and a short run
RECIPE = ("small_data", "--model_size", "nano", "--patch_size", "8", "--image_height", "256", "--image_width", "160",
          "--canvas_tokens", "128", "--warmup_steps", "0.1", "--teacher_momentum", "0.95",
          "--teacher_momentum_end", "0.95")  # fmt: skip
HERE, SHIPPED_NAME, UNTRAINED = "pretrained here", "shipped", "untrained"
TEMPLATE = Path(__file__).with_name("demo_template.md")
# a look at the command: a narrow detector of one short epoch finds little
QUICK_DETECTION = (
    *("--num_train_epochs", 1, "--map_width", 32, "--decoder_layers", 1, "--num_queries", 10, "--num_resamples", 100),
    *("--slices_per_volume", 1, "--lesion_slice_reach", 0, "--test_slices_per_volume", 1),
    *("--dataloader_num_workers", 0),
)

Command = tuple[str | Path | int, ...]  # a module and its arguments


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m training.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=user_path, help="default: runs/demo, runs/benchmark_demo")
    parser.add_argument("--seed", type=int, default=0, help="of phantom and pretraining (not with --benchmark)")
    parser.add_argument("--benchmark", action="store_true", help="the benchmark demo")
    options = parser.parse_args(arguments)
    with command_line("benchmark demo" if options.benchmark else "demo"):
        if options.benchmark:
            benchmark_demo(options.output or Path("runs/benchmark_demo"))
        else:
            demo(options.output or Path("runs/demo"), options.seed)


def demo(output: Path, seed: int) -> None:
    train, test, encoder = output / "train", output / "test", output / "pretrained" / "encoder"
    done = run_all(*phantom_and_corpus(output, output, PATIENTS, "--seed", seed, views=VIEWS))
    volume = sorted(test.rglob("*_dbt.dcm"))[0]
    shipped = os.path.relpath(SHIPPED)
    models = {HERE: encoder, SHIPPED_NAME: shipped, UNTRAINED: f"untrained:{shipped}"}
    done += run_all(
        ("accelerate.commands.launch", "--cpu", "-m", "training.pretrain", *RECIPE, "--corpus", output / "corpus",
         "--seed", seed, "--output_dir", output / "pretrained", "--max_steps", STEPS, "--visualization_steps", STEPS),
        ("modeling_mammodino.tools.cli", "inspect", volume, "--output", output / "inspect.png"),
        ("training.leaderboard", "--phantom", train, test, "--cache", output / "cache", "--models",
         *(f"{name}={source}" for name, source in models.items()), "--output", output / "results.json"),
    )  # fmt: skip
    check_opens(encoder, volume)
    rows = json.loads((output / "results.json").read_text())["rows"]
    (output / "report.md").write_text(report(rows, done, seed))
    print(f"\nreport: {output / 'report.md'}  encoder: {encoder}")


def benchmark_demo(output: Path) -> None:
    phantom, encoder, suite = output / "phantom", output / "mammodino" / "encoder", output / "suite.yaml"
    run_all(
        *phantom_and_corpus(output, phantom, {"train": 160, "test": 120}),
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


def report(rows: dict[str, Any], commands: list[tuple[str, float]], seed: int) -> str:
    """Return the report as Markdown, of the rows of `training.leaderboard`. commands: each with its seconds."""
    tasks = list(rows[HERE]["scores"])
    return jinja2.Template(TEMPLATE.read_text(), keep_trailing_newline=True, undefined=jinja2.StrictUndefined).render(
        **{"train": PATIENTS["train"], "test": PATIENTS["test"], "seed": seed, "steps": STEPS, "commands": commands},
        **{
            "here": HERE,
            "shipped": SHIPPED_NAME,
            "untrained": UNTRAINED,
            "scores": "\n".join(score_table(rows, tasks)),
        },
        verdict="\n".join(f"- {verdict(name, rows[name]['scores'])}" for name in (SHIPPED_NAME, HERE)),
    )


def verdict(name: str, scores: dict[str, Any]) -> str:
    """Say where the interval of an encoder's difference to the same, untrained, excludes zero, for better or worse."""
    found = [
        f"{'better' if apart[1] > 0 else 'worse'} on {task} ({format_interval(apart, signed=True)})"
        for task, score in scores.items()
        if excludes_zero(apart := score["minus_untrained"])
    ]
    return f"*{name}*, against the same architecture untrained: " + ("; ".join(found) or "no difference excludes zero")


if __name__ == "__main__":
    main()
