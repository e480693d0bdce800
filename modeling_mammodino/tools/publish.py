"""Publish on the Hugging Face Hub: `mammodino push FOLDER REPO_ID`, and `upload` for whatever else. Research use only.

A model folder is sent in one commit, and only if every file of it is one of a model, by an allow-list and by content:
weights, settings, code, card, figures that the card shows. Anything else is refused before the first byte is sent,
because what is published stays published. A check yields what is wrong, each with its remedy; nothing is repaired here.

Figures are images of results: PNG, JPEG or SVG. Refused are metadata of any kind, data after the image's end, links,
what is as large as a mammogram, and what is gray throughout, as mammograms are. A figure that shows a patient in color
is not recognized: look before you push.
"""

import argparse
import inspect
import io
import json
import logging
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from PIL import Image
from PIL.PngImagePlugin import ChunkStream
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .. import modeling_mammodino
from ..configuration_mammodino import MammoDinoConfig
from ..dicom import is_dicom
from ..image_processing_mammodino import MammoDinoImageProcessor
from ..modeling_mammodino import MammoDinoPreTrainedModel
from .command import model_folder

logger = logging.getLogger(__name__)

SHARDS_A_COMMIT = 20  # some 4 to 10 GB; the Hub limits commits an hour
# a page is about 800 px wide; full-field mammograms start at 4 MP
MAX_FIGURE_PX, MAX_FIGURE_BYTES = 3_000_000, 3 * 2**20
PNG_SIGNATURE, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
# what a decoder needs; the others hold text, dates, EXIF, color profiles or private data (PNG specification, 11.3)
PNG_CHUNKS = {"IHDR", "PLTE", "IDAT", "IEND", "tRNS", "gAMA", "cHRM", "sRGB", "sBIT", "pHYs", "bKGD", "hIST"}
JPEG_SEGMENTS = {"APP0", "APP14"}  # JFIF's density and Adobe's color transform; EXIF, XMP, ICC, IPTC are others
SVG = "{http://www.w3.org/2000/svg}"
SVG_ELEMENTS = {
    "svg", "g", "defs", "style", "path", "use", "rect", "circle", "ellipse", "line", "polyline", "polygon", "text",
    "tspan", "clipPath", "mask", "pattern", "marker", "linearGradient", "radialGradient", "stop", "symbol",
}  # fmt: skip
XLINK, XML = "{http://www.w3.org/1999/xlink}", "{http://www.w3.org/XML/1998/namespace}"
REMEDY = "draw it anew, with savefig(..., metadata={'Software': None}) in matplotlib"
SVG_REMEDY = "save it as PNG, or from matplotlib with svg.fonttype 'none' and Creator, Date, Format and Type None"


def check_figure(suffix: str, data: bytes) -> Iterator[str]:
    """Yield what is wrong with a figure of this suffix (.png, .jpg, .jpeg, .svg), each with its remedy."""
    if len(data) > MAX_FIGURE_BYTES:
        yield f"{len(data) / 2**20:.1f} MiB, and a figure has at most {MAX_FIGURE_BYTES / 2**20:g}; draw it smaller"
    elif suffix == ".svg":
        yield from _check_svg(data)
    else:
        yield from _check_image("PNG" if suffix == ".png" else "JPEG", data)


def _check_image(kind: str, data: bytes) -> Iterator[str]:
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
        if image.width * image.height > MAX_FIGURE_PX:
            size = f"{image.width} x {image.height} px, as large as a mammogram"
            yield f"{size}; a figure has at most {MAX_FIGURE_PX / 1e6:g} million: draw it smaller"
            return
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        yield f"not a readable {kind}, whatever its name says; remove it"
        return
    if kind == "JPEG":
        yield from _check_jpeg_segments(image, data)
    else:
        try:
            if hidden := sorted(set(png_chunks(data)) - PNG_CHUNKS):
                yield f"metadata in the PNG chunks {', '.join(hidden)}; {REMEDY}"
        except ValueError as error:
            yield f"{error}; {REMEDY}"
    if image.mode not in ("RGB", "RGBA", "P"):
        yield f"color mode {image.mode}, as mammograms have; a figure is drawn in 8-bit color"
    else:
        colors = np.asarray(image.convert("RGB"))  # (H, W, 3)
        if (colors == colors[..., :1]).all():
            yield "gray throughout, as mammograms are; draw the figure with a color, or leave it out"


def png_chunks(data: bytes) -> list[str]:
    """Return the names of a PNG's chunks but the last, IEND.

    Raises ValueError where a chunk is damaged or cut off, and where bytes stand behind the image's end.
    """
    stream = io.BytesIO(data)
    if stream.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
        raise ValueError("not a PNG")
    try:
        names = ChunkStream(stream).verify()  # up to the header of IEND
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError("damaged or cut short") from error
    if more := len(data) - 4 - stream.tell():
        raise ValueError(f"{more} bytes after the image's end" if more > 0 else "cut short")
    if not data.endswith(PNG_END):
        raise ValueError("damaged in its last chunk")
    return [name.decode("latin-1") for name in names]


