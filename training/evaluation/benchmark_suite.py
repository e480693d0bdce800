"""A suite: which backbones are evaluated on which tasks of which data sets, with which seeds; read from YAML.

output_dir: runs/benchmark
seeds: [0, 1, 2]
finetune: {mode: frozen}            # fields of training.finetune, the same for every run
backbones:
  - {name: MammoDINO, kind: mammodino, source: runs/first/encoder}
  - {name: ResNet50, kind: resnet50}
datasets:
  - {name: rsna, data_dir: /data/rsna, tasks: [cancer, density]}
  - {name: vindr_mammo, data_dir: /data/vindr, tasks: [{task: cancer, definition: birads_4_5}]}
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

import yaml

from dataset_scripts.benchmarks.task import open_benchmark
from modeling_mammodino.tools.command import user_path

from .backbones.registry import BACKBONES
from .finetuning.aggregation import levels_of
from .run_settings import FinetuneSettings
from .runs import PREDICTIONS_FILE, RESULT_FILE

SET_BY_SUITE = (
    "labels",
    "dataset",
    "data_dir",
    "task",
    "definition",
    "backbone",
    "source",
    "seed",
    "output_dir",
    "cache_dir",
    "baselines",
)


@dataclass(frozen=True)
class SuiteBackbone:
    name: str  # as the tables call it
    kind: str
    source: str | None = None  # None: the kind's default on the Hub


@dataclass(frozen=True)
class SuiteTask:
    dataset: str
    data_dir: str
    task: str
    definition: str  # the data set's default where the suite names none

    @property
    def name(self) -> str:
        return f"{self.dataset} {self.task} ({self.definition})"


@dataclass(frozen=True)
class Job:
    """One run of the suite: a backbone on a task with a seed."""

    task: SuiteTask
    backbone: SuiteBackbone
    seed: int
    output_dir: Path
    settings: FinetuneSettings

    @property
    def name(self) -> str:
        return f"{self.task.name}, {self.backbone.name}, seed {self.seed}"

    @property
    def result_file(self) -> Path:
        return self.output_dir / RESULT_FILE

    @property
    def predictions_file(self) -> Path:
        return self.output_dir / PREDICTIONS_FILE


@dataclass(frozen=True)
class Suite:
    """Everything a suite's YAML says."""

    output_dir: Path
    backbones: list[SuiteBackbone]
    tasks: list[SuiteTask]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    finetune: dict[str, Any] = field(default_factory=dict)
    ours: str = ""  # the backbone that is compared with the best of the others; empty: the first
    # of the tables: image, breast_mean, patient_max, ...; empty, or of a task without it: the task's headline level
    level: str = ""
    num_resamples: int = 1000

    @property
    def ours_or_first(self) -> str:
        return self.ours or self.backbones[0].name

    def jobs(self) -> Iterator[Job]:
        """Yield the runs in the order of the queue: seed by seed, so that a suite cut short has whole tables of fewer
        seeds."""
        for seed in self.seeds:
            for task in self.tasks:
                for backbone in self.backbones:
                    parts = (task.dataset, f"{task.task}-{task.definition}", backbone.name, f"seed-{seed}")
                    folder = self.output_dir.joinpath("runs", *map(_folder_name, parts))
                    settings = FinetuneSettings(
                        dataset=task.dataset,
                        data_dir=task.data_dir,
                        task=task.task,
                        definition=task.definition,
                        backbone=backbone.kind,
                        source=backbone.source or "",
                        seed=seed,
                        output_dir=str(folder),
                        cache_dir=str(self.output_dir / "features"),  # shared by tasks and seeds
                        baselines=backbone.name == self.ours_or_first and seed == self.seeds[0],  # once a task
                        **self.finetune,
                    )
                    yield Job(task, backbone, seed, folder, settings)


