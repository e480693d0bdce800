"""VinDr-Mammo 1.0.0 (PhysioNet, credentialed): 5,000 examinations with breast assessments and boxes of findings.

data_dir holds breast-level_annotations.csv, finding_annotations.csv and images/<study_id>/<image_id>.dicom. There is
no pathology: what "cancer" means is one of the definitions below.
"""

import ast
import logging
from pathlib import Path

import pandas

from .index import DENSITIES, Benchmark, Box, by_value, dense, four_densities, make_index, single_type
from .tables import MetadataTable, find_file, read_csv

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


def read_index(data_dir: Path) -> pandas.DataFrame:
    """SCHEMA rows of the 20,000 images. Raises FileNotFoundError, ValueError naming file, row, column.

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
    return make_index(pandas.DataFrame(rows).to_dict("records"), "vindr_mammo")


def _read(data_dir: Path) -> tuple[MetadataTable, MetadataTable]:
    return (
        read_csv(find_file(data_dir, [BREASTS], REMEDY), BREAST_COLUMNS, REMEDY),
        read_csv(find_file(data_dir, [FINDINGS], REMEDY), FINDING_COLUMNS, REMEDY),
    )


def _categories(findings: MetadataTable) -> list[list[str]]:
    """The Python lists of names that stand as text in `finding_categories`; [] where nothing was found."""
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


def _corners(images: MetadataTable, findings: MetadataTable) -> tuple[pandas.DataFrame, int]:
    """Corners of each row's box, Float64, cut to the image, and how many reached beyond it."""
    size = images.rows.set_index("image_id").index
    width, height = (
        findings.rows["image_id"].map(pandas.Series(images.number(side, required=True).array, index=size))
        for side in ("width", "height")
    )
    stated = pandas.DataFrame({name: findings.number(name) for name in CORNERS})
    cut = pandas.DataFrame(
        {name: stated[name].clip(0, height if name[0] == "y" else width) for name in CORNERS}, columns=list(CORNERS)
    )
    return cut, int((cut != stated).fillna(False).any(axis=1).sum())


def _findings(images: MetadataTable, findings: MetadataTable) -> tuple[dict[str, set[str]], dict[str, list[Box]]]:
    """Names and boxes of the findings by image, empty where a row says No Finding."""
    split = dict(zip(images.rows["image_id"], images.rows["split"], strict=True))
    for row, (image, stated) in enumerate(zip(findings.rows["image_id"], findings.rows["split"], strict=True)):
        if split.get(image) != stated:
            raise findings.fault(row, "split", f"but {BREASTS} has {split.get(image)!r} for image {image}")
    corners, beyond = _corners(images, findings)
    if beyond:
        logger.info("vindr_mammo: %d boxes reached beyond the image and were cut to it", beyond)
    types: dict[str, set[str]] = {image: set() for image in findings.rows["image_id"]}
    boxes: dict[str, list[Box]] = {image: [] for image in types}
    for row, names in enumerate(_categories(findings)):
        if not names:
            continue
        box, image = corners.iloc[row], findings.rows["image_id"][row]
        if box.isna().any():
            raise findings.fault(row, str(box.isna().idxmax()), "but a finding has a box")
        x0, y0, x1, y1 = map(float, box)
        if x0 >= x1 or y0 >= y1:
            raise findings.fault(row, "xmin", "and the box holds nothing of the image")
        types[image].update(names)
        boxes[image].append(Box(x0=x0, y0=y0, x1=x1, y1=y1, slice=-1, label=", ".join(names)))
    return types, boxes


def count(data_dir: Path) -> dict[str, int]:
    """Studies, images, breasts, labels and findings by split; findings are rows where the name says no other."""
    images, findings = _read(data_dir)
    table = images.rows.assign(breast=images.rows["study_id"] + "_" + images.rows["laterality"])
    rows = findings.rows.assign(names=_categories(findings), is_boxed=findings.number("xmin").notna())
    counts: dict[str, int] = {}
    for split in SPLIT:
        counts |= _count(split, table[table["split"] == split], rows[rows["split"] == split])
    counts |= _count("all", table, rows)
    views = table.sort_values("view_position").groupby("breast")["view_position"].agg("+".join)
    has_finding = rows["names"].map(bool)
    counts |= {
        "finding rows": len(rows),
        "finding rows of several names": (rows["names"].map(len) > 1).sum(),
        "finding rows without finding_birads": (rows["finding_birads"] == "").sum(),
        "images with a finding and No Finding": len(
            {*rows["image_id"][has_finding]} & {*rows["image_id"][~has_finding]}
        ),
        "boxes beyond the image": _corners(images, findings)[1],
        "view CC": (table["view_position"] == "CC").sum(),
        "view MLO": (table["view_position"] == "MLO").sum(),
        "breasts of two CC and no MLO": (views == "CC+CC").sum(),
        "studies of 2 or 4 series": table.groupby("study_id")["series_id"].nunique().isin([2, 4]).sum(),
        "images of 3518 x 2800": ((table["height"] == "3518") & (table["width"] == "2800")).sum(),
        "images of 2812 x 2012": ((table["height"] == "2812") & (table["width"] == "2012")).sum(),
    }
    return {name: int(value) for name, value in counts.items()}


