"""CDD-CESM (TCIA, doi 10.7937/29kw-ae92): contrast-enhanced spectral mammography, of which the low-energy images.

data_dir holds Radiology-manual-annotations.xlsx and "Low energy images of CDD-CESM/", JPEGs by the names in the file.
A low-energy image (DM) is close to a plain mammogram; the subtracted one (CM, in the file CESM) shows where contrast
agent went, and has labels of its own. `read_index(data_dir, "CESM")` gives those.
"""

import logging
import re
from pathlib import Path

import pandas

from .index import DENSITIES, Benchmark, by_value, dense, make_index, single_type
from .tables import MetadataTable, find_file, read_sheets, relative, tally

logger = logging.getLogger(__name__)

ANNOTATIONS = ("Radiology-manual-annotations.xlsx", "Radiology manual annotations.xlsx")  # the newer name first
REMEDY = f"give the folder with {ANNOTATIONS[0]} and the image folders of CDD-CESM as downloaded from TCIA"
FOLDERS = {"DM": "Low energy images of CDD-CESM", "CESM": "Subtracted images of CDD-CESM"}
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


def read_index(data_dir: Path, image_type: str = "DM") -> pandas.DataFrame:
    """SCHEMA rows of the 1,001 low-energy images, or of the subtracted ones ("CESM").

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
    return make_index(pandas.DataFrame(index).to_dict("records"), "cdd_cesm")


def _read(data_dir: Path) -> dict[str, MetadataTable]:
    path = find_file(data_dir, ANNOTATIONS, REMEDY)
    of_findings = dict.fromkeys((*LESION_SHEETS, *OTHER_SHEETS), {"name": COLUMNS["name"]})
    return read_sheets(path, {"all": COLUMNS, **of_findings}, REMEDY)


def _labels(table: MetadataTable) -> pandas.DataFrame:
    """The sheet's rows with breast, letter (density, filled in) and level (highest BIRADS); checked."""
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


def locate(index: pandas.DataFrame, data_dir: Path) -> pandas.DataFrame:
    """The index with each `path` as it is on disk, where names have stray blanks (P3_L_CM_CC .jpg)."""
    data_dir = Path(data_dir)
    on_disk: dict[str, str] = {}
    for folder in FOLDERS.values():
        if (data_dir / folder).is_dir():
            for file in sorted((data_dir / folder).iterdir()):
                name = f"{folder}/{file.stem.strip()}{file.suffix.strip().lower()}"
                on_disk.setdefault(name, relative(file, data_dir))
    return index.assign(path=index["path"].map(lambda path: on_disk.get(path, path)).astype("string"))


def count(data_dir: Path) -> dict[str, int]:
    """Rows of all sheets, and of the low-energy images (DM) by label; rows that repeat a name count each."""
    sheets = _read(data_dir)
    rows = _labels(sheets["all"])
    low = rows[rows["type"] == "DM"]
    counts = {
        "rows": len(rows),
        "patients": rows["patient"].nunique(),
        "names": rows["name"].nunique(),
        "names that stand twice": (rows["name"].value_counts() == 2).sum(),
        "breasts": rows["breast"].nunique(),
        "breasts with a density": rows["breast"][rows["letter"].notna()].nunique(),
        **{f"rows of {sheet}": len(sheets[sheet].rows) for sheet in (*LESION_SHEETS, *OTHER_SHEETS)},
        **tally(rows["type"], "rows of {}"),
        **tally(rows["pathology"]),
        "DM patients": low["patient"].nunique(),
        "DM breasts": low["breast"].nunique(),
        **tally(low["pathology"], "DM {}"),
        **tally(low["birads"], "DM BIRADS {}"),
        **tally(low["density"].replace("", "_"), "DM density {}"),
        **tally(low["letter"], "DM density filled in {}"),
        **tally(low["view"], "DM view {}"),
        **tally(low["machine"], "DM machine {}"),
    }
    return {name: int(value) for name, value in {**dict.fromkeys(PUBLISHED, 0), **counts}.items()}


