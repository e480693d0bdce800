"""Backbones under one head: MammoDINO and the baselines, each through its class of transformers.

One rule for the features that a head gets. A transformer gives its class token beside the mean of its patch tokens,
both behind its last LayerNorm (MammoDINO's mean is weighted by tissue, which its image processor returns); a
convolutional network gives the mean over its last map, as published. What CLIP models project into the space of texts
is left out. The rule is our choice: the paper says only that every backbone gets the same light head.

Weights come by Hub id, folder or file; a Hub id may name one file, OWNER/NAME/PATH. What is said here of a layout was
read in the code or the card that was published with it; no published weights were at hand. Research use only.
"""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import should_reduce_batch_size
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CLIPVisionModel,
    ConvNextV2Model,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PreTrainedModel,
    ResNetModel,
    SiglipVisionModel,
    ViTModel,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import cached_file

from modeling_mammodino import MammoDinoConfig, MammoDinoImageProcessor, MammoDinoModel, pool_tokens
from modeling_mammodino.tools.convert import INTERPOLATION, own_processor, processor_settings
from modeling_mammodino.tools.dinov2_checkpoints import read_reference_checkpoint
from modeling_mammodino.tools.embed import open_encoder, weights_sha256
from modeling_mammodino.tools.features import beside_earlier_tokens

from .checkpoint_files import check_report, find_file, first_line, quiet_transformers, read_tensors
from .convert_mammo_clip_efficientnet import PREPROCESSING as MAMMO_CLIP
from .convert_mammo_clip_efficientnet import convert_mammo_clip
from .convert_open_clip import convert_biomedclip, convert_clip_vit
from .preprocessing import MammoDinoImages, Preprocessing, rgb_images

# of an untrained ViT where no checkpoint gives the architecture: a ViT-S/14
UNTRAINED: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
# of a configuration, what no feature depends on
PROVENANCE = (
    "_name_or_path", "architectures", "auto_map", "drop_path_rate", "dtype", "id2label", "label2id",
    "transformers_version",
)  # fmt: skip


def pool_mammodino(
    model: Any, pixel_values: torch.Tensor, tissue_mask: torch.Tensor | None, last_layers: int = 1
) -> torch.Tensor:
    config = model.config
    outputs = model(pixel_values, tissue_mask=tissue_mask, output_hidden_states=last_layers > 1)
    pooled = pool_tokens(outputs.last_hidden_state, config.num_register_tokens, tissue_mask, config.tissue_threshold)
    return beside_earlier_tokens(pooled, outputs, model.layernorm, last_layers)


def pool_vit(
    model: Any, pixel_values: torch.Tensor, tissue_mask: torch.Tensor | None, last_layers: int = 1
) -> torch.Tensor:
    outputs = model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=last_layers > 1)
    return beside_earlier_tokens(pool_tokens(outputs.last_hidden_state, 0), outputs, model.layernorm, last_layers)


def pool_dinov2(
    model: Any, pixel_values: torch.Tensor, tissue_mask: torch.Tensor | None, last_layers: int = 1
) -> torch.Tensor:
    outputs = model(pixel_values, output_hidden_states=last_layers > 1)
    pooled = pool_tokens(outputs.last_hidden_state, getattr(model.config, "num_register_tokens", 0))
    norm = model.norm if hasattr(model, "norm") else model.layernorm
    return beside_earlier_tokens(pooled, outputs, norm, last_layers)


def pool_clip(
    model: Any, pixel_values: torch.Tensor, tissue_mask: torch.Tensor | None, last_layers: int = 1
) -> torch.Tensor:
    outputs = model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=last_layers > 1)
    norm = getattr(model, "vision_model", model).post_layernorm  # older transformers have it one level below
    return beside_earlier_tokens(pool_tokens(norm(outputs.last_hidden_state), 0), outputs, norm, last_layers)


