"""What a published model folder may hold, file by file: checked by content, and by allow-list.

A check yields what is wrong, each with its remedy. Nothing is repaired here: what is sent is what was checked.
"""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_mammodino import MammoDinoConfig
from .image_processing_mammodino import MammoDinoImageProcessor
from .modeling_mammodino import MammoDinoPreTrainedModel

try:
    import yaml
except ImportError:  # huggingface_hub brings it
    yaml = None  # type: ignore[assignment]

# fields of a recipe that name places of the machine it ran on, or mean nothing without them
LOCAL_RECIPE_FIELDS = (
    *("corpus", "output_dir", "resume_from_checkpoint", "init_from_checkpoint"),
    *("knn_labels", "knn_task", "knn_steps"),
)
LOCAL_PATH = re.compile(
    r"(?<![\w./<~\])}-])/[A-Za-z_][\w.-]*(?:/|\b)"  # /home/someone, not https://host/page, and/or, ViT-B/14, </p>
    r"|(?<!\w)~\w*/\w|\bfile://|(?<![A-Za-z])[A-Za-z]:[\\/]+\w|\\\\\w[\w.-]*\\"  # ~/x, file://, C:\x, \\server\x
)
PRIVATE = {
    "a path of a local machine": LOCAL_PATH,
    "an access token": re.compile(r"\b(?:hf|api_org|ghp|gho|github_pat)_\w{20,}|-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a DICOM UID": re.compile(r"(?<![\w.])[0-2](?:\.(?:0|[1-9]\d*)){6,}(?![\w.]\d)"),
}
# what transformers writes beside a class's own settings
CONFIG_FIELDS = {"architectures", "auto_map", "dtype", "model_type", "transformers_version", "problem_type",
                 "id2label", "label2id", "num_labels"}  # fmt: skip
PROCESSOR_FIELDS = {"auto_map", "image_processor_type", "processor_class", "image_processor_class"}
PLAIN_WORD = re.compile(r"[\w.+-]*(?:/[\w.+-]+|=[\d.e+-]+)?")  # a name, OWNER/NAME on the Hub, or NAME=NUMBER


def check_text(text: str) -> Iterator[str]:
    """Paths, tokens and UIDs that should not leave the machine."""
    for name, pattern in PRIVATE.items():
        if match := pattern.search(text):
            line = text.count("\n", 0, match.start()) + 1
            # a token itself is not repeated: this message may be logged
            shown = "" if "token" in name else f" ({_around(text, match)!r})"
            yield f"line {line} holds {name}{shown}; take it out"


def read_settings(data: bytes) -> dict[str, Any]:
    """A JSON object in which no field stands twice, the first unseen. Raises ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a field stands twice")
        return dict(pairs)

    content = json.loads(data, object_pairs_hook=once)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def check_config(config: dict[str, Any]) -> Iterator[str]:
    """config.json: a MammoDinoConfig with an architecture of this package, and its own code in auto_map."""
    known = (set(MammoDinoConfig().to_dict()) | CONFIG_FIELDS) - {"_name_or_path"}
    yield from _unknown_fields(config, known)
    if config.get("model_type") != MammoDinoConfig.model_type:
        yield (
            f"model_type {config.get('model_type')!r}: not a MammoDINO model, so its files cannot be checked; push "
            "what `mammodino convert` makes of it, or this with its own library"
        )
        return
    try:
        MammoDinoConfig.from_dict(config)
    except (ValueError, TypeError) as error:
        yield f"not a valid MammoDinoConfig ({_one_line(error)}); save it again with save_pretrained"
    if architecture(config) is None:
        yield f"architectures {config.get('architectures')!r}: must name one class of this package; save it again"
    ours = dict(MammoDinoConfig().auto_map)
    if foreign := sorted(set(map(str, (config.get("auto_map") or {}).values())) - set(ours.values())):
        yield f"auto_map names other code ({', '.join(foreign)}); save it again with save_pretrained"


def check_image_processor(settings: dict[str, Any]) -> Iterator[str]:
    """preprocessor_config.json: settings that the image processor has and accepts."""
    yield from _unknown_fields(settings, set(MammoDinoImageProcessor().to_dict()) | PROCESSOR_FIELDS)
    try:
        MammoDinoImageProcessor(**settings).render_settings  # noqa: B018 (refuses values out of range)
    except (ValueError, TypeError) as error:
        yield f"not valid settings ({_one_line(error)}); save it again with save_pretrained"
    foreign = [value for value in (settings.get("auto_map") or {}).values()
               if value != f"{_module(MammoDinoImageProcessor)}.{MammoDinoImageProcessor.__name__}"]  # fmt: skip
    if foreign:
        yield f"auto_map names other code ({foreign[0]}); save it again with save_pretrained"


def check_recipe(data: bytes) -> Iterator[str]:
    """recipe.yaml: names with numbers, switches and plain words, none of them a place on the machine."""
    try:
        recipe = yaml.safe_load(data.decode())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        yield f"not YAML ({_one_line(error)}); export the encoder again"
        return
    if not isinstance(recipe, dict):
        yield "not lines of `name: value`; export the encoder again"
        return
    if len(re.findall(r"^\w+:", data.decode(), re.MULTILINE)) != len(recipe):
        yield "must have one `name: value` a line, each name once; export the encoder again"
    if local := [name for name in LOCAL_RECIPE_FIELDS if recipe.get(name)]:
        yield f"{', '.join(local)}: a place on the machine it ran on; take these lines out, or export again"
    if re.search(r"(?:^|\s)#", data.decode()):
        yield "holds comments; take them out: what is not for the public is easily left in one"
    for name, value in recipe.items():
        for each in value if isinstance(value, list) else [value]:
            if each is not None and not isinstance(each, (bool, int, float, str)):
                yield f"{name}: holds a {type(each).__name__}; a recipe has numbers, switches and words"
            elif isinstance(each, str) and name not in LOCAL_RECIPE_FIELDS and not PLAIN_WORD.fullmatch(each):
                yield f"{name}: free text ({each[:40]!r}); a recipe has numbers, switches and words"


def check_card(text: str, figures: list[str]) -> Iterator[str]:
    """README.md: with a licence, said to be for research use, and showing each of the figures beside it."""
    try:
        licence = ModelCard(text).data.to_dict().get("license")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        yield f"its metadata cannot be read ({_one_line(error)}); correct the block between the --- lines"
        return
    if not licence:
        yield "states no licence; add `license: NAME` between the --- lines at its top"
    if "research use" not in text.lower():
        yield "does not say `research use only`; a reader could mistake the model for a medical device"
    if local := re.findall(rf"^\s*({'|'.join(LOCAL_RECIPE_FIELDS)}):[ \t]*(?!''|\"\")\S", text, re.MULTILINE):
        yield f"prints {', '.join(local)}, a place on the machine it ran on; take these lines out"
    shown = re.findall(r"!\[[^\]]*\]\(\s*([^)\s]+)|<img\b[^>]*\bsrc=[\"']([^\"']+)", text)
    names = {markdown or html for markdown, html in shown}
    for name in sorted(name for name in names if "://" not in name and name not in figures):
        yield f"shows {name[:60]}, which is not in the folder; add it or take it out of the card"
    for name in sorted(set(figures) - names):
        yield f"does not show {name}; remove that figure, or show it"


def model_code(config: dict[str, Any]) -> dict[str, bytes]:
    """The sources that save_pretrained copies beside a model of this configuration, by name."""
    model = architecture(config) or MammoDinoPreTrainedModel
    files = set()
    for each in (MammoDinoConfig, MammoDinoImageProcessor, model):
        file = inspect.getfile(each)
        files |= {file, *get_relative_import_files(file)}
    return {Path(file).name: Path(file).read_bytes() for file in sorted(files)}


def architecture(config: dict[str, Any]) -> type[PreTrainedModel] | None:
    """The model class of a configuration, where it is one of this package."""
    classes, found = [MammoDinoPreTrainedModel], {}
    while classes:
        each = classes.pop()
        found[each.__name__] = each
        classes += [child for child in each.__subclasses__() if child.__module__.startswith(f"{__package__}.")]
    names = config.get("architectures")
    return found.get(names[0]) if isinstance(names, list) and len(names) == 1 else None


def check_weights(folder: Path, names: list[str], config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(file, complaint): the tensors of the architecture, each once, in its shape, and no other."""
    found: dict[str, tuple[str, list[int]]] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                tensors = {key: file.get_slice(key).get_shape() for key in file.keys()}
                notes = dict(file.metadata() or {}).items() - {("format", "pt")}
        except (SafetensorError, OSError) as error:
            yield name, f"not a whole safetensors file ({_one_line(error)}); save it again with save_pretrained"
            return
        if notes:
            yield name, f"text in its header ({', '.join(sorted(dict(notes)))}); save it again with save_pretrained"
        for key in sorted(found.keys() & tensors.keys()):
            yield name, f"holds {key}, as {found[key][0]} does; keep the files of one save_pretrained"
        found |= {key: (name, shape) for key, shape in tensors.items()}
    expected = model_shapes(config)
    for key in sorted(found.keys() - expected.keys())[:3]:
        yield found[key][0], f"holds {key[:80]!r}, which the architecture has not; save it again with save_pretrained"
    for key in sorted(expected.keys() - found.keys())[:3]:
        yield names[0], f"lacks {key}, which the architecture has; save it again with save_pretrained"
    for key in sorted(expected.keys() & found.keys()):
        if found[key][1] != expected[key]:
            yield found[key][0], f"{key} has shape {found[key][1]}, the configuration says {expected[key]}"


def model_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Shape of each tensor of the architecture, without making any."""
    with torch.device("meta"):
        model = architecture(config)(MammoDinoConfig.from_dict(config))  # type: ignore[misc]
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def check_index(index: dict[str, Any], names: list[str]) -> Iterator[str]:
    """model.safetensors.index.json: the shards beside it, all of them, and counts."""
    yield from _unknown_fields(index, {"metadata", "weight_map"})
    if any(not isinstance(count, (int, float)) for count in (index.get("metadata") or {}).values()):
        yield "its metadata hold other things than counts; save it again with save_pretrained"
    if set((index.get("weight_map") or {}).values()) != set(names):
        yield f"does not list the shards beside it ({', '.join(names) or 'none'}); save it again with save_pretrained"


def _unknown_fields(content: dict[str, Any], known: set[str]) -> Iterator[str]:
    if unknown := sorted(content.keys() - known):
        yield f"unknown field {', '.join(map(repr, unknown[:5]))}; take it out"


def _module(of: type) -> str:
    return of.__module__.rpartition(".")[2]


def _around(text: str, match: re.Match[str]) -> str:
    return re.split(r"\s", text[match.start() : match.start() + 48], maxsplit=1)[0] or match.group()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
