"""Student and teacher: an encoder with projection heads each, where they start from, and how they are updated.

The teacher of Gram anchoring is an earlier state of the teacher's encoder. Sharding (FSDP2) is torch's `fully_shard` on
Accelerate's processes: Accelerate's own plugin turns into DDP on a CPU, where it could not be tested.
"""

import copy
import logging
import warnings
from pathlib import Path
from typing import NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.parametrizations import weight_norm

from modeling_mammodino import MammoDinoConfig, MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.modeling_mammodino import as_pair
from modeling_mammodino.tissue_tokens import to_device
from modeling_mammodino.tools.convert import load_encoder, rebuild
from training.pretraining.views.sample import NUM_GLOBAL_CROPS, Batch, at_places

from .canvas_objective import CanvasHeads, CanvasOutputs
from .checkpoints import CONFIG_FILE, load_module, read_recipe
from .losses.cross_entropy import Logits
from .recipe import ModelRecipe, Recipe

logger = logging.getLogger(__name__)

# what fixes the shapes of the networks, and of the centers
SHAPES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_register_tokens", "head_hidden_size",
    "head_bottleneck_size", "num_prototypes", "separate_ibot_head", "ibot_num_prototypes", "ibot_head_hidden_size",
    "ibot_head_bottleneck_size", "teacher_targets",
)  # fmt: skip


class ProjectionHead(nn.Module):
    """MLP D -> hidden -> hidden -> bottleneck, L2-normalized, then weight-normed prototypes: (n, D) -> (n, K)
    (dinov2/layers/dino_head.py), whose products are left to what needs them."""

    def __init__(self, hidden_size: int, head_hidden_size: int, bottleneck_size: int, num_prototypes: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, head_hidden_size),
            nn.GELU(),
            nn.Linear(head_hidden_size, head_hidden_size),
            nn.GELU(),
            nn.Linear(head_hidden_size, bottleneck_size),
        )
        prototypes = nn.Linear(bottleneck_size, num_prototypes, bias=False)
        for module in [*self.mlp, prototypes]:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.last_layer = weight_norm(prototypes)
        self.last_layer.parametrizations.weight.original0.data.fill_(1.0)

    def forward(self, features: torch.Tensor) -> Logits:
        bottleneck = self.mlp(features)
        epsilon = 1e-6 if bottleneck.dtype == torch.float16 else 1e-12
        return Logits(nn.functional.normalize(bottleneck, dim=-1, eps=epsilon), self.last_layer.weight)


class Outputs(NamedTuple):
    """Prototype logits of one network for one batch, None of those whose loss has weight 0. Letters: see
    training.pretraining.losses; P slice pairs, N patches. Patches have as many prototypes K as class tokens, unless
    they have a head of their own."""

    global_cls: Logits | None  # (G, B, K)
    local_cls: Logits | None  # (L, B, K), student only
    masked_patches: Logits | None  # (M, K)
    slice_cls: Logits | None  # (P, K): student's slice, teacher's neighbor
    slice_patches: Logits | None  # (T, K), the T tissue patches of the pairs
    features: torch.Tensor | None  # (G, B, D), class tokens before the head; always the student's
    patches: torch.Tensor | None  # (G*B, N, D), patch tokens of the global crops, for Gram anchoring


class Seen(NamedTuple):
    """What one network makes of a batch; None where the recipe does not use it."""

    crops: Outputs | None
    canvas: CanvasOutputs | None  # student only


