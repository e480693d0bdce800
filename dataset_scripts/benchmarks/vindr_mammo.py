"""VinDr-Mammo 1.0.0 (PhysioNet, credentialed): 5,000 examinations with breast assessments and boxes of findings.

data_dir holds breast-level_annotations.csv, finding_annotations.csv and images/<study_id>/<image_id>.dicom. There is
no pathology: what "cancer" means is one of the definitions below.
"""

import ast
import logging
from pathlib import Path

import pandas as pd

from .index import DENSITIES, Benchmark, Box, MetadataTable, find_file, in_parts, make_box, make_index, read_csv

logger = logging.getLogger(__name__)

REMEDY = "give the folder of VinDr-Mammo 1.0.0 as downloaded from PhysioNet"
BREASTS, FINDINGS = "breast-level_annotations.csv", "finding_annotations.csv"
BREAST_COLUMNS = (
    "study_id", "series_id", "image_id", "laterality", "view_position", "height", "width", "breast_birads",
    "breast_density", "split",
)  # fmt: skip
CORNERS = ("xmin", "ymin", "xmax", "ymax")
FINDING_COLUMNS = ("image_id", "finding_categories", "finding_birads", *CORNERS, "split")
NO_FINDING = "No Finding"
CATEGORIES = (
    "Mass", "Suspicious Calcification", "Focal Asymmetry", "Architectural Distortion", "Asymmetry",
    "Suspicious Lymph Node", "Skin Thickening", "Nipple Retraction", "Global Asymmetry", "Skin Retraction",
)  # fmt: skip
SPLIT = {"training": "train", "test": "test"}
SIDES = {"L": "L", "R": "R"}
BIRADS = {f"BI-RADS {level}": level for level in range(1, 6)}
DENSITY = {f"DENSITY {letter}": letter for letter in DENSITIES}


def read_index(data_dir: Path) -> pd.DataFrame:
    """Return the index of the 20,000 images. Raises FileNotFoundError, ValueError naming file, row and column.

    Boxes are cut to the image, as 42 reach beyond it; how many were is logged.
    """
    images, findings = _read(data_dir)
    study, image = images.text("study_id", required=True), images.text("image_id", required=True)
    side = images.choice("laterality", SIDES)
    types, boxes = _findings(images, findings)
    rows = {
        "patient_id": study,  # one examination a patient
        "study_id": study,
        "breast_id": study + "_" + side.astype("string"),
        "image_id": image,
        "laterality": side,
        "view": images.text("view_position"),
        "split": images.choice("split", SPLIT),
        "path": "images/" + study + "/" + image + ".dicom",
        "lesion": image.map(lambda each: int(bool(types[each])) if each in types else None),
        "lesion_types": image.map(lambda each: sorted(types[each]) if each in types else None),
        "birads": images.choice("breast_birads", BIRADS),
        "density": images.choice("breast_density", DENSITY),
        "boxes": image.map(boxes.get),
    }
    return make_index(pd.DataFrame(rows), "vindr_mammo")


def _read(data_dir: Path) -> tuple[MetadataTable, MetadataTable]:
    return (
        read_csv(find_file(data_dir, [BREASTS], REMEDY), BREAST_COLUMNS, REMEDY),
        read_csv(find_file(data_dir, [FINDINGS], REMEDY), FINDING_COLUMNS, REMEDY),
    )


def _categories(findings: MetadataTable) -> list[list[str]]:
    """Parse the Python lists of names that stand as text in `finding_categories`; [] where nothing was found."""
    parsed: dict[str, list[str]] = {}
    for row, cell in enumerate(findings.rows["finding_categories"]):
        if cell not in parsed:
            try:
                names = ast.literal_eval(cell)
            except (ValueError, SyntaxError):
                names = None
            known = isinstance(names, list) and names and all(each in (*CATEGORIES, NO_FINDING) for each in names)
            if not known or (NO_FINDING in names and names != [NO_FINDING]):
                raise findings.fault(
                    row, "finding_categories", "not a list of the data set's ten findings or No Finding"
                )
            parsed[cell] = [] if NO_FINDING in names else names
    return [parsed[cell] for cell in findings.rows["finding_categories"]]