PUBLISHED = {
    "rows": 2006, "patients": 326, "rows of DM": 1003, "rows of CESM": 1003, "DM patients": 326,
    "rows of mass_description": 310, "rows of distortion": 50, "rows of asymmetry": 231, "rows of calcifications": 240,
    "rows of mass enhancement_description": 334, "rows of nonmass enhancement_description": 184,
    "rows of postoperative": 159, "rows of postneoajuvant chemotherapy": 8, "names that stand twice": 4,
    "Malignant": 662, "DM Malignant": 331,
    # published nowhere: counted in the released file, so that another copy can be compared
    "names": 2002, "breasts": 566, "DM breasts": 566, "breasts with a density": 518, "Normal": 757, "Benign": 587,
    "DM Normal": 341, "DM Benign": 331, "DM view MLO": 503, "DM view CC": 500, "DM machine 1": 940, "DM machine 2": 63,
    "DM BIRADS 1": 371, "DM BIRADS 2": 165, "DM BIRADS 3": 107, "DM BIRADS 4": 172, "DM BIRADS 5": 116,
    "DM BIRADS 6": 4,
    "DM BIRADS 3$2": 25, "DM BIRADS 4$2": 21, "DM BIRADS 5$2": 14, "DM BIRADS 3$2$2": 2, "DM BIRADS 2$4": 2,
    "DM BIRADS 2$2": 2, "DM BIRADS 2$3": 2,
    "DM density A": 8, "DM density B": 329, "DM density C": 515, "DM density D": 70, "DM density _": 81,
    "DM density filled in A": 8, "DM density filled in B": 329, "DM density filled in C": 515,
    "DM density filled in D": 70, "DM density filled in missing": 81,
}  # fmt: skip

_DENSITY = "ACR density, filled in per breast; 81 images without one are left out"
_COMMON = {"mass": "mass", "calcification": "calcification", "asymmetry": "asymmetry"}
_ONE_TYPE = "finding by the sheets of the annotation file; left out: images without a finding, with several types"
BENCHMARK = Benchmark(
    name="cdd_cesm",
    title="CDD-CESM: Categorized Digital Database for Low energy and Subtracted Contrast Enhanced Spectral Mammography",
    homepage="https://doi.org/10.7937/29kw-ae92",
    license="CC BY 4.0",
    citation="Khaled et al., Categorized contrast enhanced mammography dataset, Scientific Data 9, 122, 2022",
    read_index=read_index,
    definitions=(
        by_value(
            "cancer",
            "malignant",
            "positive: the low-energy image is Malignant by pathology or follow-up; negative: Benign and Normal",
            "cancer",
            {0: "not malignant", 1: "malignant"},
        ),
        by_value(
            "lesion",
            "described",
            "positive: the image is in the sheet of masses, distortions, asymmetries or calcifications; negative: in "
            "none and Normal; left out: 96 Benign or Malignant images without such a finding (scars, ducts, occult)",
            "lesion",
            {0: "no lesion", 1: "lesion"},
        ),
        by_value(
            "birads",
            "highest",
            "BIRADS 1 to 5; of a compound such as 4$2, one a finding, the highest; left out: 6, known cancer (4)",
            "birads",
            {level: str(level) for level in range(1, 6)},
        ),
        by_value(
            "density",
            "ab_c_d",
            f"{_DENSITY}; A and B are one class, as only two patients have A",
            "density",
            {"A": "A or B", "B": "A or B", "C": "C", "D": "D"},
        ),
        dense(_DENSITY.replace("; 81 images without one are left out", "")),
        single_type("common", f"{_ONE_TYPE} or with an architectural distortion (16 alone)", _COMMON),
        single_type("four", _ONE_TYPE, {**_COMMON, "architectural distortion": "architectural distortion"}),
    ),
    count=count,
    published=PUBLISHED,
    locate=locate,
    notes=(
        "Low-energy images only, 1,001 names: the subtracted images are another modality, with labels of their own.",
        "Four names stand twice, with the same labels, two of them of low-energy images; what the second image is "
        "called is not known.",
        "No official split: patients are held out. The authors' own script splits images, which leaks patients.",
        "The publication states 751 normal images, 48 distortions, 222 asymmetries and 238 calcifications; the "
        "released file has 757, 50, 231 and 240. Its 248 images of several findings are counted in no sheet.",
    ),
)
