"""Heat maps of one file from an encoder, without training, for a look. Research use only.

    python -m training.heat_map FILE --model MODEL --output PNG [--slice N] [--head FOLDER]

What the class token attends to; how far each patch is from the breast's mean patch; what a breast's main components do
not explain. With a classifier, that is a MODEL that training.finetune saved or the head of a frozen encoder in FOLDER,
the evidence for its classes, too.
"""

import argparse
import logging
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot  # noqa: E402 (the backend is chosen first)
from torch import nn
from transformers import AutoConfig

from modeling_mammodino import InvalidImageError, MammoDinoForImageClassification
from modeling_mammodino.tools.embed import open_encoder
from training.evaluation.detection.data import LesionImage, LesionImageRenderer
from training.evaluation.finetuning.image_classifier import open_classifier
from training.evaluation.heat_maps import HeatMap, encode, heat_maps
from training.evaluation.run_files import write_whole

matplotlib.use("Agg")

NOTICE = "For a look: not validated to show lesions. Research use only: not a medical device."


def draw_heat_maps(
    file: str, model_name: str, output: Path, frame: int | None = None, head: Path | None = None
) -> list[HeatMap]:
    """Raises InvalidImageError, ValueError or OSError for what cannot be used."""
    model, processor = open_encoder(model_name)
    classifier, classes = find_classifier(model_name, head)
    maker = LesionImageRenderer(processor)
    (image,) = maker(file, None if frame is None else [frame], slices_per_volume=1)
    pixel_values = torch.from_numpy(maker.inputs(image.image, image.tissue)[None, :1])
    maps = heat_maps(encode(model, pixel_values, torch.from_numpy(image.tissue[None])), classifier, classes)
    figure = draw(image, maps, f"{Path(file).name}, {Path(model_name).name}")
    write_whole(output, lambda temporary: figure.savefig(temporary, format="png", dpi=90, metadata={"Software": None}))
    pyplot.close(figure)
    return maps


def find_classifier(model_name: str, head: Path | None) -> tuple[nn.Linear | None, tuple[str, ...]]:
    """The linear head and its classes: in `head`, or the model's own where it is a classifier."""
    if head is not None:
        if not head.is_dir():
            raise FileNotFoundError(f"--head {head}: no such folder; give the model folder of a training.finetune run")
        backbone, layer, classes = open_classifier(head, model_name)
        if backbone.kind != "mammodino":
            raise ValueError(f"--head {head}: is the head of {backbone.kind}; only mammodino's patches are drawn")
        return layer, tuple(classes)
    config = AutoConfig.from_pretrained(model_name)
    if "MammoDinoForImageClassification" not in (config.architectures or ()):
        return None, ()
    whole = MammoDinoForImageClassification.from_pretrained(model_name)
    return whole.classifier, tuple(whole.config.id2label[number] for number in range(whole.num_labels))


def draw(image: LesionImage, maps: list[HeatMap], title: str) -> pyplot.Figure:
    height, width = image.image.shape
    count = len(maps) + 1
    figure, axes = pyplot.subplots(
        1, count, figsize=(3.2 * count, 3.2 * height / width + 1.2), layout="constrained", squeeze=False
    )
    place = f", slice {image.frame} of {image.num_frames}" if image.num_frames > 1 else ""
    axes[0, 0].set_title(f"as the encoder sees it{place}", fontsize=9)
    for axis in axes.flat:
        axis.imshow(image.image, cmap="gray", vmin=0)
        axis.set_axis_off()
    for axis, each in zip(axes[0, 1:], maps, strict=True):
        low, high = np.nanpercentile(each.values, (1, 99))
        if each.is_signed:
            low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
        shown = axis.imshow(
            each.values,
            cmap="coolwarm" if each.is_signed else "inferno",
            vmin=low,
            vmax=high,
            alpha=0.55,
            extent=(0, width, height, 0),
            interpolation="nearest",
        )
        figure.colorbar(shown, ax=axis, location="bottom", shrink=0.8)
        axis.set_title(each.name, fontsize=9)
    figure.suptitle(f"{title}\n{NOTICE}", fontsize=9)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.heat_map", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="DICOM or image")
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id, with its image processor")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--slice", type=int, help="of a volume, a frame of the file from 0 (default: the middle one)")
    parser.add_argument("--head", type=Path, help="model folder of a training.finetune run on the frozen MODEL")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        draw_heat_maps(options.file, options.model, options.output, options.slice, options.head)
    except (InvalidImageError, ValueError, OSError) as error:
        raise SystemExit(f"heat_map: {' '.join(str(error).split())}") from error
    print(options.output)


if __name__ == "__main__":
    main()
