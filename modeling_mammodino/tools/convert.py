"""`mammodino convert`: weights in from DINOv2 (Hugging Face or original), and out to plain transformers.

An RGB model becomes a one-channel one that gives the same features for a gray image: its patch embedding is summed
over the channels with the normalization of either side folded in (`fold_normalization`).
"""

import argparse
import copy
import json
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData, save_torch_state_dict
from transformers import Dinov2Config, Dinov2WithRegistersConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from ..configuration_mammodino import MammoDinoConfig
from ..image_processing_mammodino import MammoDinoImageProcessor
from ..modeling_mammodino import MammoDinoForImageClassification, MammoDinoModel, as_pair
from .command import user_model, user_path
from .dinov2_checkpoints import read_reference_checkpoint
from .files import atomic_folder

logger = logging.getLogger(__name__)

Model = MammoDinoModel | MammoDinoForImageClassification
TARGETS = ("mammodino", "dinov2_with_registers")
CONFIGS: dict[str, Any] = {each.model_type: each for each in (Dinov2Config, Dinov2WithRegistersConfig, MammoDinoConfig)}
# what the configurations have in common
ARCHITECTURE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "hidden_act", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps", "image_size", "patch_size", "num_channels",
    "qkv_bias", "layerscale_value", "drop_path_rate", "use_swiglu_ffn", "num_register_tokens", "out_indices",
    "apply_layernorm", "reshape_hidden_states",
)  # fmt: skip
HEAD = ("id2label", "label2id", "problem_type")
# how stored position embeddings reach other sizes: facebookresearch/dinov2's released models, and transformers' classes
INTERPOLATION = {
    "reference": {
        "plain": {"interpolate_antialias": False, "interpolate_offset": 0.1},
        "registers": {"interpolate_antialias": True, "interpolate_offset": 0.0},
    },
    "transformers": {
        "plain": {"interpolate_antialias": False, "interpolate_offset": 0.0},
        "registers": {"interpolate_antialias": True, "interpolate_offset": 0.0},
    },
}
PROJECTION = "embeddings.patch_embeddings.projection"


def load_encoder(source: str | Path, **options: Any) -> MammoDinoModel:
    """Do as `load_checkpoint`, without the head, where there is one."""
    model = load_checkpoint(source, **options)
    encoder = encoder_of(model)
    if encoder is not model:
        logger.warning("%s: its classifier is left out", source)
        for name in HEAD:
            setattr(encoder.config, name, getattr(MammoDinoConfig(), name))
    return encoder


def encoder_of(model: Model) -> MammoDinoModel:
    return model if isinstance(model, MammoDinoModel) else model.dinov2_with_registers


def load_checkpoint(
    source: str | Path,
    num_channels: int = 1,
    image_size: int | Sequence[int] | None = None,
    interpolation: str = "reference",
    image_processor: MammoDinoImageProcessor | None = None,
) -> Model:
    """Return a MammoDINO model, float32 and in eval mode, with the weights of another checkpoint.

    Args:
        source: Hub id or folder of a `dinov2`, `dinov2_with_registers` or `mammodino` checkpoint, with or without a
            linear classifier; or a `.pth` in the layout of facebookresearch/dinov2.
        num_channels: 1, or as many as the source has. For 1 the result takes pixels as `image_processor` normalizes
            them and gives what the source gives for the same gray plane, repeated and normalized in its own way.
        image_size: side, or (height, width), in pixels, at which position embeddings are stored; default: the source's.
        interpolation: how plain DINOv2's position embeddings reach other sizes, as in facebookresearch/dinov2
            ("reference") or as in transformers' `Dinov2Model` ("transformers"). Register variants know one way.
        image_processor: what prepares the pixels; default: the source's own if it is ours, else the default one.

    Raises ValueError or OSError, naming the keys or fields at fault: no parameter is left random, no key unread.
    """
    if interpolation not in INTERPOLATION:
        raise ValueError(f"interpolation={interpolation!r}: must be one of {', '.join(INTERPOLATION)}")
    if Path(source).is_file() or Path(source).suffix in (".pth", ".pt"):
        model: Model = read_reference_checkpoint(source, INTERPOLATION[interpolation])
    else:
        model = read_hugging_face_checkpoint(str(source), INTERPOLATION[interpolation])
    channels = model.config.num_channels
    if num_channels not in (1, channels):
        raise ValueError(f"num_channels={num_channels}: {source} has {channels}; choose 1 or {channels}")
    if num_channels == 1:
        settings = processor_settings(source)
        target = Normalization.of(image_processor or own_processor(settings) or MammoDinoImageProcessor())
        made_with = source_normalization(source, settings, channels, target)
        if channels > 1 or made_with != target:
            projection = encoder_of(model).embeddings.patch_embeddings.projection
            weight, bias = fold_normalization(projection, made_with, target)
            model = rebuild(model, {f"{PROJECTION}.weight": weight, f"{PROJECTION}.bias": bias}, num_channels=1)
    return model if image_size is None else resample_positions(model, image_size)


