"""What a run says of itself: a JSON line a log step, progress bar and tracker; speed, signs of collapse, k-NN, images.

A self-distilled network can fail at two ends. At the entropy wall the teacher's targets are uniform and say nothing; in
collapse every image gets the same target. `target_information` is 0 at both ends.

All processes measure and share the images of the k-NN; the main one writes LOG_FILE and WARNINGS_FILE
(`read_warnings`), and draws. Trackers (TensorBoard, trackio, Weights & Biases) are Accelerate's.
"""

import importlib.util
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from dataset_scripts.benchmarks.labels import class_names, read_labels
from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.tools.command import show_progress
from modeling_mammodino.tools.features import RenderedSlice, SliceReader, extract_features, read_files
from modeling_mammodino.tools.figure import write_figure
from modeling_mammodino.tools.files import write_lines
from modeling_mammodino.tools.visualize import draw_features
from training.evaluation.metrics import auc
from training.evaluation.probes import nearest_neighbors

from .checkpoints import LOG_FILE, WARNINGS_FILE, read_log
from .compute import matmul_peak, step_flops
from .export import image_processor, published_recipe, was_computed
from .feature_images import corpus_images
from .losses.cross_entropy import Probabilities
from .networks import Network
from .preflight import FIRST_STEPS, describe, learned_nothing, shared_information
from .processes import Processes
from .recipe import Recipe
from .views.sample import Batch, PretrainingViews

logger = logging.getLogger(__name__)

PROJECT = "mammodino"  # by which trackers know the runs
NUM_RANKED = 1024  # rows of which the rank is taken: singular values of more take seconds
MAX_CACHE_BYTES = 2 * 2**30  # images of a k-NN kept in memory; of a larger set they are read and rendered each time
MAX_FOLDS, KNN_BATCH_SIZE = 5, 8
PATIENCE_FRACTION = 0.05  # of a run, for signs of collapse that a fresh network shows, too
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of matrix products, by Accelerate's name


@torch.no_grad()
def target_statistics(
    probabilities: torch.Tensor, mean_over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda mean: mean
) -> dict[str, float]:
    """Return entropies of teacher targets (n, K), as fractions of ln K.

    `target_entropy`: of each sample's target, averaged; 1 means that the teacher says nothing (the entropy wall).
    `prototype_entropy`: of the mean target; 0 means that every sample has the same, sharp target (collapse).
    `target_information`: their difference, what a target tells of its image (mutual information); 0 at both ends, at
    most ln n / ln K.
    """
    probabilities = probabilities.float().flatten(0, -2)
    entropy = -torch.xlogy(probabilities, probabilities).sum(-1).mean()
    together = mean_over_processes(torch.cat((probabilities.mean(0), entropy[None])))  # (K + 1,)
    mean, scale = together[:-1], math.log(len(together) - 1)
    target, prototype = float(together[-1]) / scale, float(-torch.xlogy(mean, mean).sum()) / scale
    return {"target_entropy": target, "prototype_entropy": prototype, "target_information": prototype - target}


@torch.no_grad()
def feature_rank(features: torch.Tensor) -> float:
    """Return RankMe (Garrido et al. 2023), exp of the entropy of the singular values of features (n, D): at most
    min(n, D)."""
    values = torch.linalg.svdvals(features[:NUM_RANKED].float())
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


class Sign(NamedTuple):
    name: str
    is_normal_at_first: bool  # a fresh network shows it, too: bad where it lasts
    holds: Callable[[dict[str, float]], bool]
    words: str  # what it means, and the remedy


SIGNS = (
    Sign(
        "collapse",
        False,
        lambda values: values.get("prototype_entropy", 1) < 0.1,
        "every image gets the same few prototypes; stop, and start again with a lower learning_rate, a longer "
        "warmup_steps, or teacher_targets sinkhorn_knopp",
    ),
    Sign(
        "entropy wall",
        True,
        lambda values: values.get("target_entropy", 0) > 0.98,
        "the teacher's targets are uniform and teach nothing; lower teacher_temperature and teacher_temperature_start, "
        "take fewer num_prototypes or a larger batch",
    ),
    Sign(
        "collapse of information",
        True,
        lambda values: values.get("target_information", 1) < 0.01 and values["target_entropy"] <= 0.98,
        "every image gets the same broad target; lower learning_rate, take teacher_targets sinkhorn_knopp, or a higher "
        "teacher_momentum",
    ),
    Sign(
        "collapse of features",
        True,
        lambda values: values["feature_rank"] < 2,
        "class tokens lie along one direction; raise koleo_weight, or lower learning_rate or weight_decay_end",
    ),
)


