"""What a step costs and what the machine can do, for the share of peak (MFU) in the log; and glibc's allocator.

Counted are matrix products, a multiplication and an addition as two operations: patch embedding, linear layers,
attention, projection heads; not norms, losses, optimizer and moving average, nor what is repeated to save memory, by
gradient checkpointing and of the teacher's logits.
"""

import ctypes
import sys
import time

import torch

from modeling_mammodino import MammoDinoConfig
from modeling_mammodino.modeling_mammodino import as_pair

from .recipe import ModelRecipe, Recipe, RunRecipe
from .views.sample import Batch

MATMUL_SECONDS = 0.15
STUDENT = 3  # a backward costs two forwards: the gradients of inputs and of weights


def block_flops(config: MammoDinoConfig, num_tokens: int) -> float:
    """Count the forward of all blocks for one image of so many tokens: linear layers, and attention's two products."""
    width = config.hidden_size
    hidden = width * config.mlp_ratio
    mlp = 3 * ((int(hidden * 2 / 3) + 7) // 8 * 8) if config.use_swiglu_ffn else 2 * hidden
    linear = 2 * num_tokens * width * (4 * width + mlp)
    return config.num_hidden_layers * (linear + 4 * num_tokens**2 * width)


def patch_embedding_flops(config: MammoDinoConfig, num_patches: int) -> float:
    """Count the forward of the patch embedding for so many patches."""
    patch_height, patch_width = as_pair(config.patch_size)
    return 2.0 * num_patches * config.num_channels * patch_height * patch_width * config.hidden_size


def head_flops(model: ModelRecipe, num_cls_tokens: int, num_patches: int) -> float:
    """Count the forward of the projection heads for so many tokens of either kind."""
    cls_flops, patch_flops = (
        2.0 * (hidden * (model.hidden_size + hidden + bottleneck) + bottleneck * prototypes)
        for hidden, bottleneck, prototypes in (
            (model.head_hidden_size, model.head_bottleneck_size, model.num_prototypes),
            (
                model.ibot_head_hidden_size or model.head_hidden_size,
                model.ibot_head_bottleneck_size or model.head_bottleneck_size,
                model.ibot_num_prototypes or model.num_prototypes,
            ),
        )
    )
    return num_cls_tokens * cls_flops + num_patches * patch_flops


def step_flops(batch: Batch, config: MammoDinoConfig, recipe: Recipe) -> float:
    """Count student's forward and backward and teacher's forward on this batch, with its masks, pairs and background,
    for the losses that the recipe uses.

    By the batch itself, so that what depends on chance (masked patches, slice pairs, background patches that are
    dropped, stochastic depth) is counted as it was.
    """
    loss, model, tissue_tokens = recipe.loss, recipe.model, recipe.views.tissue_tokens
    canvas = 0.0
    if "canvas_tokens" in batch:
        canvas = encode_flops(batch["canvas_tokens"], config, True, is_student=True)
    if "global_tissue" not in batch:
        return canvas
    whole, pairs, local = batch["global_tissue"], batch["slice_tissue"], batch["local_tissue"]
    seen_by_teacher = (whole, pairs) if loss.dino_weight or loss.ibot_weight else (pairs,)
    seen_by_student = (pairs, local) if loss.dino_weight else (pairs,)
    learns_from_whole = any((loss.dino_weight, loss.ibot_weight, loss.koleo_weight, loss.gram_weight))
    teacher = sum(encode_flops(tissue, config, tissue_tokens, is_student=False) for tissue in seen_by_teacher)
    student = sum(encode_flops(tissue, config, tissue_tokens, is_student=True) for tissue in seen_by_student)
    student += encode_flops(
        whole, config, tissue_tokens, is_student=learns_from_whole
    )  # the monitor sees it in any case
    cls_tokens = len(whole) * (loss.dino_weight > 0) + len(pairs) * (loss.adjacent_slice_weight > 0)  # of both
    patches = int(batch["masks"].sum()) * (loss.ibot_weight > 0)
    patches += int((pairs > 0).sum()) * (loss.adjacent_patch_weight > 0)
    student += STUDENT * head_flops(model, cls_tokens + len(local) * (loss.dino_weight > 0), patches)
    return canvas + student + teacher + head_flops(model, cls_tokens, patches)


def encode_flops(tissue: torch.Tensor, config: MammoDinoConfig, tissue_tokens: bool, is_student: bool) -> float:
    """Count one pass over crops of which `tissue` (n, h, w) is the breast fraction of each patch."""
    if len(tissue) == 0:
        return 0.0
    num_patches = tissue[0].numel()
    is_kept = tissue.flatten(1) > config.tissue_threshold if tissue_tokens else tissue.flatten(1) >= 0
    blocks = sum(block_flops(config, 1 + config.num_register_tokens + kept) for kept in is_kept.sum(dim=1).tolist())
    embedding = len(tissue) * patch_embedding_flops(config, num_patches)
    if not is_student:
        return embedding + blocks
    drawn = max(int(len(tissue) * (1 - config.drop_path_rate)), 1) / len(tissue)  # images that a branch is run on
    return (STUDENT - 1) * embedding + STUDENT * drawn * blocks  # pixels need no gradient


def matmul_peak(device: torch.device | str, dtype: torch.dtype, side: int | None = None) -> float:
    """Measure FLOP/s, the best of a few square matmuls on this process's device: not what its data sheet says.

    side: most rows and columns (default 8192, on a CPU 2048). Takes well under a second: sizes double until the next
    would take longer than MATMUL_SECONDS, as in half precision on a CPU without units for it.
    """
    device = torch.device(device)
    largest = side or (2048 if device.type == "cpu" else 8192)
    generator = torch.Generator(device).manual_seed(0)  # torch's own stays as the run seeded it
    peak, side, fastest = 0.0, min(128, largest), 0.0
    while side <= largest and 8 * fastest < MATMUL_SECONDS:
        left, right = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
        seconds: list[float] = []
        while len(seconds) < 3 or sum(seconds) < MATMUL_SECONDS / 2 and len(seconds) < 50:
            synchronize(device)
            started = time.perf_counter()
            torch.matmul(left, right)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        fastest = min(seconds)
        peak, side = max(peak, 2 * side**3 / fastest), 2 * side
    return peak


def set_precision(run: RunRecipe) -> None:
    """Resolve `bf16` where the recipe leaves it open, in place. On a GPU the products of float32 matrices that remain
    run in TF32, ten bits of mantissa; a CPU computes in float32."""
    is_gpu = torch.cuda.is_available()
    if is_gpu:
        torch.set_float32_matmul_precision("high")
    if run.bf16 is None:
        run.bf16 = is_gpu and torch.cuda.is_bf16_supported(including_emulation=False)


def synchronize(device: torch.device) -> None:
    """Wait for what a device has been given; a CPU waits by itself."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# malloc.h; the values are ints
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, INT_MAX = -1, -2, -3, 2**31 - 1
TOP_PAD_BYTES = 1 << 28


def keep_freed_memory() -> bool:
    """Let the process' heap serve large tensors too, and grow in large steps; return whether the C library knows how.

    By default glibc maps each tensor of over 32 MiB anew and gives it back, page by page, in every step: at batch 8
    that makes a step of ViT-S/14 take 1.5 times as long. The heap stays at its peak size until the process ends.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    settings = ((M_MMAP_THRESHOLD, INT_MAX), (M_TRIM_THRESHOLD, INT_MAX), (M_TOP_PAD, TOP_PAD_BYTES))
    return mallopt is not None and all(mallopt(*each) for each in settings)
