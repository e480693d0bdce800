"""EMBED, the Emory Breast Imaging Dataset, as far as it is open: a fifth of it, mammograms and C-views, on AWS.

data_dir holds the release's tables/ and images/cohort_*/<patient>/<examination>/.../<image>.dcm. Findings and their
pathology are of a breast of an examination: a row of the clinical table without a side, or of both, is of both. Only
what has a finding has a row, so that the other breast of a bilateral examination is negative, as in the publisher's own
notebooks. Magnified and spot views are left out, and what is neither a mammogram (2D) nor a C-view.

Boxes (ROI_coords) are the circles that radiologists drew, in pixels of the publisher's PNG files, which are turned left
to right where the DICOM's rows run to the back (DCM_to_PNG.ipynb): `read_boxes` turns them back by each header. Tables
with DCM_ROI_coords give them in pixels of the DICOM file.
"""

import logging
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from modeling_mammodino.dicom_header import number, text
from modeling_mammodino.tools.command import show_progress

from .index import DENSITIES, Benchmark, Box, MetadataTable, find_file, make_box, make_index, read_csv, read_headers

logger = logging.getLogger(__name__)

REMEDY = "give the folder with tables and images of the EMBED open data release, as Emory grants access to"
PLACES = ("tables/EMBED_OpenData_{}.csv", "EMBED_OpenData_{}.csv")
# of the images the short table will do, of findings only the whole one has the descriptors
IMAGES, FINDINGS = ("metadata_reduced", "metadata"), ("clinical", "clinical_reduced")
IMAGE_COLUMNS = (
    "empi_anon", "acc_anon", "anon_dicom_path", "FinalImageType", "ImageLateralityFinal", "ViewPosition", "spot_mag",
    "ROI_coords",
)  # fmt: skip
FINDING_COLUMNS = ("empi_anon", "acc_anon", "desc", "side", "asses", "tissueden", "path_severity", "bside")
DESCRIPTORS = ("massshape", "massmargin", "massdens", "calcfind", "calcdistri", "calcnumber")
KINDS = ("2D", "cview", "C-view")
# letter of the assessment: BI-RADS; from the least to the worst, 0 (more images are due) standing before 4
ASSESSMENTS = {"N": 1, "B": 2, "P": 3, "A": 0, "S": 4, "M": 5, "K": 6}
WORST = list(ASSESSMENTS.values())
DENSITY = {place: letter for place, letter in enumerate(DENSITIES, start=1)}  # 5 is a man's breast
CANCER, BENIGN = (0, 1), (2, 3, 4, 5)  # path_severity: invasive, not invasive; high risk to normal; 6: another cancer
# as the publisher's Sample_Notebook has them
SHAPES = {"mass": "GROXNYDL", "asymmetry": "TBSFV", "architectural distortion": "QA"}
MASS_MARGINS, MASS_DENSITIES = "DUMIS", "+-="


@dataclass
class Breast:
    """What is stated of a breast of an examination, over all its findings."""

    birads: list[int] = field(default_factory=list)
    types: set[str] = field(default_factory=set)
    severity: list[int] = field(default_factory=list)

    @cached_property
    def worst(self) -> int | None:
        return max(self.birads, key=WORST.index, default=None)

    @cached_property
    def pathology(self) -> str | None:
        worst = min(self.severity, default=None)
        return "cancer" if worst in CANCER else "benign" if worst in BENIGN else None

    @cached_property
    def cancer(self) -> int | None:
        """Pathology, and without one no cancer where the assessment is 1 to 3."""
        if self.pathology:
            return int(self.pathology == "cancer")
        return 0 if not self.severity and self.worst in (1, 2, 3) else None

    @cached_property
    def lesion(self) -> int | None:
        return 1 if self.types else 0 if self.worst == 1 else None


