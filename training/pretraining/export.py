"""The teacher's encoder as a complete Hub folder: weights, config, image processor, code, card, figure.

Every value in the card is read from the run, the corpus or the checkout.
"""

import json
import re
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
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open

from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino import MammoDinoConfig, MammoDinoImageProcessor, MammoDinoModel, __version__
from modeling_mammodino.modeling_mammodino import as_pair
from modeling_mammodino.tools.files import atomic_folder
from modeling_mammodino.tools.model_files import LOCAL_RECIPE_FIELDS

from .checkpoints import CONFIG_FILE, LOG_FILE, RECIPE_FILE, check_corpus, read_log, read_recipe, read_state
from .recipe import MAY_CHANGE_ON_RESUME, RECIPES, Recipe, load_recipe

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "model_cards" / "template.md"
FIGURE = "pretraining.png"
UNPUBLISHED = "UNPUBLISHED"  # in place of a local file's name
PHANTOM = "phantom"  # the collection of simulated breasts


def export_checkpoint(checkpoint: Path, folder: Path, corpus: Corpus, replace: bool = False) -> None:
    """Write the encoder of a run's checkpoint-N folder, its teacher's; see `export_encoder`.

    Raises ValueError where it is no checkpoint, or damaged, or was made with another corpus.
    """
    try:
        step = read_state(checkpoint)["global_step"]
        encoder = MammoDinoModel(MammoDinoConfig.from_json_file(checkpoint / CONFIG_FILE))
        with safe_open(checkpoint / "teacher.safetensors", "pt") as file:
            names = {name: f"backbone.{name}" for name in encoder.state_dict()}
            encoder.load_state_dict({name: file.get_tensor(stored) for name, stored in names.items()})
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{checkpoint}: cannot be read ({error}); give a run's checkpoint-N folder") from error
    check_corpus(corpus, checkpoint, may_be_extended=True)
    export_encoder(encoder, corpus, checkpoint_recipe(checkpoint), step, folder, replace)


def checkpoint_recipe(checkpoint: Path) -> Recipe:
    """Return a checkpoint's recipe, with the run's folder as it is now."""
    recipe = load_recipe([str(checkpoint / RECIPE_FILE), "--output_dir", str(checkpoint.parent)])
    recipe.origin = read_state(checkpoint).get("origin", {})
    return recipe


def export_encoder(
    encoder: MammoDinoModel, corpus: Corpus, recipe: Recipe, step: int, folder: Path, replace: bool = False
) -> None:
    """Write `folder` atomically; AutoModel and AutoImageProcessor open it with trust_remote_code=True.

    Raises FileExistsError, before any work, where it holds files already and `replace` is not set.
    """
    processor = image_processor(corpus, recipe)
    encoder.config.drop_path_rate = 0.0
    with atomic_folder(folder, replace) as temporary:
        encoder.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        (temporary / RECIPE_FILE).write_text(yaml.safe_dump(published_recipe(recipe), sort_keys=False))
        draw_log(Path(recipe.run.output_dir) / LOG_FILE, step, temporary / FIGURE)
        write_card(temporary / "README.md", encoder, processor, corpus, recipe, step)


def image_processor(corpus: Corpus, recipe: Recipe) -> MammoDinoImageProcessor:
    """Return the corpus' own preprocessing, on the canvas of the recipe."""
    size = {"height": recipe.model.image_height, "width": recipe.model.image_width}
    return MammoDinoImageProcessor(**corpus.manifest["image_processor"], size=size, patch_size=recipe.model.patch_size)