def _check_jpeg_segments(image: Image.Image, data: bytes) -> Iterator[str]:
    segments = getattr(image, "applist", [])
    if hidden := sorted({name for name, _ in segments} - JPEG_SEGMENTS):
        yield f"metadata in the JPEG segments {', '.join(hidden)}; save it as PNG"
    if any(name == "APP0" and not (body.startswith(b"JFIF\0") and len(body) == 14) for name, body in segments):
        yield "a thumbnail or unknown data in its APP0 segment; save it as PNG"
    # inside the image's own data a byte FF is followed by 00 or a restart marker, so the first end marker ends it
    if data.find(b"\xff\xd9", data.find(b"\xff\xda")) != len(data) - 2:
        yield "data after the image's end; save it as PNG"


def _check_svg(data: bytes) -> Iterator[str]:
    try:
        text = data.decode()
        root = ElementTree.fromstring(_without_doctype(text))
    except (UnicodeDecodeError, ElementTree.ParseError, ValueError) as error:
        yield f"not a readable SVG ({error}); {SVG_REMEDY}"
        return
    if "<!--" in text or "<?" in text[5:]:
        yield f"holds comments or processing instructions; {SVG_REMEDY}"
    elements = {element.tag.removeprefix(SVG) for element in root.iter()}
    if root.tag != f"{SVG}svg" or elements - SVG_ELEMENTS:
        yield f"holds {', '.join(sorted(elements - SVG_ELEMENTS)) or 'no SVG'}; {SVG_REMEDY}"
    attributes = {(name, value) for element in root.iter() for name, value in element.attrib.items()}
    names = {name.removeprefix(XLINK).removeprefix(XML) for name, _ in attributes}
    if hidden := sorted(name for name in names if re.match(r"\{|on|data-|aria-", name)):
        yield f"holds the attributes {', '.join(hidden)}; {SVG_REMEDY}"
    styles = [element.text or "" for element in root.iter(f"{SVG}style")]
    links = [value for name, value in attributes if name.removeprefix(XLINK) in ("href", "src")]
    links += re.findall(r"(?:url\(|@import)\s*[\"']?([^)\s\"']*)", " ".join([*styles, *(v for _, v in attributes)]))
    if outside := [link for link in links if not link.startswith("#")]:
        yield f"refers to {outside[0][:60]!r} outside of it; {SVG_REMEDY}"


def _without_doctype(text: str) -> str:
    """Without the standard document type, which declares nothing of its own; any other is refused."""
    text = re.sub(r'<!DOCTYPE svg PUBLIC "[^"<>]*"\s+"[^"<>]*">', "", text, count=1)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("its document type declares entities")
    return text


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
    """Yield paths, tokens and UIDs that should not leave the machine."""
    for name, pattern in PRIVATE.items():
        if match := pattern.search(text):
            line = text.count("\n", 0, match.start()) + 1
            # a token itself is not repeated: this message may be logged
            shown = "" if "token" in name else f" ({_around(text, match)!r})"
            yield f"line {line} holds {name}{shown}; take it out"


def without_private(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts by text, most frequent first; what `check_text` finds in a text is replaced by what it is."""
    public: Counter[str] = Counter()
    for text, count in counts.items():
        for name, pattern in PRIVATE.items():
            text = re.sub(rf"(?:{pattern.pattern})[^\s,;()]*", f"({name})", text)
        public[text] += count
    return dict(public.most_common())


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


def _around(text: str, match: re.Match[str]) -> str:
    return re.split(r"\s", text[match.start() : match.start() + 48], maxsplit=1)[0] or match.group()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


CARD, CONFIG, PROCESSOR, RECIPE = "README.md", "config.json", "preprocessor_config.json", "recipe.yaml"
WEIGHTS, INDEX = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors"), "model.safetensors.index.json"
FIGURE = re.compile(r"[\w-]+(\.png|\.jpg|\.jpeg|\.svg)")
MAX_TEXT_BYTES = 2**20
LISTED_FILES = 20  # of a folder that should not be there


def add_command(commands) -> None:
    """Add the subcommand `push`; `commands` is argparse's action of subparsers."""
    summary = "publish a model folder on the Hub, after a check of every file"
    parser = commands.add_parser("push", help=summary, description=f"{summary.capitalize()}. Research use only.")
    parser.add_argument("folder", type=model_folder, help="folder with weights, settings, code, card and figures")
    parser.add_argument("repo_id", help="OWNER/NAME on the Hub; made where it does not exist")
    parser.add_argument("--private", action="store_true", help="only with access: refused where REPO_ID is public")
    parser.add_argument("--revision", help="branch (default: main); made where it does not exist")
    parser.add_argument("--commit_message", default="Upload model", help="default: Upload model")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    commit = push_folder(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        commit_message=options.commit_message,
    )
    print(commit.commit_url)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str = "Upload model",
    token: str | None = None,
) -> CommitInfo:
    """Publish a complete model folder in one commit; files of the repository that are not in it stay.

    private: the repository must be private. It is made so where it does not exist; a public one is refused.
    revision: a branch, made from main where it does not exist.

    Raises ValueError, before anything is sent, naming each file that does not belong in a published model and the
    remedy; FileNotFoundError where there is no such folder; ConnectionError where the Hub is out of reach;
    huggingface_hub's HfHubHTTPError where it refuses.
    """
    folder = Path(folder)
    if complaints := check_folder(folder):
        listed = "\n".join(f"  {complaint}" for complaint in complaints)
        raise ValueError(f"{folder}: nothing was sent.\n{listed}")
    # by name, never a whole folder: a file that appears from now on is not sent
    files = {
        path.name: path if WEIGHTS.fullmatch(path.name) else path.read_bytes() for path in sorted(folder.iterdir())
    }
    return upload(
        repo_id, files, private=private or None, revision=revision, commit_message=commit_message, token=token
    )


