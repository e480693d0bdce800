"""Publishing a model folder on the Hugging Face Hub: `mammodino push FOLDER REPO_ID`. Research use only.

A folder is sent in one commit, and only if every file of it is one of a model: weights, settings, code, card, figures
that the card shows. Anything else is refused before the first byte is sent, because what is published stays published.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from .configuration_mammodino import MammoDinoConfig
from .dicom import is_dicom
from .published_figures import check_figure
from .published_files import (
    architecture,
    check_card,
    check_config,
    check_image_processor,
    check_index,
    check_recipe,
    check_text,
    check_weights,
    model_code,
    read_settings,
)

CARD, CONFIG, PROCESSOR, RECIPE = "README.md", "config.json", "preprocessor_config.json", "recipe.yaml"
WEIGHTS, INDEX = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors"), "model.safetensors.index.json"
FIGURE = re.compile(r"[\w-]+(\.png|\.jpg|\.jpeg|\.svg)")
MAX_TEXT_BYTES = 2**20
LISTED_FILES = 20  # of a folder that should not be there


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `push` to the command line."""
    summary = "publish a model folder on the Hub, after a check of every file"
    parser = commands.add_parser("push", help=summary, description=f"{summary.capitalize()}. Research use only.")
    parser.add_argument("folder", type=Path, help="folder with weights, settings, code, card and figures")
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
    """Publishes a complete model folder in one commit; files of the repository that are not in it stay.

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
    additions = [
        CommitOperationAdd(path.name, path if WEIGHTS.fullmatch(path.name) else path.read_bytes())
        for path in sorted(folder.iterdir())
    ]
    try:
        return _push(
            HfApi(token=token, library_name="mammodino"), additions, repo_id, private, revision, commit_message
        )
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError):  # says itself what is wrong
            raise
        raise ConnectionError(f"the Hub cannot be reached ({error}); check the network and HF_ENDPOINT") from error


def _push(
    api: HfApi, additions: list[CommitOperationAdd], repo_id: str, private: bool, revision: str | None, message: str
) -> CommitInfo:
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public; nothing was sent. Make it private there, or name another")
    if revision and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.create_commit(repo_id, additions, commit_message=message, revision=revision)
    there = set(api.list_repo_files(repo_id, revision=commit.oid))
    if absent := [each.path_in_repo for each in additions if each.path_in_repo not in there]:
        raise ValueError(f"{repo_id}: its .gitignore left out {', '.join(absent)}; remove these lines and push again")
    return commit


def check_folder(folder: str | Path) -> list[str]:
    """Why a folder cannot be published, a line a reason with its file and remedy; empty where it can."""
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
    """The complaint about an entry that is neither a folder nor a file by the name of one of a model."""
    if path.is_symlink():
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
    """What is wrong with the content of a file other than weights."""
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
