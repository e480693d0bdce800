"""The files of an archive, wherever it lies: a folder, an object store, a zip; any address that fsspec knows.

Paths may carry names of patients. They stay in the private folder of a build; elsewhere a file is known by its number.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fsspec.core import url_to_fs

from modeling_mammodino.image_file import DICOM_SUFFIXES, PICTURE_SUFFIXES, ImageFile


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
        return f"file {self.number}{suffix if suffix in (*DICOM_SUFFIXES, *PICTURE_SUFFIXES) else ''}"

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
