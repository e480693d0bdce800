"""The files of a published model: weights, settings, code, card, figures, results; each by name and by content.

A check yields what is wrong, each with its remedy; nothing is repaired here.
"""

import inspect
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, eval_result_entries_to_yaml, parse_eval_result_entries
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .. import modeling_mammodino
from ..configuration_mammodino import MammoDinoConfig
from ..dicom import is_dicom
from ..image_processing_mammodino import MammoDinoImageProcessor
from ..modeling_mammodino import MammoDinoPreTrainedModel
from .privacy import check_figure, check_text

CARD, CONFIG, PROCESSOR, RECIPE = "README.md", "config.json", "preprocessor_config.json", "recipe.yaml"
WEIGHTS, INDEX = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors"), "model.safetensors.index.json"
FIGURE = re.compile(r"[\w-]+(\.png|\.jpg|\.jpeg|\.svg)")
EVAL_RESULTS, RESULTS_FILE = ".eval_results", re.compile(r"[\w-]+(\.[\w-]+)*\.yaml")  # as the Hub reads them
MAX_TEXT_BYTES = 2**20
LISTED_FILES = 20  # of a folder that should not be there
# fields of a recipe that name places of the machine it ran on, or mean nothing without them
LOCAL_RECIPE_FIELDS = (
    *("corpus", "output_dir", "resume_from_checkpoint", "init_from_checkpoint"),
    *("knn_labels", "knn_task", "knn_steps"),
)
# what transformers writes beside a class's own settings
CONFIG_FIELDS = {"architectures", "auto_map", "dtype", "model_type", "transformers_version", "problem_type",
                 "id2label", "label2id", "num_labels"}  # fmt: skip
PROCESSOR_FIELDS = {"auto_map", "image_processor_type", "processor_class", "image_processor_class"}
PLAIN_WORD = re.compile(r"[\w.+-]*(?:/[\w.+-]+|=[\d.e+-]+)?")  # a name, OWNER/NAME on the Hub, or NAME=NUMBER


def check_folder(folder: str | Path) -> list[str]:
    """Return why a folder cannot be published, a line a reason with its file and remedy; empty where it can."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give one that save_pretrained or training.pretrain wrote")
    return [f"{name}: {complaint}" for name, complaint in _check_folder(folder)]


def _check_folder(folder: Path) -> Iterator[tuple[str, str]]:
    names, config = [], {}
    if (folder / CONFIG).is_file():
        try:
            config = read_settings((folder / CONFIG).read_bytes())
        except ValueError:
            pass  # said below, in its turn
    code = model_code(config)
    for path in sorted(folder.iterdir()):
        if path.name == EVAL_RESULTS and path.is_dir() and not path.is_symlink():
            yield from _check_results(path)
        elif complaint := _does_not_belong(path, code):
            yield path.name, complaint
        elif path.is_dir():
            yield from _check_subfolder(folder, path)
        else:
            names.append(path.name)
    weights = [name for name in names if WEIGHTS.fullmatch(name)]
    figures = [name for name in names if FIGURE.fullmatch(name)]
    for name in names:
        if name not in weights:
            yield from ((name, complaint) for complaint in _check_file(folder / name, code, weights, figures))
    is_foreign = config.get("model_type", MammoDinoConfig.model_type) != MammoDinoConfig.model_type  # and said to be
    yield from _check_completeness(names, weights, {} if is_foreign else code)
    if weights and architecture(config) and not any(check_config(config)):
        yield from check_weights(folder, weights, config)


def _does_not_belong(path: Path, code: dict[str, bytes]) -> str | None:
    """Return the complaint about an entry that is neither a folder nor a file by the name of one of a model.

    Code may be a link, as in a checkout, which has it once: what it leads to is checked, and sent.
    """
    if path.is_symlink() and not (path.name in code and path.is_file()):
        return f"a link to {path.readlink()}; put the file itself there, or remove it"
    if path.name.startswith("."):
        return "hidden; remove it"
    if path.is_dir():
        return None
    if not path.is_file():
        return "neither a file nor a folder; remove it"
    known = path.name in {CARD, CONFIG, PROCESSOR, RECIPE, INDEX, *code}
    if not known and not WEIGHTS.fullmatch(path.name) and not FIGURE.fullmatch(path.name):
        return f"{_what_it_is(path)}; remove it: a published model holds weights, settings, code, card and figures"
    if is_dicom(path):
        return "a DICOM file, whatever its name says; remove it"
    return None


def _what_it_is(path: Path) -> str:
    with path.open("rb") as stream:
        head = stream.read(4)
    if is_dicom(path):
        return "a DICOM file"
    if head[:2] == b"PK":
        return "a zip archive, as torch.save and spreadsheets write"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle, which runs code when it is opened"
    if path.suffix == ".py":
        return "code that this package does not copy beside a model"
    return "no file of a model"


def _check_subfolder(folder: Path, inside: Path) -> Iterator[tuple[str, str]]:
    files = [path for path in sorted(inside.rglob("*")) if not path.is_dir()]
    for path in files[:LISTED_FILES]:
        yield str(path.relative_to(folder)), "in a folder of its own; a published model is flat: remove the folder"
    if len(files) > LISTED_FILES or not files:
        yield f"{inside.name}/", f"a folder of {len(files)} files; a published model is flat: remove it"


def _check_file(path: Path, code: dict[str, bytes], weights: list[str], figures: list[str]) -> Iterator[str]:
    """Yield what is wrong with the content of a file other than weights."""
    if path.stat().st_size > MAX_TEXT_BYTES and path.name not in figures:
        yield f"{path.stat().st_size / 2**20:.1f} MiB; as text it has at most {MAX_TEXT_BYTES / 2**20:g}: cut it"
        return
    if path.name in code:
        if path.read_bytes() != code[path.name]:
            yield (
                "differs from this package's: others would run it unseen. Push with the version of the package that "
                f"saved the folder, or copy the installed {path.name} over it"
            )
        return
    if path.name in figures:
        yield from check_figure(path.suffix, path.read_bytes())
        if path.suffix != ".svg":
            return
    try:
        text = path.read_text(encoding="utf-8")
        content = read_settings(path.read_bytes()) if path.suffix == ".json" else {}
    except ValueError as error:
        yield f"cannot be read ({' '.join(str(error).split())}); save it again"
        return
    yield from check_text(text)
    if path.name == CARD:
        yield from check_card(text, figures)
    elif path.name == RECIPE:
        yield from check_recipe(path.read_bytes())
    elif path.name == CONFIG:
        yield from check_config(content)
    elif path.name == PROCESSOR:
        yield from check_image_processor(content)
    elif path.name == INDEX:
        yield from check_index(content, weights)


def _check_completeness(names: list[str], weights: list[str], code: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    remedy = "missing; save model and image processor with save_pretrained, and add a card"
    for name in (CARD, CONFIG, PROCESSOR, *code):
        if name not in names:
            yield name, remedy
    if not weights:
        yield "model.safetensors", remedy
    if "model.safetensors" in weights and (len(weights) > 1 or INDEX in names):
        yield "model.safetensors", "beside shards of it; keep one of the two"
    if weights and "model.safetensors" not in weights and INDEX not in names:
        yield INDEX, remedy


def read_settings(data: bytes) -> dict[str, Any]:
    """Read a JSON object in which no field stands twice, the first unseen. Raises ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a field stands twice")
        return dict(pairs)

    content = json.loads(data, object_pairs_hook=once)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def check_config(config: dict[str, Any]) -> Iterator[str]:
    """Check config.json: a MammoDinoConfig with an architecture of this package, and its own code in auto_map."""
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
    """Check preprocessor_config.json: settings that the image processor has and accepts."""
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
    """Check recipe.yaml: names with numbers, switches and plain words, none of them a place on the machine."""
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
    """Check README.md: with a license, said to be for research use, and showing each of the figures beside it."""
    try:
        license = ModelCard(text).data.to_dict().get("license")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        yield f"its metadata cannot be read ({_one_line(error)}); correct the block between the --- lines"
        return
    if not license:
        yield "states no license; add `license: NAME` between the --- lines at its top"
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


