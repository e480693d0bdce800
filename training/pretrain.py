"""Self-supervised pretraining: `python -m training.pretrain RECIPE --corpus DIR --output_dir RUN`; several processes by
`accelerate launch --quiet -m training.pretrain ...`, without --quiet that hides what is wrong behind its traceback.

RECIPE is a YAML file or the name of one in training/recipes; every field can be overridden as `--name value`. Started
again with the same output_dir, a run goes on from its last good checkpoint.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed

from dataset_scripts.corpus.reader import Corpus, local_corpus
from modeling_mammodino.tools.command import command_line
from training.pretraining import checkpoints
from training.pretraining.canvas_objective import VIEW_KINDS, canvas_losses, prepare_canvas, view_weight
from training.pretraining.checkpoints import FiniteWatch, Saver
from training.pretraining.compute import keep_freed_memory, set_precision
from training.pretraining.export import export_checkpoint, origin
from training.pretraining.losses.adjacent_slice import adjacent_slice_loss
from training.pretraining.losses.dense_regression import DenseTargets
from training.pretraining.losses.dino import dino_loss
from training.pretraining.losses.gram import gram_loss
from training.pretraining.losses.ibot import ibot_loss
from training.pretraining.losses.koleo import koleo_loss
from training.pretraining.losses.targets import TeacherTargets
from training.pretraining.monitoring import Monitor, find_tracker
from training.pretraining.networks import (
    GramTeacher,
    Network,
    compile_blocks,
    load_former_run,
    make_teacher,
    shard,
    update_teacher,
)
from training.pretraining.optimization import make_schedules, param_groups, set_learning_rates
from training.pretraining.processes import STOPPED, Processes, StopSignals
from training.pretraining.recipe import Recipe, load_recipe
from training.pretraining.views.sample import NUM_GLOBAL_CROPS, Batch, PretrainingViews, load_batches

logger = logging.getLogger(__name__)


def compute_losses(
    batch: Batch,
    student: torch.nn.Module,
    teacher: Network,
    targets_of: TeacherTargets,
    temperature: float,
    recipe: Recipe,
    gram_teacher: GramTeacher | None = None,
    dense_targets: DenseTargets | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Run both networks forward: return unweighted losses by name, and what the monitor looks for collapse in."""
    losses: dict[str, torch.Tensor] = {}
    shown: dict[str, Any] = {}
    both = student(batch, is_student=True)
    if dense_targets is not None:
        losses |= canvas_losses(both.canvas, batch, dense_targets, recipe)
        shown["features"] = both.canvas.features.detach()
    if not recipe.uses_crops:
        return losses, shown
    with torch.no_grad():
        targets = targets_of(teacher(batch, is_student=False).crops, temperature)
    seen, loss, tau = both.crops, recipe.loss, recipe.loss.student_temperature
    num_pairs = NUM_GLOBAL_CROPS * (recipe.views.num_local_crops + NUM_GLOBAL_CROPS - 1)
    if loss.dino_weight:
        dino_global = dino_loss(seen.global_cls, targets.global_cls, tau, ignore_diagonal=True)
        losses["dino_global"] = dino_global / num_pairs
        losses["dino_local"] = dino_loss(seen.local_cls, targets.global_cls, tau) / num_pairs
        shown["targets"] = targets.global_cls
    if loss.ibot_weight:
        losses["ibot"] = ibot_loss(
            seen.masked_patches, targets.masked_patches, batch["masks"].flatten(1), batch["masked_places"], tau
        )
    if loss.koleo_weight:
        losses["koleo"] = torch.stack([koleo_loss(each, batch["breast"]) for each in seen.features]).sum()
    if loss.adjacent_slice_weight:
        losses["adjacent_slice"] = adjacent_slice_loss(seen.slice_cls, targets.slice_cls, None, tau)
    if loss.adjacent_patch_weight:
        tissue = batch["slice_patch_tissue"]
        losses["adjacent_patch"] = adjacent_slice_loss(seen.slice_patches, targets.slice_patches, tissue, tau)
    if loss.gram_weight:
        losses["gram"] = seen.patches[:0].sum()  # 0 until it begins
        if gram_teacher is not None:
            losses["gram"] = gram_loss(seen.patches, gram_teacher(batch), gram_teacher.counted_patches(batch))
    return losses, shown | {"features": seen.features[0].detach()}


