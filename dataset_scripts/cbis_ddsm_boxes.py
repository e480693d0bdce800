"""CBIS-DDSM on disk: the full mammograms, and boxes around the ROI masks.

The case files name paths of an older release (<folder>/<study>/<series>/000000.dcm); NBIA's downloads keep the first
folder only and call the rest as they like (1-1.dcm, 1-2.dcm). The folder of an abnormality holds its mask and a crop,
in either order, in one series or in two: the mask is the file of the full mammogram's size, and where both have it the
one whose SeriesDescription says so.
"""

import json
import logging
import os
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from tqdm import tqdm

from modeling_mammodino.dicom import iter_slices
from modeling_mammodino.dicom_header import number, text
from modeling_mammodino.errors import ImageRefused

from .benchmark_index import Box
from .cbis_ddsm_cases import read_cases
from .nbia_download import dicom_files, read_headers, relative, subject_folders

logger = logging.getLogger(__name__)

COLLECTION = "CBIS-DDSM"
CACHE = "cbis_ddsm_boxes.json"  # in data_dir; every mask is read once
AS_STORED = {"apply_modality_lut": False, "apply_voi": False, "invert_monochrome1": False}


def locate(index: pandas.DataFrame, data_dir: Path) -> pandas.DataFrame:
    """The index with `path` as it is on disk and, where the masks are there, `boxes`.

    An image that is not found keeps the path of the case files, which is not there. Boxes are one for each abnormality,
    None where a mask of an image is missing or does not fit: counted and logged. A mask is read once (CACHE).
    """
    data_dir = Path(data_dir)
    cases, folders = read_cases(data_dir), subject_folders(data_dir, COLLECTION)
    # a picture that is filed with masses and with calcifications is there twice: the copy will do
    named = {image: list(dict.fromkeys(of["image_path"])) for image, of in cases.groupby("image_id", sort=False)}
    paths = []
    for image, stated in zip(index["image_id"], index["path"], strict=True):
        files = (_full_mammogram(folders.get(each.split("/")[0])) for each in dict.fromkeys([stated, *named[image]]))
        found = next((file for file in files if file), None)
        paths.append(relative(found, data_dir) if found else stated)
    located = index.assign(path=pandas.array(paths, dtype="string"))
    return located.assign(boxes=pandas.Series(_boxes(located, data_dir, cases, folders), index.index, dtype=object))


def _full_mammogram(folder: Path | None) -> Path | None:
    files = dicom_files(folder) if folder else []
    if len(files) > 1:
        headers = read_headers(files)
        files = [file for file, header in headers.items() if "FULL" in text(header, "SeriesDescription")]
    return files[0] if len(files) == 1 else None


def _boxes(
    index: pandas.DataFrame, data_dir: Path, cases: pandas.DataFrame, folders: dict[str, Path]
) -> list[list[Box] | None]:
    abnormalities = {
        image: list(zip(of["mask_path"], of["type"], strict=True)) for image, of in cases.groupby("image_id")
    }
    reasons: Counter[str] = Counter()
    boxes: list[list[Box] | None] = []
    with closing(_MaskBoxes(data_dir)) as cache:
        for image, path in tqdm(zip(index["image_id"], index["path"], strict=True), "masks", len(index), disable=None):
            of_image: list[Box] | None = []
            for mask_path, kind in abnormalities[image]:
                folder = folders.get(mask_path.split("/")[0])
                corners, reason = cache.get(folder, data_dir / path) if folder else (None, "not on disk")
                if corners is None:
                    reasons[reason] += 1
                    of_image = None
                    break
                x0, y0, x1, y1 = corners
                of_image.append(Box(x0=x0, y0=y0, x1=x1, y1=y1, slice=-1, label=kind))
            boxes.append(of_image)
    if reasons and (any(boxes) or set(reasons) != {"not on disk"}):  # without any masks there is nothing to say
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        logger.warning(
            "cbis_ddsm: %d of %d images have no boxes, by mask: %s", sum(reasons.values()), len(index), listed
        )
    return boxes


class _MaskBoxes:
    """Corners of each mask by the abnormality's folder, kept on disk with the sizes of the files they came from."""

    def __init__(self, data_dir: Path):
        self.path, self.changed = data_dir / CACHE, False
        try:
            self.known = json.loads(self.path.read_text())
        except (OSError, ValueError):  # not yet, or damaged: read again
            self.known = {}
        self.known = self.known if isinstance(self.known, dict) else {}

    def get(self, folder: Path, image: Path) -> tuple[list[float] | None, str]:
        """(corners, ""), or None and what is wrong with the mask."""
        if not image.is_file():
            return None, "without its mammogram"
        files = dicom_files(folder)
        signature = [[path.name, path.stat().st_size] for path in (*files, image)]
        kept = self.known.get(folder.name, {})
        if not isinstance(kept, dict) or kept.get("files") != signature:
            corners, reason = _read_mask(files, image)
            self.known[folder.name] = kept = {"files": signature, "corners": corners, "reason": reason}
            self.changed = True
        return kept["corners"], kept["reason"]

    def close(self) -> None:
        if not self.changed:
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self.known))
            os.replace(temporary, self.path)
        except OSError as error:
            logger.warning("%s: not written (%s); masks will be read again next time", self.path, error.strerror)


def _read_mask(files: list[Path], image: Path) -> tuple[list[float] | None, str]:
    shape = {path: _shape(header) for path, header in read_headers([*files, image]).items()}
    fitting = [file for file in files if file in shape and shape[file] == shape.get(image)]
    if len(fitting) > 1:
        described = read_headers(fitting)
        fitting = [file for file in fitting if "MASK" in text(described[file], "SeriesDescription")]
    if len(fitting) != 1:
        return None, "of another size than the mammogram" if not fitting else "not told from its crop"
    try:
        pixels = next(iter_slices(fitting[0], **AS_STORED)).pixels  # (H, W)
    except ImageRefused:
        return None, "not readable"
    inside = pixels > 0
    if not inside.any():
        return None, "empty"
    if (pixels[inside] != pixels.max()).any():
        return None, "of more than two values"
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)], ""


def _shape(header: Any) -> tuple[float | None, float | None]:
    return number(header, "Rows"), number(header, "Columns")
