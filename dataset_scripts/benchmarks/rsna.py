"""RSNA Screening Mammography Breast Cancer Detection (Kaggle, 2022): the train part, whose labels are public.

data_dir holds the competition's train.csv and train_images/<patient_id>/<image_id>.dcm. Images: MONOCHROME1 occurs,
and the header says where; it must not be guessed from the site.
"""

from pathlib import Path

import pandas as pd

from .index import Benchmark, MetadataTable, find_file, make_index, read_csv

COLUMNS = (
    "site_id", "patient_id", "image_id", "laterality", "view", "age", "cancer", "biopsy", "invasive", "BIRADS",
    "implant", "density", "machine_id", "difficult_negative_case",
)  # fmt: skip
REMEDY = "give the folder with train.csv and train_images of rsna-breast-cancer-detection as downloaded from Kaggle"


def read_index(data_dir: Path) -> pd.DataFrame:
    """Return the index of the 54,706 train images.

    Raises FileNotFoundError, ValueError naming file, row and column.
    """
    table = _read(data_dir)
    patient, image = table.text("patient_id", required=True), table.text("image_id", required=True)
    side = table.choice("laterality", {"L": "L", "R": "R"})
    rows = {
        "patient_id": patient,
        "study_id": patient,  # one examination a patient
        "breast_id": patient + "_" + side.astype("string"),
        "image_id": image,
        "laterality": side,
        "view": table.text("view"),
        "path": "train_images/" + patient + "/" + image + ".dcm",
        "cancer": table.whole("cancer", required=True),
        "birads": table.whole("BIRADS"),
        "density": table.text("density"),
        "site": table.text("site_id"),
        "machine": table.text("machine_id"),
        "age": table.number("age"),
    }
    return make_index(pd.DataFrame(rows), "rsna")


def _read(data_dir: Path) -> MetadataTable:
    return read_csv(find_file(data_dir, ["train.csv"], REMEDY), COLUMNS, REMEDY)


def read_tables(data_dir: Path) -> dict[str, pd.DataFrame]:
    """Return `images`: the columns of train.csv, and breast, images_of_patient, patient_has_density."""
    table = _read(data_dir)
    patient, density = table.rows["patient_id"], table.text("density")
    images = table.rows.assign(
        **{name: table.whole(name) for name in ("biopsy", "invasive", "BIRADS", "implant")},
        cancer=table.whole("cancer", required=True),
        density=density,
        difficult_negative_case=table.rows["difficult_negative_case"].str.lower(),
        breast=patient + "_" + table.rows["laterality"],
        images_of_patient=patient.groupby(patient).transform("size"),
        patient_has_density=density.notna().groupby(patient).transform("any"),
    )
    return {"images": images}


BENCHMARK = Benchmark.from_yaml(__file__, read_index=read_index, read_tables=read_tables)
