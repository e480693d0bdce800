"""Which tokens of a batch are encoded, and how images of unequal length share a batch: background costs nothing.

Three forms of one selection. Each gathers the kept tokens from the dense sequence (B, S, D), S = 1 + R + N, says what
attention must know, and scatters them back with the rows of dropped tokens zero.
"""

from typing import Any, NamedTuple

import torch
from torch import nn


class PackedTokens(NamedTuple):
    """The kept tokens of all images in one row, T = their sum: nothing is padded, each image attends to itself.

    keep (B, S) bool; lengths: kept tokens of each image.
    """

    keep: torch.Tensor
    lengths: list[int]

    def gather(self, dense: torch.Tensor) -> torch.Tensor:  # (B, S, D) -> (1, T, D)
        return dense[self.keep].unsqueeze(0)

    def scatter(self, tokens: torch.Tensor) -> torch.Tensor:  # (1, T, D) -> (B, S, D)
        dense = tokens.new_zeros(*self.keep.shape, tokens.shape[-1])
        return dense.masked_scatter(self.keep.unsqueeze(-1), tokens)

    def attention_arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        return {"lengths": self.lengths}


class PaddedTokens(NamedTuple):
    """The kept tokens of each image, padded to the longest, T: where all keep equally many, one attention call serves
    the batch. Stochastic depth, which draws images, needs this form in any case.

    positions (B, T) int64: place of each token in the dense sequence; valid (B, T) bool: False where padded.
    """

    keep: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor

    def gather(self, dense: torch.Tensor) -> torch.Tensor:  # (B, S, D) -> (B, T, D)
        return dense.gather(1, self.positions.unsqueeze(-1).expand(-1, -1, dense.shape[-1]))

    def scatter(self, tokens: torch.Tensor) -> torch.Tensor:  # (B, T, D) -> (B, S, D)
        dense = tokens.new_zeros(*self.keep.shape, tokens.shape[-1])
        tokens = tokens * self.valid.unsqueeze(-1)
        return dense.scatter(1, self.positions.unsqueeze(-1).expand_as(tokens), tokens)

    def attention_arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        return {} if self.valid.all() else {"attention_mask": key_mask(self.valid, dtype)}


class MaskedTokens(NamedTuple):
    """Every token is encoded and background keys are ignored: the same result at dense cost, for exported and traced
    graphs and tensors without values, whose shapes must not depend on data.

    keep (B, S) bool.
    """

    keep: torch.Tensor

    def gather(self, dense: torch.Tensor) -> torch.Tensor:  # (B, S, D), unchanged
        return dense

    def scatter(self, tokens: torch.Tensor) -> torch.Tensor:  # (B, S, D)
        return tokens * self.keep.unsqueeze(-1)

    def attention_arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        return {"attention_mask": key_mask(self.keep, dtype)}


TissueTokens = PackedTokens | PaddedTokens | MaskedTokens


def select_tokens(
    tissue_mask: torch.Tensor, threshold: float, num_prefix_tokens: int, pack: bool
) -> TissueTokens | None:
    """Select the prefix (class token and registers) and patches with more breast than `threshold`; None to keep all.

    tissue_mask: (B, h, w) or (B, N), breast fraction of each patch or bool.
    """
    patches = tissue_mask.flatten(1) > threshold  # (B, N)
    keep = nn.functional.pad(patches, (num_prefix_tokens, 0), value=True)  # (B, S)
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or keep.is_meta:
        return MaskedTokens(keep)
    lengths: list[int] = keep.sum(dim=1).tolist()
    if min(lengths) == keep.shape[1]:
        return None
    if pack and min(lengths) < max(lengths):
        return PackedTokens(keep, lengths)
    positions = torch.argsort(keep.int(), dim=1, descending=True, stable=True)[:, : max(lengths)]
    return PaddedTokens(keep, positions, keep.gather(1, positions))


def key_mask(keep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:  # (B, T) bool -> (B, 1, 1, T)
    """Make what is added to the attention scores: ignored keys get the lowest number of `dtype`."""
    bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
    return bias.masked_fill(~keep, torch.finfo(dtype).min)[:, None, None, :]
