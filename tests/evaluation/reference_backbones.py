"""What small checkpoints take; independent forwards of other projects' layouts, on the raw keys of their files; and
what must not be unpickled."""

import math
from pathlib import Path

import torch
from torch.nn import functional

Tensors = dict[str, torch.Tensor]


def timm_vit(state: Tensors, pixels: torch.Tensor, prefix: str = "visual.trunk.") -> torch.Tensor:
    """timm's plain ViT, or DINOv2's with its layer scale: tokens (B, 1 + N, D) behind the last LayerNorm, eps 1e-6
    throughout, exact GELU."""
    w = {name.removeprefix(prefix): value.float() for name, value in state.items() if name.startswith(prefix)}
    patch = w["patch_embed.proj.weight"].shape[-1]
    x = functional.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    width = x.shape[-1]
    x = torch.cat((w["cls_token"].expand(len(x), -1, -1), x), dim=1) + w["pos_embed"]
    for number in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))):
        b = f"blocks.{number}."
        y = functional.layer_norm(x, (width,), w[b + "norm1.weight"], w[b + "norm1.bias"], 1e-6)
        qkv = functional.linear(y, w[b + "attn.qkv.weight"], w[b + "attn.qkv.bias"])
        y = functional.linear(attend(qkv), w[b + "attn.proj.weight"], w[b + "attn.proj.bias"])
        x = x + y * w.get(b + "ls1.gamma", 1)
        y = functional.layer_norm(x, (width,), w[b + "norm2.weight"], w[b + "norm2.bias"], 1e-6)
        y = functional.gelu(functional.linear(y, w[b + "mlp.fc1.weight"], w[b + "mlp.fc1.bias"]))
        x = x + functional.linear(y, w[b + "mlp.fc2.weight"], w[b + "mlp.fc2.bias"]) * w.get(b + "ls2.gamma", 1)
    return functional.layer_norm(x, (width,), w["norm.weight"], w["norm.bias"], 1e-6)


def clip_vit(state: Tensors, pixels: torch.Tensor, quick: bool = True) -> torch.Tensor:
    """OpenAI's VisionTransformer: tokens (B, 1 + N, D), ln_post on all; eps 1e-5, QuickGELU x sigmoid(1.702 x)."""
    w = {name.removeprefix("visual."): value.float() for name, value in state.items() if name.startswith("visual.")}
    x = functional.conv2d(pixels, w["conv1.weight"], stride=w["conv1.weight"].shape[-1]).flatten(2).transpose(1, 2)
    width = x.shape[-1]
    x = torch.cat((w["class_embedding"].expand(len(x), 1, -1), x), dim=1) + w["positional_embedding"]
    x = functional.layer_norm(x, (width,), w["ln_pre.weight"], w["ln_pre.bias"])
    for number in range(1 + max(int(name.split(".")[2]) for name in w if name.startswith("transformer."))):
        b = f"transformer.resblocks.{number}."
        y = functional.layer_norm(x, (width,), w[b + "ln_1.weight"], w[b + "ln_1.bias"])
        qkv = functional.linear(y, w[b + "attn.in_proj_weight"], w[b + "attn.in_proj_bias"])
        x = x + functional.linear(attend(qkv), w[b + "attn.out_proj.weight"], w[b + "attn.out_proj.bias"])
        y = functional.layer_norm(x, (width,), w[b + "ln_2.weight"], w[b + "ln_2.bias"])
        y = functional.linear(y, w[b + "mlp.c_fc.weight"], w[b + "mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y) if quick else functional.gelu(y)
        x = x + functional.linear(y, w[b + "mlp.c_proj.weight"], w[b + "mlp.c_proj.bias"])
    return functional.layer_norm(x, (width,), w["ln_post.weight"], w["ln_post.bias"])


def attend(qkv: torch.Tensor) -> torch.Tensor:
    """Attention of heads of 64 on query, key and value side by side, (B, S, 3 * D) -> (B, S, D)."""
    B, S, width = qkv.shape
    q, k, v = qkv.reshape(B, S, 3, -1, 64).permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(-2, -1) / 8).softmax(-1)
    return (attention @ v).transpose(1, 2).reshape(B, S, width // 3)


def efficientnet(state: Tensors, pixels: torch.Tensor, image_size: int, strides: list[int]) -> torch.Tensor:
    """efficientnet_pytorch's last map (B, C, h, w): TensorFlow's "same" padding with the amounts of `image_size`.

    strides: of each block's depthwise convolution.
    """
    prefix = "image_encoder."
    w = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        running = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        return functional.batch_norm(x, *running, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-3)

    def same(x: torch.Tensor, weight: torch.Tensor, stride: int, size: int, groups: int = 1) -> torch.Tensor:
        kernel = weight.shape[-1]
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        before, after = total // 2, total - total // 2
        x = functional.pad(x, (before, after, before, after))
        return functional.conv2d(x, weight, stride=stride, groups=groups)

    x = functional.silu(norm(same(pixels, w["_conv_stem.weight"], 2, image_size), "_bn0"))
    size = math.ceil(image_size / 2)
    for number, stride in enumerate(strides):
        b, skip = f"_blocks.{number}.", x
        if f"{b}_expand_conv.weight" in w:
            x = functional.silu(norm(functional.conv2d(x, w[f"{b}_expand_conv.weight"]), f"{b}_bn0"))
        x = same(x, w[f"{b}_depthwise_conv.weight"], stride, size, groups=x.shape[1])
        x = functional.silu(norm(x, f"{b}_bn1"))
        size = math.ceil(size / stride)
        y = x.mean((2, 3), keepdim=True)
        y = functional.silu(functional.conv2d(y, w[f"{b}_se_reduce.weight"], w[f"{b}_se_reduce.bias"]))
        x = x * torch.sigmoid(functional.conv2d(y, w[f"{b}_se_expand.weight"], w[f"{b}_se_expand.bias"]))
        x = norm(functional.conv2d(x, w[f"{b}_project_conv.weight"]), f"{b}_bn2")
        if stride == 1 and x.shape[1] == skip.shape[1]:
            x = x + skip
    return functional.silu(norm(functional.conv2d(x, w["_conv_head.weight"]), "_bn1"))


NATIVE = ("resnet50", "convnextv2", "dinov2", "dinov3", "medsiglip", "rad_dino")
OWN_FILES = {
    "biomedclip": "open_clip_pytorch_model.bin",
    "mammo_clip_vit": "clip_vit.pt",
    "mammo_clip_efficientnet": "model-best.tar",
    "mammo_fm": "model-best.tar",
    "dbt_dino": "dbt_dino.pth",
}
SIDES = {"dinov2": 70, "rad_dino": 70, "dbt_dino": 70, "mammo_clip_efficientnet": 72, "mammo_fm": 72}


def inputs(kind: str, batch: int = 2) -> dict[str, torch.Tensor]:
    """Noise of the shape that a small checkpoint takes."""
    generator, side = torch.Generator().manual_seed(3), SIDES.get(kind, 64)
    if kind in ("mammodino", "untrained"):
        mask = (torch.rand(batch, 4, 4, generator=generator) - 0.3).clamp(min=0)
        return {"pixel_values": torch.randn(batch, 1, side, side, generator=generator), "tissue_mask": mask}
    return {"pixel_values": torch.randn(batch, 3, side, side, generator=generator)}


class Touch:
    """Unpickled with its code, it would leave a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")
