"""A corpus that lies elsewhere (an object store, the Hub), copied to this machine once, for memory-mapped reading."""

import hashlib
import json
import logging
import os
from pathlib import Path

from filelock import FileLock
from fsspec.core import url_to_fs
from huggingface_hub.constants import HF_HOME

from .corpus_reader import MANIFEST

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "MAMMODINO_CACHE"
DOCUMENTS = ("state.json", "dataset_info.json", MANIFEST)  # the manifest last: it says that all is there


def local_corpus(address: str | Path) -> Path:
    """The folder of a corpus: `address` itself, or where it is an fsspec address (`s3://...`,
    `hf://datasets/OWNER/NAME`) a copy under $MAMMODINO_CACHE, by default beside the Hub's own cache.

    Safe to call from several processes at a time: one copies, the others wait. A copy that was cut off goes on with the
    shard it was at. Raises FileNotFoundError where there is no finished corpus, OSError where a shard arrives damaged.
    """
    text = str(address)
    if "://" not in text and "::" not in text:
        return Path(text)
    filesystem, root = url_to_fs(text)
    try:
        content = filesystem.cat_file(f"{root}/{MANIFEST}")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{text}: no {MANIFEST}, so no corpus, or an unfinished one") from error
    manifest = json.loads(content)
    cache = Path(os.environ.get(CACHE_VARIABLE, Path(HF_HOME) / "mammodino"))
    folder = cache / "corpora" / hashlib.sha256(content).hexdigest()[:16]  # another content is another copy
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        for shard in manifest["shards"]:
            _copy(filesystem, root, folder, shard["name"], shard["sha256"])
        for name in DOCUMENTS:
            _copy(filesystem, root, folder, name)
    return folder


def _copy(filesystem, root: str, folder: Path, name: str, sha256: str | None = None) -> None:
    """Whole or not at all."""
    if Path(name).name != name:
        raise ValueError(f"{MANIFEST}: a shard is named {name!r}, which is no plain file name; leave this corpus alone")
    if (folder / name).exists():
        return
    logger.info("copying %s", name)
    temporary = folder / f".{name}.tmp"
    filesystem.get_file(f"{root}/{name}", str(temporary))
    if sha256:
        with temporary.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            temporary.unlink()
            raise OSError(
                f"{name}: arrived damaged, or is not the one of the manifest; verify the corpus at its source"
            )
    os.replace(temporary, folder / name)
