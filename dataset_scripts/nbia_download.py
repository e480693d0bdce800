"""Where NBIA's data retriever puts a TCIA collection, and what one folder of it holds."""

import os
from pathlib import Path
from typing import Any

from modeling_mammodino.dicom_file import open_header
from modeling_mammodino.errors import ImageRefused


def collection_roots(data_dir: Path, collection: str) -> list[Path]:
    """data_dir itself, its folder of the collection, and that of the retriever's manifest-* folders."""
    data_dir = Path(data_dir)
    roots = [data_dir, data_dir / collection, *sorted(data_dir.glob(f"manifest-*/{collection}"))]
    return [root for root in roots if root.is_dir()]


def subject_folders(data_dir: Path, collection: str) -> dict[str, Path]:
    """The folders directly below the roots, by name; of two with a name the first."""
    folders: dict[str, Path] = {}
    for root in collection_roots(data_dir, collection):
        for entry in sorted(os.scandir(root), key=lambda each: each.name):
            if entry.is_dir():
                folders.setdefault(entry.name, Path(entry.path))
    return folders


def dicom_files(folder: Path) -> list[Path]:
    """Below a subject's folder, whatever study and series are called, in order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".dcm" and path.is_file())


def read_headers(paths: list[Path]) -> dict[Path, Any]:
    """A pydicom Dataset without pixels for each file; without those that are no readable DICOM."""
    headers = {}
    for path in paths:
        try:
            headers[path] = open_header(path).header
        except ImageRefused:  # whoever reads its pixels says why
            continue
    return headers


def relative(path: Path, data_dir: Path) -> str:
    """As the index has it: relative to data_dir, forward slashes."""
    return path.relative_to(data_dir).as_posix()
