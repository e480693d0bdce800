"""Publish a corpus on the Hugging Face Hub, private unless said otherwise, after a check of every row and file.

    python -m dataset_scripts.corpus.push CORPUS OWNER/NAME --license cc-by-4.0

Nothing is sent where `dataset_scripts.corpus.verify` finds a fault. Shards go first and the manifest last, so that half a
corpus is not taken for one; the same command goes on, and does not send again what is there. Research use only.
"""

import argparse
import json
import logging
import os
import re
from pathlib import Path

import jinja2
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from .reader import MANIFEST
from .verify import CARD, INFO, SHARD, SHOWN, STATE, verify_corpus

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).parents[2] / "model_cards" / "corpus_template.md"
SHARDS_A_COMMIT = 20  # some 4 GB; the Hub limits commits an hour
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")  # the Hub's identifiers
LICENCE_NEEDED = (
    "--license: state one by the Hub's identifier, such as cc-by-nc-4.0. The collections that a corpus is made from "
    "have terms of their own, which hold for it: BCS-DBT is CC BY-NC 4.0, for example, and EMBED forbids passing its "
    "images on"
)


def push_corpus(
    folder: str | Path,
    repo_id: str,
    license: str,
    *,
    public: bool = False,
    revision: str | None = None,
    num_proc: int = 1,
    token: str | None = None,
) -> str:
    """Publishes a verified corpus as a dataset that `datasets.load_dataset` opens; returns its address.

    public: else the repository must be private; it is made so where it does not exist, and a public one is refused.
    revision: a branch, made from main where it does not exist.

    Raises ValueError, before anything is sent, with all that `verify` finds, without a license, or where the repository
    is public or holds another corpus; FileNotFoundError where the corpus is not finished; ConnectionError where the Hub
    is out of reach; huggingface_hub's HfHubHTTPError where it refuses.
    """
    folder = Path(folder)
    if not LICENCE.fullmatch(license):
        raise ValueError(LICENCE_NEEDED)
    if complaints := verify_corpus(folder, num_proc):
        listed = "\n".join(f"  {complaint}" for complaint in complaints[:SHOWN])
        more = f"\n  ... and {len(complaints) - SHOWN} more" if len(complaints) > SHOWN else ""
        raise ValueError(f"{folder}: nothing was sent.\n{listed}{more}")
    # read once, by name: what is sent is what was checked, and a file that appears from now on is not sent
    documents = {name: (folder / name).read_bytes() for name in (INFO, STATE, MANIFEST)}
    manifest = json.loads(documents[MANIFEST])
    documents[CARD] = _card(manifest, repo_id, license).encode()
    shards = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    api = HfApi(token=token, library_name="mammodino")
    try:
        return _push(api, folder, repo_id, shards, documents, public, revision)
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError):  # says itself what is wrong
            raise
        raise ConnectionError(f"the Hub cannot be reached ({error}); check the network and HF_ENDPOINT") from error


def _push(
    api: HfApi,
    folder: Path,
    repo_id: str,
    shards: dict[str, str],
    documents: dict[str, bytes],
    public: bool,
    revision: str | None,
) -> str:
    repo = api.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
    repo_id = repo.repo_id
    if not public and not api.repo_info(repo_id, repo_type="dataset").private:
        raise ValueError(f"{repo_id} exists and is public; nothing was sent. Make it private there, or pass --public")
    if revision and not revision.startswith("refs/"):
        api.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True)
    there = _files(api, repo_id, revision)
    # data-*.arrow is what load_dataset reads: the shards of two corpora would be read as one
    if others := sorted(name for name in there if SHARD.fullmatch(name) and there[name] != shards.get(name)):
        raise ValueError(
            f"{repo_id} holds {len(others)} shards of another corpus, {others[0]} first; nothing was sent. Push to "
            "another name or --revision, or delete them there"
        )
    missing = [name for name in shards if name not in there]
    logger.info("%d of %d shards are there, %d to send", len(shards) - len(missing), len(shards), len(missing))
    for start in range(0, len(missing), SHARDS_A_COMMIT):
        additions = [CommitOperationAdd(name, folder / name) for name in missing[start : start + SHARDS_A_COMMIT]]
        for each in additions:
            if each.upload_info.sha256.hex() != shards[each.path_in_repo]:
                raise ValueError(f"{each.path_in_repo} changed since it was checked, and was not sent; verify again")
        _commit(api, repo_id, additions, "Add shards", revision)
    last = [CommitOperationAdd(name, content) for name, content in documents.items()]
    _commit(api, repo_id, last, "Add manifest and card", revision)
    if absent := sorted({*shards, *documents} - _files(api, repo_id, revision).keys()):
        raise ValueError(f"{repo_id}: its .gitignore left out {', '.join(absent)}; remove these lines and push again")
    return str(repo)


def _commit(api: HfApi, repo_id: str, additions: list[CommitOperationAdd], message: str, revision: str | None) -> None:
    api.create_commit(repo_id, additions, commit_message=message, repo_type="dataset", revision=revision)


def _files(api: HfApi, repo_id: str, revision: str | None) -> dict[str, str | None]:
    """Files of the repository, and the sha256 of large ones."""
    entries = api.list_repo_tree(repo_id, repo_type="dataset", revision=revision)
    return {each.path: each.lfs.sha256 if getattr(each, "lfs", None) else None for each in entries}


def _card(manifest: dict, repo_id: str, license: str) -> str:
    template = jinja2.Template(TEMPLATE.read_text(), keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return template.render(manifest, repo_id=repo_id, license=license)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dataset_scripts.corpus.push", description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("repo_id", help="OWNER/NAME of the dataset; made where it does not exist")
    parser.add_argument("--license", default="", help="required: by the Hub's identifier, such as cc-by-nc-4.0")
    parser.add_argument("--public", action="store_true", help="for everybody (default: only with access)")
    parser.add_argument("--revision", help="branch (default: main); made where it does not exist")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count() or 1, help="processes of the check")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        address = push_corpus(
            options.corpus,
            options.repo_id,
            options.license,
            public=options.public,
            revision=options.revision,
            num_proc=options.num_proc,
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise SystemExit(f"push_corpus: {error}") from error
    print(address)


if __name__ == "__main__":
    main()