class Network(nn.Module):
    """Encoder and projection heads: one head for class tokens and patches (DINOv2's short recipe), or an `ibot_head`
    for patches beside it (its long recipe); none that no loss uses. Heads start from random weights; image_processor:
    what standardizes the views, for weights that were made with another; checkpoint: what is to be loaded, whose own
    configuration the encoder then has."""

    def __init__(
        self, recipe: Recipe, image_processor: MammoDinoImageProcessor | None = None, checkpoint: Path | None = None
    ):
        super().__init__()
        model = recipe.model
        self.is_sharded = recipe.run.fsdp
        self.tissue_tokens, self.loss = recipe.views.tissue_tokens, recipe.loss
        self.backbone = start_backbone(recipe, image_processor, checkpoint)
        self.mean, self.std = image_processor.mean_and_std if image_processor else (0.5, 0.25)
        self.canvas_heads = CanvasHeads(recipe) if recipe.uses_canvas else None
        self.head = self.ibot_head = None
        has_patches = self.loss.ibot_weight or self.loss.adjacent_patch_weight
        has_shared_patches = has_patches and not model.separate_ibot_head
        if self.loss.dino_weight or self.loss.adjacent_slice_weight or has_shared_patches:
            self.head = ProjectionHead(
                model.hidden_size, model.head_hidden_size, model.head_bottleneck_size, model.num_prototypes
            )
        if has_patches and model.separate_ibot_head:
            self.ibot_head = ProjectionHead(
                model.hidden_size,
                model.ibot_head_hidden_size or model.head_hidden_size,
                model.ibot_head_bottleneck_size or model.head_bottleneck_size,
                num_patch_prototypes(model),
            )

    def forward(self, batch: Batch, is_student: bool) -> Seen:
        """Encode crops and, for the student, canvases, as far as the batch holds them."""
        return Seen(
            self.encode_crops(batch, is_student) if "global_crops" in batch else None,
            self.canvas_heads(self.backbone, self.standardize(batch["canvas"]), batch)
            if self.canvas_heads is not None and is_student
            else None,
        )

    def standardize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return pixels, uint8 as they travel to the device, as the encoder sees them, float32."""
        return (pixels.float() / 255 - self.mean) / self.std

    def encode_crops(self, batch: Batch, is_student: bool) -> Outputs:
        """Encode what the losses need: for the student masked global crops, local crops and the slices, for the teacher
        unmasked global crops and the neighbors. Heads see class tokens and the patches of a loss, never all patches."""
        loss, masks = self.loss, batch["masks"].flatten(1)  # (G*B, N)
        tokens: dict[str, torch.Tensor] = {}  # what heads see, by its name in Outputs
        whole = None  # class tokens (G*B, D) and patches (G*B, N, D) of the global crops
        if is_student or loss.dino_weight or loss.ibot_weight:
            whole = global_cls, global_patches = self.encode(
                batch["global_crops"], batch["global_tissue"], masks if is_student else None
            )
            if loss.dino_weight:
                tokens["global_cls"] = global_cls
            if loss.ibot_weight:
                tokens["masked_patches"] = at_places(global_patches, batch["masked_places"])
        if is_student and loss.dino_weight:
            local_crops, local_tissue = batch["local_crops"], batch["local_tissue"]
            tokens["local_cls"] = (
                self.encode(local_crops, local_tissue)[0] if len(local_crops) else tokens["global_cls"][:0]
            )
        if loss.adjacent_slice_weight or loss.adjacent_patch_weight:
            slice_cls, slice_patches = self.encode_slices(batch, is_student, whole)
            if loss.adjacent_slice_weight:
                tokens["slice_cls"] = slice_cls
            if loss.adjacent_patch_weight:
                tokens["slice_patches"] = slice_patches
        logits = self.project(tokens)
        batch_size = len(batch["global_crops"]) // NUM_GLOBAL_CROPS
        for name in logits.keys() & {"global_cls", "local_cls"}:
            logits[name] = logits[name]._replace(features=by_crop(logits[name].features, batch_size))
        return Outputs(
            global_cls=logits.get("global_cls"),
            local_cls=logits.get("local_cls"),
            masked_patches=logits.get("masked_patches"),
            slice_cls=logits.get("slice_cls"),
            slice_patches=logits.get("slice_patches"),
            features=by_crop(whole[0], batch_size) if whole else None,
            patches=whole[1] if whole and loss.gram_weight else None,
        )

    def encode_slices(
        self, batch: Batch, is_student: bool, whole: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return class tokens (P, D) of the student's slices or the teacher's neighbors, and their tissue patches
        (T, D); without a pair, none of `whole`, the global crops'."""
        num_pairs, tissue = len(batch["slice_pairs"]), batch["slice_tissue"]
        if whole and not (num_pairs or self.is_sharded):
            return whole[0][:0], whole[1][:0, 0]
        pixels = batch["slice_pairs"][:, 0 if is_student else 1]  # (P, 1, S, S)
        if not num_pairs:  # shards are gathered by all processes together, so all must encode: here a blank
            pixels, tissue = (each.new_zeros(1, *each.shape[1:]) for each in (pixels, tissue))
        cls, patches = self.encode(pixels, tissue)
        return cls[:num_pairs], at_places(patches, batch["slice_places"])

    def project(self, tokens: dict[str, torch.Tensor]) -> dict[str, Logits]:
        """Return the logits of each tensor of tokens (n, D), in one call of a head: its prototypes are normalized
        once."""
        patch_head = self.ibot_head or self.head
        logits: dict[str, Logits] = {}
        for head in (self.head, self.ibot_head):
            seen = {
                name: each
                for name, each in tokens.items()
                if (patch_head if name.endswith("patches") else self.head) is head
            }
            if head is not None and seen:
                features, prototypes = head(torch.cat(list(seen.values())))
                parts = features.split([len(each) for each in seen.values()])
                logits |= {name: Logits(part, prototypes) for name, part in zip(seen, parts, strict=True)}
        return logits

    def encode(
        self, pixels: torch.Tensor, tissue: torch.Tensor, masks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return encode(self.backbone, self.standardize(pixels), tissue if self.tissue_tokens else None, masks)


def encode(
    backbone: MammoDinoModel,
    pixels: torch.Tensor,
    tissue_mask: torch.Tensor | None,
    masks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return class tokens (n, D) and patch tokens (n, N, D) of crops (n, 1, S, S)."""
    sequence = backbone(pixels, bool_masked_pos=masks, tissue_mask=tissue_mask).last_hidden_state
    return sequence[:, 0], sequence[:, 1 + backbone.config.num_register_tokens :]


def by_crop(rows: torch.Tensor, batch_size: int) -> torch.Tensor:  # (C * B, ...) -> (C, B, ...)
    return rows.unflatten(0, (len(rows) // batch_size, batch_size))


def num_patch_prototypes(model: ModelRecipe) -> int:
    return (model.separate_ibot_head and model.ibot_num_prototypes) or model.num_prototypes


def start_backbone(
    recipe: Recipe, image_processor: MammoDinoImageProcessor | None, checkpoint: Path | None
) -> MammoDinoModel:
    """Return one of the shape of a checkpoint that is to be loaded, else the encoder of `init_from`, one of the shape
    of `init_from_checkpoint`, or a random one."""
    if checkpoint and (checkpoint / CONFIG_FILE).is_file():  # which the first versions did not write
        return MammoDinoModel(MammoDinoConfig.from_json_file(checkpoint / CONFIG_FILE))
    if recipe.model.init_from:
        return load_backbone(recipe, image_processor)
    return MammoDinoModel(former_config(recipe)) if recipe.model.init_from_checkpoint else random_backbone(recipe)


def random_backbone(recipe: Recipe) -> MammoDinoModel:
    model = recipe.model
    canvas = (model.image_height, model.image_width)
    image_size = canvas if recipe.uses_canvas else recipe.views.global_crop_size  # of the position embeddings
    return MammoDinoModel(
        MammoDinoConfig(
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            image_size=image_size,
            patch_size=model.patch_size,
            num_register_tokens=model.num_register_tokens,
            layerscale_value=model.layerscale_value,
            drop_path_rate=model.drop_path_rate,
        )
    )


def load_backbone(recipe: Recipe, image_processor: MammoDinoImageProcessor | None = None) -> MammoDinoModel:
    """Load the encoder of `init_from`, for pixels as `image_processor` standardizes them.

    Its position embeddings stay at their stored size, and reach the crops' by its own rule: so nothing is lost, and
    the export takes any size as well as the source did. Raises ValueError where the recipe's architecture is another.
    """
    model = recipe.model
    encoder = load_encoder(model.init_from, image_processor=image_processor)
    config = encoder.config
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"):
        wanted, found = getattr(model, name), getattr(config, name)
        if as_pair(found) != as_pair(wanted):
            raise ValueError(
                f"{name}={wanted}: init_from={model.init_from} has {name}={found}; give --{name} {found}, or other "
                "weights"
            )
    fresh = model.num_register_tokens - config.num_register_tokens
    if fresh < 0:
        raise ValueError(
            f"num_register_tokens={model.num_register_tokens}: init_from={model.init_from} has "
            f"{config.num_register_tokens}, none of which can be left out; give at least as many"
        )
    if fresh:
        logger.info("init_from=%s has %d register tokens: %d fresh", model.init_from, config.num_register_tokens, fresh)
    registers = [encoder.embeddings.register_tokens, 1e-6 * torch.randn(1, fresh, config.hidden_size)]  # DINOv2's start
    model_with_registers = rebuild(
        encoder,
        {"embeddings.register_tokens": torch.cat(registers, dim=1).detach()},
        num_register_tokens=model.num_register_tokens,
        drop_path_rate=model.drop_path_rate,
    )
    return cast(MammoDinoModel, model_with_registers)


def former_config(recipe: Recipe) -> MammoDinoConfig:
    """Return the configuration of the encoder in `init_from_checkpoint`, with this run's stochastic depth. Its
    position embeddings keep their stored size, from which they are interpolated to any crop.

    Raises ValueError where the folder is no checkpoint, or the recipe's networks are others, naming field and remedy.
    """
    folder = Path(recipe.model.init_from_checkpoint)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"init_from_checkpoint={folder}: holds no {CONFIG_FILE}; give a run's checkpoint-N folder")
    wanted = recipe.flat()
    former = Recipe().flat() | read_recipe(folder)
    for name in SHAPES:
        if wanted[name] != former[name]:
            raise ValueError(
                f"{name}={wanted[name]}: init_from_checkpoint={folder} has {name}={former[name]}; give --{name} "
                f"{former[name]}, or another checkpoint"
            )
    config = MammoDinoConfig.from_json_file(folder / CONFIG_FILE)
    config.drop_path_rate = recipe.model.drop_path_rate
    return config


def load_former_run(recipe: Recipe, modules: dict[str, nn.Module]) -> None:
    """Load student, teacher and centers of `init_from_checkpoint` in place; optimizer, schedules and order are the new
    run's. Raises ValueError where a file is damaged."""
    folder = Path(recipe.model.init_from_checkpoint)
    try:
        for name in ("student", "teacher", "targets"):
            load_module(modules[name], folder / f"{name}.safetensors")
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"init_from_checkpoint={folder}: cannot be read ({error}); give another checkpoint") from error


def make_teacher(student: Network) -> Network:
    """Return an exact copy, backbone and head, without gradients and without stochastic depth."""
    teacher = copy.deepcopy(student).eval()
    return teacher.requires_grad_(False)


def compile_blocks(network: Network) -> None:
    """Compile the transformer blocks in place: one graph serves all of one size, and what surrounds them, where crops
    of several sizes meet, stays as it is."""
    for block in network.backbone.encoder.layer:
        block.compile()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Update in place: teacher <- momentum * teacher + (1 - momentum) * student, parameters only."""
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    targets, sources = zip(*pairs, strict=True)
    torch._foreach_lerp_(list(targets), [source.detach() for source in sources], 1 - momentum)


class GramTeacher(nn.Module):
    """A frozen copy of the teacher's encoder, taken at `gram_start_step` and anew every `gram_update_steps`, at most
    `gram_max_updates` times (Siméoni et al. 2025, DINOv3). When it is taken follows from the recipe and the step alone,
    so a resumed run needs its weights and no counter."""

    def __init__(self, teacher: Network, recipe: Recipe):
        super().__init__()
        self.loss, self.tissue_tokens = recipe.loss, recipe.views.tissue_tokens
        self.keeps_to_tissue = recipe.views.tissue_aware_masks or recipe.views.tissue_tokens
        self.backbone = copy.deepcopy(teacher.backbone)
        self.standardize = teacher.standardize

    def is_taken_at(self, step: int) -> bool:
        since, every = step - self.loss.gram_start_step, self.loss.gram_update_steps
        is_update = every > 0 and since > 0 and since % every == 0 and since // every <= self.loss.gram_max_updates
        return since == 0 or is_update

    def at(self, step: int, teacher: Network) -> "GramTeacher | None":
        """Return itself, after taking the teacher's weights where that is due before `step`; None before it begins."""
        if self.is_taken_at(step):
            self.backbone.load_state_dict(teacher.backbone.state_dict())
        return self if step >= self.loss.gram_start_step else None

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Return patch features (G*B, N, D) of the whole global crops, on the student's grid."""
        crops, tissue = batch.get("gram_crops", batch["global_crops"]), batch.get("gram_tissue", batch["global_tissue"])
        _, patches = encode(self.backbone, self.standardize(crops), tissue if self.tissue_tokens else None)
        return resize_patches(patches, tuple(tissue.shape[1:]), tuple(batch["global_tissue"].shape[1:]))

    def counted_patches(self, batch: Batch) -> torch.Tensor | None:
        """Return which patches count, (G*B, N) bool: those with breast, where masks or tokens keep to it (our choice:
        air resembles air in any teacher); else None, all."""
        tissue = batch["global_tissue"].flatten(1)
        return to_device(tissue > 0, batch["global_crops"].device) if self.keeps_to_tissue else None


def resize_patches(patches: torch.Tensor, grid: tuple[int, ...], wanted: tuple[int, ...]) -> torch.Tensor:
    """Resize features (n, h*w, D) of a patch grid (h, w) to another, (n, h'*w', D): bicubic, float32. Dropped patches
    are zero, which changes the length of what they are mixed into, not its direction."""
    if grid == wanted:
        return patches
    maps = patches.float().transpose(1, 2).unflatten(2, grid)  # (n, D, h, w)
    return nn.functional.interpolate(maps, size=wanted, mode="bicubic").flatten(2).transpose(1, 2)


def shard(networks: list[Network], device: torch.device, gathered: torch.dtype | None = None) -> None:
    """Shard in place over all processes, block by block, before the optimizer is made.

    gathered: what weights of blocks and heads are gathered in, autocast's type, so that they are half the bytes; the
    shards, optimizer, moving average and sums of gradients stay float32, as what blocks hand on to one another does by
    autocast. The student's are kept whole from its first forward on until their backward: less to gather, for a copy in
    memory. Raises ValueError where there is one process only.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        raise ValueError("fsdp=True: there is one process; start several with torchrun or accelerate launch")
    # its networks return views of their logits; nothing here writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for network in networks:
        has_backward = any(each.requires_grad for each in network.parameters())  # which frees what a forward gathered
        heads = [part for part in network.children() if part is not network.backbone]
        for part in (*network.backbone.encoder.layer, *heads):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=not has_backward)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)  # a root keeps its own whole until a backward