def _corners(images: MetadataTable, findings: MetadataTable) -> tuple[pd.DataFrame, pd.Series]:
    """Return the corners of each row's box, Float64, cut to the image, and whether it reached beyond it."""
    if (repeated := images.rows["image_id"].duplicated()).any():
        raise images.fault(int(repeated.argmax()), "image_id", "and so is an earlier row's")
    size = images.rows.set_index("image_id").index
    width, height = (
        findings.rows["image_id"].map(pd.Series(images.number(side, required=True).array, index=size))
        for side in ("width", "height")
    )
    stated = pd.DataFrame({name: findings.number(name) for name in CORNERS})
    cut = pd.DataFrame({name: stated[name].clip(0, height if name[0] == "y" else width) for name in CORNERS})
    return cut, (cut != stated).fillna(False).any(axis=1)


def _findings(images: MetadataTable, findings: MetadataTable) -> tuple[dict[str, set[str]], dict[str, list[Box]]]:
    """Return names and boxes of the findings by image, empty where a row says No Finding."""
    split = dict(zip(images.rows["image_id"], images.rows["split"], strict=True))
    for row, (image, stated) in enumerate(zip(findings.rows["image_id"], findings.rows["split"], strict=True)):
        if split.get(image) != stated:
            raise findings.fault(row, "split", f"but {BREASTS} has {split.get(image)!r} for image {image}")
    corners, beyond = _corners(images, findings)
    if beyond.any():
        logger.info("vindr_mammo: %d boxes reached beyond the image and were cut to it", beyond.sum())
    types: dict[str, set[str]] = {image: set() for image in findings.rows["image_id"]}
    boxes: dict[str, list[Box]] = {image: [] for image in types}
    for row, names in enumerate(_categories(findings)):
        if not names:
            continue
        box, image = corners.iloc[row], findings.rows["image_id"][row]
        if box.isna().any():
            raise findings.fault(row, str(box.isna().idxmax()), "but a finding has a box")
        if box["xmin"] >= box["xmax"] or box["ymin"] >= box["ymax"]:
            raise findings.fault(row, "xmin", "and the box holds nothing of the image")
        types[image].update(names)
        boxes[image].append(make_box(box, ", ".join(names)))
    return types, boxes


def read_tables(data_dir: Path) -> dict[str, pd.DataFrame]:
    """Return `images`, `findings` and `names` (a row each name of a finding), of each part and of all."""
    stated, found = _read(data_dir)
    breast = stated.rows["study_id"] + "_" + stated.rows["laterality"]
    views = stated.rows["view_position"]
    images = stated.rows.rename(columns={"split": "part"}).assign(
        breast=breast,
        views_of_breast=views.groupby(breast).transform(lambda of: "+".join(sorted(of))),
        series_of_study=stated.rows.groupby("study_id")["series_id"].transform("nunique"),
    )
    names = pd.Series(_categories(found), index=found.rows.index)
    image = found.rows["image_id"]
    findings = found.rows.rename(columns={"split": "part"}).assign(
        name=names,
        number_of_names=names.map(len),
        is_no_finding=names.map(len) == 0,
        is_boxed=found.number("xmin").notna(),
        image_has_both=names.map(bool).groupby(image).transform("nunique") == 2,
        is_beyond_image=_corners(stated, found)[1],
    )
    tables = {"images": images, "findings": findings, "names": findings.explode("name").dropna(subset="name")}
    return {name: in_parts(table) for name, table in tables.items()}


BENCHMARK = Benchmark.from_yaml(__file__, read_index=read_index, read_tables=read_tables)
