"""CBIS-DDSM (TCIA, doi 10.7937/K9/TCIA.2016.7O02S9CY): scanned films with masses and calcifications.

data_dir holds the four case files and, for images, NBIA's download (CBIS-DDSM/<folder>/...). An image is a patient's
side and view; its labels are those of all its abnormalities, whichever files they are in. Masses and calcifications
were split one without the other, so that some patients are in both splits: they stay in test and leave train.
"""
# MERGED: CBIS-DDSM's four case files, of masses and calcifications and of two splits, as one table of abnormalities.
# MERGED: CBIS-DDSM on disk: the full mammograms, and boxes around the ROI masks.
#
# The case files name paths of an older release (<folder>/<study>/<series>/000000.dcm); NBIA's downloads keep the first
# folder only and call the rest as they like (1-1.dcm, 1-2.dcm). The folder of an abnormality holds its mask and a crop,
# in either order, in one series or in two: the mask is the file of the full mammogram's size, and where both have it the
# one whose SeriesDescription says so.
#

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
from modeling_mammodino.image_io import InvalidImageError

from .index import Benchmark, Box, by_value, dense, four_densities, make_index, single_type
from .tables import dicom_files, find_file, read_csv, read_headers, relative, subject_folders

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


def read_cases(data_dir: Path) -> pandas.DataFrame:
    """A row an abnormality, in the order of FILES: COLUMNS as stated, and

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
    cases = pandas.concat(parts, ignore_index=True)
    cases["image_id"] = cases["patient_id"] + "_" + cases["side"] + "_" + cases["view"]
    return cases


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
    # an image that is filed with masses and with calcifications is there twice: the copy will do
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
    except InvalidImageError:
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


logger = logging.getLogger(__name__)


def read_index(data_dir: Path) -> pandas.DataFrame:
    """SCHEMA rows of 2,997 images, and how many the leak cost is logged. Raises as `read_cases`."""
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


def count(data_dir: Path) -> dict[str, int]:
    """Abnormalities, patients, images and labels by case file; then what the four have in common."""
    cases = read_cases(data_dir)
    counts: dict[str, int] = {}
    for kind, split in FILES:
        of = cases[(cases["kind"] == kind) & (cases["split"] == split)]
        counts |= _count(f"{kind} {split}", of)
        counts |= {f"{kind} {split}: assessment {level}": (of["level"] == level).sum() for level in range(6)}
        counts |= {f"{kind} {split}: density {level}": (of["density"] == str(level)).sum() for level in range(5)}
    counts |= _count("all", cases)
    masks, crops, images = (set(cases[name]) for name in ("mask_path", "crop_path", "image_path"))
    files = masks | crops | images
    splits_of = {name: cases.groupby(name)["split"].nunique() for name in ("patient_id", "image_id")}
    in_test = cases["patient_id"].isin(cases["patient_id"][cases["split"] == "test"])
    first = cases.drop_duplicates("image_id").set_index("image_id")["split"]
    malignant = (cases["pathology"] == "MALIGNANT").groupby(cases["image_id"]).any().reindex(first.index)
    counts |= {
        "files": len(files),
        "series": len({name.rsplit("/", 1)[0] for name in files}),
        "folders": len({name.split("/")[0] for name in files}),
        "abnormalities of crop and mask in two series": (
            cases["crop_path"].str.rsplit("/", n=1).str[0] != cases["mask_path"].str.rsplit("/", n=1).str[0]
        ).sum(),
        "images": cases["image_id"].nunique(),
        **{f"images in {split}": cases["image_id"][cases["split"] == split].nunique() for split in ("train", "test")},
        "patients in train and test": (splits_of["patient_id"] == 2).sum(),
        "images in train and test": (splits_of["image_id"] == 2).sum(),
        "train images of patients in test": cases["image_id"][in_test & (cases["split"] == "train")].nunique(),
        "patients of masses and calcifications": (cases.groupby("patient_id")["kind"].nunique() == 2).sum(),
        "images of a malignant abnormality": malignant.sum(),
        "images first in train, malignant": (malignant & (first == "train")).sum(),
        "images first in train, benign": (~malignant & (first == "train")).sum(),
        "images first in test, malignant": (malignant & (first == "test")).sum(),
        "images first in test, benign": (~malignant & (first == "test")).sum(),
    }
    return {name: int(value) for name, value in counts.items()}


def _count(name: str, of: pandas.DataFrame) -> dict[str, int]:
    return {
        f"{name}: abnormalities": len(of),
        f"{name}: patients": of["patient_id"].nunique(),
        f"{name}: full images": of["image_path"].nunique(),
        **{f"{name}: {each}": (of["pathology"] == each).sum() for each in PATHOLOGIES},
    }


_NAMES = (
    "abnormalities", "patients", "full images", *PATHOLOGIES,
    *(f"assessment {level}" for level in range(6)), *(f"density {level}" for level in range(5)),
)  # fmt: skip
_BY_FILE = {
    "mass train": (1318, 691, 1231, 637, 577, 104, 129, 1, 77, 279, 533, 299, 0, 287, 585, 337, 109),
    "mass test": (378, 201, 361, 147, 194, 37, 33, 2, 14, 85, 169, 75, 0, 50, 172, 112, 44),
    "calc train": (1546, 602, 1227, 544, 528, 474, 63, 0, 482, 89, 753, 159, 0, 175, 501, 539, 331),
    "calc test": (326, 151, 284, 129, 130, 67, 13, 0, 71, 24, 178, 40, 2, 24, 115, 115, 70),
    "all": (3568, 1566, 3103, 1457, 1429, 682),  # no further names
}
PUBLISHED = {
    **{f"{file}: {name}": n for file, of in _BY_FILE.items() for name, n in zip(_NAMES, of, strict=False)},
    "files": 10239, "series": 6775, "folders": 6671, "abnormalities of crop and mask in two series": 104,
    "images": 3032, "images in train": 2420, "images in test": 641,
    "patients in train and test": 31, "images in train and test": 29, "train images of patients in test": 64,
    "patients of masses and calcifications": 79, "images of a malignant abnormality": 1347,
    "images first in train, malignant": 1088, "images first in train, benign": 1318,
    "images first in test, malignant": 259, "images first in test, benign": 367,
}  # fmt: skip

BENCHMARK = Benchmark(
    name="cbis_ddsm",
    title="CBIS-DDSM: Curated Breast Imaging Subset of DDSM",
    homepage="https://doi.org/10.7937/K9/TCIA.2016.7O02S9CY",
    license="CC BY 3.0",
    citation="Lee et al., A curated mammography data set, Scientific Data 4, 170177, 2017, doi 10.1038/sdata.2017.177",
    read_index=read_index,
    definitions=(
        by_value(
            "cancer",
            "malignant",
            "positive: an abnormality of the image is MALIGNANT; negative: all are BENIGN or BENIGN_WITHOUT_CALLBACK",
            "cancer",
            {0: "benign", 1: "malignant"},
        ),
        by_value(
            "birads",
            "highest",
            "the highest assessment of the image's abnormalities, 2 to 5; left out: 0 (not complete) and 1 (3 images)",
            "birads",
            {level: str(level) for level in range(2, 6)},
        ),
        four_densities("density 1 to 4 as A to D; 0, stated for two images, is missing"),
        dense("of density 1 to 4 as A to D; 0, stated for two images, is missing"),
        single_type(
            "mass_or_calcification",
            "abnormality type; left out: images with a mass and a calcification",
            {"mass": "mass", "calcification": "calcification"},
        ),
    ),
    count=count,
    published=PUBLISHED,
    locate=locate,
    notes=(
        "Scanned films. The original DDSM and mini-DDSM are other data sets.",
        "Lesion presence: absent, as every image has an abnormality and there are no normal cases.",
        "Leak in the published splits: masses and calcifications were split one without the other; 31 patients and 29 "
        "images are in both. Test stays whole (641 images); the 64 train images of these patients leave train, of "
        "which 29 are in test and 35 are left out. So 2,356 + 641 images of 3,032.",
        "Labels are of the image, from all its abnormalities. A list of the images of masses, then of "
        "calcifications, has 3,103, as 71 are filed twice; one copy elsewhere states 3,120.",
        "Boxes come from ROI masks on disk, read once and kept in data_dir/cbis_ddsm_boxes.json; images whose mask is "
        "missing or of another size have none and are counted.",
    ),
)
