"""Publish a corpus on the Hugging Face Hub, private unless said otherwise, after a check of every row and file.

    python -m dataset_scripts.corpus.push CORPUS OWNER/NAME --license cc-by-4.0

Nothing is sent where `dataset_scripts.corpus.verify` finds a fault. Shards go first and the manifest last, so that half
a corpus is not taken for one; the same command goes on, and does not send again what is there. Research use only.
"""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import DatasetCard, DatasetCardData

from modeling_mammodino.tools.command import CommandParser, command_line, user_path
from modeling_mammodino.tools.publish import size_category, upload

from .reader import FEATURES, INFO, MANIFEST, STATE
from .verify import CARD, listed, verify_corpus

SHARDS = "data-*.arrow"
TEMPLATE = Path(__file__).parents[2] / "model_cards" / "corpus_template.md"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")  # the Hub's identifiers
LICENSE_NEEDED = (
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
    """Publish a verified corpus as a dataset that `datasets.load_dataset` opens; return its address.

    public: else the repository must be private; it is made so where it does not exist, and a public one is refused.
    revision: a branch, made from main where it does not exist.

    Raises ValueError, before anything is sent, with all that `verify` finds, without a license, or where the repository
    is public or holds another corpus; FileNotFoundError where the corpus is not finished; ConnectionError where the Hub
    is out of reach; huggingface_hub's HfHubHTTPError where it refuses.
    """
    folder = Path(folder)
    if not LICENSE.fullmatch(license):
        raise ValueError(LICENSE_NEEDED)
    if complaints := verify_corpus(folder, num_proc):
        raise ValueError(f"{folder}: nothing was sent.\n{listed(complaints)}")
    # read once, by name: what is sent is what was checked, and a file that appears from now on is not sent
    documents = {name: (folder / name).read_bytes() for name in (INFO, STATE, MANIFEST)}
    manifest = json.loads(documents[MANIFEST])
    size = sum((folder / shard["name"]).stat().st_size for shard in manifest["shards"])
    documents[CARD] = str(make_card(manifest, size, repo_id, license)).encode()
    commit = upload(
        repo_id,
        documents,
        shards={shard["name"]: (folder / shard["name"], shard["sha256"]) for shard in manifest["shards"]},
        shard_pattern=SHARDS,  # what load_dataset reads: the shards of two corpora would be read as one
        repo_type="dataset",
        private=not public,
        revision=revision,
        commit_message="Add manifest and card",
        token=token,
    )
    return str(commit.repo_url)


def make_card(manifest: dict[str, Any], size: int, repo_id: str, license: str) -> DatasetCard:
    """Return the card of a corpus of `size` bytes; its metadata tell the Hub's viewer what to show before it reads."""
    splits = {"train": {"name": "train", "num_bytes": size, "num_examples": manifest["rows"]}}
    info = datasets.DatasetInfo(features=FEATURES, splits=splits, download_size=size, dataset_size=size)
    data = DatasetCardData(
        license=license,
        pretty_name=f"{manifest['collection']}, a MammoDINO pretraining corpus",
        size_categories=size_category(manifest["rows"]),
        task_categories=["image-feature-extraction"],
        tags=["mammography", "tomosynthesis", "medical-imaging", "research-use-only", "mammodino"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": SHARDS}]}],
        dataset_info=info._to_yaml_dict(),
    )
    return DatasetCard.from_template(data, template_path=str(TEMPLATE), repo_id=repo_id, **manifest)


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m dataset_scripts.corpus.push", description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=user_path)
    parser.add_argument("repo_id", help="OWNER/NAME of the dataset; made where it does not exist")
    parser.add_argument("--license", default="", help="required: by the Hub's identifier, such as cc-by-nc-4.0")
    parser.add_argument("--public", action="store_true", help="for everybody (default: only with access)")
    parser.add_argument("--revision", help="branch (default: main); made where it does not exist")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count() or 1, help="processes of the check")
    options = vars(parser.parse_args(arguments))
    with command_line("push_corpus"):
        logging.getLogger("httpx").setLevel(logging.WARNING)
        try:
            address = push_corpus(options.pop("corpus"), **options)
        except ValueError as error:  # of as many lines as there are complaints
            raise SystemExit(f"push_corpus: {error}") from error
    print(address)


if __name__ == "__main__":
    main()
