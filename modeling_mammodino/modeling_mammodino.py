"""The MammoDINO encoder: a ViT with registers in which background costs nothing."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mammodino import MammoDinoConfig
from .layers_mammodino import (
    MammoDinoEmbeddings,
    MammoDinoLayer,
    MammoDinoLayerScale,
    MammoDinoSelfAttention,
)
from .tissue_tokens import TissueTokens, select_tokens


class MammoDinoPreTrainedModel(PreTrainedModel):
    config: MammoDinoConfig
    config_class = MammoDinoConfig
    # the native prefix, so that a classification checkpoint, too, opens as Dinov2WithRegistersForImageClassification
    base_model_prefix = "dinov2_with_registers"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MammoDinoEmbeddings", "MammoDinoLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MammoDinoLayer, "attentions": MammoDinoSelfAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """DINOv2's initialisation (facebookresearch/dinov2, dinov2/models/vision_transformer.py)."""
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
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
            pixel_values (B, C, H, W): pictures as `MammoDinoImageProcessor` returns them.
            bool_masked_pos (B, N) or (B, h, w), bool: patches replaced by the mask token (pretraining).
            tissue_mask (B, h, w) or (B, N): breast fraction of each patch. Patches at or below
                `config.tissue_threshold` are not encoded.

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
            hidden_states=restore_all(encoded.hidden_states, kept),
            attentions=encoded.attentions,
        )

    def encode(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None,
        tissue_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[BaseModelOutput, TissueTokens | None]:
        """The blocks' outputs, of the kept tokens alone where a selection is returned beside."""
        embeddings = self.embeddings(pixel_values, bool_masked_pos)  # (B, S, D)
        if tissue_mask is None:
            return self.encoder(embeddings, **kwargs), None
        config, num_prefix_tokens = self.config, 1 + self.config.num_register_tokens
        num_patches = embeddings.shape[1] - num_prefix_tokens
        num_images = embeddings.shape[0]  # not len(), which would fix the batch of an exported graph
        if tissue_mask.shape[0] != num_images:
            raise ValueError(f"tissue_mask is for {tissue_mask.shape[0]} images, pixel_values for {num_images}.")
        if tissue_mask[0].numel() != num_patches:
            raise ValueError(
                f"tissue_mask has {tissue_mask[0].numel()} patches an image, pixel_values have {num_patches}; "
                f"use one image processor with patch_size={config.patch_size}."
            )
        draws_images = self.training and config.drop_path_rate > 0  # stochastic depth
        shows_attentions = config._attn_implementation == "eager"
        # packing splits by lengths, for each of which a graph would be compiled
        is_compiled = torch.compiler.is_compiling() or self.encoder.layer[0]._compiled_call_impl is not None
        pack = not (draws_images or shows_attentions or is_compiled)
        kept = select_tokens(tissue_mask, config.tissue_threshold, num_prefix_tokens, pack)
        if kept is None:
            return self.encoder(embeddings, **kwargs), None
        return self.encoder(kept.gather(embeddings), **kept.attention_arguments(embeddings.dtype), **kwargs), kept


def restore(tokens: torch.Tensor, kept: TissueTokens | None) -> torch.Tensor:
    """Kept tokens back in the dense shape (B, S, D), where some were dropped."""
    return tokens if kept is None else kept.scatter(tokens)


def restore_all(recorded: tuple | None, kept: TissueTokens | None) -> tuple | None:
    """The same for recorded hidden states, of which a user may have asked for a few: the others are None."""
    return recorded and tuple(states if states is None else restore(states, kept) for states in recorded)


def pool_tokens(
    last_hidden_state: torch.Tensor,
    num_register_tokens: int,
    tissue_mask: torch.Tensor | None = None,
    tissue_threshold: float = 0.0,
) -> torch.Tensor:
    """The class token beside the mean of the patch tokens, weighted by tissue where a mask is given.

    last_hidden_state (B, 1 + R + N, D) -> (B, 2 * D). Patches that the encoder dropped have no weight; an image without
    any tissue gets the plain mean.
    """
    cls_token, patches = last_hidden_state[:, 0], last_hidden_state[:, 1 + num_register_tokens :]
    if tissue_mask is None:
        return torch.cat((cls_token, patches.mean(dim=1)), dim=1)
    weights = tissue_mask.flatten(1).to(patches.dtype)  # (B, N)
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
            hidden_states=restore_all(encoded.hidden_states, kept),
            attentions=encoded.attentions,
        )


class MammoDinoForImageClassification(MammoDinoPreTrainedModel):
    """The encoder under one linear layer on the class token and the tissue-weighted mean of the patch tokens."""

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
    "MammoDinoForImageClassification",
    "MammoDinoModel",
    "MammoDinoPreTrainedModel",
    "pool_tokens",
]
