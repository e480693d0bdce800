"""What is each idea worth? The paper's (tissue-aware crops and masks, adjacent slices) and ours, on the phantom.

    python -m training.study --size hour --output runs/study --num_proc 2

Plain DINOv2 (all ideas off), all on, each alone, each left out, at equal compute over several seeds; frozen features
are evaluated on held-out simulated patients and, with --real_slices, on real ones. Resumable: what is done is skipped,
and several processes share the work. `--only "MammoDINO" --output ANOTHER` remakes one row. Research use only.
"""

import json
import logging
import multiprocessing
import os
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import torch
from accelerate.utils import set_seed
from threadpoolctl import threadpool_limits

from dataset_scripts.corpus.reader import Corpus
from dataset_scripts.phantom.archive import PhantomParameters, write_archive
from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.tools.command import CommandParser, command_line, user_path
from modeling_mammodino.tools.files import write_json
from training.evaluation.readout import EncoderReader, Reader, whole_features
from training.evaluation.runs import (
    PREDICTIONS_FILE,
    RESULT_FILE,
    SETTINGS_FILE,
    is_done,
    read_json,
    run_jobs,
    write_parquet,
)
from training.pretraining.checkpoints import LOG_FILE, read_log
from training.pretraining.export import image_processor
from training.pretraining.monitoring import read_warnings
from training.pretraining.networks import random_backbone
from training.pretraining.recipe import Recipe, load_recipe
from training.studies.design import HAND_CRAFTED, SIZES, Configuration, Size, configurations, equal_compute_steps
from training.studies.hand_crafted import HandCraftedReader
from training.studies.phantom_tasks import PhantomImages, predictions
from training.studies.real_slices import RealSlices
from training.studies.report import write_study

from .commands import run, shown

logger = logging.getLogger(__name__)

PROCESSES = "spawn"  # a fork of a process in which torch has run threads can hang
FIRST_TEST_PATIENT = 1_000_000  # no patient is in both archives
# one thread, so that several runs share the cores and each is the same run again
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# patients are hashed with a key; phantoms have nothing to hide, so theirs is written here
HASH_KEY = "the study's simulated patients"


@dataclass
class Study:
    """Where a study lies, and its size."""

    output: Path
    size: Size
    size_name: str
    real_slices: Path | None

    @property
    def corpus(self) -> Path:
        return self.output / "corpus"

    @property
    def recipe(self) -> Recipe:
        return load_recipe([self.size.recipe, "--corpus", str(self.corpus), "--output_dir", str(self.output)])

    def about(self) -> dict[str, Any]:
        """Return its size, as JSON holds it: in the output folder, and in each result."""
        return {"size": self.size_name, "settings": json.loads(json.dumps(asdict(self.size)))}

    def check_size(self) -> None:
        """Raise ValueError where the output folder is of another size: all its runs share archives and corpus."""
        here = self.about()
        for path in (self.output / SETTINGS_FILE, *sorted(self.output.glob(f"runs/*/*/{RESULT_FILE}"))):
            there = here | (read_json(path) or {})
            if any(there[name] != here[name] for name in here):
                raise ValueError(
                    f"{path}: is of --size {there['size']}, {there['settings']}; --size {self.size_name} is "
                    f"{here['settings']}; give the same --size to go on, or another --output"
                )

    def labels(self, part: str) -> Path:
        return self.output / "phantom" / part / "labels.csv"

    def prepare(self, num_proc: int) -> None:
        """Simulate both archives and build the corpus; what is complete stays."""
        write_json(self.output / SETTINGS_FILE, self.about())
        parameters = PhantomParameters(**self.size.phantom)
        for part, first, count, views in (
            ("pretraining", 0, self.size.pretraining_patients, 2),
            ("learn", self.size.pretraining_patients, self.size.learn_patients, 2),
            ("test", FIRST_TEST_PATIENT, self.size.test_patients, 1),
        ):
            if not self.labels(part).is_file():
                folder = self.labels(part).parent
                write_archive(folder, count, 0, parameters, num_proc, first, views_per_patient=views)
        if not self.corpus.exists():
            archive = self.labels("pretraining").parent
            start("dataset_scripts.corpus", archive, "--output", self.corpus, "--collection", "phantom")

    @cached_property
    def image_processor(self) -> MammoDinoImageProcessor:
        return image_processor(Corpus(self.corpus), self.recipe)

    @cached_property
    def images(self) -> tuple[PhantomImages, PhantomImages]:
        """Of the archives that probes learn from and are tested on, rendered once for all runs."""
        parts = (self.labels(part) for part in ("learn", "test"))
        learn, test = (PhantomImages(each, self.image_processor, self.output / "cache") for each in parts)
        return learn, test

    @cached_property
    def real(self) -> RealSlices | None:
        folder = self.real_slices
        return RealSlices(folder, self.image_processor, self.output / "cache") if folder else None


