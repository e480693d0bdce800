"""CBIS-DDSM (TCIA, doi 10.7937/K9/TCIA.2016.7O02S9CY): scanned films with masses and calcifications.

data_dir holds the four case files and, for images, NBIA's download (CBIS-DDSM/<folder>/...). An image is a patient's
side and view; its labels are those of all its abnormalities, whichever files they are in. Masses and calcifications
were split one without the other, so that some patients are in both splits: they stay in test and leave train.

The case files name paths of an older release (<folder>/<study>/<series>/000000.dcm); NBIA's downloads keep the first
folder only and call the rest as they like (1-1.dcm, 1-2.dcm). The folder of an abnormality holds its mask and a crop,
in either order, in one series or in two: the mask is the file of the full mammogram's size, and where both have it the
one whose SeriesDescription says so.
"""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from modeling_mammodino.dicom import iter_slices
from modeling_mammodino.dicom_header import number, text
from modeling_mammodino.dicom_pixels import AS_STORED
from modeling_mammodino.image_io import InvalidImageError
from modeling_mammodino.tools.command import show_progress
from modeling_mammodino.tools.files import write_text

from .index import (
    BY_HEADER,
    Benchmark,
    Box,
    find_file,
    in_parts,
    make_box,
    make_index,
    read_csv,
    read_headers,
    relative,
    say_where,
    subject_files,
)

logger = logging.getLogger(__name__)

FILES = {
    ("mass", "train"): "mass_case_description_train_set.csv",
    ("mass", "test"): "mass_case_description_test_set.csv",
    ("calc", "train"): "calc_case_description_train_set.csv",
    ("calc", "test"): "calc_case_description_test_set.csv",
}
REMEDY = "give the folder with the four *_case_description_*_set.csv of CBIS-DDSM as downloaded from TCIA"
COLUMNS = {
    "patient_id": ("patient_id",),
    "density": ("breast_density", "breast density"),
    "side": ("left or right breast",),
    "view": ("image view",),
    "abnormality": ("abnormality id",),
    "type": ("abnormality type",),
    "assessment": ("assessment",),
    "pathology": ("pathology",),
    "image_path": ("image file path",),
    "crop_path": ("cropped image file path",),
    "mask_path": ("ROI mask file path",),
}
PATHOLOGIES = ("MALIGNANT", "BENIGN", "BENIGN_WITHOUT_CALLBACK")
DENSITY = {"0": None, "1": "A", "2": "B", "3": "C", "4": "D"}  # two rows have 0
COLLECTION = "CBIS-DDSM"
CACHE = "cbis_ddsm_boxes.json"  # in data_dir; every mask is read once


def read_cases(data_dir: Path) -> pd.DataFrame:
    """Return a row an abnormality, in the order of FILES: COLUMNS as stated, and

    kind (mass or calc), split (train or test), letter (density A to D or None), level (assessment, int), and
    image_id, patient_side_view, the same for an image that is filed with masses and with calcifications.

    Newlines and blanks around paths are taken off. Raises FileNotFoundError, ValueError naming file, row and column.
    """
    parts = []
    for (kind, split), name in FILES.items():
        table = read_csv(find_file(data_dir, [name], REMEDY), COLUMNS, REMEDY)
        for column in ("patient_id", "view", "abnormality", "image_path", "mask_path"):
            table.text(column, required=True)
        table.choice("pathology", dict.fromkeys(PATHOLOGIES))
        table.choice("type", dict.fromkeys(("mass", "calcification")))
        side = table.choice("side", {"LEFT": "L", "RIGHT": "R"})
        rows = table.rows.assign(kind=kind, split=split, laterality=side, letter=table.choice("density", DENSITY))
        rows["level"] = table.choice("assessment", {str(level): level for level in range(6)}).astype(int)
        parts.append(rows)
    cases = pd.concat(parts, ignore_index=True)
    cases["image_id"] = cases["patient_id"] + "_" + cases["side"] + "_" + cases["view"]
    return cases