def upload(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    *,
    shards: Mapping[str, tuple[Path, str]] | None = None,
    shard_pattern: str = "",
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str,
    token: str | None = None,
) -> CommitInfo:
    """Send files to a repository on the Hub, which is made where it does not exist; other files of it stay.

    Shards go first, in commits of SHARDS_A_COMMIT, then `files` in one commit, which is returned: half of a data set is
    not taken for one, and the same call goes on after a stop, for shards that are there are not sent again.

    Args:
        files: path in the repository -> content, or the file that holds it.
        shards: path in the repository -> file and its sha256 (hexadecimal).
        shard_pattern: what shards are called, such as "data-*.arrow": readers take all files of that name for one data
            set, so a repository with others is refused.
        repo_type: "model" or "dataset".
        private: True: the repository must be private, and is made so; False: it is made public; None: as the account's
            settings say.
        revision: a branch, made from main where it does not exist.

    Raises ValueError where the repository is public and should not be, where it holds other shards, where a shard is
    not what its sha256 says, and where the repository's .gitignore leaves out a file; ConnectionError where the Hub is
    out of reach; huggingface_hub's HfHubHTTPError where it refuses.
    """
    api = HfApi(token=token, library_name="mammodino")
    shards = shards or {}
    try:
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            remedy = "name another" if repo_type == "model" else "pass --public"
            raise ValueError(f"{repo_id} exists and is public; nothing was sent. Make it private there, or {remedy}")
        if revision and not revision.startswith("refs/"):
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        if shards:
            _upload_shards(api, repo_id, repo_type, revision, shards, shard_pattern)
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(
            repo_id, additions, commit_message=commit_message, repo_type=repo_type, revision=revision
        )
        there = set(api.list_repo_files(repo_id, repo_type=repo_type, revision=commit.oid))
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError):  # says itself what is wrong
            raise
        raise ConnectionError(f"the Hub cannot be reached ({error}); check the network and HF_ENDPOINT") from error
    if absent := sorted({*shards, *files} - there):
        raise ValueError(f"{repo_id}: its .gitignore left out {', '.join(absent)}; remove these lines and push again")
    return commit


def _upload_shards(
    api: HfApi,
    repo_id: str,
    repo_type: str,
    revision: str | None,
    shards: Mapping[str, tuple[Path, str]],
    pattern: str,
) -> None:
    entries = api.list_repo_tree(repo_id, repo_type=repo_type, revision=revision, recursive=True)
    there = {each.path: each.lfs.sha256 if each.lfs else "" for each in entries if isinstance(each, RepoFile)}
    known = {name: sha256 for name, (_, sha256) in shards.items()}
    if others := sorted(name for name in there if fnmatch(name, pattern) and there[name] != known.get(name)):
        raise ValueError(
            f"{repo_id} holds {len(others)} files of another data set, {others[0]} first; nothing was sent. Push to "
            "another name, or delete them there"
        )
    missing = [name for name in shards if name not in there]
    logger.info("%d of %d shards are there, %d to send", len(shards) - len(missing), len(shards), len(missing))
    for start in range(0, len(missing), SHARDS_A_COMMIT):
        additions = [CommitOperationAdd(name, shards[name][0]) for name in missing[start : start + SHARDS_A_COMMIT]]
        for each in additions:
            if each.upload_info.sha256.hex() != known[each.path_in_repo]:
                raise ValueError(f"{each.path_in_repo} changed since it was checked, and was not sent; verify again")
        api.create_commit(repo_id, additions, commit_message="Add shards", repo_type=repo_type, revision=revision)


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
        if complaint := _does_not_belong(path, code):
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
