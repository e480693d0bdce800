"""Student and teacher: one network each, seen side by side by the losses."""

import copy
import logging
from typing import NamedTuple

import torch
from torch import nn

from modeling_mammodino import MammoDinoConfig, MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.convert_dinov2 import load_encoder, rebuild
from modeling_mammodino.layers_mammodino import as_pair

from ..recipe import ModelRecipe, Recipe
from ..views.sample import NUM_GLOBAL_CROPS
from .continued import former_config
from .heads import ProjectionHead

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


class Outputs(NamedTuple):
    """Prototype logits of one network for one batch. Letters: see training.losses; P slice pairs, N patches. Patches
    have as many prototypes K as class tokens, unless they have a head of their own."""

    global_cls: torch.Tensor  # (G, B, K)
    local_cls: torch.Tensor  # (L, B, K), student only
    masked_patches: torch.Tensor  # (M, K)
    slice_cls: torch.Tensor  # (P, K): student's slice, teacher's neighbour
    slice_patches: torch.Tensor  # (T, K), the T tissue patches of the pairs
    features: torch.Tensor  # (G, B, D), class tokens before the head
    patches: torch.Tensor  # (G*B, N, D), patch tokens of the global crops; (0, N, D) without Gram anchoring


class Network(nn.Module):
    """Encoder and projection heads: one head for class tokens and patches (DINOv2's short recipe), or an `ibot_head`
    for patches beside it (its long recipe). Heads start from random weights; image_processor: what standardises the
    views, for weights that were made with another."""

    def __init__(self, recipe: Recipe, image_processor: MammoDinoImageProcessor | None = None):
        super().__init__()
        model = recipe.model
        self.is_sharded = recipe.run.fsdp
        self.tissue_tokens, self.shows_patches = recipe.views.tissue_tokens, recipe.loss.gram_weight > 0
        self.backbone = start_backbone(recipe, image_processor)
        self.head = ProjectionHead(
            model.hidden_size, model.head_hidden_size, model.head_bottleneck_size, model.num_prototypes
        )
        self.ibot_head = None
        if model.separate_ibot_head:
            self.ibot_head = ProjectionHead(
                model.hidden_size,
                model.ibot_head_hidden_size or model.head_hidden_size,
                model.ibot_head_bottleneck_size or model.head_bottleneck_size,
                num_patch_prototypes(model),
            )

    def forward(self, batch: Batch, is_student: bool) -> Outputs:
        """The student sees masked global crops, local crops and the slices; the teacher unmasked global crops and
        the neighbours. Heads see class tokens and the patches that a loss needs, never all patches."""
        masks = batch["masks"].flatten(1)  # (G*B, N)
        global_cls, global_patches = self.encode(
            batch["global_crops"], batch["global_tissue"], masks if is_student else None
        )
        local_cls = global_cls[:0]
        if is_student and len(batch["local_crops"]):
            local_cls, _ = self.encode(batch["local_crops"], batch["local_tissue"])
        slice_cls, slice_patches = global_cls[:0], global_patches[:0, 0]
        num_pairs, slice_tissue = len(batch["slice_pairs"]), batch["slice_tissue"]
        if num_pairs or self.is_sharded:
            pixels = batch["slice_pairs"][:, 0 if is_student else 1]  # (P, 1, S, S)
            if not num_pairs:  # shards are gathered by all processes together, so all must encode: here a blank
                pixels = pixels.new_zeros(1, *pixels.shape[1:])
                slice_tissue = slice_tissue.new_zeros(1, *slice_tissue.shape[1:])
            slice_cls, patches = self.encode(pixels, slice_tissue)
            slice_cls, slice_patches = slice_cls[:num_pairs], patches[slice_tissue.flatten(1) > 0]

        logits = self.project([global_cls, local_cls, slice_cls], [global_patches[masks], slice_patches])
        batch_size = len(global_cls) // NUM_GLOBAL_CROPS
        return Outputs(
            global_cls=logits[0].unflatten(0, (NUM_GLOBAL_CROPS, batch_size)),
            local_cls=logits[1].unflatten(0, (len(local_cls) // batch_size, batch_size)),
            slice_cls=logits[2],
            masked_patches=logits[3],
            slice_patches=logits[4],
            features=global_cls.unflatten(0, (NUM_GLOBAL_CROPS, batch_size)),
            patches=global_patches if self.shows_patches else global_patches[:0],
        )

    def project(self, cls_tokens: list[torch.Tensor], patches: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of each tensor of tokens (n, D), in one call of a head: its prototypes are normalised once."""
        if self.ibot_head is None:
            return project_together(self.head, cls_tokens + patches)
        return project_together(self.head, cls_tokens) + project_together(self.ibot_head, patches)

    def encode(
        self, pixels: torch.Tensor, tissue: torch.Tensor, masks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return encode(self.backbone, pixels, tissue if self.tissue_tokens else None, masks)


def encode(
    backbone: MammoDinoModel,
    pixels: torch.Tensor,
    tissue_mask: torch.Tensor | None,
    masks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class tokens (n, D) and patch tokens (n, N, D) of crops (n, 1, S, S)."""
    sequence = backbone(pixels, bool_masked_pos=masks, tissue_mask=tissue_mask).last_hidden_state
    return sequence[:, 0], sequence[:, 1 + backbone.config.num_register_tokens :]


def project_together(head: nn.Module, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(head(torch.cat(tokens)).split([len(each) for each in tokens]))


def num_patch_prototypes(model: ModelRecipe) -> int:
    return (model.separate_ibot_head and model.ibot_num_prototypes) or model.num_prototypes


def start_backbone(recipe: Recipe, image_processor: MammoDinoImageProcessor | None) -> MammoDinoModel:
    """The encoder of `init_from`, one of the shape of `init_from_checkpoint`, or a random one."""
    if recipe.model.init_from:
        return load_backbone(recipe, image_processor)
    return MammoDinoModel(former_config(recipe)) if recipe.model.init_from_checkpoint else random_backbone(recipe)


def random_backbone(recipe: Recipe) -> MammoDinoModel:
    model = recipe.model
    return MammoDinoModel(
        MammoDinoConfig(
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            image_size=recipe.views.global_crop_size,
            patch_size=model.patch_size,
            num_register_tokens=model.num_register_tokens,
            layerscale_value=model.layerscale_value,
            drop_path_rate=model.drop_path_rate,
        )
    )


def load_backbone(recipe: Recipe, image_processor: MammoDinoImageProcessor | None = None) -> MammoDinoModel:
    """The encoder of `init_from`, for pixels as `image_processor` standardises them. Its position embeddings stay at
    their stored size, and reach the crops' by its own rule: so nothing is lost, and the export takes any size as well
    as the source did. Raises ValueError where the recipe's architecture is another."""
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
    return rebuild(
        encoder,
        {"embeddings.register_tokens": torch.cat(registers, dim=1).detach()},
        num_register_tokens=model.num_register_tokens,
        drop_path_rate=model.drop_path_rate,
    )


def make_teacher(student: Network) -> Network:
    """An exact copy, backbone and head, without gradients and without stochastic depth."""
    teacher = copy.deepcopy(student).eval()
    return teacher.requires_grad_(False)


def compile_blocks(network: Network) -> None:
    """Compiles the transformer blocks in place: one graph serves all of one size, and what surrounds them, where crops
    of several sizes meet, stays as it is."""
    for block in network.backbone.encoder.layer:
        block.compile()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, parameters only."""
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    targets, sources = zip(*pairs, strict=True)
    torch._foreach_lerp_(list(targets), [source.detach() for source in sources], 1 - momentum)
