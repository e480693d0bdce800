"""The files of an archive, wherever it is: listed, and read as streams, of which a reader holds one open at a time."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from modeling_mammodino.image_io import DICOM_SUFFIXES, IMAGE_SUFFIXES, ImageFile, InvalidImageError
from modeling_mammodino.tools.walk import OF_SYSTEM, Walk, is_of_system, unlisted, walk

FILE_SYSTEMS = 16  # held open in a process; a zip's table of contents is read once
PACKED: dict[type[Exception], str] = {
    NotImplementedError: "packed by a method that Python does not know, as Deflate64 of Windows; pack it again",
    RuntimeError: "behind a password; unpack it first",  # what zipfile raises
}


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

    def size(self) -> int:
        """In bytes, unpacked. Raises InvalidImageError where the archive does not say."""
        with self.refusing():
            return int(file_system(self.source).size(self.path))

    def open(self) -> Any:
        """Open it as a binary stream. Raises InvalidImageError where the archive does not give it."""
        with self.refusing():
            return file_system(self.source).open(self.path, "rb")

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Turn whatever an archive raises, a zip, a tar or a store, into InvalidImageError, without its message, which
        may quote the path."""
        try:
            yield
        except OSError as error:
            raise InvalidImageError(self.name, unreadable(error)) from error
        except (MemoryError, InvalidImageError):
            raise
        except Exception as error:
            reason = PACKED.get(type(error), f"damaged in its archive ({type(error).__name__}); fetch that again")
            raise InvalidImageError(self.name, reason) from error


def unreadable(error: OSError) -> str:
    """Return the reason without the path that the message of an OSError quotes."""
    return f"cannot be opened ({error.strerror or type(error).__name__}); check the file and its permissions"


@contextmanager
def opened(files: Sequence[ArchiveFile]) -> Iterator[list[ImageFile]]:
    """Yield the files as images to read; a series may have more of them than a process may hold open."""
    turn: list[_Stream] = []
    try:
        # buffered, for a header is read in some 150 pieces
        streams = [io.BufferedReader(_Stream(file, turn)) for file in files]
        yield [
            ImageFile(stream, file.name, identity=file.relative) for file, stream in zip(files, streams, strict=True)
        ]
    finally:
        for stream in turn:
            stream.rest()


class _Stream(io.RawIOBase):
    """Opens its file when it is read, and closes the one whose turn it was; goes on at the position it had."""

    def __init__(self, file: ArchiveFile, turn: list["_Stream"]):
        self.file, self.turn = file, turn
        self.name = file.name  # pydicom asks a buffered reader for it
        self.position = 0
        self.inner: Any = None

    def rest(self) -> None:
        if self.inner is not None:
            self.position = self.inner.tell()
            self.inner.close()
            self.inner = None

    def _awake(self) -> Any:
        if self.inner is None:
            for other in self.turn:
                other.rest()
            self.turn[:] = [self]
            self.inner = self.file.open()
            self.inner.seek(self.position)
        return self.inner

    def read(self, size: int | None = -1) -> bytes:
        with self.file.refusing():
            return self._awake().read(-1 if size is None else size)

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self.file.refusing():
            return self._awake().seek(offset, whence)

    def tell(self) -> int:
        return self.position if self.inner is None else self.inner.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def is_address(source: str) -> bool:
    """Whether a source is an address for fsspec; a path of this machine may have colons, too."""
    return ("://" in source or "::" in source) and not os.path.exists(source)


@lru_cache(maxsize=FILE_SYSTEMS)
def file_system(source: str) -> AbstractFileSystem:
    """Return the file system of an address; fsspec itself would read a zip's contents anew for every file."""
    return url_to_fs(source)[0] if is_address(source) else LocalFileSystem()


class Listing(NamedTuple):
    """Reasons are free of names."""

    files: list[ArchiveFile]  # sorted
    unlisted: dict[str, str]  # folders that cannot be listed: path -> reason
    passed_over: dict[str, str]  # what is no part of an archive: path -> reason


def list_archive(sources: Sequence[str]) -> Listing:
    """List every file of the addresses.

    Credentials come from fsspec's configuration and environment. Raises OSError where a source cannot be opened.
    """
    found: set[tuple[str, str, str]] = set()
    listing = Listing([], {}, {})
    for source in sources:
        try:
            filesystem = file_system(source)
            root = url_to_fs(source)[1] if is_address(source) else source
        except (OSError, ImportError):
            raise
        except Exception as error:  # what a container raises
            raise OSError(
                f"{source}: cannot be opened ({type(error).__name__}); check the address, or fetch it again"
            ) from error
        if filesystem.isfile(root):
            found.add((source, root, PurePosixPath(root).name))
            continue
        if not filesystem.isdir(root):
            raise FileNotFoundError(f"{source}: no such file or folder")
        walked = walk(root) if isinstance(filesystem, LocalFileSystem) else _walk_store(filesystem, root)
        start = len(root.rstrip("/")) + 1 if root else 0
        found.update((source, path, path[start:]) for path in map(_with_slashes, walked.files))
        listing.unlisted.update(walked.unlisted)
        listing.passed_over.update(walked.passed_over)
    return listing._replace(files=[ArchiveFile(number, *each) for number, each in enumerate(sorted(found))])


def _with_slashes(path: str) -> str:
    return path if os.sep == "/" else Path(path).as_posix()


def _walk_store(filesystem: AbstractFileSystem, root: str) -> Walk:
    """Walk an object store or a container, folder by folder: fsspec's own walk leaves out in silence what it cannot
    list."""
    found = Walk([], {}, {})
    if isinstance(filesystem, AbstractArchiveFileSystem):  # each listing of a folder there goes through all members
        entries = filesystem.find(root, detail=True).values()
        names = [entry["name"] for entry in entries if entry["type"] == "file"]
        for name in names:
            is_foreign = any(map(is_of_system, name[len(root) :].split("/")))
            found.passed_over.update({name: OF_SYSTEM}) if is_foreign else found.files.append(name)
        return found
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            entries = filesystem.ls(folder, detail=True)
        except OSError as error:
            if folder == root:
                raise
            found.unlisted[folder] = unlisted(error)
            continue
        for entry in entries:
            path = entry["name"].rstrip("/")
            if path == folder.rstrip("/"):
                continue
            if is_of_system(path.rpartition("/")[2]):
                found.passed_over[path] = OF_SYSTEM
            elif entry["type"] == "directory":
                folders.append(path)
            else:
                found.files.append(path)
    return found