def pool_siglip(model: Any, pixel_values: torch.Tensor, tissue_mask: torch.Tensor | None) -> torch.Tensor:
    """Return what its attention pooling gives, which stands for a class token, beside the mean."""
    outputs = model(pixel_values, interpolate_pos_encoding=True)
    return torch.cat((outputs.pooler_output, outputs.last_hidden_state.mean(1)), dim=1)


def pool_pooled(model: Any, pixel_values: torch.Tensor, tissue_mask: torch.Tensor | None) -> torch.Tensor:
    return model(pixel_values).pooler_output.flatten(1)


def pool_map(model: Any, pixel_values: torch.Tensor, tissue_mask: torch.Tensor | None) -> torch.Tensor:
    return model(pixel_values).last_hidden_state.mean((2, 3))


def published(mean: Sequence[float], std: Sequence[float], side: int = 224, resample: int = 3) -> dict[str, Any]:
    """Return the image processor of a family, for folders without one: its final size, by Pillow's number of the
    interpolation."""
    size = {"height": side, "width": side}
    return {"size": size, "image_mean": list(mean), "image_std": list(std), "resample": resample}


IMAGENET = published(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
CLIP = published(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
CHEST = published([0.5307] * 3, [0.2583] * 3, side=518)  # of microsoft/rad-dino
SIGLIP = published([0.5] * 3, [0.5] * 3, side=448)  # of google/medsiglip-448
# of its repository's extract_embeddings.py: values after the window, 0 to 1, as they are, by area (4: Pillow's box)
DBT = published([0.0] * 3, [1.0] * 3, side=518, resample=4)
ATTENTION = ("query", "value", "q_proj", "v_proj")  # one pair or the other, by version of transformers


class Family(NamedTuple):
    """How one kind of backbone is opened and used.

    Attributes:
        license: of the weights, as far as it is known.
        pool: features (B, F) of model, pixel_values and tissue_mask, and where a model has class tokens `last_layers`.
        width: F, from the model's configuration.
        adapted: what the layers are called that low-rank adapters go to, of which a model has some.
        hub_id: the source where none is given.  get: how to come by the weights, where they are not on the Hub or
            not for everybody.
        models: class by `model_type` of config.json.
        published: settings of the image processor, for a folder without one.
        convert: reads the family's own file; `files`: its names in a folder or repository, `suffix`: its ending.
        as_mammo_clip: whether images are stretched to size and range, as Mammo-CLIP's.
    """

    license: str
    pool: Callable[..., torch.Tensor]
    width: Callable[[Any], int]
    adapted: tuple[str, ...]
    hub_id: str | None = None
    models: dict[str, type[PreTrainedModel]] = {}
    published: dict[str, Any] = {}
    convert: Callable[[Path], tuple[PreTrainedModel, dict[str, Any]]] | None = None
    files: tuple[str, ...] = ()
    suffix: str = ""
    get: str = ""
    as_mammo_clip: bool = False

    @property
    def is_transformer(self) -> bool:
        return self.width is _two_tokens

    @property
    def has_class_token(self) -> bool:
        return self.is_transformer and self.pool is not pool_siglip


def _two_tokens(config: Any) -> int:
    return 2 * config.hidden_size


def _last_map(config: Any) -> int:
    return config.hidden_sizes[-1]


def convert_dbt_dino(path: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the teacher's ViT of a file of DINOv2's training, float32 and in eval mode, and its image processor."""
    return read_reference_checkpoint(path, INTERPOLATION["reference"], read_tensors(path)), DBT


OPEN_CLIP = ("open_clip_pytorch_model.bin", "open_clip_model.safetensors")
OWN = "that of the checkpoint"
GATED = "accept its terms on the Hub first, then log in (hf auth login)"
BACKBONES: dict[str, Family] = {
    "mammodino": Family(OWN, pool_mammodino, _two_tokens, ATTENTION, models={"mammodino": MammoDinoModel}),
    "resnet50": Family(
        "Apache-2.0", pool_pooled, _last_map, ("convolution",), "microsoft/resnet-50", {"resnet": ResNetModel}, IMAGENET
    ),
    "convnextv2": Family(
        "CC BY-NC 4.0 by its repository", pool_pooled, _last_map, ("pwconv1", "pwconv2"),
        "facebook/convnextv2-base-22k-224", {"convnextv2": ConvNextV2Model}, IMAGENET,
    ),
    "dinov2": Family(
        "Apache-2.0", pool_dinov2, _two_tokens, ATTENTION, "facebook/dinov2-base",
        {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}, IMAGENET,
    ),
    "dinov3": Family(  # Simeoni et al., arXiv 2508.10104
        "DINOv3 License", pool_dinov2, _two_tokens, ATTENTION, "facebook/dinov3-vitb16-pretrain-lvd1689m",
        {"dinov3_vit": DINOv3ViTModel}, published(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resample=2), get=GATED,
    ),
    "rad_dino": Family(
        "MSRLA, for research", pool_dinov2, _two_tokens, ATTENTION, "microsoft/rad-dino", {"dinov2": Dinov2Model}, CHEST
    ),
    "dbt_dino": Family(  # Dorfner et al., arXiv 2512.13608
        "MIT", pool_dinov2, _two_tokens, ATTENTION, published=DBT, convert=convert_dbt_dino, files=("dbt_dino.pth",),
        suffix=".pth", get="fetch dbt_dino.pth from https://zenodo.org/records/17981813",
    ),
    "biomedclip": Family(
        "MIT", pool_vit, _two_tokens, ATTENTION, "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        {"vit": ViTModel}, CLIP, convert_biomedclip, OPEN_CLIP,
    ),
    "medsiglip": Family(
        "Health AI Developer Foundations terms", pool_siglip, _two_tokens, ATTENTION, "google/medsiglip-448",
        {"siglip": SiglipVisionModel, "siglip_vision_model": SiglipVisionModel}, SIGLIP, get=GATED,
    ),
    "mammo_clip_vit": Family(
        OWN, pool_clip, _two_tokens, ATTENTION, None, {"clip": CLIPVisionModel, "clip_vision_model": CLIPVisionModel},
        CLIP, convert_clip_vit, OPEN_CLIP, ".pt",
    ),
    "mammo_clip_efficientnet": Family(
        "none stated; CC BY-NC-SA 4.0 of its code", pool_map, lambda config: config.hidden_dim,
        ("expand_conv", "project_conv"), "shawn24/Mammo-CLIP", {}, MAMMO_CLIP, convert_mammo_clip,
        ("Pre-trained-checkpoints/b5-model-best-epoch-7.tar",), ".tar", as_mammo_clip=True,
    ),
    "mammo_fm": Family(  # Ghosh et al., arXiv 2512.00198: Mammo-CLIP's B5 and preprocessing; learned from EMBED, too
        "CC BY 4.0 by its README; read the terms beside the weights", pool_map, lambda config: config.hidden_dim,
        ("expand_conv", "project_conv"), "batmanLab/Mammo-FM", {}, MAMMO_CLIP, convert_mammo_clip,
        ("Mammo-FM_BatmanlabTrained_CLIP.tar",), ".tar", as_mammo_clip=True,
    ),
    "untrained": Family(OWN, pool_mammodino, _two_tokens, ATTENTION, models={"mammodino": MammoDinoModel}),
}  # fmt: skip


class Backbone(nn.Module):
    """A model with its preprocessing and its rule for features.

    Attributes:
        kind: of BACKBONES.  source: what it was opened from.  width: F, of its features.
        last_layers: with 2 or more the class tokens of that many last layers stand side by side, from the earliest,
            before the mean of the last one's patch tokens, as in DINOv2's linear evaluation.
        model: of transformers.
        preprocess: from a file to what `forward` takes, slice by slice: `preprocess(file, slices, slices_per_volume)`
            yields `pixel_values` (C, H, W) float32 and, for MammoDINO, `tissue_mask` (h, w) float32. A volume gives
            `slices_per_volume` evenly spaced slices (0: all), or those named, counted in order of position. Raises
            InvalidImageError, naming a file that cannot be used. It pickles without the weights, for workers.
        lora_targets: names of its layers for peft's `LoraConfig(target_modules=...)`: the queries and values of
            attention, the linear layers of ConvNeXt, the convolutions of ResNet, the pointwise ones of EfficientNet.
    """

    def __init__(self, kind: str, source: str, model: PreTrainedModel, preprocess: Preprocessing, last_layers: int = 1):
        super().__init__()
        family = BACKBONES[kind]
        self.kind, self.source, self.model, self.preprocess = kind, source, model, preprocess
        self.last_layers, self.width = last_layers, family.width(model.config)
        if last_layers > 1:
            if not family.has_class_token or last_layers > model.config.num_hidden_layers:
                has = f"{model.config.num_hidden_layers} layers" if family.has_class_token else "no class token"
                raise ValueError(f"last_layers={last_layers}: backbone {kind} has {has}")
            self.width += (last_layers - 1) * model.config.hidden_size
        names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        self.lora_targets = sorted(names.intersection(family.adapted))

    def forward(self, pixel_values: torch.Tensor, tissue_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return features (B, F) of `pixel_values` (B, C, H, W); `tissue_mask` (B, h, w) is MammoDINO's alone."""
        options = {"last_layers": self.last_layers} if self.last_layers > 1 else {}
        return BACKBONES[self.kind].pool(self.model, pixel_values, tissue_mask, **options)

    def settings(self) -> dict[str, Any]:
        """Return all that the features depend on, for the keys of caches: a hash of the weights as they are now, the
        architecture and the preprocessing; not the place they came from. Fit for JSON."""
        config = {name: value for name, value in self.model.config.to_dict().items() if name not in PROVENANCE}
        return {
            "kind": self.kind,
            "weights": weights_sha256(self.model),
            "config": config,
            "images": self.preprocess.settings(),
            **({"last_layers": self.last_layers} if self.last_layers > 1 else {}),
        }


def load_backbone(
    kind: str, source: str | None = None, *, seed: int = 0, crop_to_breast: bool = True, last_layers: int = 1
) -> Backbone:
    """Open a backbone, float32 and in eval mode.

    Args:
        kind: of BACKBONES.
        source: Hub id, folder or file; None: the kind's published weights. Of `untrained` the MammoDINO whose
            architecture and image processor are taken; None: a ViT-S/14.
        seed: of the weights of `untrained`.
        crop_to_breast: whether RGB baselines see the breast or the whole image; MammoDINO's image processor says so
            itself.
        last_layers: see `Backbone`.

    Raises ValueError, one line, for a missing, damaged or foreign checkpoint; no code of a checkpoint is run. What runs
    out of memory is raised as it is.
    """
    if kind not in BACKBONES:
        raise ValueError(f"backbone {kind}: must be one of {', '.join(BACKBONES)}")
    source = source or BACKBONES[kind].hub_id
    if source is None and kind != "untrained":
        raise ValueError(
            f"backbone {kind}: {BACKBONES[kind].get or 'no published weights are known'}; give a source: a folder, a "
            "file or a Hub id"
        )
    place = "" if source is None else f", source {source}"
    try:
        if source and (local := Path(source).expanduser()).exists():
            source = str(local)
        elif source:
            place = f", source {source} (no such folder or file here)"
            _check_hub_id(source)
        if kind == "untrained":
            model, images = _untrained(source, seed)
        elif kind == "mammodino":
            model, images = _mammodino(str(source))
        else:
            model, images = _baseline(kind, str(source), crop_to_breast)
    except pickle.UnpicklingError as error:  # a pytorch_model.bin
        raise ValueError(
            f"backbone {kind}{place}: refused, for its weights hold more than tensors; none of their code was run. "
            "Save it again as safetensors (save_pretrained)"
        ) from error
    except SafetensorError as error:
        raise ValueError(
            f"backbone {kind}{place}: its weights are damaged ({first_line(error)}); fetch it again"
        ) from error
    except Exception as error:  # on a damaged file the readers of config, weights and pickles fail in any way
        if isinstance(error, MemoryError) or should_reduce_batch_size(error):  # out of memory, here or on a GPU
            raise
        gated = f"; {BACKBONES[kind].get}" if BACKBONES[kind].get and isinstance(error, OSError) else ""
        raise ValueError(f"backbone {kind}{place}: {first_line(error)}{gated}") from error
    return Backbone(kind, source or "a ViT-S/14", model, images, last_layers).eval()


def _check_hub_id(source: str) -> None:
    try:
        validate_repo_id("/".join(source.split("/")[:2]))
    except HFValidationError as error:
        raise ValueError("neither is it a Hub id (OWNER/NAME)") from error


def _untrained(source: str | None, seed: int) -> tuple[PreTrainedModel, Preprocessing]:
    config, image_processor = MammoDinoConfig(**UNTRAINED), MammoDinoImageProcessor()
    if source is not None:
        _check_family("untrained", source)
        config = MammoDinoConfig.from_pretrained(source)
        if (own := own_processor(processor_settings(source))) is None:
            raise ValueError(
                "has no preprocessor_config.json of a MammoDinoImageProcessor; give an encoder's whole folder"
            )
        image_processor = own
    with torch.random.fork_rng(devices=[]):  # the draws of a run do not depend on the backbone
        torch.default_generator.manual_seed(seed)
        return MammoDinoModel(config), MammoDinoImages(image_processor)


def _mammodino(source: str) -> tuple[PreTrainedModel, Preprocessing]:
    _check_family("mammodino", source)
    model, image_processor = open_encoder(source)
    return model, MammoDinoImages(image_processor)


def _baseline(kind: str, source: str, crop_to_breast: bool) -> tuple[PreTrainedModel, Preprocessing]:
    family = BACKBONES[kind]
    path = find_file(source, family.files, family.suffix) if family.convert else None
    if family.convert and path:
        model, published = family.convert(path)
    elif family.models:
        model_type, published = _check_family(kind, source), family.published
        options: dict[str, Any] = {"add_pooling_layer": False} if model_type == "vit" else {}
        with quiet_transformers():
            opened: Any = family.models[model_type].from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        model, report = opened
        check_report(report)
    else:
        if not Path(source).exists():
            cached_file(source, family.files[0])  # says why it cannot be had
        raise ValueError(f"has no {' or '.join(family.files)}, nor one *{family.suffix}; give the path of the file")
    if (channels := model.config.num_channels) != 3:
        raise ValueError(f"takes {channels} channels; a baseline takes RGB: give the weights as they were published")
    return model, rgb_images(source, published, crop_to_breast, family.as_mammo_clip)


def _check_family(kind: str, source: str) -> str:
    """Return the `model_type` of a folder or Hub id. Raises ValueError, naming who opens it, where it is of another
    family."""
    takes, own = BACKBONES[kind].models, BACKBONES[kind].files
    if Path(source).is_file():
        raise ValueError("is a file; give the folder of a checkpoint of transformers, or its Hub id")
    model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if model_type not in takes:
        opens = [other for other, family in BACKBONES.items() if model_type in family.models]
        says = (
            f"its config.json says model_type={model_type}" if model_type else "it has no config.json with a model_type"
        )
        raise ValueError(
            f"{says}, and {kind} takes {' or '.join(takes)}"
            + (f", or a folder with {own[0]}" if own else "")
            + (f"; open it as {' or '.join(opens)}" if opens else "")
        )
    return model_type