def weighted_sum(losses: dict[str, torch.Tensor], recipe: Recipe) -> torch.Tensor:
    """Return the loss that is minimized; a loss of weight 0 is not among `losses`, for nothing of it is computed."""
    loss, fraction = recipe.loss, recipe.loss.view_regularizer_fraction
    weights = {
        "dino_global": loss.dino_weight,
        "dino_local": loss.dino_weight,
        "ibot": loss.ibot_weight,
        "koleo": loss.koleo_weight,
        "adjacent_slice": loss.adjacent_slice_weight,
        "adjacent_patch": loss.adjacent_patch_weight,
        "gram": loss.gram_weight,
        "dense_statistics": loss.dense_statistics_weight,
        "dense_components": loss.dense_components_weight,
    }
    for kind in VIEW_KINDS:
        weights[f"{kind}_agreement"] = view_weight(loss, kind) * (1 - fraction)
        weights[f"{kind}_spread"] = view_weight(loss, kind) * fraction
    return torch.stack([weights[name] * value for name, value in losses.items()]).sum()


def train(recipe: Recipe, load: Callable[..., Iterator[Batch]] | None = None) -> Path:
    """Run or resume a recipe; return the folder of the exported encoder. `load` may replace `load_batches`."""
    run = recipe.run
    set_precision(run)
    accelerator = Accelerator(
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        mixed_precision="bf16" if run.bf16 else "no",
        cpu=not torch.accelerator.is_available(),  # said aloud: else torchrun's processes each run alone on a CPU
        log_with=find_tracker(run.report_to),
        project_config=ProjectConfiguration(run.output_dir, logging_dir=str(Path(run.output_dir) / "logs")),
    )
    corpus = Corpus(local_corpus(run.corpus))
    global_batch = run.per_device_train_batch_size * run.gradient_accumulation_steps * accelerator.num_processes
    checkpoint = checkpoints.find_checkpoint(recipe)
    if checkpoint:
        checkpoints.check_same_run(recipe, global_batch, checkpoint)
        checkpoints.check_corpus(corpus, checkpoint)

    if accelerator.device.type == "cpu":
        keep_freed_memory()
    set_seed(run.seed)
    views = PretrainingViews(
        corpus,
        recipe.views,
        recipe.model.patch_size,
        run.seed,
        global_batch,
        slice_pairs=recipe.uses_slice_pairs,
        crops=recipe.uses_crops,
        canvas=(recipe.model.image_height, recipe.model.image_width) if recipe.uses_canvas else None,
    )
    student = Network(recipe, corpus.image_processor, checkpoint).to(accelerator.device)
    dense_targets = prepare_canvas(student.backbone, views, recipe, accelerator.device) if recipe.uses_canvas else None
    teacher, targets_of = make_teacher(student), TeacherTargets(recipe).to(accelerator.device)
    if run.fsdp:
        # a CPU's layer norm takes no weights of another type than its input's, and autocast leaves it as it is
        has_bf16_weights = accelerator.mixed_precision == "bf16" and accelerator.device.type != "cpu"
        shard([student, teacher], accelerator.device, torch.bfloat16 if has_bf16_weights else None)
    optimizer = torch.optim.AdamW(
        param_groups(student, recipe.model.num_hidden_layers, recipe.optimizer),
        betas=(recipe.optimizer.adam_beta1, recipe.optimizer.adam_beta2),
        fused=True,
    )
    modules = {"student": student, "teacher": teacher, "targets": targets_of}
    gram_teacher = GramTeacher(teacher, recipe).to(accelerator.device) if recipe.loss.gram_weight > 0 else None
    if gram_teacher:
        modules["gram_teacher"] = gram_teacher
    if dense_targets:
        modules["dense_targets"] = dense_targets
    step = resume(recipe, modules, optimizer, checkpoint)
    if run.gradient_checkpointing:
        student.backbone.gradient_checkpointing_enable()
    if run.torch_compile:
        for network in (student, teacher):
            compile_blocks(network)
    wrapped = student if run.fsdp else accelerator.prepare(student)

    schedules = make_schedules(recipe, global_batch)
    processes = Processes()
    monitor = Monitor(recipe, accelerator, processes, corpus, teacher, step, global_batch)
    monitor.preflight(views)
    watch = FiniteWatch(views, run, accelerator)
    batches = monitor.wait((load or load_batches)(views, recipe, step, accelerator))
    wrapped.train()
    about = {"global_batch_size": global_batch, "corpus": corpus.fingerprints[-1]}
    with StopSignals(processes) as stop, Saver(recipe, modules, optimizer, about, processes) as saver:
        while step < run.max_steps and not stop.is_agreed():
            now = {name: float(values[step]) for name, values in schedules.items()}
            set_learning_rates(optimizer, now)
            gram = gram_teacher and gram_teacher.at(step, teacher)
            for forward in range(run.gradient_accumulation_steps):
                batch = next(batches)
                seed_forward(run.seed, step, forward, accelerator.process_index)
                with accelerator.accumulate(wrapped):
                    with accelerator.autocast():
                        losses, shown = compute_losses(
                            batch, wrapped, teacher, targets_of, now["teacher_temperature"], recipe, gram, dense_targets
                        )
                        total = weighted_sum(losses, recipe)
                    watch.note(total, step * run.gradient_accumulation_steps + forward)
                    accelerator.backward(total)
            for part in student.children():  # backbone and heads apart
                norm = accelerator.clip_grad_norm_(part.parameters(), recipe.optimizer.max_grad_norm or math.inf)
                watch.note_gradient(norm, step)
            optimizer.step()
            optimizer.zero_grad()
            update_teacher(teacher, student, now["teacher_momentum"])
            step += 1

            if monitor.step(step):
                watch.check()
                values = monitor.gather(losses, total, batch)
                monitor.log(step, values | now, **shown)
            if saver.is_due(step):
                watch.check()
                saver.save(step)
        watch.check()
        saved = saver.finish(step)
    monitor.close()
    encoder, is_finished = Path(run.output_dir) / "encoder", step == run.max_steps
    if is_finished and processes.is_main:
        export_checkpoint(saved, encoder, corpus, replace=True)
        print(f"encoder: {encoder}")
    accelerator.end_training()
    if not is_finished:
        stopped = KeyboardInterrupt(f"stopped, and saved as {saved}; the same command goes on")
        raise stopped if processes.is_main else SystemExit(STOPPED)
    return encoder


def resume(
    recipe: Recipe, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer, path: Path | None
) -> int:
    """Load a checkpoint where there is one, else a former run's if the recipe names one, and note where weights come
    from; return the number of finished steps."""
    recipe.origin = checkpoints.read_state(path).get("origin", {}) if path else {}
    recipe.origin = origin(recipe)
    if path is None:
        if recipe.model.init_from_checkpoint:
            load_former_run(recipe, modules)
        return 0
    step = checkpoints.load_checkpoint(path, modules, optimizer)
    logger.info("going on from %s", path)
    output_dir = Path(recipe.run.output_dir)
    later = [each.name for each in checkpoints.list_checkpoints(output_dir) if checkpoints.step_of(each) > step]
    if later:
        logger.warning("%s: %s give way to the next that is saved; move what is to stay", output_dir, ", ".join(later))
    return step


def seed_forward(*numbers: int) -> None:
    """Seed stochastic depth, the only randomness in the networks, by seed, step, forward and process, so that a resumed
    run draws what the uninterrupted one does."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def main(arguments: list[str] | None = None) -> None:
    with command_line("pretrain"):
        train(load_recipe(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    main()