class CollapseWatch:
    """Names each sign when it comes, once, and again only after it went.

    patience_steps: how long a sign that is normal in a fresh network must last before it is called bad.
    """

    def __init__(self, patience_steps: int):
        self.patience_steps = patience_steps
        self.since: dict[str, int] = {}  # step at which a sign was first seen
        self.told: set[str] = set()

    def check(self, step: int, values: dict[str, float]) -> list[str]:
        """Return what is to be said of this log line's values."""
        messages = []
        for sign in SIGNS:
            if not sign.holds(values):
                self.since.pop(sign.name, None)
                if sign.name in self.told:
                    self.told.remove(sign.name)
                    messages.append(f"{sign.name}: over")
                continue
            lasted = step - self.since.setdefault(sign.name, step)
            if sign.name not in self.told and lasted >= self.patience_steps * sign.is_normal_at_first:
                self.told.add(sign.name)
                messages.append(f"{sign.name}, since step {self.since[sign.name]}: {sign.words}")
        return messages


def append_line(file: Path, record: dict[str, Any]) -> None:
    """Append a record to a file of JSON lines, which is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def forget_after(file: Path, step: int) -> None:
    """Take lines of later steps out of a file of JSON lines: a run that goes on from `step` writes them again. A line
    that a crash cut goes too."""
    if file.is_file():
        write_lines(file, [line for line in read_log(file) if step and line["step"] <= step])


def read_warnings(output_dir: Path) -> list[dict[str, Any]]:
    """Return what a run warned of, `{"step": int, "warning": str}` each, oldest first; empty where it never did."""
    return read_log(output_dir / WARNINGS_FILE)


def find_tracker(report_to: str) -> str | None:
    """Return what `Accelerator(log_with=)` takes. Raises ValueError where the tracker is not installed, which
    Accelerate would pass over in silence."""
    if report_to == "none":
        return None
    if importlib.util.find_spec(report_to) is None:
        raise ValueError(
            f"report_to={report_to!r}: not installed; pip install {report_to}, or give tensorboard or none (the JSON "
            "lines are written in any case)"
        )
    return report_to


def start_tracker(accelerator: Accelerator, recipe: Recipe) -> None:
    """Start one tracker's run a start of the command, named as output_dir is, with the recipe less this machine's
    paths."""
    name, logs = Path(recipe.run.output_dir).resolve().name, str(Path(recipe.run.output_dir) / "logs")
    settings = {key: value if isinstance(value, (bool, int, float, str)) else str(value)
                for key, value in published_recipe(recipe).items()}  # fmt: skip
    # W&B's own record of the machine holds the command line with its paths, and what is printed
    quiet = {"x_disable_meta": True, "console": "off", "disable_git": True, "disable_code": True}
    of_each: dict[str, dict[str, Any]] = {
        "trackio": {"name": name, "resume": "allow"},
        "wandb": {"name": name, "group": name, "dir": logs, "settings": quiet},
    }
    accelerator.init_trackers(PROJECT, config=settings, init_kwargs=of_each)


def log_image(accelerator: Accelerator, name: str, image: np.ndarray, step: int) -> None:
    """Show an image (H, W, 3) uint8 RGB in TensorBoard, whose files stay here: breasts go to no hosted tracker."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")


class KnnProbe:
    """k-NN on the labeled files of one task: whether features become useful, long before the losses say so. A volume is
    its middle slice.

    labels: a label table (docs/finetuning.md); rows without a label are left out.
    Each of several processes reads and encodes its share. Raises ValueError for what cannot be used, a file included: a
    curve of other files is another curve.
    """

    def __init__(self, labels: Path, task: str, image_processor: MammoDinoImageProcessor, processes: Processes):
        try:
            table = read_labels(labels, [task])
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"knn_labels={error}") from error
        table = table[table[task].notna()]
        paths = [labels.parent / file for file in table["file"]]
        if missing := [path for path in paths if not path.is_file()]:
            raise ValueError(f"knn_labels={labels}: {len(missing)} of its files do not exist, {missing[0]} first")
        self.labels, self.patients = labels, table["patient"].to_numpy()
        classes, self.y = np.unique(class_names(table[task]).to_numpy(str), return_inverse=True)
        num_patients = [len(set(self.patients[self.y == number])) for number in range(len(classes))]
        if len(classes) < 2 or min(num_patients) < 2:
            raise ValueError(
                f"knn_task={task}: {labels} has {dict(zip(classes.tolist(), num_patients, strict=True))} patients of "
                "each class; at least two classes are needed, with two patients each"
            )
        folds = StratifiedGroupKFold(min(MAX_FOLDS, *num_patients), shuffle=True, random_state=0)
        self.folds = list(folds.split(self.y, self.y, self.patients))
        self.places = range(processes.index, len(paths), processes.count)  # of the own paths among all
        self.paths, self.processes = [paths[place] for place in self.places], processes
        self.reader = SliceReader(image_processor, slices_per_volume=1)
        fits = 4 * len(self.paths) * image_processor.size["height"] * image_processor.size["width"] <= MAX_CACHE_BYTES
        self.images = list(self._images()) if fits else None
        if not fits:  # all are read once, so that a bad file is refused now
            for _ in self._images():
                pass

    def auc(self, encoder: MammoDinoModel) -> float:
        """Return the AUC over all files, each predicted from other patients' files; of several classes the macro
        mean. Every process calls it."""
        images = self._images() if self.images is None else self.images
        keyed = ((None, image.inputs) for image in images)
        own = [row for _, row in extract_features(encoder, keyed, pool="both", batch_size=KNN_BATCH_SIZE)]
        placed = dict(self.processes.gather(list(zip(self.places, own, strict=True))))
        rows = [placed[place] for place in range(len(self.y))]
        classifier = nearest_neighbors(min(len(learn) for learn, _ in self.folds))
        probabilities = cross_val_predict(classifier, np.stack(rows), self.y, cv=self.folds, method="predict_proba")
        return auc(self.y, probabilities)

    def _images(self) -> Iterator[RenderedSlice]:
        for images in read_files(self.paths, self.reader):
            if isinstance(images, str):
                raise ValueError(f"knn_labels={self.labels}: {images}; take that row out")
            yield from images


