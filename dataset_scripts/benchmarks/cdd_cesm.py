"""CDD-CESM (TCIA, doi 10.7937/29kw-ae92): contrast-enhanced spectral mammography, of which the low-energy images.

data_dir holds Radiology-manual-annotations.xlsx and "Low energy images of CDD-CESM/", JPEGs by the names in the file.
A low-energy image (DM) is close to a plain mammogram; the subtracted one (CM, in the file CESM) shows where contrast
agent went, and has labels of its own. `read_index(data_dir, "CESM")` gives those.
"""

import logging
import re
from itertools import product
from pathlib import Path

import pandas as pd

from .index import (
    DENSITIES,
    Benchmark,
    MetadataTable,
    collection_roots,
    find_file,
    make_index,
    read_sheets,
    relative,
    say_where,
)

logger = logging.getLogger(__name__)

ANNOTATIONS = ("Radiology-manual-annotations.xlsx", "Radiology manual annotations.xlsx")  # the newer name first
REMEDY = f"give the folder with {ANNOTATIONS[0]} and the image folders of CDD-CESM as downloaded from TCIA"
FOLDERS = {"DM": "Low energy images of CDD-CESM", "CESM": "Subtracted images of CDD-CESM"}
COLLECTION = "CDD-CESM"
NAME = re.compile(r"P(\d+)_([LR])_(DM|CM)_(CC|MLO)")
COLUMNS = {
    "name": ("Image_name",),
    "patient": ("Patient_ID",),
    "side": ("Side",),
    "type": ("Type",),
    "density": ("Breast density (ACR)", "ACR", "Breast density"),
    "birads": ("BIRADS",),
    "view": ("View",),
    "machine": ("Machine",),
    "pathology": ("Pathology Classification/ Follow up", "Pathology Classification", "Pathology"),
}
LESION_SHEETS = {  # a sheet names the images with a finding of its kind
    "mass_description": "mass",
    "distortion": "architectural distortion",
    "asymmetry": "asymmetry",
    "calcifications": "calcification",
    "mass enhancement_description": "mass enhancement",
    "nonmass enhancement_description": "non-mass enhancement",
}
OTHER_SHEETS = ("postoperative", "postneoajuvant chemotherapy")  # (sic); of treatment, no lesions
PATHOLOGIES = ("Normal", "Benign", "Malignant")
NO_DENSITY = ("_", "")


def read_index(data_dir: Path, image_type: str = "DM") -> pd.DataFrame:
    """Return the index of the 1,001 low-energy images, or of the subtracted ones ("CESM").

    A compound BIRADS, one value a finding, becomes its highest. Density is stated with some images of a breast and
    filled in for the others of it. Rows that stand twice are counted and logged. Raises FileNotFoundError, ValueError
    naming file, sheet, row, column.
    """
    if image_type not in FOLDERS:
        raise ValueError(f"image_type {image_type!r}: not one of {', '.join(FOLDERS)}")
    sheets = _read(data_dir)
    rows = _labels(sheets["all"])
    types: dict[str, list[str]] = {}
    for sheet, name in LESION_SHEETS.items():
        for image in sheets[sheet].rows["name"]:
            types[image] = sorted({*types.get(image, ()), name})
    of_type = rows[rows["type"] == image_type]
    once = of_type.drop_duplicates("name")
    if len(once) < len(of_type):
        logger.info("cdd_cesm: %d rows repeat a name and its labels; taken once", len(of_type) - len(once))
    found = once["name"].map(lambda name: types.get(name, []))
    index = {
        "patient_id": "P" + once["patient"],
        "study_id": "P" + once["patient"],
        "breast_id": once["breast"],
        "image_id": once["name"],
        "laterality": once["side"],
        "view": once["view"],
        "path": FOLDERS[image_type] + "/" + once["name"] + ".jpg",
        "cancer": (once["pathology"] == "Malignant").astype(int),
        "lesion": found.map(bool).astype("Int64").mask(~found.map(bool) & (once["pathology"] != "Normal")),
        "lesion_types": found,
        "birads": once["level"],
        "density": once["letter"],
    }
    return make_index(pd.DataFrame(index), "cdd_cesm")


