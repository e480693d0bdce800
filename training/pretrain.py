"""Self-supervised pretraining: `accelerate launch -m training.pretrain RECIPE --corpus DIR --output_dir RUN`.

RECIPE is a YAML file or the name of one in training/recipes; every field can be overridden as `--name value`. Started
again with the same output_dir, a run goes on from its last good checkpoint.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed

from dataset_scripts.corpus.reader import Corpus, local_corpus
from modeling_mammodino.tools.command import command_line
from training.pretraining import checkpoints
from training.pretraining.canvas_objective import VIEW_KINDS, canvas_losses, prepare_canvas, view_weight
from training.pretraining.checkpoints import FiniteWatch
from training.pretraining.compute import keep_freed_memory
from training.pretraining.export import export_encoder
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
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Run both networks forward: return unweighted losses by name, and what the monitor looks for collapse in."""
    losses: dict[str, torch.Tensor] = {}
    shown: dict[str, torch.Tensor] = {}
    both = student(batch, is_student=True)
    if dense_targets is not None:
        losses |= canvas_losses(both.canvas, batch, dense_targets, recipe)
        shown["features"] = both.canvas.features.detach()
    if not recipe.uses_crops:
        return losses, shown
    with torch.no_grad():
        targets = targets_of(teacher(batch, is_student=False).crops, temperature)
    seen = both.crops
    num_pairs = NUM_GLOBAL_CROPS * (recipe.views.num_local_crops + NUM_GLOBAL_CROPS - 1)
    tau, tissue = recipe.loss.student_temperature, batch["slice_tissue"][batch["slice_tissue"] > 0]
    losses |= {
        "dino_global": dino_loss(seen.global_cls, targets.global_cls, tau, ignore_diagonal=True) / num_pairs,
        "dino_local": dino_loss(seen.local_cls, targets.global_cls, tau) / num_pairs,
        "ibot": ibot_loss(seen.masked_patches, targets.masked_patches, batch["masks"].flatten(1), tau),
        "koleo": sum(koleo_loss(features, batch["volume"]) for features in seen.features),
        "adjacent_slice": adjacent_slice_loss(seen.slice_cls, targets.slice_cls, None, tau),
        "adjacent_patch": adjacent_slice_loss(seen.slice_patches, targets.slice_patches, tissue, tau),
        "gram": seen.features.new_zeros(()),
    }
    if gram_teacher is not None:
        losses["gram"] = gram_loss(seen.patches, gram_teacher(batch), gram_teacher.counted_patches(batch))
    return losses, shown | {"targets": targets.global_cls, "features": seen.features[0].detach()}


def weighted_sum(losses: dict[str, torch.Tensor], recipe: Recipe) -> torch.Tensor:
    """Return the loss that is minimized; a loss that the recipe does not use is no part of it."""
    loss, fraction = recipe.loss, recipe.loss.view_regularizer_fraction
    terms = []
    if recipe.uses_crops:
        terms += [
            loss.dino_weight * (losses["dino_global"] + losses["dino_local"]),
            loss.ibot_weight * losses["ibot"],
            loss.koleo_weight * losses["koleo"],
            loss.adjacent_slice_weight * losses["adjacent_slice"],
            loss.adjacent_patch_weight * losses["adjacent_patch"],
            loss.gram_weight * losses["gram"],
        ]
    if "dense_statistics" in losses:
        terms.append(loss.dense_statistics_weight * losses["dense_statistics"])
        terms.append(loss.dense_components_weight * losses["dense_components"])
    for kind in VIEW_KINDS:
        if weight := view_weight(loss, kind):
            views = (1 - fraction) * losses[f"{kind}_agreement"] + fraction * losses[f"{kind}_spread"]
            terms.append(weight * views)
    return sum(terms[1:], start=terms[0])


