"""Small checkpoints of random weights in the true layout of every backbone, to try the suite out without a download.

They know nothing: a benchmark of them shows that the suite runs, not what a backbone is worth.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    ConvNextV2Config,
    ConvNextV2Model,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from modeling_mammodino import MammoDinoConfig, MammoDinoImageProcessor, MammoDinoModel

from .convert_mammo_clip_efficientnet import PREPROCESSING, VARIANTS, efficientnet_config, round_filters
from .registry import BACKBONES, CHEST, DBT, IMAGENET, SIGLIP

WIDTH, BLOCKS, SIDE_PX, PATCH_PX = 64, 2, 64, 16  # of the ViTs; one attention head of 64
State = dict[str, torch.Tensor]


def write_small_checkpoints(folder: str | Path, seed: int = 0) -> dict[str, Path]:
    """Writes one checkpoint a kind of BACKBONES into `folder` and returns their folders by kind.

    Images are 64 to 72 px. `untrained` gets MammoDINO's folder. The weights are a function of `seed`.
    """
    folders = {kind: Path(folder) / kind for kind in ("mammodino", *NATIVE, *OWN_FILES)}
    with torch.random.fork_rng(devices=[]):
        for number, (kind, path) in enumerate(folders.items(), start=1):  # not 0, which is an untrained encoder's seed
            torch.default_generator.manual_seed(1000 * seed + number)
            path.mkdir(parents=True, exist_ok=True)
            if kind == "mammodino":
                _write_mammodino(path)
            elif kind in NATIVE:
                _write_native(kind, path)
            else:
                OWN_FILES[kind](path)
    return {**folders, "untrained": folders["mammodino"]}


def _write_mammodino(path: Path) -> None:
    config = MammoDinoConfig(
        hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=1, patch_size=PATCH_PX, image_size=SIDE_PX,
        layerscale_value=1.0,
    )  # fmt: skip
    MammoDinoModel(config).save_pretrained(path)
    MammoDinoImageProcessor(size={"height": SIDE_PX, "width": SIDE_PX}, patch_size=PATCH_PX).save_pretrained(path)


def _vit(**fields: Any) -> dict[str, Any]:
    return {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 1, **fields}


# by kind: class, configuration, and the size, mean and deviation of its published image processor
NATIVE: dict[str, tuple[type[PreTrainedModel], Any, dict[str, Any]]] = {
    "resnet50": (
        ResNetModel,
        ResNetConfig(embedding_size=16, hidden_sizes=[32, 32, 64, 64], depths=[3, 4, 6, 3]),
        {**IMAGENET, "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}},
    ),
    "convnextv2": (
        ConvNextV2Model,
        ConvNextV2Config(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1]),
        {**IMAGENET, "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}},
    ),
    "dinov2": (
        Dinov2Model,
        Dinov2Config(**_vit(image_size=70, patch_size=14)),
        {
            **IMAGENET, "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 80},
            "do_center_crop": True, "crop_size": {"height": 70, "width": 70},
        },
    ),
    "dinov3": (
        DINOv3ViTModel,
        DINOv3ViTConfig(**_vit(image_size=SIDE_PX, patch_size=PATCH_PX, intermediate_size=128, num_register_tokens=4)),
        {
            **BACKBONES["dinov3"].published, "image_processor_type": "DINOv3ViTImageProcessorFast",
            "size": {"height": SIDE_PX, "width": SIDE_PX}, "do_center_crop": None, "crop_size": None,
        },
    ),
    "medsiglip": (
        SiglipVisionModel,
        SiglipVisionConfig(**_vit(image_size=SIDE_PX, patch_size=PATCH_PX, intermediate_size=128)),
        {
            **SIGLIP, "image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE_PX, "width": SIDE_PX},
        },
    ),
    "rad_dino": (
        Dinov2Model,
        Dinov2Config(**_vit(image_size=70, patch_size=14)),
        {
            **CHEST, "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 70},
            "do_center_crop": True, "crop_size": {"height": 70, "width": 70},
        },
    ),
}  # fmt: skip


def _write_native(kind: str, path: Path) -> None:
    model, config, processor = NATIVE[kind]
    model(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def _timm_vit(prefix: str, patch_px: int, patches: int) -> State:
    """A ViT in the names of timm, which are DINOv2's as well."""
    state = {
        f"{prefix}cls_token": _normal(1, 1, WIDTH),
        f"{prefix}pos_embed": _normal(1, 1 + patches, WIDTH),
        **_layer(f"{prefix}patch_embed.proj", WIDTH, 3, patch_px, patch_px),
        **_norm(f"{prefix}norm", WIDTH),
    }
    for block in (f"{prefix}blocks.{number}." for number in range(BLOCKS)):
        state |= _norm(block + "norm1", WIDTH) | _norm(block + "norm2", WIDTH)
        state |= _layer(block + "attn.qkv", 3 * WIDTH, WIDTH) | _layer(block + "attn.proj", WIDTH, WIDTH)
        state |= _layer(block + "mlp.fc1", 4 * WIDTH, WIDTH) | _layer(block + "mlp.fc2", WIDTH, 4 * WIDTH)
    return state


