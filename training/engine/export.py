"""The teacher's encoder as a complete Hub folder: weights, config, image processor, code, card, figure."""

import json
import os
import shutil
from pathlib import Path

import matplotlib
import yaml
from huggingface_hub import ModelCard, ModelCardData

from dataset_scripts.corpus_reader import Corpus
from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel

from ..recipe import Recipe

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (the backend is chosen first)

CARD_TEMPLATE = Path(__file__).parents[2] / "model_cards" / "template.md"
FIGURE = "pretraining.png"


def export_encoder(encoder: MammoDinoModel, corpus: Corpus, recipe: Recipe, step: int, folder: Path) -> None:
    """Writes `folder` whole or not at all; AutoModel and AutoImageProcessor open it with trust_remote_code=True."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model = MammoDinoModel(encoder.config)
    model.load_state_dict(encoder.state_dict())
    model.config.drop_path_rate = 0.0
    model.save_pretrained(temporary)
    image_processor(corpus, recipe).save_pretrained(temporary)
    recipe.save(temporary / "recipe.yaml")
    draw_log(Path(recipe.run.output_dir) / "logs" / "log.jsonl", temporary / FIGURE)
    write_card(temporary / "README.md", model, corpus, recipe, step)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def image_processor(corpus: Corpus, recipe: Recipe) -> MammoDinoImageProcessor:
    """The corpus' own preprocessing, on the canvas of the recipe."""
    size = {"height": recipe.model.image_height, "width": recipe.model.image_width}
    return MammoDinoImageProcessor(**corpus.manifest["image_processor"], size=size, patch_size=recipe.model.patch_size)


def write_card(path: Path, model: MammoDinoModel, corpus: Corpus, recipe: Recipe, step: int) -> None:
    manifest, config = corpus.manifest, model.config
    card = ModelCard.from_template(
        ModelCardData(
            license="apache-2.0",
            library_name="transformers",
            pipeline_tag="image-feature-extraction",
            tags=["mammography", "tomosynthesis", "self-supervised", "research-use-only"],
        ),
        template_path=str(CARD_TEMPLATE),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        patch_size=config.patch_size,
        num_parameters=f"{model.num_parameters() / 1e6:.1f} M",
        canvas=f"{recipe.model.image_height} x {recipe.model.image_width}",
        num_images=manifest["rows"],
        num_volumes=manifest["volumes"],
        kinds=", ".join(f"{count} {kind}" for kind, count in manifest["rows_by_kind"].items()),
        steps=step,
        figure=FIGURE,
        recipe=yaml.safe_dump(recipe.flat(), sort_keys=False),
    )
    card.save(path)


def draw_log(log: Path, output: Path) -> None:
    """Losses and signs of collapse over steps, from the run's log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    panels = {
        "losses (unweighted)": [key for key in lines[0] if key.startswith("loss_")],
        "entropy over ln K": ["target_entropy", "prototype_entropy"],
        "feature rank (RankMe)": ["feature_rank"],
        "breast fraction": ["tissue_in_crops", "tissue_in_masks"],
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(16, 3.4), layout="constrained")
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for key in keys:
            axis.plot([line["step"] for line in lines], [line[key] for line in lines], label=key.removeprefix("loss_"))
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.legend(fontsize=7)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)
