"""A corpus that lies elsewhere (an object store, the Hub), copied to this machine once, for memory-mapped reading."""
# MERGED: The files of an archive, wherever it lies: a folder, an object store, a zip; any address that fsspec knows.
#
# Paths may carry names of patients. They stay in the private folder of a build; elsewhere a file is known by its number.
#

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from filelock import FileLock
from fsspec.core import url_to_fs
from huggingface_hub.constants import HF_HOME

from modeling_mammodino.image_io import DICOM_SUFFIXES, IMAGE_SUFFIXES, ImageFile

from .reader import MANIFEST


class ArchiveFile(NamedTuple):
    """A file of an archive; as a list, a line of the private listing."""

    number: int  # its place in the listing
    source: str  # address of the archive
    path: str  # in the file system of that address
    relative: str  # to the archive's root, with slashes

    @property
    def name(self) -> str:
        """What may be logged."""
        suffix = PurePosixPath(self.path).suffix.lower()
        return f"file {self.number}{suffix if suffix in (*DICOM_SUFFIXES, *IMAGE_SUFFIXES) else ''}"

    @contextmanager
    def open(self) -> Iterator[ImageFile]:
        filesystem, _ = url_to_fs(self.source)
        with filesystem.open(self.path, "rb") as stream:
            yield ImageFile(stream, self.name, identity=self.relative)


def list_archive(sources: Sequence[str]) -> list[ArchiveFile]:
    """Every file of the addresses, sorted; linked folders are not entered.

    Credentials come from fsspec's configuration and environment. Raises OSError where something cannot be listed.
    """
    found: list[tuple[str, str, str]] = []
    for source in sources:
        filesystem, root = url_to_fs(source)
        if filesystem.isfile(root):
            found.append((source, root, PurePosixPath(root).name))
            continue
        if not filesystem.isdir(root):
            raise FileNotFoundError(f"{source}: no such file or folder")
        start = len(root.rstrip("/")) + 1 if root else 0
        for _, _, files in filesystem.walk(root, detail=True, on_error="raise"):
            # a link to a folder is listed as a file
            paths = [path for name, about in files.items() if (path := about["name"]) and not _is_linked_folder(about)]
            found += [(source, path, path[start:]) for path in paths]
    return [ArchiveFile(number, *each) for number, each in enumerate(sorted(set(found)))]


def absolute(source: str | Path) -> str:
    """An address that means the same in every process."""
    text = str(source)
    return text if "://" in text or "::" in text else str(Path(text).absolute())


def _is_linked_folder(about: dict) -> bool:
    return bool(about.get("islink")) and Path(about["name"]).is_dir()


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
