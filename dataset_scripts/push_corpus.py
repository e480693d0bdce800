"""Publish a corpus on the Hugging Face Hub, private unless said otherwise, after a check of every row and file.

    python -m dataset_scripts.push_corpus CORPUS OWNER/NAME --license cc-by-4.0

Nothing is sent where `dataset_scripts.verify` finds a fault. Shards go first and the manifest last, so that half a
corpus is not taken for one; the same command goes on, and does not send again what is there.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jinja2
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from .corpus_reader import MANIFEST
from .verify import KNOWN_FILES, SHOWN, verify_corpus

TEMPLATE = Path(__file__).parents[1] / "model_cards" / "corpus_template.md"
SHARDS_A_COMMIT = 20
CARD = "README.md"


def push_corpus(
    folder: str | Path,
    repo_id: str,
    license: str,
    public: bool = False,
    num_proc: int = 1,
    token: str | None = None,
) -> str:
    """Publishes a verified corpus as a dataset; returns its address.

    Raises ValueError, before anything is sent, with all that `verify` finds, or where the repository is public and
    `public` is not asked for; ConnectionError where the Hub is out of reach; HfHubHTTPError where it refuses.
    """
    folder = Path(folder)
    if complaints := verify_corpus(folder, num_proc):
        listed = "\n".join(f"  {complaint}" for complaint in complaints[:SHOWN])
        raise ValueError(f"{folder}: nothing was sent.\n{listed}")
    manifest = json.loads((folder / MANIFEST).read_text())
    card = _card(manifest, repo_id, license)
    shards = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    api = HfApi(token=token, library_name="mammodino")
    try:
        repo = api.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
        if not public and not api.repo_info(repo.repo_id, repo_type="dataset").private:
            raise ValueError(
                f"{repo_id} exists and is public; nothing was sent. Make it private there, or pass --public"
            )
        there = _shards_there(api, repo.repo_id)
        missing = [name for name, sha256 in shards.items() if there.get(name) != sha256]
        for batch in _batches(missing):
            additions = [CommitOperationAdd(name, folder / name) for name in batch]
            api.create_commit(repo.repo_id, additions, commit_message="Add shards", repo_type="dataset")
        # by name, never a whole folder: a file that appears from now on is not sent
        last = [CommitOperationAdd(name, (folder / name).read_bytes()) for name in sorted(KNOWN_FILES - {CARD})]
        last.append(CommitOperationAdd(CARD, card.encode()))
        api.create_commit(repo.repo_id, last, commit_message="Add manifest and card", repo_type="dataset")
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError):  # says itself what is wrong
            raise
        raise ConnectionError(f"the Hub cannot be reached ({error}); check the network and HF_ENDPOINT") from error
    return str(repo)


def _card(manifest: dict, repo_id: str, license: str) -> str:
    template = jinja2.Template(TEMPLATE.read_text(), keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return template.render(manifest, repo_id=repo_id, license=license)


def _shards_there(api: HfApi, repo_id: str) -> dict[str, str]:
    """Large files of the repository, by name, and their sha256."""
    files = api.list_repo_tree(repo_id, repo_type="dataset")
    return {file.path: file.lfs.sha256 for file in files if getattr(file, "lfs", None)}


def _batches(names: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), SHARDS_A_COMMIT):
        yield names[start : start + SHARDS_A_COMMIT]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dataset_scripts.push_corpus", description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("repo_id", help="OWNER/NAME of the dataset; made where it does not exist")
    parser.add_argument(
        "--license",
        required=True,
        help="of the published pictures; the terms of their collections hold: BCS-DBT is CC BY-NC 4.0, for example",
    )
    parser.add_argument("--public", action="store_true", help="for everybody (default: only with access)")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count() or 1, help="processes of the check")
    options = parser.parse_args(arguments)
    try:
        address = push_corpus(options.corpus, options.repo_id, options.license, options.public, options.num_proc)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise SystemExit(f"push_corpus: {error}") from error
    print(address)


if __name__ == "__main__":
    main()
