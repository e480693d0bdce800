"""Publish on the Hugging Face Hub: `mammodino push FOLDER REPO_ID`, and `upload` for whatever else. Research use only.

A model folder is sent in one commit, and only if every file of it is one of a model, by an allow-list and by content
(`model_files`). Anything else is refused before the first byte is sent, because what is published stays published.
"""

import argparse
import logging
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile

from .command import model_folder
from .model_files import WEIGHTS, check_folder

logger = logging.getLogger(__name__)

SHARDS_A_COMMIT = 20  # some 4 to 10 GB; the Hub limits commits an hour


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
        path.relative_to(folder).as_posix(): path if WEIGHTS.fullmatch(path.name) else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return upload(
        repo_id, files, private=private or None, revision=revision, commit_message=commit_message, token=token
    )


def size_category(rows: int) -> str:
    """Return the Hub's category of a data set's size, such as 1K<n<10K."""
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M"]
    place = next((place for place in range(len(bounds)) if rows < 10 ** (place + 3)), len(bounds) - 1)
    return f"n<{bounds[0]}" if place == 0 else f"{bounds[place - 1]}<n<{bounds[place]}"


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
