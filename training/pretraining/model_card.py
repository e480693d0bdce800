"""The card of an encoder at its export: every value in it is read from the run, the corpus or the checkout."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel, __version__
from modeling_mammodino.tools.publish import LOCAL_RECIPE_FIELDS

from .checkpoints import RECIPE_FILE
from .recipe import MAY_CHANGE_ON_RESUME, RECIPES, Recipe, load_recipe

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "model_cards" / "template.md"
NOT_EVALUATED = "Not evaluated yet."
UNPUBLISHED = "UNPUBLISHED"  # in place of a local file's name
PHANTOM = "phantom"  # the collection of simulated breasts


def write_card(
    path: Path,
    model: MammoDinoModel,
    image_processor: MammoDinoImageProcessor,
    corpus: Corpus,
    recipe: Recipe,
    step: int,
    figure: str,
) -> None:
    manifest, config, size = corpus.manifest, model.config, image_processor.size
    settings = {
        name: value
        for name, value in image_processor.to_dict().items()
        if name not in ("auto_map", "image_processor_type")
    }
    card = ModelCard.from_template(
        ModelCardData(
            license="apache-2.0",
            library_name="transformers",
            pipeline_tag="image-feature-extraction",
            base_model=base_model(recipe),
            tags=["mammography", "tomosynthesis", "medical-imaging", "self-supervised", "research-use-only"],
        ),
        template_path=str(TEMPLATE),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_register_tokens=config.num_register_tokens,
        patch_size=config.patch_size,
        num_patches=(size["height"] // config.patch_size) * (size["width"] // config.patch_size),
        num_parameters=f"{model.num_parameters() / 1e6:.2f} M",
        canvas=f"{size['height']} x {size['width']}",
        num_images=manifest["rows"],
        num_volumes=manifest["volumes"],
        kinds=", ".join(f"{count} {kind}" for kind, count in manifest["rows_by_kind"].items()),
        simulated_images=int(np.sum(np.asarray(corpus.rows.data.column("source")) == PHANTOM)),
        results=NOT_EVALUATED,
        recipe_name=recipe_name(recipe),
        initial_weights=initial_weights(recipe),
        steps=step,
        commit=git_commit(ROOT),
        versions=f"mammodino {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        figure=figure,
        recipe=yaml.safe_dump(published_recipe(recipe), sort_keys=False).rstrip(),
        image_processor=json.dumps(settings, indent=2, default=list),
    )
    card.save(path)


def published_recipe(recipe: Recipe) -> dict[str, Any]:
    """Every field but the places on this machine."""
    published = {name: value for name, value in recipe.flat().items() if name not in LOCAL_RECIPE_FIELDS}
    if first_source(recipe):
        published["init_from"] = base_model(recipe) or UNPUBLISHED
    return published


def base_model(recipe: Recipe) -> str | None:
    """The repository on the Hub that the weights started from, also by way of a former run; None where they were random
    or local."""
    name = first_source(recipe)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if "/" in name and not Path(name).exists() else None


def initial_weights(recipe: Recipe) -> str:
    source = first_source(recipe)
    origin = f"`{base}` on the Hub" if (base := base_model(recipe)) else "unpublished weights" if source else "random"
    return f"a former run's, which started from: {origin}" if recipe.model.init_from_checkpoint else origin


def first_source(recipe: Recipe) -> str:
    """`init_from` of the run, or of the first of the former runs that it goes on from."""
    fields = recipe.flat()
    while former := fields.get("init_from_checkpoint"):
        fields = yaml.safe_load((Path(former) / RECIPE_FILE).read_text())
    return fields.get("init_from", "")


def recipe_name(recipe: Recipe) -> str:
    """The nearest shipped recipe and the fields that differ from it, apart from those that change no result."""
    differing = {}
    for shipped in sorted(path.stem for path in RECIPES.glob("*.yaml")):
        theirs = load_recipe([shipped, "--corpus", "-", "--output_dir", "-"]).flat()
        differing[shipped] = [
            name for name, value in recipe.flat().items() if name not in MAY_CHANGE_ON_RESUME and value != theirs[name]
        ]
    name = min(differing, key=lambda each: len(differing[each]))
    changed = differing[name]
    return f"`{name}` as shipped" if not changed else f"`{name}`, but for {', '.join(f'`{each}`' for each in changed)}"


def git_commit(checkout: Path) -> str:
    """The commit of the code, marked where files were changed since; said to be unknown outside of a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != checkout.resolve():
            return "unknown (not a checkout)"
        return f"`{git('rev-parse', 'HEAD')}`" + (", with uncommitted changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a checkout)"
