"""CMMD, the Chinese Mammography Database (TCIA, doi 10.7937/tcia.eqde4b16).

data_dir holds CMMD_clinicaldata_revision.xlsx (a row a labeled breast), the metadata.csv of NBIA's download (images a
patient) and the images, CMMD/<ID1>/<study>/<series>/1-1.dcm. Each breast has a CC and an MLO; which file is which only
the headers say, so that paths come from `locate`. Without metadata.csv the unlabeled breasts are not known and left
out.
"""

import logging
import re
from functools import partial
from pathlib import Path

import pandas

from modeling_mammodino.dicom_header import laterality, view

from .index import Benchmark, Definition, by_value, make_index, single_type
from .tables import (
    MetadataTable,
    dicom_files,
    find_file,
    read_csv,
    read_headers,
    read_sheets,
    relative,
    subject_folders,
    tally,
)

logger = logging.getLogger(__name__)

COLLECTION = "CMMD"
CLINICAL, MANIFEST = "CMMD_clinicaldata_revision.xlsx", "metadata.csv"
REMEDY = f"give the folder with {CLINICAL}, {MANIFEST} and CMMD/ as downloaded from TCIA"
COLUMNS = ("ID1", "LeftRight", "Age", "number", "abnormality", "classification", "subtype")
MANIFEST_COLUMNS = ("Subject ID", "Number of Images", "File Location")
TYPES = {"mass": ["mass"], "calcification": ["calcification"], "both": ["calcification", "mass"]}
CANCER = {"Benign": 0, "Malignant": 1}
SIDES, VIEWS = ("L", "R"), ("CC", "MLO")


def read_index(data_dir: Path) -> pandas.DataFrame:
    """SCHEMA rows of 5,202 images, paths missing. Raises FileNotFoundError, ValueError naming file, row, column."""
    table, labels = _read_clinical(data_dir)
    images = _read_manifest(data_dir)
    sides: dict[str, tuple[str, ...]] = {}
    for patient, side in labels:
        sides[patient] = (*sides.get(patient, ()), side)
    if images is None:
        logger.warning(
            "%s: no %s, so unlabeled breasts are not known; the index has the %d labeled images only",
            data_dir, MANIFEST, len(VIEWS) * len(labels),
        )  # fmt: skip
    else:
        sides = {patient: _sides(table, patient, sides.get(patient, ()), number) for patient, number in images.items()}
        if absent := {patient for patient, _ in labels} - set(images):
            raise ValueError(
                f"{data_dir}/{MANIFEST}: no line for {len(absent)} patients, first {min(absent)}; {REMEDY}"
            )
    rows = [
        {
            "patient_id": patient,
            "study_id": patient,  # one study a patient
            "breast_id": f"{patient}_{side}",
            "image_id": f"{patient}_{side}_{name}",
            "laterality": side,
            "view": name,
            **labels.get((patient, side), {}),
        }
        for patient, of in sides.items()
        for side in sorted(of)
        for name in VIEWS
    ]
    return make_index(rows, "cmmd")


def _sides(table: MetadataTable, patient: str, labeled: tuple[str, ...], images: int) -> tuple[str, ...]:
    """The breasts of a patient: the labeled one where there are two images, both where there are four."""
    if images == 2 and len(labeled) == 1:
        return labeled
    if images == 4 and labeled:
        return SIDES
    raise ValueError(f"{table.path}: {patient} has {len(labeled)} rows, but {images} images in {MANIFEST}; {REMEDY}")


def _read_clinical(data_dir: Path) -> tuple[MetadataTable, dict[tuple[str, str], dict]]:
    """The clinical table, and what the index has of each labeled breast."""
    path = find_file(data_dir, [CLINICAL], REMEDY)
    (table,) = read_sheets(path, {"Sheet1": COLUMNS}, REMEDY).values()
    sides, cancer = (
        table.choice("LeftRight", dict(zip(SIDES, SIDES, strict=True))),
        table.choice("classification", CANCER),
    )
    types = table.choice("abnormality", TYPES)
    labels: dict[tuple[str, str], dict] = {}
    for row, key in enumerate(zip(table.text("ID1", required=True), sides, strict=True)):
        if key in labels:
            raise table.fault(row, "ID1", f"which has a row for {key[1]} before this one")
        labels[key] = {"cancer": cancer[row], "lesion": 1, "lesion_types": list(types[row])}
    return table, labels


