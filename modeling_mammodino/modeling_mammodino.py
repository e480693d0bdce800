"""The MammoDINO encoder: a ViT with registers in which background costs nothing."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, ImageClassifierOutput
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


class TissueTokens(NamedTuple):
    """Which tokens of a dense sequence of length S = 1 + R + N are encoded, padded to the longest of the batch.

    positions (B, T) int64: place of each kept token in the dense sequence; valid (B, T) bool: False where padded.
    """

    positions: torch.Tensor
    valid: torch.Tensor

    @classmethod
    def select(cls, tissue_mask: torch.Tensor, threshold: float, num_prefix_tokens: int) -> "TissueTokens | None":
        """The class token, the registers and the patches with more breast than `threshold`; None to keep all.

        tissue_mask: (B, h, w) or (B, N), breast fraction of each patch or bool.
        """
        patches = tissue_mask.flatten(1) > threshold  # (B, N)
        keep = nn.functional.pad(patches, (num_prefix_tokens, 0), value=True)  # (B, S)
        lengths = keep.sum(dim=1)
        longest = int(lengths.max())
        if int(lengths.min()) == keep.shape[1]:
            return None
        positions = torch.argsort(keep.int(), dim=1, descending=True, stable=True)[:, :longest]
        return cls(positions, torch.arange(longest, device=keep.device) < lengths[:, None])

    def gather(self, dense: torch.Tensor) -> torch.Tensor:  # (B, S, D) -> (B, T, D)
        return dense.gather(1, self.positions.unsqueeze(-1).expand(-1, -1, dense.shape[-1]))

    def scatter(self, tokens: torch.Tensor, length: int) -> torch.Tensor:  # (B, T, D) -> (B, S, D), dropped rows zero
        dense = tokens.new_zeros(tokens.shape[0], length, tokens.shape[-1])
        tokens = tokens * self.valid.unsqueeze(-1)
        return dense.scatter(1, self.positions.unsqueeze(-1).expand_as(tokens), tokens)

    def attention_mask(self, dtype: torch.dtype) -> torch.Tensor | None:  # (B, 1, 1, T), added to the scores
        if bool(self.valid.all()):
            return None
        bias = torch.zeros(self.valid.shape, dtype=dtype, device=self.valid.device)
        return bias.masked_fill(~self.valid, torch.finfo(dtype).min)[:, None, None, :]


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
            token. `hidden_states` on request have the dense shape; `attentions` cover the kept tokens only.
        """
        embeddings = self.embeddings(pixel_values, bool_masked_pos)  # (B, S, D)
        length = embeddings.shape[1]
        kept, attention_mask = None, None
        if tissue_mask is not None:
            num_prefix_tokens = 1 + self.config.num_register_tokens
            if tissue_mask[0].numel() != length - num_prefix_tokens:
                raise ValueError(
                    f"tissue_mask has {tissue_mask[0].numel()} patches an image, pixel_values have "
                    f"{length - num_prefix_tokens}; use one image processor with patch_size={self.config.patch_size}."
                )
            kept = TissueTokens.select(tissue_mask, self.config.tissue_threshold, num_prefix_tokens)
        if kept is not None:
            embeddings, attention_mask = kept.gather(embeddings), kept.attention_mask(embeddings.dtype)

        encoded: BaseModelOutput = self.encoder(embeddings, attention_mask=attention_mask, **kwargs)
        sequence, hidden_states = self.layernorm(encoded.last_hidden_state), encoded.hidden_states
        if kept is not None:
            sequence = kept.scatter(sequence, length)
            if hidden_states is not None:
                hidden_states = tuple(kept.scatter(states, length) for states in hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=sequence,
            pooler_output=sequence[:, 0],
            hidden_states=hidden_states,
            attentions=encoded.attentions,
        )


def pool_tokens(
    last_hidden_state: torch.Tensor, num_register_tokens: int, tissue_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The class token beside the mean of the patch tokens, weighted by tissue where a mask is given.

    last_hidden_state (B, 1 + R + N, D) -> (B, 2 * D). An image without any tissue gets the plain mean.
    """
    cls_token, patches = last_hidden_state[:, 0], last_hidden_state[:, 1 + num_register_tokens :]
    if tissue_mask is None:
        return torch.cat((cls_token, patches.mean(dim=1)), dim=1)
    weights = tissue_mask.flatten(1).to(patches.dtype)  # (B, N)
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, torch.ones_like(weights))
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.cat((cls_token, torch.einsum("bn,bnd->bd", weights, patches)), dim=1)


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
        features = pool_tokens(outputs.last_hidden_state, self.config.num_register_tokens, tissue_mask)
        logits = self.classifier(features)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["MammoDinoForImageClassification", "MammoDinoModel", "MammoDinoPreTrainedModel", "pool_tokens"]