def read_suite(path: Path, output_dir: Path | None = None) -> Suite:
    """Read a YAML file; `output_dir` overrides its own. Raises ValueError naming file, field and what it may be."""
    try:
        values = yaml.safe_load(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("must be lines of `name: value`")
        backbones = [_read(SuiteBackbone, each, "backbones") for each in _list(values, "backbones")]
        tasks = [task for each in _list(values, "datasets") for task in _tasks(each)]
        known = {each.name for each in fields(Suite)} - {"tasks"} | {"datasets"}
        if unknown := set(values) - known:
            raise ValueError(f"unknown field {min(unknown)!r}; known: {', '.join(sorted(known))}")
        if not (output_dir or values.get("output_dir")):
            raise ValueError("output_dir must be given")
        rest = {key: value for key, value in values.items() if key not in ("backbones", "datasets")}
        suite = Suite(
            **rest | {"output_dir": user_path(output_dir or str(values["output_dir"]))},
            backbones=backbones,
            tasks=tasks,
        )
        _check(suite)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"suite {path}: {' '.join(str(error).split())}") from error
    return suite


def _list(values: dict[str, Any], name: str) -> list[Any]:
    found = values.get(name)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{name}: must be a list of at least one")
    return found


def _read(kind: type, values: Any, where: str) -> Any:
    names = [each.name for each in fields(kind)]
    if not isinstance(values, dict) or set(values) - set(names):
        raise ValueError(f"{where}: {values!r} must be fields of {', '.join(names)}")
    if missing := [each.name for each in fields(kind) if each.default is MISSING and values.get(each.name) is None]:
        raise ValueError(f"{where}: {values!r} has no {missing[0]}")
    if wrong := [name for name, value in values.items() if not isinstance(value, str | None)]:
        raise ValueError(f"{where}: {wrong[0]}={values[wrong[0]]!r} must be text; write it in quotes")
    return kind(**values)


def _tasks(values: Any) -> Iterator[SuiteTask]:
    """Yield the tasks of one data set, each given by its name, or as {task: ..., definition: ...}."""
    if not isinstance(values, dict) or set(values) != {"name", "data_dir", "tasks"}:
        raise ValueError(f"datasets: {values!r} must have name, data_dir and tasks")
    if wrong := [name for name in ("name", "data_dir") if not isinstance(values[name], str)]:
        raise ValueError(f"datasets: {wrong[0]}={values[wrong[0]]!r} must be text; write it in quotes")
    data_dir = user_path(values["data_dir"])
    benchmark = open_benchmark(values["name"], data_dir.absolute())
    for each in _list(values, "tasks"):
        chosen = {"task": each} if isinstance(each, str) else each
        if not isinstance(chosen, dict) or not {"task"} <= set(chosen) <= {"task", "definition"}:
            raise ValueError(f"datasets: task {each!r} must be a name, or a task and its definition")
        definition = benchmark.definition(chosen["task"], chosen.get("definition"))
        yield SuiteTask(benchmark.name, str(data_dir), definition.task, definition.name)


def _check(suite: Suite) -> None:
    for each in fields(suite):
        kind: Any = get_origin(each.type) or each.type
        if not isinstance(value := getattr(suite, each.name), kind):
            raise ValueError(f"{each.name}={value!r}: must be of type {kind.__name__}")
    names = [each.name for each in suite.backbones]
    for kind, found in (
        ("backbones", [_folder_name(name) for name in names]),
        ("datasets", [task.name for task in suite.tasks]),
        ("seeds", suite.seeds),
    ):
        if repeated := [each for each, count in Counter(found).items() if count > 1]:
            raise ValueError(f"{kind}: {repeated[0]!r} is there twice")
    if not suite.seeds or not all(isinstance(seed, int) and seed >= 0 for seed in suite.seeds):
        raise ValueError(f"seeds={suite.seeds!r}: must be whole numbers from 0 on, at least one")
    if suite.ours and suite.ours not in names:
        raise ValueError(f"ours={suite.ours!r}: must be one of {', '.join(names)}")
    known = levels_of(suite.finetune.get("head", ""))
    if suite.level and suite.level not in known:
        raise ValueError(f"level={suite.level!r}: must be one of {', '.join(known)}")
    if suite.num_resamples < 1:
        raise ValueError(f"num_resamples={suite.num_resamples}: must be 1 or more")
    for backbone in suite.backbones:
        if backbone.kind not in BACKBONES:
            raise ValueError(f"backbones: kind {backbone.kind!r} must be one of {', '.join(BACKBONES)}")
    if taken := [name for name in SET_BY_SUITE if name in suite.finetune]:
        raise ValueError(f"finetune: {taken[0]} is set by the suite itself")
    for _ in suite.jobs():  # each checks its settings
        pass


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)