@dataclass
class Run:
    """One configuration with one seed: a job that pretrains and evaluates."""

    study: Study
    configuration: Configuration
    seed: int

    @property
    def name(self) -> str:
        return f"{self.configuration.name}, seed {self.seed}"

    @property
    def output_dir(self) -> Path:
        return self.study.output / "runs" / self.configuration.name.replace(" ", "_") / f"seed-{self.seed}"

    @property
    def pretraining(self) -> Path:
        return self.output_dir / "pretraining"

    @property
    def encoder(self) -> Path:
        """The complete Hub folder that it leaves."""
        return self.pretraining / "encoder"

    def pretrain_arguments(self) -> tuple[list[str], int]:
        """Return the arguments of training.pretrain, and the number of steps among them."""
        arguments = [self.study.size.recipe, "--corpus", str(self.study.corpus), "--seed", str(self.seed)]
        arguments += ["--output_dir", str(self.pretraining), "--report_to", "none"]
        steps = equal_compute_steps(self.study.size, self.configuration, arguments)
        arguments += ["--max_steps", str(steps), "--save_steps", str(max(1, steps // 4))]
        return arguments + self.configuration.overrides(), steps

    def __call__(self) -> None:
        arguments, steps = self.pretrain_arguments()
        if steps:
            start("training.pretrain", *arguments)
            self.pass_warnings_on()
        reader = self.reader()
        found, real = predictions(reader, *self.study.images), {}
        if self.study.real:
            orderings = self.study.real.orderings(whole_features(reader, self.study.real.canvases))
            real = {"neighbors": orderings.to_dict("list")}
        result = {
            "configuration": self.configuration.name,
            "on": sorted(self.configuration.on),
            "seed": self.seed,
            **self.study.about(),
            "steps": steps,
            "pretraining": summary(self.pretraining / LOG_FILE) if steps else {},
            "command": shown([sys.executable, "-m", "training.pretrain", *arguments]) if steps else "",
            "remade_by": f'python -m training.study --size {self.study.size_name} --only "{self.configuration.name}" '
            "--output ANOTHER",
            "real": real,
            "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "scikit-learn")},
        }
        write_parquet(self.output_dir / PREDICTIONS_FILE, found)
        write_json(self.output_dir / RESULT_FILE, result)  # last: where it stands, the run is done

    def pass_warnings_on(self) -> None:
        """Log what the pretraining warned of, such as collapse."""
        for each in read_warnings(self.pretraining):
            logger.warning("%s: step %d: %s", self.name, each["step"], each["warning"])

    def reader(self) -> Reader:
        recipe, processor = self.study.recipe, self.study.image_processor
        if self.configuration.name == HAND_CRAFTED:
            return HandCraftedReader((recipe.model.image_height, recipe.model.image_width), recipe.model.patch_size)
        if self.configuration.is_trained:
            return EncoderReader(MammoDinoModel.from_pretrained(self.encoder), processor)
        set_seed(self.seed)
        return EncoderReader(random_backbone(recipe), processor)


def summary(log: Path) -> dict[str, float]:
    """Return compute spent and the last losses, from a run's log; empty where it has none."""
    steps = [line for line in read_log(log) if "forward_teraflops" in line or "loss" in line]
    return {name: value for name, value in steps[-1].items() if isinstance(value, int | float)} if steps else {}


def start(module: str, *arguments: str | Path) -> None:
    """Run a command quietly with one thread. Raises ValueError with its last words where it fails."""
    key = os.environ.get("MAMMODINO_HASH_KEY", HASH_KEY)
    run(module, *arguments, environment={"MAMMODINO_HASH_KEY": key, **ONE_THREAD}, quiet=True)


def work(runs: list[Run]) -> dict[str, str]:
    """Do what is left of the runs beside other processes; return the reasons of those that failed here."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    with threadpool_limits(1):
        return run_jobs(runs, run_while_wanted)


def run_while_wanted(job: Run) -> None:
    parent = multiprocessing.parent_process()
    if parent and not parent.is_alive():
        raise SystemExit  # of a study that was killed, no further run is begun
    job()


def main(arguments: list[str] | None = None) -> None:
    names = [each.name for each in configurations()]
    parser = CommandParser(prog="python -m training.study", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", choices=SIZES, default="hour", help="an hour, an evening: on two cores; a night: a GPU"
    )
    parser.add_argument("--output", type=user_path, default=Path("runs/study"))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the size's own")
    parser.add_argument("--num_proc", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--real_slices", type=user_path, help="BCS-DBT slices: a folder with slices.csv and slices/")
    parser.add_argument("--report", type=user_path, help="Markdown to write (default: report.md in the output)")
    parser.add_argument("--report_only", action="store_true", help="run nothing; report what is done")
    options = parser.parse_args(arguments)
    study = Study(options.output, SIZES[options.size], options.size, options.real_slices)
    chosen = [each for each in configurations() if each.name in options.only]
    runs = [Run(study, each, seed) for seed in options.seeds or study.size.seeds for each in chosen]
    with command_line("study"):
        study.check_size()
        failed = {} if options.report_only else run_all(study, runs, options.num_proc)
        if failed and not any(map(is_done, runs)):
            raise ValueError("; ".join(failed.values()))
        print(write_study(options.output, runs, options.report or options.output / "report.md"))
        if failed:
            raise ValueError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed.values())}")


def run_all(study: Study, runs: list[Run], num_proc: int) -> dict[str, str]:
    """Run what is not done yet in `num_proc` processes; return the reasons of those that failed, by name."""
    study.prepare(num_proc)
    if num_proc == 1:
        return work(runs)
    failed: dict[str, str] = {}
    with multiprocessing.get_context(PROCESSES).Pool(num_proc) as pool:
        for each in pool.map(work, [runs] * num_proc, chunksize=1):
            failed |= each
    return failed


if __name__ == "__main__":
    main()