def _read_manifest(data_dir: Path) -> dict[str, int] | None:
    """Images of each patient; None without the file."""
    table = _manifest(data_dir)
    if table is None:
        return None
    return table.whole("Number of Images", required=True).groupby(table.rows["Subject ID"], sort=False).sum().to_dict()


def _manifest(data_dir: Path) -> MetadataTable | None:
    data_dir = Path(data_dir)
    places = [data_dir / MANIFEST, *sorted(data_dir.glob(f"manifest-*/{MANIFEST}"))]
    path = next((place for place in places if place.is_file()), None)
    return read_csv(path, MANIFEST_COLUMNS, REMEDY) if path else None


def locate(index: pandas.DataFrame, data_dir: Path) -> pandas.DataFrame:
    """The index with the `path` of each image, by side and view of the headers below its patient's folder.

    Where a patient's files do not give each image of the index once, those that are doubtful keep no path; logged.
    """
    data_dir = Path(data_dir)
    folders = _patient_folders(data_dir)
    found: dict[str, str] = {}
    unclear: list[str] = []
    for patient in index["patient_id"].unique():
        files = dicom_files(folders[patient]) if patient in folders else []
        names: dict[str, list[Path]] = {}
        for file, header in read_headers(files).items():
            names.setdefault(f"{patient}_{laterality(header)}_{view(header)}", []).append(file)
        if len(names) < len(files):
            unclear.append(patient)
        found |= {image: relative(of[0], data_dir) for image, of in names.items() if len(of) == 1}
    if unclear:
        logger.warning(
            "cmmd: files of %d patients share side and view or cannot be read, first %s; they have no path",
            len(unclear), unclear[0],
        )  # fmt: skip
    return index.assign(path=index["image_id"].map(found).astype("string"))


def _patient_folders(data_dir: Path) -> dict[str, Path]:
    """By the manifest's File Location (.\\CMMD\\D1-0001\\...) where it is there, else by the folder's name."""
    folders = subject_folders(data_dir, COLLECTION)
    manifest = _manifest(data_dir)
    if manifest is None:
        return folders
    for patient, location in zip(manifest.rows["Subject ID"], manifest.rows["File Location"], strict=True):
        stated = manifest.path.parent / location.replace("\\", "/")
        if patient not in folders and stated.is_dir():
            folders[patient] = stated
    return folders


def count(data_dir: Path) -> dict[str, int]:
    """Breasts with a label, by what the clinical file says of them; images, where metadata.csv is there."""
    table, _ = _read_clinical(data_dir)
    rows, age = table.rows, table.whole("Age", required=True)
    group, number = rows["ID1"].str[:2], table.whole("number", required=True)
    by_patient = rows.groupby("ID1")["classification"]
    counts = {
        "labeled breasts": len(rows),
        "patients": rows["ID1"].nunique(),
        **{f"patients of {each}": rows["ID1"][group == each].nunique() for each in ("D1", "D2")},
        "patients of two labeled breasts": (by_patient.size() == 2).sum(),
        "patients of two labeled breasts that differ": (by_patient.nunique() == 2).sum(),
        **tally("number " + number.astype("string")),
        **tally(rows["classification"]),
        **tally(rows["classification"] + " of " + group),
        **tally(rows["abnormality"], "abnormality {}"),
        **tally(table.text("subtype"), "subtype {}"),
        **tally(rows["LeftRight"], "labeled breasts {}"),
        "lowest age": age.min(),
        "highest age": age.max(),
    }
    images = _read_manifest(data_dir)
    if images is not None:
        index = read_index(data_dir)
        is_labeled, is_d1 = index["cancer"].notna(), index["patient_id"].str.startswith("D1")
        counts |= {
            "images": sum(images.values()),
            "images of D1": sum(number for patient, number in images.items() if patient.startswith("D1")),
            "images of D2": sum(number for patient, number in images.items() if patient.startswith("D2")),
            **tally(pandas.Series(images), "patients of {} images"),
            "images with a label": is_labeled.sum(),
            "images with a label of D1": (is_labeled & is_d1).sum(),
            "images with a label of D2": (is_labeled & ~is_d1).sum(),
            "images Malignant": (index["cancer"] == 1).sum(),
            "images Benign": (index["cancer"] == 0).sum(),
            "images without a label": (~is_labeled).sum(),
            "breasts without a label": index["breast_id"][~is_labeled].nunique(),
            **tally(index["laterality"], "images {}"),
            **tally(index["view"], "images {}"),
        }
    told = [name for name in PUBLISHED if images is not None or not re.search("images|without", name)]
    return {name: int(value) for name, value in {**dict.fromkeys(told, 0), **counts}.items()}


