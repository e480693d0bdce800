"""Heat maps of one file from an encoder, without training, for a look. Research use only.

    python -m training.heat_map FILE --model MODEL --output PNG [--slice N] [--head FOLDER]

What the class token attends to; how far each patch is from the breast's mean patch; what a breast's main components do
not explain. With a classifier, a MODEL that training.finetune saved or the head of a frozen encoder in FOLDER, the
evidence for its classes, too. With a head of tissue tiles (--head mil of that run), of any backbone, the attention over
the tiles instead.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig

from modeling_mammodino import MammoDinoForImageClassification, MammoDinoModel
from modeling_mammodino.dicom import spread
from modeling_mammodino.rendering import UNPLACED
from modeling_mammodino.tools.command import CommandParser, command_line, user_model, user_path
from modeling_mammodino.tools.features import extract_features
from modeling_mammodino.tools.files import check_output
from training.evaluation.backbones.preprocessing import MammoDinoImages
from training.evaluation.backbones.registry import Backbone, load_backbone
from training.evaluation.detection.data import LesionImage, LesionImageRenderer, frames_in_order
from training.evaluation.finetuning.image_classifier import open_classifier
from training.evaluation.finetuning.multiple_instance import MultipleInstanceHead
from training.evaluation.finetuning.tiles import TileReader
from training.evaluation.heat_maps import HeatMap, encode, heat_maps
from training.evaluation.plots import draw_heat_maps


def write_heat_maps(
    file: str | Path, model_name: str, output: Path, frame: int | None = None, head: Path | None = None
) -> list[HeatMap]:
    """Draw and return the heat maps of one slice. Raises InvalidImageError, ValueError or OSError for what cannot be
    used."""
    opened: tuple[Backbone, nn.Module | None, tuple[str, ...]]
    if head is not None:
        opened = open_head(model_name, head)
    else:
        opened = (load_backbone("mammodino", model_name), *own_classifier(model_name))
    image, maps = map_file(str(file), frame, *opened)
    draw_heat_maps(image, maps, f"{Path(file).name}, {Path(model_name).name}", output)
    return maps


def map_file(
    file: str, frame: int | None, backbone: Backbone, classifier: nn.Module | None, classes: tuple[str, ...]
) -> tuple[LesionImage, list[HeatMap]]:
    """Return a slice as the encoder sees it, the middle one where `frame` is None, and its heat maps."""
    if isinstance(classifier, MultipleInstanceHead):
        return map_tiles(file, frame, backbone, classifier)
    assert isinstance(backbone.preprocess, MammoDinoImages) and isinstance(classifier, nn.Linear | None)
    renderer, model = LesionImageRenderer(backbone.preprocess.image_processor), cast(MammoDinoModel, backbone.model)
    (image,) = renderer(file, None if frame is None else [frame], slices_per_volume=1)
    pixel_values = torch.from_numpy(renderer.inputs(image.image, image.tissue)[None, :1])
    return image, heat_maps(encode(model, pixel_values, torch.from_numpy(image.tissue[None])), classifier, classes)


def map_tiles(
    file: str, frame: int | None, backbone: Backbone, head: MultipleInstanceHead
) -> tuple[LesionImage, list[HeatMap]]:
    """Return a slice as tiles are cut from it, and the attention over its tiles."""
    order = frames_in_order(file, [] if frame is None else [frame])
    position = spread(len(order), 1)[0] if frame is None else order.index(frame)
    (tiled,) = TileReader(backbone.preprocess, head.tiling)(file, [position])
    found: Any = extract_features(backbone, tiled.inputs(backbone.preprocess), pool=None)
    image = LesionImage(order[position], len(order), tiled.image, tiled.tissue, UNPLACED, tiled.image.shape)
    return image, [head.tile_map(tiled, np.stack([feature for _, feature in found]))]


def open_head(model_name: str, head: Path) -> tuple[Backbone, nn.Module, tuple[str, ...]]:
    """Return the backbone of a training.finetune run, its head and its classes. Raises ValueError for a head that is
    not drawn."""
    if not head.is_dir():
        raise FileNotFoundError(f"--head {head}: no such folder; give the model folder of a training.finetune run")
    backbone, layer, classes = open_classifier(head, model_name)
    check_drawable(backbone, layer, f"--head {head}")
    return backbone, layer, tuple(classes)


def check_drawable(backbone: Backbone, layer: nn.Module, name: str) -> None:
    """Raise ValueError where there are no heat maps of such a head."""
    if not isinstance(layer, nn.Linear | MultipleInstanceHead):
        raise ValueError(f"{name}: pools slices by attention; only linear heads and those of tiles are drawn")
    if isinstance(layer, nn.Linear) and backbone.last_layers > 1:
        raise ValueError(f"{name}: is on class tokens of {backbone.last_layers} layers; only of one it is drawn")
    if isinstance(layer, nn.Linear) and not isinstance(backbone.preprocess, MammoDinoImages):
        raise ValueError(f"{name}: is the head of {backbone.kind}; only mammodino's patches are drawn")


def own_classifier(model_name: str) -> tuple[nn.Linear | None, tuple[str, ...]]:
    """Return the linear head and the classes of a model that is a classifier."""
    config = AutoConfig.from_pretrained(model_name)
    if "MammoDinoForImageClassification" not in (config.architectures or ()):
        return None, ()
    whole = MammoDinoForImageClassification.from_pretrained(model_name)
    names: Any = whole.config.id2label
    return whole.classifier, tuple(names[number] for number in range(whole.num_labels))


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m training.heat_map", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=user_path, help="DICOM or image")
    parser.add_argument(
        "--model", type=user_model, required=True, help="checkpoint folder or Hub id, with its image processor"
    )
    parser.add_argument("--output", type=user_path, required=True, help="PNG to write")
    parser.add_argument("--slice", type=int, help="of a volume, a frame of the file from 0 (default: the middle one)")
    parser.add_argument("--head", type=user_path, help="model folder of a training.finetune run on the frozen MODEL")
    options = parser.parse_args(arguments)
    with command_line("heat_map"):
        check_output(options.output, ".png")
        write_heat_maps(options.file, options.model, options.output, options.slice, options.head)
        print(options.output)


if __name__ == "__main__":
    main()
