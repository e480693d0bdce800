"""The recipe of a pretraining run: typed, from YAML, overridden on the command line, checked before any work.

Where a value is unpublished for MammoDINO the default is DINOv2's; what differs is said at the field. Fields carry the
names of `transformers.TrainingArguments` where it has one.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from modeling_mammodino.tools.command import did_you_mean
from training.settings import SettingsParser, check_values, setting

RECIPES = Path(__file__).parents[1] / "recipes"
IN_STEPS = "in steps, or below 1 as a fraction of max_steps"
SAMPLES_PER_BLOCK = 4096  # in which each kind of image has its exact share
# fields of each model_size; the last three are the field's ViT-Ti, ViT-S and ViT-B
SIZED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "per_device_train_batch_size")
MODEL_SIZES = {
    "nano": (128, 4, 2, 32),
    "micro": (192, 6, 3, 32),
    "tiny": (192, 12, 3, 128),
    "small": (384, 12, 6, 256),
    "base": (768, 12, 12, 256),
}


@dataclass
class ModelRecipe:
    init_from: str = setting(
        "", "Weights that student and teacher start from: a Hub id, a folder or DINOv2's .pth; empty: random."
    )
    init_from_checkpoint: str = setting(
        "",
        "A former run's checkpoint-N folder: its networks and heads go on, optimizer and schedules start afresh.",
    )
    model_size: str = setting(
        "",
        f"Sets {', '.join(SIZED)}, each of which can still be given; the learning rate follows batch and width by its "
        "two reference fields. Empty: they stand for themselves.",
        choices=("", *MODEL_SIZES),
    )
    hidden_size: int = setting(768, "Width D of the encoder.", low=1)
    num_hidden_layers: int = setting(12, "Transformer blocks.", low=1)
    num_attention_heads: int = setting(12, "Attention heads.", low=1)
    patch_size: int = setting(14, "Patch side in pixels.", low=1)
    num_register_tokens: int = setting(4, "Register tokens; what init_from lacks starts fresh.", low=0)
    layerscale_value: float = setting(1e-5, "Initial LayerScale; with init_from, its own.", low=0)
    drop_path_rate: float = setting(0.3, "Stochastic depth of the student.", low=0, high=0.99)
    head_hidden_size: int = setting(2048, "Hidden size of the projection head.", low=1)
    head_bottleneck_size: int = setting(256, "Bottleneck of the projection head.", low=1)
    num_prototypes: int = setting(65536, "Prototypes K.", low=2)
    separate_ibot_head: bool = setting(False, "Patches go through a head of their own (DINOv2's long recipe).")
    ibot_num_prototypes: int = setting(0, "Prototypes of that head; 0: num_prototypes.", low=0)
    ibot_head_hidden_size: int = setting(0, "Hidden size of that head; 0: head_hidden_size.", low=0)
    ibot_head_bottleneck_size: int = setting(0, "Bottleneck of that head; 0: head_bottleneck_size.", low=0)
    dense_components: int = setting(64, "Whitened components of a patch's surroundings that are predicted.", low=1)
    projector_hidden_size: int = setting(512, "Hidden size of the projectors of breast and patient views.", low=1)
    projector_size: int = setting(64, "Embedding size of these projectors.", low=1)
    whiten_patch_embeddings: bool = setting(
        False, "A random encoder's patch embedding starts as mixtures of whitened patches of the corpus, else as noise."
    )
    image_height: int = setting(518, "Canvas height of the exported image processor, in pixels.", low=1)
    image_width: int = setting(518, "Canvas width of the exported image processor, in pixels.", low=1)


@dataclass
class ViewsRecipe:
    kind_weights: list[str] = setting(
        [], "Shares of the samples by kind of image, such as dbt=2 ffdm=1, other kinds left out; empty: volumes as is."
    )
    global_crop_size: int = setting(224, "Side of the global crops in pixels.", low=1)
    gram_crop_size: int = setting(
        0, "Side of the global crops that the gram teacher sees, in pixels; 0: the student's own crops.", low=0
    )
    local_crop_size: int = setting(98, "Side of the local crops in pixels.", low=1)
    num_local_crops: int = setting(8, "Local crops an image.", low=0)
    global_crop_scale: list[float] = setting([0.32, 1.0], "Area of global crops over the image.", low=0, high=1)
    local_crop_scale: list[float] = setting([0.05, 0.32], "Area of local crops over the image.", low=0, high=1)
    crop_ratio: list[float] = setting([0.75, 4 / 3], "Aspect of all crops, width over height.", low=0.01)
    tissue_aware_crops: bool = setting(True, "Crops hold a minimum of breast; off: plain random crops.")
    global_min_tissue: float = setting(0.5, "Least breast fraction of a global crop.", low=0, high=1)
    local_min_tissue: float = setting(0.7, "Least breast fraction of a local crop.", low=0, high=1)
    tissue_aware_masks: bool = setting(True, "Only breast patches are masked; off: any patch.")
    tissue_tokens: bool = setting(False, "Student and teacher drop background patches (DESIGN: signature idea).")
    mask_probability: float = setting(0.5, "Share of global crops that are masked.", low=0, high=1)
    mask_ratio: list[float] = setting([0.1, 0.5], "Masked share of the patches that may be masked.", low=0, high=1)
    horizontal_flip_probability: float = setting(0.5, "Left-right flips.", low=0, high=1)
    vertical_flip_probability: float = setting(0.0, "Upside-down flips.", low=0, high=1)
    jitter_probability: float = setting(0.8, "Share of crops with brightness and contrast jitter.", low=0, high=1)
    brightness: float = setting(0.4, "Brightness factor drawn in 1 +- this.", low=0, high=1)
    contrast: float = setting(0.4, "Contrast factor drawn in 1 +- this.", low=0, high=1)
    blur_probability: list[float] = setting([1.0, 0.1, 0.5], "Blur of global 1, global 2, local crops.", low=0, high=1)
    blur_sigma_px: list[float] = setting([0.1, 2.0], "Standard deviation of the blur.", low=0.01)
    solarize_probability: float = setting(0.0, "Solarization of global crop 2 (DINOv2: 0.2).", low=0, high=1)
    slice_crop_scale: list[float] = setting([0.5, 1.0], "Area of the crop shared by two slices.", low=0, high=1)
    slice_pairing: str = setting(
        "within_reach",
        "Neighbor of a slice: any within reach (DBT), or the one above or below (axial: CT, MR).",
        choices=("within_reach", "axial"),
    )
    slice_max_distance_mm: float = setting(3.0, "Farthest neighbor where the slice spacing is known.", low=0)
    slice_max_distance_slices: int = setting(2, "Farthest neighbor where it is not.", low=1)
    # the canvas: whole images for dense regression and agreement of views; our choice, all of it
    views_per_patient: int = setting(
        0, "Views of one patient that stand together in a batch, half of each breast; 0: images as they come.", low=0
    )
    single_source_batches: bool = setting(True, "The patients of a step are of one source (with views_per_patient).")
    canvas_tokens: int = setting(96, "Patches of the canvas that the encoder sees; all where it has fewer.", low=1)
    canvas_scatter_probability: float = setting(0.5, "Share scattered over the breast, else a blob.", low=0, high=1)
    canvas_mask_probability: float = setting(0.5, "Share of the blobs that are masked.", low=0, high=1)
    canvas_mask_ratio: float = setting(0.3, "Masked share of the tokens of such a blob.", low=0, high=1)
    canvas_rotation_degrees: float = setting(17.0, "Rotation drawn in +- this.", low=0)
    canvas_scale: list[float] = setting([0.83, 1.2], "Scale.", low=0.1)
    canvas_aspect: float = setting(1.09, "Stretch of the width over the height, drawn log-uniform up to this.", low=1)
    canvas_shift_fraction: float = setting(0.03, "Shift in +- this, of the canvas' height.", low=0, high=1)
    canvas_blur_probability: float = setting(0.4, "Share that is blurred or sharpened.", low=0, high=1)
    canvas_gamma: float = setting(0.4, "Exponent of gray values of half of the images, log-uniform in +- this.", low=0)
    canvas_gain: float = setting(0.22, "Gain drawn in 1 +- this.", low=0, high=1)
    canvas_offset: float = setting(0.075, "Offset of gray values of 0..1, drawn in +- this.", low=0, high=1)
    canvas_field: float = setting(
        0.37, "Gain that varies smoothly over the image, in +- this, and offset, in +- 0.4 times this.", low=0, high=1
    )
    canvas_noise: float = setting(0.03, "Largest standard deviation of noise, in gray values of 0..1.", low=0, high=1)


@dataclass
class LossRecipe:
    dino_weight: float = setting(1.0, "Weight of the DINO loss.", low=0)
    ibot_weight: float = setting(1.0, "Weight of the iBOT loss.", low=0)
    koleo_weight: float = setting(0.1, "Weight of KoLeo, summed over the global crops.", low=0)
    adjacent_slice_weight: float = setting(1.0, "Weight of the adjacent-slice loss on the class token.", low=0)
    adjacent_patch_weight: float = setting(0.5, "Weight of the same on co-located tissue patches.", low=0)
    gram_weight: float = setting(0.0, "Weight of Gram anchoring (DINOv3: 2.0); 0: off.", low=0)
    gram_start_step: int = setting(
        0, "Step at which the gram teacher is taken from the teacher, and the loss begins.", low=0
    )
    gram_update_steps: int = setting(10000, "Steps after which it is taken anew; 0: never.", low=0)
    gram_max_updates: int = setting(3, "How often it is taken anew at most.", low=0)
    dense_statistics_weight: float = setting(0.0, "Weight of regressing local statistics from patches; 0: off.", low=0)
    dense_components_weight: float = setting(0.0, "Weight of regressing whitened surroundings; 0: off.", low=0)
    breast_weight: float = setting(0.0, "Weight of agreement between the views of a breast; 0: off.", low=0)
    patient_weight: float = setting(0.0, "Weight of agreement between the views of a patient; 0: off.", low=0)
    contralateral_weight: float = setting(
        0.0, "Weight of agreement, between views, of what differs between the two breasts; 0: off.", low=0
    )
    view_regularizer: str = setting(
        "visreg", "What keeps agreeing views from collapse.", choices=("visreg", "sigreg", "coding_rate")
    )
    view_regularizer_fraction: float = setting(0.6, "Its share beside the agreement's.", low=0, high=1)
    student_temperature: float = setting(0.1, "Temperature of the student.", low=1e-3)
    teacher_temperature: float = setting(0.07, "Temperature of the teacher after warm-up.", low=1e-3)
    teacher_temperature_start: float = setting(0.04, "Temperature of the teacher at step 0.", low=1e-3)
    teacher_temperature_warmup_steps: float = setting(0.3, f"Its linear warm-up, {IN_STEPS}.", low=0)
    teacher_targets: str = setting(
        "sinkhorn_knopp", "How the teacher is kept from collapse.", choices=("sinkhorn_knopp", "centering")
    )


@dataclass
class OptimizerRecipe:
    learning_rate: float = setting(4e-3, "Peak learning rate at a batch of 1024.", low=0)
    learning_rate_reference_batch: int = setting(
        1024, "The peak is scaled by sqrt(batch / this); 0 takes learning_rate as it is.", low=0
    )
    learning_rate_reference_width: int = setting(
        0, "The peak is scaled by this / hidden_size (muP, arXiv 2203.03466, for all layers alike); 0: not.", low=0
    )
    min_learning_rate: float = setting(1e-6, "Learning rate at the end of the cosine.", low=0)
    warmup_steps: float = setting(0.1, f"Linear warm-up of the learning rate, {IN_STEPS}.", low=0)
    weight_decay: float = setting(0.04, "Weight decay at step 0.", low=0)
    weight_decay_end: float = setting(0.4, "Weight decay at the end of its cosine.", low=0)
    adam_beta1: float = setting(0.9, "AdamW beta1.", low=0, high=1)
    adam_beta2: float = setting(0.999, "AdamW beta2.", low=0, high=1)
    max_grad_norm: float = setting(3.0, "Clipping, separately for backbone and each head; 0: off.", low=0)
    layerwise_decay: float = setting(0.9, "Learning-rate factor from a block to the one below.", low=0, high=1)
    patch_embed_lr_multiplier: float = setting(0.2, "Learning-rate factor of the patch embedding.", low=0)
    freeze_backbone_steps: float = setting(
        0, f"First steps in which only the head learns (with init_from), {IN_STEPS}.", low=0
    )
    freeze_last_layer_steps: float = setting(
        0.01, f"First steps in which the prototypes do not move, {IN_STEPS}.", low=0
    )
    teacher_momentum: float = setting(0.992, "EMA momentum at step 0.", low=0, high=1)
    teacher_momentum_end: float = setting(1.0, "EMA momentum at the end of its cosine.", low=0, high=1)


@dataclass
class RunRecipe:
    corpus: str = setting("", "Folder written by dataset_scripts.corpus, or its fsspec address, then copied once.")
    output_dir: str = setting("", "Where checkpoints, logs and the exported encoder go.")
    max_steps: int = setting(125000, "Optimizer steps; every schedule is in steps.", low=1)
    per_device_train_batch_size: int = setting(64, "Images a process and forward.", low=1)
    gradient_accumulation_steps: int = setting(
        1, "Forwards a step. Targets and KoLeo balance within one: two are not one twice as large.", low=1
    )
    dataloader_num_workers: int = setting(4, "Worker processes that prepare views.", low=0)
    dataloader_prefetch_factor: int = setting(2, "Batches that each of them holds ready.", low=1)
    seed: int = setting(0, "Seed of order, views, initial weights and stochastic depth.", low=0)
    save_steps: int = setting(1250, "Steps between checkpoints.", low=1)
    save_total_limit: int = setting(2, "Checkpoints kept.", low=1)
    logging_steps: int = setting(10, "Steps between log lines.", low=1)
    bf16: bool | None = setting(None, "bfloat16 autocast; unset: on a GPU that has it, not on a CPU.")
    fsdp: bool = setting(False, "Shard weights, gradients and optimizer over the processes (FSDP2); else DDP.")
    torch_compile: bool = setting(False, "Compile the transformer blocks of student and teacher.")
    gradient_checkpointing: bool = setting(False, "Recompute activations in the student's backward.")
    report_to: str = setting(
        "tensorboard",
        "Where the log goes beside logs/log.jsonl.",
        choices=("tensorboard", "trackio", "wandb", "none"),
    )
    visualization_steps: int = setting(1250, "Steps between images of the teacher's features; 0: none.", low=0)
    knn_steps: int = setting(0, "Steps between k-NN scores of the teacher on knn_labels; 0: none.", low=0)
    knn_labels: str = setting("", "Label table (docs/finetuning.md) with the column knn_task.")
    knn_task: str = setting("", "Column of knn_labels that is predicted.")
    preflight: bool = setting(
        True, "Before the first step, estimate what views share, and warn of a run that cannot learn."
    )
    resume_from_checkpoint: str = setting(
        "",
        "A checkpoint folder, which later ones in output_dir give way to; empty: the last good one in output_dir.",
    )


@dataclass
class Recipe:
    model: ModelRecipe = field(default_factory=ModelRecipe)
    views: ViewsRecipe = field(default_factory=ViewsRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)
    origin: dict[str, Any] = field(default_factory=dict)  # of the weights, noted when the run begins: folders move

    @property
    def uses_slice_pairs(self) -> bool:
        return self.loss.adjacent_slice_weight > 0 or self.loss.adjacent_patch_weight > 0

    @property
    def uses_crops(self) -> bool:
        """Whether a loss of student and teacher needs crops."""
        loss = self.loss
        weights = (loss.dino_weight, loss.ibot_weight, loss.koleo_weight, loss.gram_weight)
        return self.uses_slice_pairs or any(weight > 0 for weight in weights)

    @property
    def uses_canvas(self) -> bool:
        """Whether dense regression or agreement of views needs the whole image."""
        loss = self.loss
        dense = (loss.dense_statistics_weight, loss.dense_components_weight)
        return self.uses_view_groups or any(weight > 0 for weight in dense)

    @property
    def uses_view_groups(self) -> bool:
        loss = self.loss
        return any(weight > 0 for weight in (loss.breast_weight, loss.patient_weight, loss.contralateral_weight))

    def flat(self) -> dict[str, Any]:
        """Every field by its name, as in the YAML file and on the command line."""
        sections = (self.model, self.views, self.loss, self.optimizer, self.run)
        return {name: value for section in sections for name, value in asdict(section).items()}

    def save(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(self.flat(), sort_keys=False))


def whole_steps(steps: float, max_steps: int) -> int:
    """Return a number of steps that may be given as a fraction of the run (as `TrainingArguments.warmup_steps`)."""
    return round(steps * max_steps) if steps < 1 else int(steps)


SECTIONS: tuple[Any, ...] = (ModelRecipe, ViewsRecipe, LossRecipe, OptimizerRecipe, RunRecipe)
# what may change between the parts of one run: it alters where and how fast, never what is computed; of batch and
# accumulation a checkpoint holds the product over all processes, which may not
MAY_CHANGE_ON_RESUME = {
    "corpus", "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_num_workers",
    "dataloader_prefetch_factor", "save_steps", "save_total_limit", "logging_steps", "report_to",
    "visualization_steps", "knn_steps", "knn_labels", "knn_task", "preflight", "resume_from_checkpoint",
    "torch_compile", "gradient_checkpointing", "fsdp",
}  # fmt: skip


def load_recipe(arguments: list[str]) -> Recipe:
    """`RECIPE [--name value ...]`: a YAML file, or the name of one in training/recipes, with overrides.

    Raises ValueError naming the field and what it may be.
    """
    parser = SettingsParser(SECTIONS, prog="pretrain", usage="python -m training.pretrain RECIPE [--name value ...]")
    parser.add_argument("recipe", help="a YAML file, or the name of one in training/recipes")
    known = [each.name for section in SECTIONS for each in fields(section)]
    if arguments and not arguments[0].startswith("-"):
        values = _read_yaml(arguments[0], known)
        parser.set_defaults(**(_of_size(values.get("model_size", "")) | values))
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--model_size", default="")
    parser.set_defaults(**_of_size(given.parse_known_args(arguments)[0].model_size))  # outdoes the file
    *sections, _ = parser.parse_args_into_dataclasses(args=arguments)
    recipe = Recipe(*sections)
    for section in sections:
        check_values(section)
    _check_together(recipe)
    return recipe


def _of_size(size: str) -> dict[str, int]:
    """Return the fields that a model size sets; none for a name that is none, which is refused later."""
    return dict(zip(SIZED, MODEL_SIZES.get(size, ()), strict=False))


def _read_yaml(name: str, known: list[str]) -> dict[str, Any]:
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else RECIPES / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(each.stem for each in RECIPES.glob("*.yaml")))
        raise ValueError(f"recipe {name!r}: no file {path}; shipped recipes: {shipped}")
    values = yaml.safe_load(path.read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path}: must be lines of `name: value`")
    for key in values:
        if key not in known:
            raise ValueError(f"recipe {path}: unknown field {key!r}{did_you_mean(str(key), known)}")
    return values


def parse_kind_weights(pairs: Sequence[str]) -> dict[str, float]:
    """Parse ["dbt=2", "ffdm=1"] to {"dbt": 2.0, "ffdm": 1.0}. Raises ValueError naming the field."""
    weights: dict[str, float] = {}
    for pair in pairs:
        kind, _, number = pair.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not kind or kind in weights or not 0 < weight < math.inf:
            raise ValueError(
                f"kind_weights={list(pairs)}: {pair!r} must be KIND=WEIGHT, each kind once and its weight above 0, "
                "such as dbt=2 ffdm=1"
            )
        weights[kind] = weight
    if any(weight / sum(weights.values()) * SAMPLES_PER_BLOCK < 1 for weight in weights.values()):
        raise ValueError(
            f"kind_weights={list(pairs)}: a kind has less than one sample in {SAMPLES_PER_BLOCK}; raise its weight, or "
            "take it out"
        )
    return weights


def _check_together(recipe: Recipe) -> None:
    """Raises ValueError where fields contradict one another."""
    model, views, loss, run = recipe.model, recipe.views, recipe.loss, recipe.run

    def check(name: str, is_wrong: Any, reason: str) -> None:
        if is_wrong:
            raise ValueError(f"{name}={recipe.flat()[name]}: {reason}")

    check("hidden_size", model.hidden_size % model.num_attention_heads, "must be a multiple of num_attention_heads")
    for name in ("ibot_num_prototypes", "ibot_head_hidden_size", "ibot_head_bottleneck_size"):
        is_lonely = getattr(model, name) and not model.separate_ibot_head
        check(name, is_lonely, "needs --separate_ibot_head true")
    check("ibot_num_prototypes", model.ibot_num_prototypes == 1, "must be 2 or more, or 0 for num_prototypes")
    crop_sizes = ("global_crop_size", "local_crop_size", "gram_crop_size") if recipe.uses_crops else ()
    for name in (*crop_sizes, "image_height", "image_width"):
        is_cut = recipe.flat()[name] % model.patch_size
        check(name, is_cut, f"must be a multiple of patch_size={model.patch_size}")
    for name in (
        "warmup_steps",
        "teacher_temperature_warmup_steps",
        "freeze_backbone_steps",
        "freeze_last_layer_steps",
    ):
        steps = recipe.flat()[name]
        check(name, steps >= 1 and steps != int(steps), "must be whole steps, or a fraction of max_steps below 1")
        is_warmup = "warmup" in name  # a run may end with its warm-up, but what is frozen has to thaw
        is_long = steps > run.max_steps if is_warmup else steps >= max(run.max_steps, 1)
        remedy = f"{'is longer than' if is_warmup else 'is not over within'} max_steps={run.max_steps}"
        check(name, steps and is_long, f"{remedy}; give fewer steps, or a fraction of max_steps such as 0.1")
    gram = loss.gram_weight
    check("gram_crop_size", views.gram_crop_size and not gram, "needs a gram_weight above 0")
    is_smaller = 0 < views.gram_crop_size < views.global_crop_size
    check("gram_crop_size", is_smaller, "must be at least global_crop_size, or 0")
    is_late = gram and loss.gram_start_step >= run.max_steps
    check("gram_start_step", is_late, f"must be below max_steps={run.max_steps}")
    if gram and run.fsdp:
        raise ValueError("gram_weight: the Gram teacher is not sharded yet; give --fsdp false, or --gram_weight 0")
    if model.init_from and model.init_from_checkpoint:
        raise ValueError("init_from_checkpoint: cannot be combined with init_from; give one of them")
    scales = ("global_crop_scale", "local_crop_scale", "slice_crop_scale")
    for name in (*scales, "canvas_scale", "crop_ratio", "mask_ratio", "blur_sigma_px"):
        pair = getattr(views, name)
        check(name, len(pair) != 2 or pair[0] > pair[1], "must be two numbers, the smaller first")
        check(name, name in scales and pair[0] <= 0, "must be above 0")
    check("blur_probability", len(views.blur_probability) != 3, "must be three numbers: global 1, global 2, local")
    parse_kind_weights(views.kind_weights)
    if not (recipe.uses_crops or recipe.uses_canvas):
        raise ValueError("every loss has weight 0: nothing would be learned; give one a weight")
    group = views.views_per_patient
    check("views_per_patient", group % 2, "must be even: half of them are of each breast")
    check(
        "views_per_patient", recipe.uses_view_groups and not group, "must be 2 or more where views of a patient agree"
    )
    check("kind_weights", group and views.kind_weights, "cannot be combined with views_per_patient; leave one out")
    is_torn = group and run.per_device_train_batch_size % group
    check("per_device_train_batch_size", is_torn, f"must be a multiple of views_per_patient={group}")
    is_bare = run.fsdp and model.num_register_tokens == 0  # a parameter without elements
    check("num_register_tokens", is_bare, "cannot be sharded; give 1 or more, or --fsdp false")
    check("fsdp", recipe.uses_canvas and run.fsdp, "the canvas objective is not sharded; give --fsdp false")
    if not (run.corpus and run.output_dir):
        raise ValueError("corpus and output_dir must be given: --corpus DIR --output_dir RUN")
    is_split = run.knn_steps and run.fsdp
    check("knn_steps", is_split, "no k-NN with fsdp, where no process holds the whole teacher; give 0")
    lacks_labels = run.knn_steps and not (run.knn_labels and run.knn_task)
    check("knn_steps", lacks_labels, "needs knn_labels, a CSV, and knn_task, a column of it; give both, or 0")
