"""An image file that is open already, wherever it lies: in an object store, in a zip, in a request."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

DICOM_SUFFIXES = (".dcm", ".dicom")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".pgm", ".tif", ".tiff", ".bmp")
MAX_PIXELS = 2**26  # of one plane: twice the largest film scan that we know of; more is a damaged header


@dataclass(frozen=True)
class ImageFile:
    """Takes the place of a path. For one reader at a time: the stream has one position."""

    stream: BinaryIO  # seekable
    name: str  # for messages; its suffix counts as a path's does
    identity: str = ""  # hashed where a file has no UID of its own; `name` if empty


def suffix(source: Any) -> str:
    """Of a path or an `ImageFile`, in lower case."""
    return Path(source.name if isinstance(source, ImageFile) else source).suffix.lower()