PUBLISHED = {
    "labeled breasts": 1872, "patients": 1775, "patients of D1": 1026, "patients of D2": 749,
    "patients of two labeled breasts": 97, "patients of two labeled breasts that differ": 30, "number 2": 1872,
    "Malignant": 1316, "Benign": 556,
    "Malignant of D1": 563, "Benign of D1": 544, "Malignant of D2": 753, "Benign of D2": 12,
    "abnormality mass": 1149, "abnormality both": 461, "abnormality calcification": 262,
    "subtype missing": 1123, "subtype Luminal B": 376, "subtype Luminal A": 152, "subtype HER2-enriched": 135,
    "subtype triple negative": 86, "labeled breasts L": 988, "labeled breasts R": 884,
    "lowest age": 17, "highest age": 87,
    "images": 5202, "images of D1": 2214, "images of D2": 2988, "patients of 2 images": 949,
    "patients of 4 images": 826,
    "images with a label": 3744, "images with a label of D1": 2214, "images with a label of D2": 1530,
    "images Malignant": 2632, "images Benign": 1112, "images without a label": 1458, "breasts without a label": 729,
    "images L": 2682, "images R": 2520, "images CC": 2601, "images MLO": 2601,
}  # fmt: skip

_UNlabeled = "breasts without a row in the clinical file (1,458 images, the other side in D2)"


def _with_contralateral(positive: str, negative: str, column: str, index: pandas.DataFrame) -> pandas.Series:
    is_positive = (index[column] == 1).fillna(False)
    return pandas.Series(negative, index.index, dtype="string").mask(is_positive, positive)


def _contralateral(task: str, column: str, positive: str, negative: str, meaning: str) -> Definition:
    label = partial(_with_contralateral, positive, negative, column)
    return Definition(task, "contralateral_negative", meaning, (negative, positive), label)


BENCHMARK = Benchmark(
    name="cmmd",
    title="CMMD: The Chinese Mammography Database",
    homepage="https://doi.org/10.7937/tcia.eqde4b16",
    license="CC BY 4.0",
    citation="Cui et al., The Chinese Mammography Database, TCIA, 2021, doi 10.7937/tcia.eqde4b16",
    read_index=read_index,
    definitions=(
        by_value(
            "cancer",
            "malignant",
            f"positive: the breast is Malignant by biopsy; negative: Benign; left out: {_UNlabeled}",
            "cancer",
            {0: "benign", 1: "malignant"},
        ),
        _contralateral(
            "cancer",
            "cancer",
            "malignant",
            "not malignant",
            f"positive: the breast is Malignant; negative: Benign, and {_UNlabeled}, which nobody has confirmed",
        ),
        _contralateral(
            "lesion",
            "lesion",
            "lesion",
            "unlabeled",
            f"positive: the breast has a row, so a mass or calcification; negative: {_UNlabeled}, which nobody has "
            "confirmed to be without a lesion; all negatives are of D2, so that telling D1 from D2 pays",
        ),
        single_type(
            "mass_or_calcification",
            "abnormality of the breast; left out: both, and breasts without a row",
            {"mass": "mass", "calcification": "calcification"},
        ),
    ),  # fmt: skip
    count=count,
    published=PUBLISHED,
    locate=locate,
    notes=(
        "No BI-RADS and no density in the public labels, so neither task; a BI-RADS score on CMMD is of others.",
        "No official split: patients are held out.",
        "One row a breast: its CC and its MLO have the same label. 1,458 images of D2 have no row: they are "
        "unlabeled, not normal, and left out unless the definition says otherwise.",
        "The collection's text counts 3,728 mammograms and 1,498 of the 749 patients with a subtype; the revised "
        "clinical file gives 3,744 and 1,530, of 5,202 images.",
    ),
)