def _check_results(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file() or not RESULTS_FILE.fullmatch(path.name):
            complaints = iter(["no YAML file of results; remove it"])
        else:
            complaints = check_results(path.read_bytes())
        yield from ((f"{EVAL_RESULTS}/{path.name}", complaint) for complaint in complaints)


def results_yaml(entries: list[EvalResultEntry]) -> str:
    """Return a file of `.eval_results`, which the Hub shows beside a model and in the leaderboard of its data sets."""
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)


def check_results(data: bytes) -> Iterator[str]:
    """Check a file of `.eval_results`: entries in the Hub's form, finite numbers on data sets there, nothing else."""
    try:
        text = data.decode()
        entries = parse_eval_result_entries(yaml.safe_load(text))
        if yaml.safe_load(text) != yaml.safe_load(results_yaml(entries)) or re.search(r"(?:^|\s)#", text):
            raise ValueError("other fields, or comments")
        for each in entries:
            validate_repo_id(each.dataset_id)
            if "/" not in each.dataset_id or not math.isfinite(each.value):
                raise ValueError(f"{each.task_id}: needs a data set OWNER/NAME and a finite value")
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        yield f"not results in the Hub's form ({_one_line(error)}); write them with training.card --hub_dataset"
        return
    yield from check_text(text)


def model_code(config: dict[str, Any]) -> dict[str, bytes]:
    """Return the sources that save_pretrained copies beside a model of this configuration, by name."""
    model = architecture(config) or MammoDinoPreTrainedModel
    files = set()
    for each in (MammoDinoConfig, MammoDinoImageProcessor, model):
        file = inspect.getfile(each)
        files |= {file, *get_relative_import_files(file)}
    return {Path(file).name: Path(file).read_bytes() for file in sorted(files)}


def architecture(config: dict[str, Any]) -> type[PreTrainedModel] | None:
    """Return the model class of a configuration, where it is one of this package."""
    names = config.get("architectures")
    found = getattr(modeling_mammodino, str(names[0]), None) if isinstance(names, list) and len(names) == 1 else None
    return found if isinstance(found, type) and issubclass(found, MammoDinoPreTrainedModel) else None


def check_weights(folder: Path, names: list[str], config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (file, complaint): the tensors of the architecture, each once, in its shape, and no other."""
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
    """Return the shape of each tensor of the architecture, without making any."""
    with torch.device("meta"):
        model = architecture(config)(MammoDinoConfig.from_dict(config))  # type: ignore[misc]
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def check_index(index: dict[str, Any], names: list[str]) -> Iterator[str]:
    """Check model.safetensors.index.json: the shards beside it, all of them, and counts."""
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