def train(recipe: Recipe, load: Callable[..., Iterator[Batch]] | None = None) -> Path:
    """Run or resume a recipe; return the folder of the exported encoder. `load` may replace `load_batches`."""
    run = recipe.run
    accelerator = Accelerator(
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        mixed_precision="bf16" if run.bf16 else "no",
        cpu=not torch.accelerator.is_available(),  # said aloud: else torchrun's processes each run alone on a CPU
        log_with=find_tracker(run.report_to),
        project_config=ProjectConfiguration(run.output_dir, logging_dir=str(Path(run.output_dir) / "logs")),
    )
    corpus = Corpus(local_corpus(run.corpus))
    global_batch = run.per_device_train_batch_size * run.gradient_accumulation_steps * accelerator.num_processes

    if accelerator.device.type == "cpu":
        keep_freed_memory()
    set_seed(run.seed)
    student = Network(recipe, corpus.image_processor)
    teacher, targets_of = make_teacher(student), TeacherTargets(recipe)
    for module in (student, teacher, targets_of):
        module.to(accelerator.device)
    if run.fsdp:
        shard([student, teacher], accelerator.device)
    optimizer = torch.optim.AdamW(
        param_groups(student, recipe.model.num_hidden_layers, recipe.optimizer),
        betas=(recipe.optimizer.adam_beta1, recipe.optimizer.adam_beta2),
        fused=True,
    )
    modules = {"student": student, "teacher": teacher, "targets": targets_of}
    gram_teacher = GramTeacher(teacher, recipe).to(accelerator.device) if recipe.loss.gram_weight > 0 else None
    if gram_teacher:
        modules["gram_teacher"] = gram_teacher
    crops, canvas = recipe.uses_crops, (recipe.model.image_height, recipe.model.image_width)
    views = PretrainingViews(
        corpus,
        recipe.views,
        recipe.model.patch_size,
        run.seed,
        global_batch,
        slice_pairs=recipe.uses_slice_pairs,
        crops=crops,
        canvas=canvas if recipe.uses_canvas else None,
    )
    dense_targets = prepare_canvas(student.backbone, views, recipe, accelerator.device) if recipe.uses_canvas else None
    if dense_targets:
        modules["dense_targets"] = dense_targets
        teacher.load_state_dict(student.state_dict())
    step = resume(recipe, modules, optimizer)
    if run.gradient_checkpointing:
        student.backbone.gradient_checkpointing_enable()
    if run.torch_compile:
        for network in (student, teacher):
            compile_blocks(network)
    wrapped = student if run.fsdp else accelerator.prepare(student)

    schedules = make_schedules(recipe, global_batch)
    monitor = Monitor(recipe, accelerator, corpus, teacher, step, global_batch)
    watch = FiniteWatch(views, run, accelerator)
    batches = monitor.wait((load or load_batches)(views, recipe, step, accelerator))
    wrapped.train()
    while step < run.max_steps:
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
            accelerator.clip_grad_norm_(part.parameters(), recipe.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(teacher, student, now["teacher_momentum"])
        step += 1

        if monitor.step(step):
            watch.check()
            values = monitor.gather(losses, total, batch)
            monitor.log(step, values | now, **shown)
        if step % run.save_steps == 0 or step == run.max_steps:
            watch.check()
            is_main = accelerator.is_main_process
            checkpoints.save_checkpoint(Path(run.output_dir), step, modules, optimizer, recipe, is_main)
            accelerator.wait_for_everyone()
    monitor.close()
    encoder = Path(run.output_dir) / "encoder"
    export_encoder(teacher.backbone, corpus, recipe, step, encoder, accelerator.is_main_process)
    accelerator.print(f"encoder: {encoder}")
    accelerator.end_training()
    return encoder


def resume(recipe: Recipe, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint where there is one, else a former run's if the recipe names one; return the number of finished
    steps."""
    path = checkpoints.find_checkpoint(recipe)
    if path is None:
        if recipe.model.init_from_checkpoint:
            load_former_run(recipe, modules)
        return 0
    checkpoints.check_same_recipe(recipe, yaml.safe_load((path / checkpoints.RECIPE_FILE).read_text()), path)
    step = checkpoints.load_checkpoint(path, modules, optimizer)
    logger.info("going on from %s", path)
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
