"""Read the original DINOv2 checkpoints: the `.pth` files of facebookresearch/dinov2, released or from its training.

The configuration is derived from the shapes of the tensors, and every key of the file is accounted for.
"""

import logging
import math
import re
from pathlib import Path

import torch

from ..configuration_mammodino import MammoDinoConfig
from ..modeling_mammodino import MammoDinoModel

logger = logging.getLogger(__name__)

HEAD_SIZE = 64  # width of an attention head, in every published size
MAX_MLP_RATIO = 16
PATCH_WEIGHT = "embeddings.patch_embeddings.projection.weight"
# names of dinov2/models/vision_transformer.py -> of a Dinov2-with-registers checkpoint, applied in this order
RENAMES = (
    (r"^blocks\.(?:\d+\.)?(\d+)\.", r"encoder.layer.\1."),  # blocks.C.N: in chunks for FSDP; N counts through them all
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^norm\.", "layernorm."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
)
# what dinov2's training saves beside the teacher's backbone
BESIDE_THE_BACKBONE = re.compile(r"^(student\.|(teacher\.)?(dino|ibot)_head\.|(dino_loss|ibot_patch_loss)\.)")


def read_reference_checkpoint(path: str | Path, interpolation: dict, tensors: dict | None = None) -> MammoDinoModel:
    """Return the encoder of a `.pth`, float32, with as many channels and registers as the file has.

    tensors: what the file holds, where it was read before. interpolation: `interpolate_antialias` and
    `interpolate_offset` of the plain and of the register variants, by "plain" and "registers".

    Raises ValueError, naming the keys, where the file is not a DINOv2 encoder as a whole; a pickle that holds more than
    tensors is refused before any of it runs.
    """
    state = rename(teacher_backbone(load_tensors(path) if tensors is None else tensors, path), path)
    config = derive_config(state, path)
    variant = interpolation["registers" if config.num_register_tokens else "plain"]
    for name, value in variant.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = MammoDinoModel(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    misshapen = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    if missing or unexpected or misshapen:
        shapes = [f"{name} {found[name]}, not {expected[name]}" for name in misshapen]
        raise ValueError(
            f"{path}: not a whole DINOv2 encoder (keys in Hugging Face names): missing {_some(missing)}; unexpected "
            f"{_some(unexpected)}; of another shape {_some(shapes)}. Give a backbone of facebookresearch/dinov2"
        )
    model.load_state_dict(state, assign=True)
    return model.eval()


def load_tensors(path: str | Path) -> dict:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # on bytes that are no pickle, torch's reader fails in any way
        raise ValueError(
            f"{path}: refused, for it holds more than tensors or is damaged; none of its code was run. Save the state "
            f"dict alone, from a source that you trust ({type(error).__name__}: {str(error).split(chr(10))[0]})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}; a dict of tensors is needed")
    return checkpoint


def teacher_backbone(checkpoint: dict, path: str | Path) -> dict[str, torch.Tensor]:
    """Return the encoder's entries, without the wrappers of dinov2's training: the teacher's where there are two."""
    for wrapper in ("model", "teacher"):
        if isinstance(checkpoint.get(wrapper), dict):
            dropped = [name for name in checkpoint if name != wrapper]
            if dropped:
                logger.warning("%s: only %r is converted, not %s", path, wrapper, _some(dropped))
            checkpoint = checkpoint[wrapper]
    for prefix in ("teacher.backbone.", "backbone."):
        inside = {name.removeprefix(prefix): value for name, value in checkpoint.items() if name.startswith(prefix)}
        if inside:
            outside = [name for name in checkpoint if not name.startswith(prefix)]
            unknown = [name for name in outside if not BESIDE_THE_BACKBONE.match(name)]
            if unknown:
                raise ValueError(f"{path}: beside {prefix}* there are unknown keys: {_some(unknown)}")
            if outside:
                logger.warning("%s: %s* is converted; %d other keys are not", path, prefix, len(outside))
            checkpoint = inside
            break
    odd = [name for name, value in checkpoint.items() if not isinstance(value, torch.Tensor)]
    if odd or "patch_embed.proj.weight" not in checkpoint:
        raise ValueError(
            f"{path}: not a DINOv2 encoder: "
            + (f"not tensors: {_some(odd)}" if odd else f"no patch_embed.proj.weight among {_some(list(checkpoint))}")
        )
    return checkpoint


def rename(tensors: dict[str, torch.Tensor], path: str | Path) -> dict[str, torch.Tensor]:
    """Return the state dict in Hugging Face names, float32; query, key and value apart."""
    state: dict[str, torch.Tensor] = {}

    def put(name: str, tensor: torch.Tensor) -> None:
        if name in state:
            raise ValueError(f"{path}: two tensors for {name}")
        state[name] = tensor.float().contiguous()

    for original, tensor in tensors.items():
        name = original
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            if tensor.shape[0] % 3:
                raise ValueError(f"{path}: {original} of shape {tuple(tensor.shape)} is not query, key and value")
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                put(name.replace(".attn.qkv.", f".attention.attention.{part}."), rows.clone())  # a storage of its own
        else:
            put(name, tensor)
    width = state[PATCH_WEIGHT].shape[0]
    state.setdefault("embeddings.register_tokens", torch.zeros(1, 0, width))
    if "embeddings.mask_token" not in state:
        logger.warning("%s: no mask_token; it starts from zero, as in DINOv2", path)
        state["embeddings.mask_token"] = torch.zeros(1, width)
    return state


def derive_config(state: dict[str, torch.Tensor], path: str | Path) -> MammoDinoConfig:
    """Return the architecture from the shapes of a renamed state dict."""
    if state[PATCH_WEIGHT].ndim != 4:
        raise ValueError(f"{path}: patch_embed.proj.weight must have 4 dimensions")
    width, num_channels, *patch_size = state[PATCH_WEIGHT].shape
    layers = [int(found.group(1)) for name in state if (found := re.match(r"encoder\.layer\.(\d+)\.", name))]
    positions = state.get("embeddings.position_embeddings", torch.zeros(1, 0, width))
    side = math.isqrt(max(positions.shape[1] - 1, 0))
    if not layers or width % HEAD_SIZE or not side or side**2 != positions.shape[1] - 1:
        raise ValueError(
            f"{path}: not a DINOv2 encoder: {len(set(layers))} blocks, width {width} (must be a multiple of "
            f"{HEAD_SIZE}), pos_embed {tuple(positions.shape)} (must be the class token and a square grid)"
        )
    is_swiglu = "encoder.layer.0.mlp.weights_in.weight" in state
    output = state.get(f"encoder.layer.0.mlp.{'weights_out' if is_swiglu else 'fc2'}.weight", torch.zeros(width, 0))
    ratios = range(1, MAX_MLP_RATIO + 1)
    hidden_sizes = {(int(width * r * 2 / 3) + 7) // 8 * 8 if is_swiglu else width * r: r for r in ratios}
    if output.shape[-1] not in hidden_sizes:
        raise ValueError(
            f"{path}: an MLP of {output.shape[-1]} hidden features at width {width} has no whole mlp_ratio"
        )
    return MammoDinoConfig(
        hidden_size=width,
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=width // HEAD_SIZE,
        mlp_ratio=hidden_sizes[output.shape[-1]],
        use_swiglu_ffn=is_swiglu,
        qkv_bias="encoder.layer.0.attention.attention.query.bias" in state,
        patch_size=patch_size[0] if patch_size[0] == patch_size[1] else patch_size,
        image_size=[side * each for each in patch_size] if patch_size[0] != patch_size[1] else side * patch_size[0],
        num_channels=num_channels,
        num_register_tokens=state["embeddings.register_tokens"].shape[1],
    )


def _some(names: list[str], count: int = 5) -> str:
    """Return the first names of a list, for a message."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(map(str, names[:count])) or "none") + rest


__all__ = ["read_reference_checkpoint"]
