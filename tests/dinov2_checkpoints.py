"""Small random DINOv2 checkpoints in each of their forms, and an independent forward of the original layout."""

import json
from pathlib import Path

import torch
from one_thread import one_thread  # noqa: F401 (a fixture)
from torch.nn import functional

from modeling_mammodino import MammoDinoImageProcessor

WIDTH, PATCH, SIDE = 128, 14, 70  # a stored grid of 5 x 5
TINY = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": PATCH, "image_size": SIDE}
SIZES = ((70, 70), (112, 112), (42, 98), (28, 28))  # stored, larger, not square, smaller
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # tokens, biases and scales away from their initial values
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def save_source(folder: Path, kind, config, mean=MEAN, std=STD, **settings):
    """A checkpoint of transformers with its preprocessor_config.json."""
    model = randomize(kind(config))
    model.save_pretrained(folder)
    settings = {"image_processor_type": "BitImageProcessor", "image_mean": mean, "image_std": std, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def inputs(height: int, width: int, mean=MEAN, std=STD, full: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """One gray plane as an RGB model gets it and as ours does."""
    plane = torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (mean, std))
    ours = MammoDinoImageProcessor()
    return (plane * full - mean) / std, (plane - ours.image_mean[0]) / ours.image_std[0]


def assert_equal_features(ours, theirs, ours_in, theirs_in, atol=1e-5):
    with torch.no_grad():
        a, b = ours(ours_in), theirs(theirs_in)
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=atol)  # tokens, or logits


def reference_forward(state: dict[str, torch.Tensor], pixels: torch.Tensor, offset: float, antialias: bool):
    """The published DINOv2 on its own state dict, written out: final LayerNorm of all tokens (B, 1 + R + N, D)."""
    width = state["cls_token"].shape[-1]
    patches = functional.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    batch, _, h, w = patches.shape
    positions = state["pos_embed"]
    side = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].reshape(1, side, side, width).permute(0, 3, 1, 2)
    if (h, w) != (side, side):
        target = {"scale_factor": ((h + offset) / side, (w + offset) / side)} if offset else {"size": (h, w)}
        grid = functional.interpolate(grid, mode="bicubic", antialias=antialias, **target)
    x = patches.flatten(2).transpose(1, 2) + grid.flatten(2).transpose(1, 2)
    cls = (state["cls_token"] + positions[:, :1]).expand(batch, -1, -1)
    registers = state.get("register_tokens", torch.zeros(1, 0, width)).expand(batch, -1, -1)
    x = torch.cat((cls, registers, x), dim=1)
    for block in range(2):
        part = {k.removeprefix(f"blocks.{block}."): v for k, v in state.items() if k.startswith(f"blocks.{block}.")}
        y = functional.layer_norm(x, (width,), part["norm1.weight"], part["norm1.bias"], 1e-6)
        qkv = functional.linear(y, part["attn.qkv.weight"], part["attn.qkv.bias"])
        q, k, v = qkv.reshape(batch, -1, 3, width // 64, 64).permute(2, 0, 3, 1, 4)
        attention = ((q * 64**-0.5) @ k.transpose(-2, -1)).softmax(-1)
        y = (attention @ v).transpose(1, 2).reshape(batch, -1, width)
        x = x + part["ls1.gamma"] * functional.linear(y, part["attn.proj.weight"], part["attn.proj.bias"])
        y = functional.layer_norm(x, (width,), part["norm2.weight"], part["norm2.bias"], 1e-6)
        if "mlp.w12.weight" in part:
            gate, value = functional.linear(y, part["mlp.w12.weight"], part["mlp.w12.bias"]).chunk(2, dim=-1)
            y = functional.linear(functional.silu(gate) * value, part["mlp.w3.weight"], part["mlp.w3.bias"])
        else:
            y = functional.gelu(functional.linear(y, part["mlp.fc1.weight"], part["mlp.fc1.bias"]))
            y = functional.linear(y, part["mlp.fc2.weight"], part["mlp.fc2.bias"])
        x = x + part["ls2.gamma"] * y
    return functional.layer_norm(x, (width,), state["norm.weight"], state["norm.bias"], 1e-6)


def reference_state(registers: int = 0, swiglu_hidden: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights in the layout of facebookresearch/dinov2."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 26, WIDTH), "mask_token": (1, WIDTH),
              "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,),
              "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}  # fmt: skip
    if registers:
        shapes["register_tokens"] = (1, registers, WIDTH)
    ffn = {"fc1": (4 * WIDTH, WIDTH), "fc2": (WIDTH, 4 * WIDTH)}
    if swiglu_hidden:
        ffn = {"w12": (2 * swiglu_hidden, WIDTH), "w3": (WIDTH, swiglu_hidden)}
    linears = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)} | {f"mlp.{k}": v for k, v in ffn.items()}
    for block in (f"blocks.{number}." for number in range(2)):
        for name, shape in linears.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[block + name] = (WIDTH,)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
