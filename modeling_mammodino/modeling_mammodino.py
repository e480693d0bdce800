"""The MammoDINO encoder: a ViT with registers in which background costs nothing.

Parameter names are those of a Dinov2-with-registers checkpoint on disk (transformers writes these names in every
version), so that either implementation opens the other's weights. The blocks are self-contained because the in-memory
names of the native classes change between transformers versions.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mammodino import MammoDinoConfig
from .tissue_tokens import PackedImages, TissueTokens, attend_packed, select_tokens, to_device


def as_pair(value) -> tuple[int, int]:
    """Return an int or a pair of ints as (height, width)."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class MammoDinoPatchEmbeddings(nn.Module):
    """Pixels (B, C, H, W) to patch embeddings (B, N, D)."""

    def __init__(self, config: MammoDinoConfig):
        super().__init__()
        self.image_size = as_pair(config.image_size)
        self.patch_size = as_pair(config.patch_size)
        self.num_channels = config.num_channels
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, self.patch_size, stride=self.patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values must have shape (B, {self.num_channels}, H, W); got {tuple(pixel_values.shape)}. "
                "MammoDinoImageProcessor makes them from any image."
            )
        if pixel_values.shape[0] == 0:  # which attention in transformers cannot reshape
            raise ValueError(f"pixel_values {tuple(pixel_values.shape)} hold no image; give at least one.")
        pixel_values = pixel_values.to(self.projection.weight.dtype)
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class MammoDinoEmbeddings(nn.Module):
    """Class, register and patch tokens with position embeddings: (B, C, H, W) to (B, 1 + R + N, D)."""

    def __init__(self, config: MammoDinoConfig):
        super().__init__()
        self.patch_embeddings = MammoDinoPatchEmbeddings(config)
        (height, width), (patch_height, patch_width) = as_pair(config.image_size), as_pair(config.patch_size)
        self.stored_grid = (height // patch_height, width // patch_width)
        num_patches = self.stored_grid[0] * self.stored_grid[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_patches + 1, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.interpolate_antialias = config.interpolate_antialias
        self.interpolate_offset = config.interpolate_offset

    def interpolate_position_embeddings(self, grid: tuple[int, int]) -> torch.Tensor:
        """Interpolate the position embeddings (1, 1 + h*w, D) to a patch grid (h, w), bicubic in float32
        (facebookresearch/dinov2, dinov2/models/vision_transformer.py, interpolate_pos_encoding)."""
        if grid == self.stored_grid:
            return self.position_embeddings
        cls_position, patch_positions = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        patch_positions = patch_positions.reshape(1, *self.stored_grid, -1).permute(0, 3, 1, 2)
        target: dict = {"size": grid}
        if self.interpolate_offset:  # the sampled points then differ from those of size=
            ratios = zip(grid, self.stored_grid, strict=True)
            target = {"scale_factor": tuple((wanted + self.interpolate_offset) / stored for wanted, stored in ratios)}
        patch_positions = nn.functional.interpolate(
            patch_positions.float(), mode="bicubic", antialias=self.interpolate_antialias, **target
        ).to(patch_positions.dtype)
        return torch.cat((cls_position, patch_positions.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        batch_size, _, height, width = pixel_values.shape
        patch_height, patch_width = self.patch_embeddings.patch_size
        embeddings = self.patch_embeddings(pixel_values)  # (B, N, D)
        if bool_masked_pos is not None:
            mask_token = self.mask_token.to(embeddings.dtype)
            embeddings = torch.where(bool_masked_pos.flatten(1).unsqueeze(-1), mask_token, embeddings)
        cls_token: torch.Tensor = self.cls_token
        if bool_masked_pos is None and self.training:  # DistributedDataParallel needs a gradient of every parameter
            cls_token = cls_token + 0 * self.mask_token
        cls_tokens = cls_token.expand(batch_size, -1, -1)
        embeddings = torch.cat((cls_tokens, embeddings), dim=1)
        embeddings = embeddings + self.interpolate_position_embeddings((height // patch_height, width // patch_width))
        registers = self.register_tokens.expand(batch_size, -1, -1)  # registers carry no position
        embeddings = torch.cat((embeddings[:, :1], registers, embeddings[:, 1:]), dim=1)
        return self.dropout(embeddings)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class MammoDinoSelfAttention(nn.Module):
    def __init__(self, config: MammoDinoConfig):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.is_causal = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed: PackedImages | None = None,
        **kwargs,
    ):
        """hidden_states (B, T, D); with `packed`, (1, T, D), images in one row that must not see each other."""
        batch_size, length, _ = hidden_states.shape
        implementation = self.config._attn_implementation
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0

        def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **more):
            mask = fit_mask(mask, implementation)
            return interface(self, query, key, value, mask, scaling=self.scaling, dropout=dropout, **kwargs, **more)

        query, key, value = (
            project(hidden_states).view(batch_size, length, -1, self.head_size).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if packed is None:
            context, weights = attention(query, key, value, attention_mask)
        else:
            context, weights = attend_packed(attention, implementation, query, key, value, packed, dropout > 0)
        return context.reshape(batch_size, length, -1), weights


def fit_mask(mask: torch.Tensor | None, implementation: str) -> torch.Tensor | None:
    """Bring a mask of keys (B, 1, 1, T), added to the scores, into the form that transformers' interface takes."""
    if mask is not None and implementation == "flex_attention":  # transformers reads it out of bounds
        raise ValueError(
            "flex_attention takes no mask, as tissue_mask needs with stochastic depth and in compiled and exported "
            "graphs; use attn_implementation='sdpa', or drop_path_rate=0."
        )
    return mask[:, 0, 0] >= 0 if mask is not None and mask.ndim == 4 and "flash" in implementation else mask  # (B, T)


class MammoDinoSelfOutput(nn.Module):
    def __init__(self, config: MammoDinoConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense(hidden_states)


class MammoDinoAttention(nn.Module):
    def __init__(self, config: MammoDinoConfig):
        super().__init__()
        self.attention = MammoDinoSelfAttention(config)
        self.output = MammoDinoSelfOutput(config)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        return self.output(self.attention(hidden_states, attention_mask, **kwargs)[0])


class MammoDinoLayerScale(nn.Module):
    def __init__(self, config: MammoDinoConfig):
        super().__init__()
        self.lambda1 = nn.Parameter(config.layerscale_value * torch.ones(config.hidden_size))

    def forward(self, update: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Scale the update, and add it to the residual in the same pass where one is given."""
        return update * self.lambda1 if residual is None else torch.addcmul(residual, update, self.lambda1)


class MammoDinoMLP(nn.Module):
    def __init__(self, config: MammoDinoConfig):
        super().__init__()
        hidden_features = config.hidden_size * config.mlp_ratio
        self.fc1 = nn.Linear(config.hidden_size, hidden_features)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden_features, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class MammoDinoSwiGLUFFN(nn.Module):
    def __init__(self, config: MammoDinoConfig):
        super().__init__()
        hidden_features = (int(config.hidden_size * config.mlp_ratio * 2 / 3) + 7) // 8 * 8
        self.weights_in = nn.Linear(config.hidden_size, 2 * hidden_features)
        self.weights_out = nn.Linear(hidden_features, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, value = self.weights_in(hidden_states).chunk(2, dim=-1)
        return self.weights_out(nn.functional.silu(gate) * value)


class MammoDinoLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block. Stochastic depth runs each branch on a random subset of the batch and scales it up,
    which saves the dropped share of the compute (dinov2/layers/block.py, drop_add_residual_stochastic_depth)."""

    def __init__(self, config: MammoDinoConfig):
        super().__init__()
        self.drop_path_rate = config.drop_path_rate
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = MammoDinoAttention(config)
        self.layer_scale1 = MammoDinoLayerScale(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MammoDinoSwiGLUFFN(config) if config.use_swiglu_ffn else MammoDinoMLP(config)
        self.layer_scale2 = MammoDinoLayerScale(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        kept: TissueTokens | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """hidden_states (B, T, D); with `kept`, the dense (B, S, D), of which the kept tokens alone are computed."""

        def attend(states: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
            mask = attention_mask if attention_mask is None else attention_mask[rows]
            return self.attention(self.norm1(states), mask, **kwargs)

        def mix(states: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
            return self.mlp(self.norm2(states))

        states = hidden_states if kept is None else kept.gather(hidden_states)
        states = self.add_residual(states, attend, self.layer_scale1)
        return restore(self.add_residual(states, mix, self.layer_scale2), kept)

    def add_residual(self, states: torch.Tensor, branch: Callable, scale: MammoDinoLayerScale) -> torch.Tensor:
        if not self.training or self.drop_path_rate == 0:
            return scale(branch(states, slice(None)), residual=states)
        batch_size = states.shape[0]
        kept = max(int(batch_size * (1 - self.drop_path_rate)), 1)
        rows = torch.randperm(batch_size, device=states.device)[:kept]
        update = scale(branch(states[rows], rows)).to(states.dtype)
        return torch.index_add(states, 0, rows, update, alpha=batch_size / kept)


class MammoDinoPreTrainedModel(PreTrainedModel):
    config: MammoDinoConfig
    config_class = MammoDinoConfig
    # the native prefix, so that a classification checkpoint, too, opens as Dinov2WithRegistersForImageClassification
    base_model_prefix = "dinov2_with_registers"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MammoDinoEmbeddings", "MammoDinoLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MammoDinoLayer, "attentions": MammoDinoSelfAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as DINOv2 does (facebookresearch/dinov2, dinov2/models/vision_transformer.py), which leaves the
        patch convolution as PyTorch makes it."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, MammoDinoEmbeddings):
            init.trunc_normal_(module.position_embeddings, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.cls_token, std=1e-6)
            init.normal_(module.register_tokens, std=1e-6)
            init.zeros_(module.mask_token)
        elif isinstance(module, MammoDinoLayerScale):
            init.constant_(module.lambda1, self.config.layerscale_value)


class MammoDinoEncoder(MammoDinoPreTrainedModel):
    def __init__(self, config: MammoDinoConfig):
        super().__init__(config)
        self.layer = nn.ModuleList([MammoDinoLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class MammoDinoModel(MammoDinoPreTrainedModel):
    """Vision transformer with registers. Without `tissue_mask` it equals `Dinov2WithRegistersModel` on the same
    weights; with it, background patches are dropped before the first block."""

    def __init__(self, config: MammoDinoConfig):
        super().__init__(config)
        self.embeddings = MammoDinoEmbeddings(config)
        self.encoder = MammoDinoEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        tissue_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (B, C, H, W): images as `MammoDinoImageProcessor` returns them.
            bool_masked_pos (B, N) or (B, h, w), bool: patches replaced by the mask token (pretraining).
            tissue_mask (B, h, w) or (B, N): breast fraction of each patch. Patches at or below
                `config.tissue_threshold` are not encoded. May stay on the CPU, where reading it makes no forward wait
                for the device.

        Returns:
            `last_hidden_state` (B, 1 + R + N, D), the rows of dropped patches zero; `pooler_output` (B, D), the class
            token. `hidden_states` on request have the dense shape; `attentions` (eager attention only) cover the kept
            tokens, padded to the longest image.
        """
        encoded, kept = self.encode(pixel_values, bool_masked_pos, tissue_mask, **kwargs)
        sequence = restore(self.layernorm(encoded.last_hidden_state), kept)  # (B, S, D)
        return BaseModelOutputWithPooling(
            last_hidden_state=sequence,
            pooler_output=sequence[:, 0],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def encode(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None,
        tissue_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[BaseModelOutput, TissueTokens | None]:
        """Run the blocks: their outputs, to be restored where a selection is returned beside. Hidden states, where they
        are asked for, are dense, and what the next block sees, so that gradients reach them."""
        embeddings = self.embeddings(pixel_values, bool_masked_pos)  # (B, S, D)
        if tissue_mask is None:
            return self.encoder(embeddings, **kwargs), None
        config, num_prefix_tokens = self.config, 1 + self.config.num_register_tokens
        num_patches = embeddings.shape[1] - num_prefix_tokens
        if kwargs.get("attention_mask") is not None:
            raise ValueError(
                "attention_mask cannot be combined with tissue_mask, which says what is attended to; set tissue_mask "
                "to 0 where a patch is to be left out."
            )
        num_images = embeddings.shape[0]  # not len(), which would fix the batch of an exported graph
        if tissue_mask.shape[0] != num_images:
            raise ValueError(f"tissue_mask is for {tissue_mask.shape[0]} images, pixel_values for {num_images}.")
        if tissue_mask.flatten(1).shape[1] != num_patches:
            raise ValueError(
                f"tissue_mask has {tissue_mask.flatten(1).shape[1]} patches an image, pixel_values have {num_patches}; "
                f"use one image processor with patch_size={config.patch_size}."
            )
        # stochastic depth draws images, which one row of all does not hold apart
        draws_images = self.training and config.drop_path_rate > 0
        device, threshold = embeddings.device, config.tissue_threshold
        kept = select_tokens(tissue_mask, threshold, num_prefix_tokens, not draws_images, device)
        if kept is None:
            return self.encoder(embeddings, **kwargs), None
        arguments = {**kept.attention_arguments(embeddings.dtype), **kwargs}
        shows_states = kwargs.get("output_hidden_states")  # or which of them, by number
        if (config.output_hidden_states if shows_states is None else shows_states) is not False:
            dense = kept.in_place()
            return self.encoder(dense.scatter(embeddings), kept=kept, **arguments), dense
        return self.encoder(kept.gather(embeddings), **arguments), kept


def restore(tokens: torch.Tensor, kept: TissueTokens | None) -> torch.Tensor:
    """Put kept tokens back into the dense shape (B, S, D), where some were dropped."""
    return tokens if kept is None else kept.scatter(tokens)


def pool_tokens(
    last_hidden_state: torch.Tensor,
    num_register_tokens: int,
    tissue_mask: torch.Tensor | None = None,
    tissue_threshold: float = 0.0,
) -> torch.Tensor:
    """Concatenate the class token and the mean of the patch tokens, weighted by tissue where a mask is given.

    last_hidden_state (B, 1 + R + N, D) -> (B, 2 * D). Patches that the encoder dropped have no weight; an image without
    any tissue gets the plain mean.
    """
    cls_token, patches = last_hidden_state[:, 0], last_hidden_state[:, 1 + num_register_tokens :]
    if tissue_mask is None:
        return torch.cat((cls_token, patches.mean(dim=1)), dim=1)
    weights = to_device(tissue_mask.flatten(1), patches.device).to(patches.dtype)  # (B, N)
    weights = weights * (weights > tissue_threshold)
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, torch.ones_like(weights))
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.cat((cls_token, torch.einsum("bn,bnd->bd", weights, patches)), dim=1)


class MammoDinoBackbone(BackboneMixin, MammoDinoModel):
    """The encoder as a backbone of transformers' detection and segmentation heads: one feature map a chosen stage.

    Choose stages by `out_features` (`"stem"`, `"stage1"`, ...) or `out_indices`. Maps of dropped patches are zero.
    """

    def __init__(self, config: MammoDinoConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(  # type: ignore[override]
        self, pixel_values: torch.Tensor, tissue_mask: torch.Tensor | None = None, **kwargs
    ) -> BackboneOutput:
        """`pixel_values` (B, C, H, W), `tissue_mask` (B, h, w). Returns `feature_maps`, each (B, D, h, w), or
        (B, 1 + R + N, D) with `config.reshape_hidden_states=False`."""
        encoded, kept = self.encode(pixel_values, None, tissue_mask, **kwargs)
        patch_height, patch_width = self.embeddings.patch_embeddings.patch_size
        grid = (pixel_values.shape[2] // patch_height, pixel_values.shape[3] // patch_width)
        feature_maps = []
        for stage, states in zip(self.stage_names, encoded.hidden_states or (), strict=True):
            if stage not in self.out_features:
                continue
            states = restore(self.layernorm(states) if self.config.apply_layernorm else states, kept)  # (B, S, D)
            if self.config.reshape_hidden_states:
                states = states[:, 1 + self.config.num_register_tokens :].transpose(1, 2).unflatten(2, grid)
            feature_maps.append(states.contiguous())
        return BackboneOutput(
            feature_maps=tuple(feature_maps),  # type: ignore[arg-type]
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


class MammoDinoForImageClassification(MammoDinoPreTrainedModel):
    """The encoder under one linear layer on the class token and the tissue-weighted mean of the patch tokens."""

    accepts_loss_kwargs = False  # the loss is a mean over the batch: Trainer divides it by its accumulation steps

    def __init__(self, config: MammoDinoConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.dinov2_with_registers = MammoDinoModel(config)
        self.classifier = nn.Linear(2 * config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        tissue_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """`pixel_values` (B, C, H, W), `tissue_mask` (B, h, w), `labels` (B,) int64, or (B, num_labels) float for
        multi-label problems. Returns `logits` (B, num_labels) and, with labels, `loss`."""
        outputs = self.dinov2_with_registers(pixel_values, tissue_mask=tissue_mask, **kwargs)
        features = pool_tokens(
            outputs.last_hidden_state, self.config.num_register_tokens, tissue_mask, self.config.tissue_threshold
        )
        logits = self.classifier(features)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "MammoDinoBackbone",
    "MammoDinoEmbeddings",
    "MammoDinoForImageClassification",
    "MammoDinoLayer",
    "MammoDinoLayerScale",
    "MammoDinoModel",
    "MammoDinoPreTrainedModel",
    "MammoDinoSelfAttention",
    "as_pair",
    "pool_tokens",
]