def read_index(data_dir: Path) -> pd.DataFrame:
    """Return the index of the mammograms and C-views, and a column `pathology` (cancer or benign).

    Raises FileNotFoundError, ValueError naming file, row and column. What is left out is logged.
    """
    images, findings = _read(Path(data_dir))
    breasts, density = _breasts(findings)
    patient, study = (images.text(name, required=True) for name in ("empi_anon", "acc_anon"))
    path = images.text("anon_dicom_path", required=True).str.replace(r"^.*?(?=cohort_)", "", regex=True)
    side = images.text("ImageLateralityFinal").where(images.rows["ImageLateralityFinal"].isin(["L", "R"]))
    special, other = (images.whole("spot_mag") == 1).fillna(False), ~images.rows["FinalImageType"].isin(KINDS)
    logger.info("embed_open_data: left out: %d magnified or spot views, %d of other kinds", special.sum(), other.sum())
    unknown = Breast()
    found = [breasts.get(key, unknown) for key in zip(study.tolist(), side.fillna("").tolist(), strict=True)]
    stored = "DCM_ROI_coords" in images.rows
    types: list[list[str] | None] = [None if of.lesion is None else sorted(of.types) for of in found]
    columns = {
        "patient_id": patient,
        "study_id": study,
        "breast_id": study + "_" + side,
        "image_id": path.str.rsplit("/", n=1).str[-1].str.removesuffix(".dcm"),
        "laterality": side,
        "view": images.text("ViewPosition"),
        "path": ("images/" if (Path(data_dir) / "images").is_dir() else "") + path,
        "cancer": [of.cancer for of in found],
        "lesion": [of.lesion for of in found],
        "lesion_types": types,
        "birads": [of.worst for of in found],
        "density": study.map(density),
        "boxes": [_boxes(images, "DCM_ROI_coords", row, types[row]) if stored else None for row in range(len(found))],
    }
    kept = ~(special | other).to_numpy()
    index = make_index(pd.DataFrame(columns)[kept], "embed_open_data")
    pathology = np.array([of.pathology for of in found], dtype=object)
    return index.assign(pathology=pd.array(pathology[kept], dtype="string"))


def _read(data_dir: Path) -> tuple[MetadataTable, MetadataTable]:
    tables = []
    for names, columns, optional in (
        (IMAGES, IMAGE_COLUMNS, ("DCM_ROI_coords",)), (FINDINGS, FINDING_COLUMNS, DESCRIPTORS)
    ):  # fmt: skip
        path = find_file(data_dir, [place.format(name) for name in names for place in PLACES], REMEDY)
        tables.append(read_csv(path, columns, REMEDY, optional))
    return tables[0], tables[1]


def _breasts(findings: MetadataTable) -> tuple[dict[tuple[str, str], Breast], dict[str, str]]:
    """Return what is stated by (examination, side), and density by examination."""
    severity, density = findings.whole("path_severity"), findings.whole("tissueden").map(DENSITY)
    letters = findings.choice("asses", {**ASSESSMENTS, "X": None, "": None})
    sides = {"L": "L", "R": "R", "B": "LR", "": "LR"}
    of_finding, of_biopsy = findings.choice("side", sides), findings.choice("bside", {**sides, "": None})
    if (wrong := ~severity.isin([*CANCER, *BENIGN, 6]) & severity.notna()).any():
        raise findings.fault(int(wrong.argmax()), "path_severity", "not 0 to 6")
    types = _types(findings)
    breasts: dict[tuple[str, str], Breast] = defaultdict(Breast)
    studies = findings.text("acc_anon", required=True)
    columns = (studies, of_finding, of_biopsy, letters, severity.astype(object), types)
    for study, sides_of, biopsied, birads, worst, kinds in zip(*map(list, columns), strict=True):
        for side in sides_of:
            breasts[study, side].types |= kinds
            breasts[study, side].birads += [] if birads is None else [birads]
        for side in biopsied or sides_of:
            breasts[study, side].severity += [] if pd.isna(worst) else [worst]
    bilateral = studies[findings.rows["desc"].str.contains("bilat", case=False)].unique()
    silent = [(study, side) for study in bilateral for side in "LR" if (study, side) not in breasts]
    breasts |= {key: Breast(birads=[1]) for key in silent}
    logger.info("embed_open_data: %d breasts of bilateral examinations without a row are negative", len(silent))
    return dict(breasts), dict(zip(studies[density.notna()], density.dropna(), strict=True))