class Monitor:
    """Meters of one process. What one does alone, or takes long over, all wait for.

    Raises ValueError, before the first step, where the labeled set of the recipe cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        processes: Processes,
        corpus: Corpus,
        teacher: Network,
        first_step: int,
        global_batch_size: int,
    ):
        run = recipe.run
        self.recipe, self.run, self.encoder = recipe, run, teacher.backbone
        self.accelerator, self.processes = accelerator, processes
        self.first_step, self.global_batch_size = first_step, global_batch_size
        self.is_main = accelerator.is_main_process
        self.watch = CollapseWatch(round(PATIENCE_FRACTION * run.max_steps))
        self.knn = self.images = None
        if run.knn_steps:
            self.knn = KnnProbe(Path(run.knn_labels), run.knn_task, image_processor(corpus, recipe), processes)
        if self.is_main:
            for file in (LOG_FILE, WARNINGS_FILE):
                forget_after(Path(run.output_dir) / file, first_step)
            if run.visualization_steps and run.fsdp:
                self.warn(
                    first_step, "visualization_steps: no images with fsdp, where no process holds the whole teacher"
                )
            elif run.visualization_steps:
                self.images = corpus_images(corpus, image_processor(corpus, recipe))
        processes.wait()
        start_tracker(accelerator, recipe)
        dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
        if self.is_main:
            logger.info("%s, matrix products in %s", accelerator.device, str(dtype).removeprefix("torch."))
        peak = torch.tensor([matmul_peak(accelerator.device, dtype) / 1e12], device=accelerator.device)
        self.peak_teraflops = float(accelerator.gather(peak).sum())  # of all devices
        if first_step == 0 and (first_look := self.look(0)) and self.is_main:
            self.write(0, first_look)
        self.progress = show_progress(
            total=run.max_steps, initial=first_step, unit="step", disable=not self.is_main, desc="pretrain"
        )
        self.data_seconds, self.steps_since_log = 0.0, 0
        self.started = self.last_log = time.monotonic()

    def preflight(self, views: PretrainingViews) -> None:
        """Say, before the first step of a run, what the views share that its losses compare."""
        if self.run.preflight and self.is_main and self.first_step == 0:
            values, warnings = describe(shared_information(views, self.recipe), self.recipe)
            if values:
                self.write(0, values)
            for message in warnings:
                self.warn(0, message)
        self.processes.wait()

    def wait(self, iterator: Iterator[Batch]) -> Iterator[Batch]:
        """Yield from the iterator, with the time spent waiting for it counted."""
        while True:
            started = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.data_seconds += time.monotonic() - started
            yield item

    def step(self, step: int) -> bool:
        """Count a finished step (1-based); True where a log line is due. Nothing here waits for the device."""
        self.steps_since_log += 1
        self.progress.update()
        every = (self.run.logging_steps, self.run.knn_steps, self.run.visualization_steps)
        return any(self.is_due(step, steps) for steps in every)

    def is_due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.run.max_steps)

    def gather(self, losses: dict[str, torch.Tensor], total: torch.Tensor, batch: Batch) -> dict[str, float]:
        """Return what the processes saw at this step, averaged over them; all of them call this."""
        flops = step_flops(batch, self.encoder.config, self.recipe)
        own = {f"loss_{name}": float(value.detach()) for name, value in losses.items()}
        own |= {"loss": float(total.detach()), **tissue_shares(batch), "forward_teraflops": flops / 1e12}
        own["data_wait_seconds"] = self.data_seconds
        table = self.accelerator.gather(torch.tensor([list(own.values())], device=self.accelerator.device))
        values = dict(zip(own, table.mean(dim=0).tolist(), strict=True))
        return values | {"data_wait_seconds": float(table[:, -1].max())}  # the slowest holds the others up

    def log(
        self, step: int, values: dict[str, float], features: torch.Tensor, targets: Probabilities | None = None
    ) -> None:
        """Write a line. All processes call this. values: what `gather` gave, and what else is to be written;
        features (B, D) of the student and targets (G, B, K) of the teacher, where it has any: this process's."""
        accelerator = self.accelerator
        if targets is not None:
            values |= target_statistics(targets.dense(), lambda mean: accelerator.reduce(mean, reduction="mean"))
        values["feature_rank"] = feature_rank(accelerator.gather(features.detach().float()))
        now = time.monotonic()
        seconds, steps = max(now - self.last_log, 1e-9), self.steps_since_log
        forwards = steps * self.run.gradient_accumulation_steps * accelerator.num_processes
        values |= {
            "images_per_second": steps * self.global_batch_size / seconds,
            "mfu": values.pop("forward_teraflops") * forwards / seconds / self.peak_teraflops,
            "data_wait_fraction": values["data_wait_seconds"] / seconds,
            "seconds_left": (now - self.started) / (step - self.first_step) * (self.run.max_steps - step),
            "peak_memory_gib": peak_memory_gib(accelerator.device),
        }
        found = self.look(step)
        if self.is_main:
            for message in self.watch.check(step, values):
                self.warn(step, message)
            self.write(step, values | found)
            if self.run.preflight and step - self.run.logging_steps < FIRST_STEPS <= step:
                if still := learned_nothing(read_log(Path(self.run.output_dir) / LOG_FILE)):
                    self.warn(step, still)
            shown = {key: f"{values[key]:.3g}" for key in ("loss", "images_per_second", "mfu")}
            self.progress.set_postfix(shown, refresh=False)
        self.data_seconds, self.steps_since_log = 0.0, 0
        looked = time.monotonic() - now  # a look is no part of the speed
        self.started, self.last_log = self.started + looked, now + looked

    def look(self, step: int) -> dict[str, float]:
        """Evaluate the teacher, all processes together, and draw it on the main one, where that is due."""
        found: dict[str, float] = {}
        if self.knn and self.is_due(step, self.run.knn_steps):
            with torch.compiler.set_stance("force_eager"):  # whole images are no shapes to compile for
                found["knn_auc"] = self.knn.auc(self.encoder)
        if self.images and self.is_due(step, self.run.visualization_steps):
            with torch.compiler.set_stance("force_eager"):
                title = f"Step {step}: what patch features see"
                image = draw_features(self.encoder, self.images["pixel_values"], self.images["tissue_mask"], title)
            folder = Path(self.run.output_dir) / "images"
            folder.mkdir(parents=True, exist_ok=True)
            write_figure(image, folder / f"step-{step:06d}.png")
            log_image(self.accelerator, "features", image, step)
        if self.is_due(step, self.run.knn_steps) or self.is_due(step, self.run.visualization_steps):
            self.processes.wait()
        return found

    def write(self, step: int, values: dict[str, float]) -> None:
        append_line(Path(self.run.output_dir) / LOG_FILE, {"step": step, **values})
        self.accelerator.log({name: value for name, value in values.items() if was_computed(name, value)}, step=step)

    def warn(self, step: int, message: str) -> None:
        """Log a warning, and append it to the run's WARNINGS_FILE, which `read_warnings` reads."""
        logger.warning("step %d: %s", step, message)
        append_line(Path(self.run.output_dir) / WARNINGS_FILE, {"step": step, "warning": message})

    def close(self) -> None:
        self.progress.close()


def tissue_shares(batch: Batch) -> dict[str, float]:
    """Return how much breast the views hold, and how much of the masked crops, and of the breast in them, is masked."""
    if "masks" not in batch:
        return {}
    masks, tissue = batch["masks"].cpu(), batch["global_tissue"]  # (G*B, h, w) each
    is_masked = masks.flatten(1).any(dim=1)
    masked_tissue = (tissue * masks).sum()
    return {
        "tissue_in_crops": float(batch["crop_tissue"].mean()),
        "tissue_in_masks": float(masked_tissue / masks.sum().clamp_min(1)),
        "masked_fraction": float(masks.sum() / masks[is_masked].numel()) if is_masked.any() else 0.0,
        "masked_tissue_fraction": float(masked_tissue / tissue[is_masked].sum().clamp_min(1)),
        "crops_below_minimum": float(batch["crops_below_minimum"].sum()),
        "slice_pairs": float(len(batch["slice_pairs"])),
    }


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory so far: of the device's allocator, on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