def _write_dbt_dino(path: Path) -> None:
    """The teacher of DINOv2's training: its ViT, 70 px in patches of 14, and a word of its head."""
    scales = {f"backbone.blocks.{n}.ls{k}.gamma": 1 + _normal(WIDTH) for n in range(BLOCKS) for k in (1, 2)}
    teacher = {
        "backbone.mask_token": _normal(1, WIDTH), **_timm_vit("backbone.", 14, 25), **scales,
        "dino_head.last_layer.weight_g": _normal(32, 1),
    }  # fmt: skip
    torch.save({"teacher": teacher}, path / "dbt_dino.pth")
    processor = {**DBT, "image_processor_type": "BitImageProcessor", "size": {"height": 70, "width": 70}}
    (path / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def _write_biomedclip(path: Path) -> None:
    """open_clip's file with timm's ViT as its image tower, and a word of the text tower."""
    state = {
        **_timm_vit("visual.trunk.", PATCH_PX, (SIDE_PX // PATCH_PX) ** 2),
        "visual.head.proj.weight": _normal(32, WIDTH),
        "text.proj.0.weight": _normal(32, 32),
        "logit_scale": torch.tensor(4.6),
    }
    torch.save(state, path / "open_clip_pytorch_model.bin")
    vision = {"timm_model_name": "vit_base_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": SIDE_PX}
    preprocessing = {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    }
    settings = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision}, "preprocess_cfg": preprocessing}
    (path / "open_clip_config.json").write_text(json.dumps(settings, indent=2))


def _write_clip_vit(path: Path) -> None:
    """A state dict in the layout of OpenAI's CLIP, half precision as OpenAI's are, and a word of its text tower."""
    state = {
        "visual.class_embedding": _normal(WIDTH),
        "visual.positional_embedding": _normal(1 + (SIDE_PX // PATCH_PX) ** 2, WIDTH),
        "visual.proj": _normal(WIDTH, 32),
        "visual.conv1.weight": _layer("", WIDTH, 3, PATCH_PX, PATCH_PX)[".weight"],
        **_norm("visual.ln_pre", WIDTH),
        **_norm("visual.ln_post", WIDTH),
        "token_embedding.weight": _normal(16, 32),
        "text_projection": _normal(32, 32),
        "logit_scale": torch.tensor(4.6),
    }
    for block in (f"visual.transformer.resblocks.{number}." for number in range(BLOCKS)):
        state |= _norm(block + "ln_1", WIDTH) | _norm(block + "ln_2", WIDTH)
        attention = _layer(block + "attn.in_proj", 3 * WIDTH, WIDTH)
        state |= {name.replace("in_proj.", "in_proj_"): value for name, value in attention.items()}
        state |= _layer(block + "attn.out_proj", WIDTH, WIDTH)
        state |= _layer(block + "mlp.c_fc", 4 * WIDTH, WIDTH) | _layer(block + "mlp.c_proj", WIDTH, 4 * WIDTH)
    torch.save({name: value.half() for name, value in state.items()}, path / "clip_vit.pt")


def _write_efficientnet(path: Path) -> None:
    """Training's state as batmanlab saves it, with an EfficientNet in the names of efficientnet_pytorch."""
    model = {f"image_encoder.{name}": value for name, value in efficientnet_state("small").items()}
    model |= {"text_encoder.word.weight": _normal(16, 32), "image_projection.projection.weight": _normal(32, 32)}
    training = {"model": model, "epoch": 1, "config": {"model": {"image_encoder": {"model_type": "cnn"}}}}
    torch.save(training, path / "model-best.tar")
    side = VARIANTS["small"].image_size
    processor = {**PREPROCESSING, "image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}}
    (path / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def efficientnet_state(variant: str) -> State:
    """Random weights of an EfficientNet, B0 to B7 or `small`, in the names of efficientnet_pytorch."""
    config, (width, depth, _) = efficientnet_config(variant), VARIANTS[variant]
    stem = round_filters(32, width)
    state = {"_conv_stem.weight": _kernel(stem, 3, 3), **_batch_norm("_bn0", stem)}
    block = 0
    stages = zip(
        config.in_channels, config.out_channels, config.kernel_sizes, config.expand_ratios, config.num_block_repeats,
        strict=True,
    )  # fmt: skip
    for channels_in, channels_out, kernel, expand, repeats in stages:
        narrow, out = round_filters(channels_in, width), round_filters(channels_out, width)
        for _ in range(math.ceil(depth * repeats)):
            name, wide, squeezed = f"_blocks.{block}.", narrow * expand, max(1, narrow // 4)
            if expand != 1:
                state |= {f"{name}_expand_conv.weight": _kernel(wide, narrow, 1)} | _batch_norm(name + "_bn0", wide)
            state |= {f"{name}_depthwise_conv.weight": _kernel(wide, 1, kernel)} | _batch_norm(name + "_bn1", wide)
            state |= _layer(name + "_se_reduce", squeezed, wide, 1, 1)
            state |= _layer(name + "_se_expand", wide, squeezed, 1, 1)
            state |= {f"{name}_project_conv.weight": _kernel(out, wide, 1)} | _batch_norm(name + "_bn2", out)
            narrow, block = out, block + 1
    head = round_filters(1280, width)
    return state | {"_conv_head.weight": _kernel(head, narrow, 1)} | _batch_norm("_bn1", head)


OWN_FILES = {
    "biomedclip": _write_biomedclip,
    "mammo_clip_vit": _write_clip_vit,
    "mammo_clip_efficientnet": _write_efficientnet,
    "mammo_fm": _write_efficientnet,
    "dbt_dino": _write_dbt_dino,
}


def _normal(*shape: int, std: float = 0.1) -> torch.Tensor:
    return torch.randn(shape) * std


def _layer(name: str, *shape: int) -> State:
    """Weight and bias of a linear or convolutional layer; shape: outputs first."""
    return {f"{name}.weight": _normal(*shape, std=math.prod(shape[1:]) ** -0.5), f"{name}.bias": _normal(shape[0])}


def _kernel(channels_out: int, channels_in: int, side: int) -> torch.Tensor:
    return _normal(channels_out, channels_in, side, side, std=(2 / (channels_in * side**2)) ** 0.5)


def _norm(name: str, width: int) -> State:
    return {f"{name}.weight": 1 + _normal(width), f"{name}.bias": _normal(width)}


def _batch_norm(name: str, width: int) -> State:
    return {
        **_norm(name, width),
        f"{name}.running_mean": _normal(width),
        f"{name}.running_var": 0.5 + torch.rand(width),
        f"{name}.num_batches_tracked": torch.tensor(1),
    }