def _count(split: str, table: pandas.DataFrame, rows: pandas.DataFrame) -> dict[str, int]:
    named = rows.explode("names").dropna(subset="names")
    return {
        f"{split}: studies": table["study_id"].nunique(),
        f"{split}: images": len(table),
        f"{split}: breasts": table["breast"].nunique(),
        **{f"{split}: {each}": (table["breast_birads"] == each).sum() for each in BIRADS},
        **{f"{split}: {each}": (table["breast_density"] == each).sum() for each in DENSITY},
        f"{split}: finding rows with box": rows["is_boxed"].sum(),
        f"{split}: No Finding rows": len(rows) - named.index.nunique(),
        f"{split}: images with a finding": named["image_id"].nunique(),
        **{
            f"{split}: images of {each}": named["image_id"][named["names"] == each].nunique() for each in CATEGORIES[:2]
        },
        **{f"{split}: {each}": (named["names"] == each).sum() for each in CATEGORIES},
    }


_BY_SPLIT = {  # training, test, all
    "studies": (4000, 1000, 5000), "images": (16000, 4000, 20000), "breasts": (8000, 2000, 10000),
    "BI-RADS 1": (10724, 2682, 13406), "BI-RADS 2": (3742, 934, 4676), "BI-RADS 3": (744, 186, 930),
    "BI-RADS 4": (610, 152, 762), "BI-RADS 5": (180, 46, 226),
    "DENSITY A": (80, 20, 100), "DENSITY B": (1528, 380, 1908),
    "DENSITY C": (12232, 3060, 15292), "DENSITY D": (2160, 540, 2700),
    "finding rows with box": (1802, 452, 2254), "No Finding rows": (14589, 3643, 18232),
    "images with a finding": (1411, 357, 1768),
    "images of Mass": (894, 219, 1113), "images of Suspicious Calcification": (337, 105, 442),
    "Mass": (989, 237, 1226), "Suspicious Calcification": (428, 115, 543), "Focal Asymmetry": (216, 53, 269),
    "Architectural Distortion": (95, 24, 119), "Asymmetry": (77, 20, 97), "Suspicious Lymph Node": (46, 11, 57),
    "Skin Thickening": (45, 12, 57), "Nipple Retraction": (30, 7, 37), "Global Asymmetry": (20, 6, 26),
    "Skin Retraction": (15, 3, 18),
}  # fmt: skip
PUBLISHED = {
    **{f"{split}: {name}": n for name, of in _BY_SPLIT.items() for split, n in zip((*SPLIT, "all"), of, strict=True)},
    "finding rows": 20486, "finding rows of several names": 174, "finding rows without finding_birads": 18357,
    "images with a finding and No Finding": 0, "boxes beyond the image": 42,
    "view CC": 10001, "view MLO": 9999, "breasts of two CC and no MLO": 1, "studies of 2 or 4 series": 28,
    "images of 3518 x 2800": 15244, "images of 2812 x 2012": 3796,
}  # fmt: skip

_NO_PATHOLOGY = "by the radiologists' assessment, as there is no pathology"
BENCHMARK = Benchmark(
    name="vindr_mammo",
    title="VinDr-Mammo",
    homepage="https://physionet.org/content/vindr-mammo/1.0.0/",
    license="PhysioNet Credentialed Health Data License and Data Use Agreement",
    citation="Nguyen et al., VinDr-Mammo, Scientific Data 10, 277, 2023, doi 10.1038/s41597-023-02100-7",
    read_index=read_index,
    definitions=(
        by_value(
            "cancer",
            "birads_4_5",
            f"positive: BI-RADS 4 or 5, a biopsy is due; negative: 1 to 3; {_NO_PATHOLOGY}: some positives are benign",
            "birads",
            {level: "BI-RADS 1 to 3" if level < 4 else "BI-RADS 4 or 5" for level in range(1, 6)},
        ),
        by_value(
            "cancer",
            "birads_5",
            f"positive: BI-RADS 5; negative: 1 to 4; {_NO_PATHOLOGY}: some negatives, of 4, are cancers",
            "birads",
            {level: "BI-RADS 1 to 4" if level < 5 else "BI-RADS 5" for level in range(1, 6)},
        ),
        by_value(
            "cancer",
            "birads_5_clear",
            f"positive: BI-RADS 5; negative: 1 and 2; left out as unclear: 3 and 4; {_NO_PATHOLOGY}",
            "birads",
            {1: "BI-RADS 1 or 2", 2: "BI-RADS 1 or 2", 5: "BI-RADS 5"},
        ),
        by_value(
            "lesion",
            "finding",
            "positive: at least one boxed finding, skin, nipple and lymph node included; negative: No Finding",
            "lesion",
            {0: "no finding", 1: "finding"},
        ),
        by_value(
            "birads",
            "breast",
            "the breast's assessment, 1 to 5; 0 and 6 do not occur",
            "birads",
            {level: str(level) for level in range(1, 6)},
        ),
        four_densities("ACR density of the breast"),
        dense("ACR density of the breast"),
        single_type(
            "lexicon",
            "lesion types of the BI-RADS lexicon, where the three kinds of asymmetry are one; left out: images without "
            "a finding, with several types, or with a finding of skin, nipple or lymph node",
            {
                "Mass": "mass",
                "Suspicious Calcification": "calcification",
                "Architectural Distortion": "architectural distortion",
                **dict.fromkeys(("Asymmetry", "Focal Asymmetry", "Global Asymmetry"), "asymmetry"),
            },
        ),
    ),
    count=count,
    published=PUBLISHED,
    no_sharing="PhysioNet's data use agreement forbids passing its data on; whoever needs them signs it on PhysioNet",
    notes=(
        "No pathology: cancer is defined by BI-RADS, and the cut is a choice (--definition).",
        "Official split: 4,000 examinations to train on, 1,000 to test on; validation is held out of the former.",
        "One left breast of the training part has two CC views and no MLO; both are kept as stated.",
        "42 boxes reach beyond the image and are cut to it.",
    ),
)
