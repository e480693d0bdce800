"""CBIS-DDSM's four case files, of masses and calcifications and of two splits, as one table of abnormalities."""

from pathlib import Path

import pandas

from .metadata_tables import find_file, read_csv

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
    image_id, patient_side_view, the same for a picture that is filed with masses and with calcifications.

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