def write_card(
    path: Path,
    model: MammoDinoModel,
    image_processor: MammoDinoImageProcessor,
    corpus: Corpus,
    recipe: Recipe,
    step: int,
) -> None:
    """Fill in model_cards/template.md."""
    manifest, config, size = corpus.manifest, model.config, image_processor.size
    patch_height, patch_width = as_pair(config.patch_size)
    settings = image_processor.to_dict()
    for name in ("auto_map", "image_processor_type"):
        settings.pop(name, None)
    card = ModelCard.from_template(
        ModelCardData(
            license="apache-2.0",
            library_name="transformers",
            pipeline_tag="image-feature-extraction",
            base_model=base_model(recipe),
            datasets=origin(recipe)["corpora"] or None,
            tags=["mammography", "tomosynthesis", "medical-imaging", "self-supervised", "research-use-only"],
        ),
        template_path=str(TEMPLATE),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_register_tokens=config.num_register_tokens,
        patch_size=config.patch_size,
        num_patches=(size["height"] // patch_height) * (size["width"] // patch_width),
        num_parameters=f"{model.num_parameters() / 1e6:.2f} M",
        canvas=f"{size['height']} x {size['width']}",
        num_images=manifest["rows"],
        num_volumes=manifest["volumes"],
        kinds=", ".join(f"{count} {kind}" for kind, count in manifest["rows_by_kind"].items()),
        simulated_images=int(np.diff(corpus.volume_bounds)[corpus.volume_column("source") == PHANTOM].sum()),
        results="Not evaluated yet.",
        recipe_name=recipe_name(recipe),
        initial_weights=initial_weights(recipe),
        steps=step,
        commit=git_commit(ROOT),
        versions=f"mammodino {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        figure=FIGURE if path.with_name(FIGURE).is_file() else None,
        recipe=yaml.safe_dump(published_recipe(recipe), sort_keys=False).rstrip(),
        image_processor=json.dumps(settings, indent=2, default=list),
    )
    card.save(path)


def published_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return every field but the places on this machine."""
    published = {name: value for name, value in recipe.flat().items() if name not in LOCAL_RECIPE_FIELDS}
    if source := origin(recipe)["init_from"]:
        published["init_from"] = source
    return published


def base_model(recipe: Recipe) -> str | None:
    """Return the repository on the Hub that the weights started from, also by way of a former run; None where they were
    random or local."""
    source = origin(recipe)["init_from"]
    return None if source in ("", UNPUBLISHED) else source


def initial_weights(recipe: Recipe) -> str:
    """Say where the weights started from, without a path of this machine."""
    source = {"": "random", UNPUBLISHED: "unpublished weights"}
    name = origin(recipe)["init_from"]
    said = source.get(name, f"`{name}` on the Hub")
    return f"a former run's, which started from: {said}" if recipe.model.init_from_checkpoint else said


def origin(recipe: Recipe) -> dict[str, Any]:
    """Return `init_from`, what the weights started from as it may be published, and `corpora`, the Hub's among those
    that they have seen: also by way of former runs, and without a path of this machine.

    Raises ValueError where a former run that did not note it is no longer there.
    """
    return _origin(recipe.flat(), recipe.origin)


def _origin(fields: dict[str, Any], noted: dict[str, Any]) -> dict[str, Any]:
    if noted:
        before = noted
    elif former := fields.get("init_from_checkpoint"):
        try:
            before = _origin(read_recipe(Path(former)), read_state(Path(former)).get("origin", {}))
        except OSError as error:
            raise ValueError(
                f"init_from_checkpoint={former}: cannot be read ({error}), which alone says where the weights started; "
                "put this folder back"
            ) from error
    else:
        before = {"init_from": published_source(fields.get("init_from", "")), "corpora": []}
    own = re.findall(r"^hf://datasets/([^/@]+/[^/@]+)", fields.get("corpus", ""))
    return before | {"corpora": sorted({*before["corpora"], *own})}


def published_source(init_from: str) -> str:
    """Return a Hub id as it is, UNPUBLISHED for what else there is."""
    try:
        validate_repo_id(init_from)
    except HFValidationError:
        return UNPUBLISHED if init_from else ""
    return init_from if "/" in init_from and not Path(init_from).exists() else UNPUBLISHED


def recipe_name(recipe: Recipe) -> str:
    """Name the nearest shipped recipe and the fields that differ from it, but for those that change no result."""
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
    """Return the commit of the code, marked where files were changed since; outside of a checkout it is unknown."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != checkout.resolve():
            return "unknown (not a checkout)"
        return f"`{git('rev-parse', 'HEAD')}`" + (", with uncommitted changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a checkout)"


def was_computed(name: str, value: float) -> bool:
    """Tell whether a value of the log was: a loss of 0 is of a batch without what it compares, or not yet begun."""
    return value != 0 or not name.startswith("loss_")


def curves(lines: list[dict[str, float]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return (step, value) of what a run's log tells, by panel and name; without losses that were never computed."""
    panels = {
        "losses (unweighted)": [key for line in lines for key in line if key.startswith("loss_")],
        "entropy over ln K": ["target_entropy", "prototype_entropy"],
        "feature rank (RankMe)": ["feature_rank"],
        "breast fraction": ["tissue_in_crops", "tissue_in_masks"],
        "k-NN of the teacher": ["knn_auc"],
    }
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for title, keys in panels.items():
        for key in dict.fromkeys(keys):
            points = [(line["step"], line[key]) for line in lines if key in line and was_computed(key, line[key])]
            if points:
                found.setdefault(title, {})[key] = points
    return found


def draw_log(log: Path, step: int, output: Path) -> None:
    """Draw losses and signs of collapse up to a step, from the run's log; nothing where it says nothing."""
    panels = curves([line for line in read_log(log) if line["step"] <= step])
    if not panels:
        return
    figure = Figure(figsize=(4 * len(panels), 4.2), layout="constrained")
    for axis, (title, of) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for key, points in of.items():
            axis.plot(*zip(*points, strict=True), label=key.removeprefix("loss_").replace("_", " "))
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel("AUC" if key == "knn_auc" else "loss" if key.startswith("loss_") else "")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(of) > 1:  # below the curves, not over them
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8, frameon=False)
    figure.savefig(output, dpi=200, metadata={"Software": None})  # nothing but the image
