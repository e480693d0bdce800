"""CMMD, the Chinese Mammography Database (TCIA, doi 10.7937/tcia.eqde4b16).

data_dir holds CMMD_clinicaldata_revision.xlsx (a row a labeled breast), the metadata.csv of NBIA's download (images a
patient) and the images, CMMD/<ID1>/<study>/<series>/1-1.dcm. Each breast has a CC and an MLO; which file is which only
the headers say, so that paths come from `locate`. Without metadata.csv the unlabeled breasts are not known and left
out.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from modeling_mammodino.dicom_header import laterality, view

from .index import (
    BY_HEADER,
    Benchmark,
    MetadataTable,
    find_file,
    make_index,
    read_csv,
    read_headers,
    read_sheets,
    relative,
    say_where,
    subject_files,
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


def read_index(data_dir: Path) -> pd.DataFrame:
    """Return the index of 5,202 images, paths missing.

    Raises FileNotFoundError, ValueError naming file, row and column.
    """
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
    """Return the breasts of a patient: the labeled one where there are two images, both where there are four."""
    if images == 2 and len(labeled) == 1:
        return labeled
    if images == 4 and labeled:
        return SIDES
    raise ValueError(f"{table.path}: {patient} has {len(labeled)} rows, but {images} images in {MANIFEST}; {REMEDY}")


def _read_clinical(data_dir: Path) -> tuple[MetadataTable, dict[tuple[str, str], dict]]:
    """Return the clinical table, and what the index has of each labeled breast."""
    path = find_file(data_dir, [CLINICAL], REMEDY)
    (table,) = read_sheets(path, {"Sheet1": COLUMNS}, REMEDY).values()
    sides, cancer = table.choice("LeftRight", {"L": "L", "R": "R"}), table.choice("classification", CANCER)
    types = table.choice("abnormality", TYPES)
    labels: dict[tuple[str, str], dict] = {}
    for row, key in enumerate(zip(table.text("ID1", required=True), sides, strict=True)):
        if key in labels:
            raise table.fault(row, "ID1", f"which has a row for {key[1]} before this one")
        labels[key] = {"cancer": cancer[row], "lesion": 1, "lesion_types": list(types[row])}
    return table, labels


def _read_manifest(data_dir: Path) -> dict[str, int] | None:
    """Return the number of images of each patient; None without the file."""
    table = _manifest(data_dir)
    if table is None:
        return None
    return table.whole("Number of Images", required=True).groupby(table.rows["Subject ID"], sort=False).sum().to_dict()


def _manifest(data_dir: Path) -> MetadataTable | None:
    data_dir = Path(data_dir)
    places = [data_dir / MANIFEST, *sorted(data_dir.glob(f"manifest-*/{MANIFEST}"))]
    path = next((place for place in places if place.is_file()), None)
    return read_csv(path, MANIFEST_COLUMNS, REMEDY) if path else None


def locate(index: pd.DataFrame, data_dir: Path) -> pd.DataFrame:
    """Return the index with the `path` of each image, by side and view of the headers below its patient's folder.

    Where a patient's files do not give each image of the index once, those that are doubtful keep no path; logged.
    """
    data_dir = Path(data_dir)
    files_of = _patient_files(data_dir, index["patient_id"].unique())
    found: dict[str, str] = {}
    unclear: list[str] = []
    for patient in index["patient_id"].unique():
        files = files_of.get(patient, [])
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
    absent = [image for image in index["image_id"] if image not in found]
    say_where("cmmd", data_dir, COLLECTION, absent, len(index), BY_HEADER)
    return index.assign(path=index["image_id"].map(found).astype("string"))


def _patient_files(data_dir: Path, patients: Iterable[str]) -> dict[str, list[Path]]:
    """Find files as in any collection, or by the manifest's File Location (.\\CMMD\\D1-0001\\...)."""
    stated: dict[str, Path] = {}
    if (manifest := _manifest(data_dir)) is not None:
        for patient, location in zip(manifest.rows["Subject ID"], manifest.rows["File Location"], strict=True):
            if (folder := manifest.path.parent / location.replace("\\", "/")).is_dir():
                stated[patient] = folder
    return subject_files(data_dir, COLLECTION, patients, stated)


def read_tables(data_dir: Path) -> dict[str, pd.DataFrame]:
    """Return `breasts`, the rows of the clinical file, and where metadata.csv is there `patients` and `images`."""
    table, _ = _read_clinical(data_dir)
    by_patient = table.rows.groupby("ID1")["classification"]
    breasts = table.rows.assign(
        age=table.whole("Age", required=True),
        number=table.whole("number", required=True),
        subtype=table.text("subtype"),
        group=table.rows["ID1"].str[:2],
        breasts_of_patient=by_patient.transform("size"),
        classes_of_patient=by_patient.transform("nunique"),
    )
    numbers = _read_manifest(data_dir)
    if numbers is None:
        return {"breasts": breasts}
    patients = pd.DataFrame({"group": [patient[:2] for patient in numbers], "images": numbers.values()})
    index = read_index(data_dir)
    images = index.assign(
        group=index["patient_id"].str[:2], classification=index["cancer"].map({0: "Benign", 1: "Malignant"})
    )
    return {"breasts": breasts, "patients": patients, "images": images}


BENCHMARK = Benchmark.from_yaml(__file__, read_index=read_index, read_tables=read_tables, locate=locate)