def _read(data_dir: Path) -> dict[str, MetadataTable]:
    path = find_file(data_dir, ANNOTATIONS, REMEDY)
    of_findings = dict.fromkeys((*LESION_SHEETS, *OTHER_SHEETS), {"name": COLUMNS["name"]})
    return read_sheets(path, {"all": COLUMNS, **of_findings}, REMEDY)


def _labels(table: MetadataTable) -> pd.DataFrame:
    """Return the sheet's rows with breast, letter (density, filled in) and level (highest BIRADS); checked."""
    table.choice("pathology", dict.fromkeys(PATHOLOGIES))
    stated = table.choice("density", {**{letter: letter for letter in DENSITIES}, **dict.fromkeys(NO_DENSITY)})
    rows = table.rows.assign(breast="P" + table.rows["patient"] + "_" + table.rows["side"])
    first_row: dict[str, int] = {}
    density: dict[str, str] = {}
    levels = []
    for row, of in enumerate(rows.itertuples()):
        named = NAME.fullmatch(of.name)
        if not named or named.groups() != (of.patient, of.side, of.type.replace("CESM", "CM"), of.view):
            raise table.fault(row, "name", "not P<patient>_<side>_<DM or CM>_<view> of its own row")
        if not re.fullmatch(r"[0-6](\$[0-6])*", of.birads):
            raise table.fault(row, "birads", "not levels 0 to 6 with $ between them")
        levels.append(max(map(int, of.birads.split("$"))))
        before = rows.iloc[first_row.setdefault(of.name, row)]
        if (before["birads"], before["pathology"]) != (of.birads, of.pathology):
            raise table.fault(row, "name", "which stands in an earlier row with other labels")
        if stated[row] and density.setdefault(of.breast, stated[row]) != stated[row]:
            raise table.fault(row, "density", f"but another image of the breast has {density[of.breast]}")
    return rows.assign(level=levels, letter=rows["breast"].map(density))


def locate(index: pd.DataFrame, data_dir: Path) -> pd.DataFrame:
    """Return the index with each `path` as it is on disk, where names have stray blanks (P3_L_CM_CC .jpg), below
    data_dir or the folder of the collection; where was looked for the others is logged."""
    data_dir = Path(data_dir)
    roots = collection_roots(data_dir, COLLECTION)
    on_disk: dict[str, str] = {}
    for root, folder in product(roots, FOLDERS.values()):
        if (root / folder).is_dir():
            for file in sorted((root / folder).iterdir()):
                name = f"{folder}/{file.stem.strip()}{file.suffix.strip().lower()}"
                on_disk.setdefault(name, relative(file, data_dir))
    absent = [path for path in index["path"] if path not in on_disk]
    say_where("cdd_cesm", data_dir, COLLECTION, absent, len(index))
    return index.assign(path=index["path"].map(lambda path: on_disk.get(path, path)).astype("string"))


def read_tables(data_dir: Path) -> dict[str, pd.DataFrame]:
    """Return `rows` of the first sheet, `low` of the low-energy images, and `findings`, the rows of other sheets.

    Rows that repeat a name are kept.
    """
    sheets = _read(data_dir)
    rows = _labels(sheets["all"])
    rows = rows.assign(
        density=rows["density"].replace("", "_"), rows_of_name=rows.groupby("name")["name"].transform("size")
    )
    findings = pd.concat([sheets[name].rows.assign(sheet=name) for name in (*LESION_SHEETS, *OTHER_SHEETS)])
    return {"rows": rows, "low": rows[rows["type"] == "DM"], "findings": findings}


BENCHMARK = Benchmark.from_yaml(__file__, read_index=read_index, read_tables=read_tables, locate=locate)