def read_hugging_face_checkpoint(source: str, interpolation: dict) -> Model:
    """Read a Hub id or folder as it is, with its own channels; no code that lies beside the weights is run."""
    model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if model_type not in CONFIGS:
        raise ValueError(
            f"{source}: model_type={model_type!r} in its config.json; convert reads {', '.join(CONFIGS)}, and the .pth "
            "files of facebookresearch/dinov2"
        )
    config = theirs = CONFIGS[model_type].from_pretrained(source)
    has_head = any(name.endswith("ForImageClassification") for name in theirs.architectures or ())
    if model_type != "mammodino":
        fields = {name: getattr(theirs, name) for name in ARCHITECTURE if hasattr(theirs, name)}
        fields |= {name: getattr(theirs, name) for name in HEAD} if has_head else {}
        fields |= {"num_register_tokens": 0} if model_type == "dinov2" else {}
        config = MammoDinoConfig(**fields, **interpolation["plain" if model_type == "dinov2" else "registers"])
    loader: Any = MammoDinoForImageClassification if has_head else MammoDinoModel
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what is missing is evaluated below
    try:
        model, report = loader.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            key_mapping={r"^dinov2\.": "dinov2_with_registers."},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except pickle.UnpicklingError as error:  # a pytorch_model.bin
        raise ValueError(
            f"{source}: refused, for its weights hold more than tensors; none of their code was run"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = {name.removeprefix("dinov2_with_registers.") for name in report["missing_keys"]}
    if not config.num_register_tokens:
        missing.discard("embeddings.register_tokens")
    if model_type == "dinov2" and "embeddings.mask_token" in missing:
        logger.warning("%s: no mask_token; it starts from zero, as in DINOv2", source)
        missing.remove("embeddings.mask_token")
    faults = {
        "missing": missing,
        "unexpected": report["unexpected_keys"],
        "of another shape": report["mismatched_keys"],
    }
    if any(faults.values()):
        named = "; ".join(f"{kind}: {', '.join(sorted(map(str, keys)))}" for kind, keys in faults.items() if keys)
        raise ValueError(
            f"{source}: the weights are not those of its config.json ({model_type}): {named}. Save the model again "
            "with save_pretrained"
        )
    return model.eval()


def resample_positions(model: Model, image_size: int | Sequence[int]) -> Model:
    """Return the model with position embeddings stored at another size, interpolated as it would do itself: at that
    size it gives the same, and others are reached from there. image_size: side or (height, width) in pixels."""
    sides = (image_size,) if isinstance(image_size, int) else tuple(image_size)
    height, width, patch = sides[0], sides[-1], as_pair(model.config.patch_size)
    if len(sides) > 2 or min(sides) < 1 or height % patch[0] or width % patch[1]:
        raise ValueError(f"image_size={list(sides)}: must be one or two multiples of patch_size={patch[0]}")
    with torch.no_grad():
        positions = encoder_of(model).embeddings.interpolate_position_embeddings(
            (height // patch[0], width // patch[1])
        )
    stored = height if height == width else [height, width]
    return rebuild(model, {"embeddings.position_embeddings": positions.contiguous()}, image_size=stored)


def rebuild(model: Model, tensors: dict[str, torch.Tensor], **fields: Any) -> Model:
    """Return `model` with some configuration fields and encoder tensors replaced, in eval mode; others are shared."""
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(config, name, value)
    with torch.device("meta"):
        rebuilt = type(model)(config)
    prefix = "" if encoder_of(model) is model else f"{model.base_model_prefix}."
    rebuilt.load_state_dict(model.state_dict() | {prefix + name: each for name, each in tensors.items()}, assign=True)
    return rebuilt.eval()


def convert(
    source: str | Path,
    output: str | Path,
    to: str = "mammodino",
    num_channels: int = 1,
    image_size: int | Sequence[int] | None = None,
    interpolation: str = "reference",
) -> Path:
    """Write `source` as a folder of the type `to`, with its image processor, atomically; see `load_checkpoint`
    for the other arguments. "mammodino" folders hold the code as well.

    The image processor is the source's own where it is ours, else the default one for the model's size; a model that
    keeps its color channels keeps its own preprocessor_config.json.
    """
    if to not in TARGETS:
        raise ValueError(f"to={to!r}: must be one of {', '.join(TARGETS)}")
    with atomic_folder(output) as temporary:
        model = load_checkpoint(source, num_channels, image_size, interpolation)
        settings, processor = processor_settings(source), None
        if model.config.num_channels == 1:
            processor = gray_processor(model, own_processor(settings), image_size)
            settings = processor.to_dict()
        if settings:
            settings.pop("auto_map", None)  # plain transformers is to run no code
            (temporary / "preprocessor_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        if to == "mammodino":
            model.save_pretrained(temporary)
            if processor:
                processor.save_pretrained(temporary)
        else:
            write_native(model, temporary)
        model_card(source, model).save(temporary / "README.md")
    return Path(output)


def gray_processor(
    model: Model, own: MammoDinoImageProcessor | None, image_size: int | Sequence[int] | None
) -> MammoDinoImageProcessor:
    height, width = encoder_of(model).embeddings.stored_grid
    patch = as_pair(model.config.patch_size)
    if patch[0] != patch[1]:
        raise ValueError(f"patch_size={list(patch)}: MammoDinoImageProcessor makes square patches only")
    size = {"height": height * patch[0], "width": width * patch[0]}
    if own is None:
        return MammoDinoImageProcessor(size=size, patch_size=patch[0])
    if image_size is not None:
        own.size = size
    return own


def write_native(model: Model, folder: Path) -> None:
    """Write a checkpoint that plain transformers opens with `AutoModel` (or `AutoModelForImageClassification`) as
    Dinov2-with-registers, without remote code, and that gives the same as `model` without `tissue_mask`.

    Raises ValueError where position embeddings do not form a square, which that class cannot store.
    """
    config, stored = model.config, encoder_of(model).embeddings.stored_grid
    if stored[0] != stored[1]:
        raise ValueError(
            f"image_size={config.image_size}: dinov2_with_registers stores square position embeddings only; give "
            f"--image_size {max(as_pair(config.image_size))} (images of other sizes still go in)"
        )
    if (config.interpolate_antialias, config.interpolate_offset) != (True, 0.0):
        logger.warning(
            "dinov2_with_registers interpolates position embeddings antialiased and without offset, these weights do "
            "not: features are equal at %s px and differ at other sizes; --image_size chooses the size",
            " x ".join(map(str, as_pair(config.image_size))),
        )
    has_head = isinstance(model, MammoDinoForImageClassification)
    names = ARCHITECTURE + (HEAD if has_head else ())
    native = Dinov2WithRegistersConfig(**{name: getattr(config, name) for name in names})
    native.architectures = [f"Dinov2WithRegisters{'ForImageClassification' if has_head else 'Model'}"]
    native.dtype = "float32"
    native.save_pretrained(folder)
    save_torch_state_dict(model.state_dict(), folder)  # the names are those of that class on disk


def model_card(source: str | Path, model: Model) -> ModelCard:
    is_local = Path(source).exists()  # a path of this machine is nobody's business
    name = Path(source).name if is_local else str(source)
    data = ModelCardData(
        base_model=None if is_local else name,
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if isinstance(model, MammoDinoModel) else "image-classification",
        tags=["mammography", "research-use-only"],
    )
    return ModelCard(
        f"---\n{data}\n---\n\n# {name}, converted\n\nWeights of `{name}` for {model.config.num_channels}-channel "
        "images, converted with `mammodino convert`. They keep the license of their source. **Research use only: not "
        "a medical device, not for diagnosis.**\n"
    )


class Normalization(NamedTuple):
    """(x - mean) / std of pixels in 0..1, a value a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, image_processor: MammoDinoImageProcessor) -> "Normalization":
        mean, std = image_processor.mean_and_std
        return cls((mean,), (std,))


IMAGENET = Normalization(tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD))  # of DINOv2's own training


def processor_settings(source: str | Path) -> dict[str, Any] | None:
    """Return preprocessor_config.json of a folder or Hub id; None where it has none, as a `.pth`."""
    if Path(source).is_file():
        return None
    if not Path(source).is_dir():
        cached_file(str(source), "config.json")  # says whether the Hub is out of reach, or knows no such repository
    if cached_file(str(source), "preprocessor_config.json", _raise_exceptions_for_missing_entries=False) is None:
        return None
    return MammoDinoImageProcessor.get_image_processor_dict(str(source))[0]


def own_processor(settings: dict[str, Any] | None) -> MammoDinoImageProcessor | None:
    """Return the image processor, where the settings are those of ours."""
    if settings is None or settings.get("image_processor_type") != MammoDinoImageProcessor.__name__:
        return None
    return MammoDinoImageProcessor.from_dict(settings)


def source_normalization(
    source: str | Path, settings: dict[str, Any] | None, num_channels: int, target: Normalization
) -> Normalization:
    """Return the normalization that a checkpoint was made with. Where nothing says it, an RGB model is taken to be of
    ImageNet's, as DINOv2 is, and any other to be of `target`; a warning says so."""
    own = own_processor(settings)
    if own is not None:
        found = Normalization.of(own)
    elif settings is None or settings.get("image_mean") is None or settings.get("image_std") is None:
        found = IMAGENET if num_channels == 3 else target
        expected = num_channels == 3 and Path(source).is_file()  # the original files have nothing beside them
        logger.log(
            logging.INFO if expected else logging.WARNING,
            "%s: no preprocessor_config.json with image_mean and image_std; taken to be made with mean %s and standard "
            "deviation %s%s", source, found.mean, found.std, " (ImageNet's, DINOv2's own)" if num_channels == 3 else "",
        )  # fmt: skip
    elif not settings.get("do_normalize", True):
        found = Normalization((0.0,), (1.0,))
    else:
        mean, std = (np.ravel(settings[name]).astype(float).tolist() for name in ("image_mean", "image_std"))
        found = Normalization(tuple(mean), tuple(std))
    if own is None and settings is not None:  # transformers normalizes what it has rescaled: 0..1 by default
        full = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255
        found = Normalization(tuple(each / full for each in found.mean), tuple(each / full for each in found.std))
    if len(set(found.mean)) == len(set(found.std)) == 1:
        found = Normalization(found.mean[:1] * num_channels, found.std[:1] * num_channels)
    if not len(found.mean) == len(found.std) == num_channels or min(found.std) <= 0:
        raise ValueError(
            f"{source}: image_mean={found.mean} and image_std={found.std} of preprocessor_config.json do not fit "
            f"num_channels={num_channels} of the model: give one value for all channels or one for each, "
            "those of image_std above 0"
        )
    return found


def fold_normalization(
    projection: torch.nn.Conv2d, source: Normalization, target: Normalization
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight (D, 1, p, p) and bias (D,) of a patch embedding that takes a gray plane g as (g - m) / s and
    gives what `projection` gives for it in each of its channels c as (g - m_c) / s_c:

        weight = sum_c W_c s / s_c,    bias = b + sum over c and the patch of W_c (m - m_c) / s_c
    """
    weight = projection.weight.detach().double()  # (D, C, p, p)
    mean_c, std_c = (torch.tensor(each, dtype=torch.float64).view(-1, 1, 1) for each in source)  # (C, 1, 1)
    shift = (weight * ((target.mean[0] - mean_c) / std_c)).sum((1, 2, 3))  # (D,)
    bias = shift if projection.bias is None else projection.bias.detach().double() + shift
    folded = (weight * (target.std[0] / std_c)).sum(1, keepdim=True)
    return folded.to(projection.weight.dtype), bias.to(projection.weight.dtype)


def add_command(commands: Any) -> None:
    """Add the subcommand `convert`; `commands` is argparse's action of subparsers."""
    parser = commands.add_parser(
        "convert",
        help="weights from DINOv2, or out to plain transformers",
        description="Converts DINOv2 weights to a MammoDINO folder, or either to a folder that plain transformers "
        "opens as dinov2_with_registers. Research use only.",
    )
    parser.add_argument(
        "source", type=user_model, help="Hub id or folder (dinov2, dinov2_with_registers, mammodino), or DINOv2's .pth"
    )
    parser.add_argument("output", type=user_path, help="folder to write; must not exist or be empty")
    parser.add_argument("--to", choices=TARGETS, default=TARGETS[0], help="type of the folder (default: %(default)s)")
    parser.add_argument("--num_channels", type=int, default=1, help="1, or as many as the source has (default: 1)")
    parser.add_argument(
        "--image_size", type=int, nargs="+", metavar="PX",
        help="side, or height and width, at which position embeddings are stored (default: the source's)",
    )  # fmt: skip
    parser.add_argument(
        "--interpolation", choices=tuple(INTERPOLATION), default="reference",
        help="how plain DINOv2's position embeddings reach other sizes: as in facebookresearch/dinov2 (default), or as "
        "in transformers' Dinov2Model",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    try:
        folder = convert(
            options.source, options.output, options.to, options.num_channels, options.image_size, options.interpolation
        )
    except FileExistsError:
        raise
    except (ValueError, OSError) as error:  # transformers does not always name what it could not reach
        raise ValueError(f"{options.source}: {str(error).removeprefix(f'{options.source}: ')}") from error
    print(folder)


__all__ = ["convert", "load_checkpoint", "load_encoder", "own_processor", "processor_settings", "write_native"]
