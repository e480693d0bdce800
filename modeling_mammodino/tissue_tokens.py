"""Which tokens of a batch are encoded, and how images of unequal length share a batch: background costs nothing.

A selection is worked out on the host: from a mask there no forward waits for the device, from one on the device each
waits once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

try:  # since torch 2.10
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]


class PackedImages(NamedTuple):
    """Images behind each other in one row of T tokens; each attends to itself.

    starts (B + 1,) int32: image i has tokens starts[i] to starts[i + 1]; longest: most tokens of an image, L;
    places (T,) int64: of each token in B rows of L; has_kernel: whether torch has attention for such rows there.
    """

    starts: torch.Tensor
    longest: int
    places: torch.Tensor
    has_kernel: bool


class TissueTokens(NamedTuple):
    """The tokens that are encoded, in rows of T: one row an image, or a single one of all images (packed).

    size: (B, S) of the dense sequences (B, S, D), S = 1 + R + N; positions (rows, T) int64: where each token stands
    among their B * S, None where all stay in their places; valid (rows, T) bool: False where attention is to ignore a
    token, which fills a row up or was not selected, None where there is none.
    """

    size: tuple[int, int]
    positions: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    packed: PackedImages | None = None

    def gather(self, dense: torch.Tensor) -> torch.Tensor:  # (B, S, D) -> (rows, T, D)
        if self.positions is None:
            return dense
        tokens = dense.flatten(0, 1).index_select(0, self.positions.flatten())
        return tokens.view(*self.positions.shape, -1)

    def scatter(self, tokens: torch.Tensor) -> torch.Tensor:
        """Put tokens (rows, T, D) back into the dense shape (B, S, D), where the rows of dropped tokens are zero."""
        if self.valid is not None:
            tokens = tokens * self.valid.unsqueeze(-1)
        if self.positions is None:
            return tokens
        dense = tokens.new_zeros(self.size[0] * self.size[1], tokens.shape[-1])
        return dense.index_copy(0, self.positions.flatten(), tokens.flatten(0, 1)).view(*self.size, -1)

    def in_place(self) -> "TissueTokens":
        """Return the same selection with every token in its place."""
        if self.positions is None:
            return self
        ones = torch.ones(*self.positions.shape, 1, device=self.positions.device)
        return TissueTokens(self.size, valid=self.scatter(ones).squeeze(-1) > 0)

    def attention_arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        if self.packed is not None:
            return {"packed": self.packed}
        return {} if self.valid is None else {"attention_mask": key_mask(self.valid, dtype)}


def select_tokens(
    tissue_mask: torch.Tensor,
    threshold: float,
    num_prefix_tokens: int,
    pack: bool = True,
    device: torch.device | None = None,
) -> TissueTokens | None:
    """Select the prefix (class token and registers) and patches with more breast than `threshold`; None to keep all.

    tissue_mask: (B, h, w) or (B, N), breast fraction of each patch or bool, on any device; pack: whether images of
    unequal length may share a row; device: of the tokens, by default the mask's. In graphs (compiled, exported,
    traced), whose shapes must not depend on data, and for masks without values, all tokens stay: the same result at
    dense cost.
    """
    patches = tissue_mask.flatten(1) > threshold  # (B, N)
    keep = nn.functional.pad(patches, (num_prefix_tokens, 0), value=True)  # (B, S)
    num_images, length = keep.shape
    device = keep.device if device is None else device
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or keep.is_meta:
        return TissueTokens((num_images, length), valid=keep.to(device))
    keep = keep.cpu()
    lengths = keep.sum(dim=1)
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest == length:
        return None
    valid, packed = None, None
    if pack and shortest < longest:
        positions = keep.flatten().nonzero().T  # (1, T)
        starts = nn.functional.pad(lengths.cumsum(0), (1, 0))
        image = positions[0] // length
        places = image * longest + torch.arange(len(image)) - starts[image]
        starts, places = (to_device(each, device) for each in (starts.int(), places))
        packed = PackedImages(starts, longest, places, has_varlen_kernel(device))
    else:
        positions = torch.argsort(keep.int(), dim=1, descending=True, stable=True)[:, :longest]  # (B, T)
        valid = to_device(keep.gather(1, positions), device) if shortest < longest else None
        positions = positions + length * torch.arange(num_images)[:, None]
    return TissueTokens((num_images, length), to_device(positions, device), valid, packed)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy without waiting for the device, which takes memory that the system does not page out."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def key_mask(keep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:  # (B, T) bool -> (B, 1, 1, T)
    """Make what is added to the attention scores: ignored keys get the lowest number of `dtype`."""
    bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
    return bias.masked_fill(~keep, torch.finfo(dtype).min)[:, None, None, :]


def attend_packed(
    attention: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    implementation: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedImages,
    has_dropout: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Let each image attend to itself, in one call where a call is dear.

    attention: of query, key, value and mask, each (rows, H, T, d) -> (rows, T, H, d), and weights or None; query, key,
    value (1, H, T, d). Returns the context (1, T, H, d), and weights (B, H, L, L) where `attention` has them.
    FlashAttention takes the row as it is; elsewhere images are padded for the call. On a CPU each has its own, which is
    faster there, and for flex attention, which takes no padding.
    """
    starts, longest, places, has_kernel = packed
    if "flash" in implementation:
        lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
        return attention(query, key, value, None, **lengths)
    on_cpu = query.device.type == "cpu" and implementation != "eager" and not has_kernel
    if (on_cpu or implementation == "flex_attention") and not torch.compiler.is_compiling():
        images = zip(*(each.split(starts.diff().tolist(), dim=2) for each in (query, key, value)), strict=True)
        return torch.cat([attention(*image, None)[0] for image in images], dim=1), None
    q, k, v = (each.squeeze(0).transpose(0, 1) for each in (query, key, value))  # (T, H, d)
    fits = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    if has_kernel and fits and implementation == "sdpa" and not has_dropout:
        context = varlen_attn(q, k, v, starts, starts, longest, longest)
        return context.unsqueeze(0), None  # type: ignore[union-attr]
    num_images = starts.shape[0] - 1
    padded = [pad_images(each, num_images, longest, places) for each in (q, k, v)]
    is_token = torch.arange(longest, device=starts.device) < starts.diff()[:, None]  # (B, L)
    context, weights = attention(*padded, key_mask(is_token, query.dtype))  # (B, L, H, d)
    return context.flatten(0, 1).index_select(0, places).unsqueeze(0), weights


def pad_images(tokens: torch.Tensor, num_images: int, longest: int, places: torch.Tensor) -> torch.Tensor:
    """(T, H, d) -> (B, H, L, d)"""
    rows = tokens.new_zeros(num_images * longest, *tokens.shape[1:]).index_copy(0, places, tokens)
    return rows.unflatten(0, (num_images, longest)).transpose(1, 2)


def has_varlen_kernel(device: torch.device) -> bool:
    """Return whether torch's FlashAttention takes packed rows on this device, in half precision."""
    if varlen_attn is None or device.type != "cuda" or not torch.backends.cuda.flash_sdp_enabled():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
