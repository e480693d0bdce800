"""The teacher's encoder as a complete Hub folder: weights, config, image processor, code, card, figure."""

import json
import os
import shutil
from pathlib import Path

import matplotlib
import yaml
from matplotlib import pyplot  # noqa: E402 (the backend is chosen first)
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel

from .checkpoints import LOG_FILE, WHOLE
from .model_card import published_recipe, write_card
from .recipe import Recipe

matplotlib.use("Agg")

FIGURE = "pretraining.png"


def export_encoder(
    encoder: MammoDinoModel, corpus: Corpus, recipe: Recipe, step: int, folder: Path, is_main: bool = True
) -> None:
    """Writes `folder` whole or not at all; AutoModel and AutoImageProcessor open it with trust_remote_code=True.

    Every process calls it, and the main one writes.
    """
    weights = get_model_state_dict(encoder, options=WHOLE)
    if not is_main:
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model = MammoDinoModel(encoder.config)
    model.load_state_dict(weights)
    model.config.drop_path_rate = 0.0
    model.save_pretrained(temporary)
    processor = image_processor(corpus, recipe)
    processor.save_pretrained(temporary)
    (temporary / "recipe.yaml").write_text(yaml.safe_dump(published_recipe(recipe), sort_keys=False))
    draw_log(Path(recipe.run.output_dir) / LOG_FILE, temporary / FIGURE)
    write_card(temporary / "README.md", model, processor, corpus, recipe, step, FIGURE)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def image_processor(corpus: Corpus, recipe: Recipe) -> MammoDinoImageProcessor:
    """The corpus' own preprocessing, on the canvas of the recipe."""
    size = {"height": recipe.model.image_height, "width": recipe.model.image_width}
    return MammoDinoImageProcessor(**corpus.manifest["image_processor"], size=size, patch_size=recipe.model.patch_size)


def draw_log(log: Path, output: Path) -> None:
    """Losses and signs of collapse over steps, from the run's log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    scores = [line for line in lines if "knn_auc" in line]  # from step 0 on, where there are no losses yet
    lines = [line for line in lines if "target_entropy" in line]
    panels = {
        "losses (unweighted)": [key for key in lines[0] if key.startswith("loss_")],
        "entropy over ln K": ["target_entropy", "prototype_entropy"],
        "feature rank (RankMe)": ["feature_rank"],
        "breast fraction": ["tissue_in_crops", "tissue_in_masks"],
    }
    if scores:
        panels["k-NN of the teacher"] = ["knn_auc"]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained")
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for key in keys:
            shown = scores if key == "knn_auc" else lines
            axis.plot([line["step"] for line in shown], [line[key] for line in shown], label=key.removeprefix("loss_"))
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.legend(fontsize=7)
    figure.savefig(output, dpi=110, metadata={"Software": None})  # nothing but the image
    pyplot.close(figure)
