"""The whole suite on simulated breasts, as `make benchmark-demo`: `python -m training.benchmark_demo --output DIR`.

Phantom archives -> a briefly pretrained MammoDINO -> every baseline at small random weights -> suite -> detector. Small
random baselines show that the chain works; they say nothing about the published models of those names.
"""

import argparse
import os
import sys
from pathlib import Path

import yaml

from dataset_scripts.benchmarks.index import TASKS
from training.evaluation.backbones.small import write_small_checkpoints

from .chain import Chain

NUM_PATIENTS = {"train": 240, "test": 160}
FIRST_TEST_PATIENT = 10_000
PRETRAINING_STEPS = 120
SUITE_PROCESSES = 2
# a look at the command: a narrow detector of one short epoch finds little
QUICK_DETECTION = (
    *("--num_train_epochs", 1, "--map_width", 32, "--decoder_layers", 1, "--num_queries", 10, "--num_resamples", 100),
    *("--slices_per_volume", 1, "--lesion_slice_reach", 0, "--test_slices_per_volume", 1),
    *("--dataloader_num_workers", 0),
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.benchmark_demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_demo"))
    options = parser.parse_args(arguments)
    output, python = options.output, sys.executable
    phantom, encoder = output / "phantom", output / "mammodino" / "encoder"
    output.mkdir(parents=True, exist_ok=True)
    chain = Chain("benchmark demo")
    for part, first in (("train", 0), ("test", FIRST_TEST_PATIENT)):
        chain.run(
            python, "-m", "dataset_scripts.phantom", "--output", phantom / part, "--first_patient", first,
            "--num_patients", NUM_PATIENTS[part], "--num_proc", os.cpu_count() or 1,
        )  # fmt: skip
    corpus = [python, "-m", "dataset_scripts.corpus", phantom / "train", "--collection", "phantom"]
    chain.run(*corpus, "--output", output / "corpus")
    pretrain = [python, "-m", "training.pretrain", "demo", "--corpus", output / "corpus", "--visualization_steps", 0]
    chain.run(*pretrain, "--output_dir", output / "mammodino", "--max_steps", PRETRAINING_STEPS)
    suite = output / "suite.yaml"
    suite.write_text(yaml.safe_dump(make_suite(output, phantom, encoder), sort_keys=False))
    chain.run(python, "-m", "training.benchmark", "--config", suite, processes=SUITE_PROCESSES)
    chain.run(
        python, "-m", "training.detect", "--dataset", "phantom", "--data_dir", phantom, "--encoder", encoder,
        "--output_dir", output / "detect", *QUICK_DETECTION,
    )  # fmt: skip
    print(f"\nreport: {output / 'benchmark' / 'report.md'}  radar plot: {output / 'benchmark' / 'radar.png'}")


def make_suite(output: Path, phantom: Path, encoder: Path) -> dict:
    """Every task, our encoder, its untrained twin and every baseline, three seeds."""
    small = write_small_checkpoints(output / "small")
    backbones = [
        {"name": "MammoDINO", "kind": "mammodino", "source": str(encoder)},
        {"name": "untrained", "kind": "untrained", "source": str(encoder)},
    ]
    backbones += [
        {"name": f"{kind} (small, random)", "kind": kind, "source": str(path)}
        for kind, path in small.items()
        if kind not in ("mammodino", "untrained")
    ]
    return {
        "output_dir": str(output / "benchmark"),
        "seeds": [0, 1, 2],
        "ours": "MammoDINO",
        "finetune": {"mode": "frozen", "dataloader_num_workers": 0, "save_model": False},
        "backbones": backbones,
        "datasets": [{"name": "phantom", "data_dir": str(phantom), "tasks": list(TASKS)}],
    }


if __name__ == "__main__":
    main()