def locate(index: pd.DataFrame, data_dir: Path) -> pd.DataFrame:
    """Return the index with `path` as it is on disk; an image that is not found keeps the path of the case files."""
    data_dir = Path(data_dir)
    cases = read_cases(data_dir)
    # an image that is filed with masses and with calcifications is there twice: the copy will do
    named = {image: list(dict.fromkeys(of["image_path"])) for image, of in cases.groupby("image_id", sort=False)}
    files_of = subject_files(
        data_dir, COLLECTION, [_subject(path) for image in index["image_id"] for path in named[image]]
    )
    paths, absent = [], []
    for image, stated in zip(index["image_id"], index["path"], strict=True):
        files = (_full_mammogram(files_of.get(_subject(each), [])) for each in dict.fromkeys([stated, *named[image]]))
        found = next((file for file in files if file), None)
        paths.append(relative(found, data_dir) if found else stated)
        absent += [] if found else [image]
    say_where("cbis_ddsm", data_dir, COLLECTION, absent, len(index), BY_HEADER)
    return index.assign(path=pd.array(paths, dtype="string"))


def _subject(path: str) -> str:
    """Return the subject of a path of the case files: an image, or one of its abnormalities."""
    return path.split("/")[0]


def _full_mammogram(files: list[Path]) -> Path | None:
    if len(files) > 1:
        headers = read_headers(files)
        files = [file for file, header in headers.items() if "FULL" in text(header, "SeriesDescription")]
    return files[0] if len(files) == 1 else None


def read_boxes(index: pd.DataFrame, data_dir: Path) -> pd.DataFrame:
    """Return the index of `locate` with `boxes`, one for each abnormality, where the masks are there.

    None where a mask of an image is missing or does not fit: counted and logged. A mask is read once (CACHE).
    """
    data_dir = Path(data_dir)
    cases = read_cases(data_dir)
    cases = cases[cases["image_id"].isin(index["image_id"])]
    abnormalities = {
        image: list(zip(of["mask_path"].map(_subject), of["type"], strict=True))
        for image, of in cases.groupby("image_id")
    }
    files_of = subject_files(data_dir, COLLECTION, cases["mask_path"].map(_subject))
    reasons: Counter[str] = Counter()
    boxes: list[list[Box] | None] = []
    known = _read_cache(data_dir / CACHE)
    before = dict(known)
    try:
        for image, path in show_progress(
            zip(index["image_id"], index["path"], strict=True), "masks", len(index), disable=None
        ):
            of_image: list[Box] = []
            for subject, kind in abnormalities[image]:
                corners, reason = _corners(subject, files_of.get(subject), data_dir / path, known)
                if corners is None:
                    reasons[reason] += 1
                    break
                of_image.append(make_box(corners, kind))
            boxes.append(of_image if len(of_image) == len(abnormalities[image]) else None)
    finally:
        if known != before:
            _write_cache(data_dir / CACHE, known)
    if reasons and (any(boxes) or set(reasons) != {"not on disk"}):  # without any masks there is nothing to say
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        logger.warning(
            "cbis_ddsm: %d of %d images have no boxes, by mask: %s", sum(reasons.values()), len(index), listed
        )
    return index.assign(boxes=pd.Series(boxes, index.index, dtype=object))


def _corners(
    subject: str, files: list[Path] | None, image: Path, known: dict[str, Any]
) -> tuple[list[float] | None, str]:
    """Return (x0, y0, x1, y1) and "", or None and what is wrong with the mask.

    known: what was read before, by abnormality, with names, sizes and times of the files it came from.
    """
    if files is None:
        return None, "not on disk"
    if not image.is_file():
        return None, "without its mammogram"
    found = [(path.name, path.stat()) for path in (*files, image)]
    signature = [[name, at.st_size, at.st_mtime_ns] for name, at in found]
    kept = known.get(subject)
    if not isinstance(kept, dict) or kept.get("files") != signature:
        corners, reason = _read_mask(files, image)
        known[subject] = kept = {"files": signature, "corners": corners, "reason": reason}
    return kept["corners"], kept["reason"]


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):  # not yet, or damaged: read again
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(path: Path, known: dict[str, Any]) -> None:
    try:
        write_text(path, json.dumps(known))
    except OSError as error:
        logger.warning("%s: not written (%s); masks will be read again next time", path, error.strerror)