def _types(findings: MetadataTable) -> list[set[str]]:
    """Return the lesion types of each finding, by the rules of the publisher's notebook."""
    cells = {name: findings.rows.get(name, pd.Series("", findings.rows.index)) for name in DESCRIPTORS}
    shape = cells["massshape"]
    is_type = {name: shape.isin(list(letters)) for name, letters in SHAPES.items()}
    is_type["mass"] |= cells["massmargin"].isin(list(MASS_MARGINS)) | cells["massdens"].isin(list(MASS_DENSITIES))
    counted = pd.to_numeric(cells["calcnumber"], errors="coerce").fillna(0) != 0
    is_type["calcification"] = (cells["calcfind"] != "") | (cells["calcdistri"] != "") | counted
    table = np.stack([each.to_numpy() for each in is_type.values()], axis=1)
    return [{name for name, has in zip(is_type, row, strict=True) if has} for row in table.tolist()]


def _boxes(images: MetadataTable, column: str, row: int, types: list[str] | None) -> list[Box] | None:
    """Return the boxes of an image, (y0, x0, y1, x1) one after the other, inclusive; None without any: a breast without
    a circle may have a lesion. A box has the breast's lesion type where that has one."""
    numbers = list(map(int, re.findall(r"\d+", images.rows[column][row])))
    if len(numbers) % 4:
        raise images.fault(row, column, "not boxes of four numbers")
    label = types[0] if types and len(types) == 1 else "lesion"
    boxes = [make_box((x0, y0, x1 + 1, y1 + 1), label) for y0, x0, y1, x1 in zip(*[iter(numbers)] * 4, strict=True)]
    if not all(box["x0"] < box["x1"] and box["y0"] < box["y1"] for box in boxes):
        raise images.fault(row, column, "but ymin and xmin must not be above ymax and xmax")
    return boxes or None


def read_boxes(index: pd.DataFrame, data_dir: Path) -> pd.DataFrame:
    """Return the index with `boxes` in pixels of the DICOM files; None where a file with boxes is not there."""
    if index["boxes"].notna().any():  # DCM_ROI_coords
        return index
    images, _ = _read(Path(data_dir))
    rows = {
        name.rsplit("/", 1)[-1].removesuffix(".dcm"): row for row, name in enumerate(images.rows["anon_dicom_path"])
    }
    boxes: list[list[Box] | None] = []
    absent = 0
    for image in show_progress(index.itertuples(), "boxes", len(index), disable=None):
        of_image = _boxes(images, "ROI_coords", rows[image.image_id], image.lesion_types)
        path = Path(data_dir) / image.path
        header = read_headers([path]).get(path) if of_image and path.is_file() else None
        absent += bool(of_image) and header is None
        if of_image and header is not None and _is_turned(header, image):
            width = number(header, "Columns") or 0
            of_image = [Box(**{**box, "x0": width - box["x1"], "x1": width - box["x0"]}) for box in of_image]
        boxes.append(of_image if header is not None else None)
    if absent:
        logger.warning("embed_open_data: %d images with boxes are not there or not readable", absent)
    return index.assign(boxes=pd.Series(boxes, index.index, dtype=object))


def _is_turned(header: Any, image: Any) -> bool:
    """Return whether the publisher's PNG file mirrors the DICOM: of CC, MLO and ML those whose rows run to the back; or
    where the header does not say, those of right breasts."""
    if (text(header, "ViewPosition") or image.view) not in ("CC", "MLO", "ML"):
        return False
    orientation = text(header, "PatientOrientation")
    return orientation.startswith("P") if orientation else image.laterality == "R"


def read_tables(data_dir: Path) -> dict[str, pd.DataFrame]:
    """Return `images` and `findings`, the latter with a column a lesion type, and whether the examination is a
    screening."""
    images, findings = _read(Path(data_dir))
    tables = {"images": images.rows, "findings": findings.rows}
    tables["findings"] = findings.rows.assign(screening=findings.rows["desc"].str.contains("screen", case=False))
    if set(DESCRIPTORS) & set(findings.rows):
        types = _types(findings)
        of_type = {name: [name in each for each in types] for name in (*SHAPES, "calcification")}
        tables["types"] = tables["findings"].assign(**of_type)
    return tables


BENCHMARK = Benchmark.from_yaml(__file__, read_index=read_index, read_tables=read_tables, read_boxes=read_boxes)