def _read_mask(files: list[Path], image: Path) -> tuple[list[float] | None, str]:
    headers = read_headers([*files, image])
    shape = {path: (number(header, "Rows"), number(header, "Columns")) for path, header in headers.items()}
    fitting = [file for file in files if file in shape and shape[file] == shape.get(image)]
    if len(fitting) > 1:
        fitting = [file for file in fitting if "MASK" in text(headers[file], "SeriesDescription")]
    if len(fitting) != 1:
        return None, "of another size than the mammogram" if not fitting else "not told from its crop"
    try:
        pixels = next(iter_slices(fitting[0], AS_STORED)).pixels  # (H, W)
    except InvalidImageError:
        return None, "not readable"
    inside = pixels > 0
    if not inside.any():
        return None, "empty"
    if (pixels[inside] != pixels.max()).any():
        return None, "of more than two values"
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)], ""


def read_index(data_dir: Path) -> pd.DataFrame:
    """Return the index of 2,997 images; how many the leak cost is logged. Raises as `read_cases`."""
    cases = read_cases(data_dir)
    in_test = set(cases["patient_id"][cases["split"] == "test"])
    test_images = set(cases["image_id"][cases["split"] == "test"])
    leaked = cases[(cases["split"] == "train") & cases["patient_id"].isin(in_test)]
    if len(leaked):
        images = set(leaked["image_id"])
        logger.info(
            "cbis_ddsm: %d patients are in train and in test; removed from train: %d images, of which %d stay in test",
            leaked["patient_id"].nunique(), len(images), len(images & test_images),
        )  # fmt: skip
    rows = []
    for image, of in cases.groupby("image_id", sort=False):
        patient, split = of["patient_id"].iloc[0], "test" if image in test_images else "train"
        if split == "train" and patient in in_test:
            continue
        of = of.sort_values("split", kind="stable")  # test first: its copy of an image that is there twice
        side = of["laterality"].iloc[0]
        rows.append(
            {
                "patient_id": patient,
                "study_id": patient,
                "breast_id": f"{patient}_{side}",
                "image_id": image,
                "laterality": side,
                "view": of["view"].iloc[0],
                "split": split,
                "path": of["image_path"].iloc[0],
                "cancer": int((of["pathology"] == "MALIGNANT").any()),
                "lesion": 1,
                "lesion_types": sorted(set(of["type"])),
                "birads": int(of["level"].max()),
                "density": of["letter"].iloc[0],
            }
        )
    return make_index(rows, "cbis_ddsm")


def read_tables(data_dir: Path) -> dict[str, pd.DataFrame]:
    """Return `cases`, of each case file and of all, and the `files` that they name."""
    cases = read_cases(data_dir)
    by_patient, by_image = cases.groupby("patient_id"), cases.groupby("image_id")
    is_malignant = (cases["pathology"] == "MALIGNANT").groupby(cases["image_id"]).transform("any")
    paths = cases[["mask_path", "crop_path", "image_path"]].stack().drop_duplicates()
    files = pd.DataFrame({"series": paths.str.rsplit("/", n=1).str[0], "folder": paths.str.split("/").str[0]})
    cases = cases.assign(
        part=cases["kind"] + " " + cases["split"],
        crop_series=cases["crop_path"].str.rsplit("/", n=1).str[0],
        mask_series=cases["mask_path"].str.rsplit("/", n=1).str[0],
        splits_of_patient=by_patient["split"].transform("nunique"),
        splits_of_image=by_image["split"].transform("nunique"),
        kinds_of_patient=by_patient["kind"].transform("nunique"),
        image=is_malignant.map({True: "malignant", False: "benign"}),
        first_split=by_image["split"].transform("first"),
    )
    return {"cases": in_parts(cases), "files": files}


BENCHMARK = Benchmark.from_yaml(
    __file__, read_index=read_index, read_tables=read_tables, locate=locate, read_boxes=read_boxes
)
