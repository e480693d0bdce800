"""CBIS-DDSM (TCIA, doi 10.7937/K9/TCIA.2016.7O02S9CY): scanned films with masses and calcifications.

data_dir holds the four case files and, for images, NBIA's download (CBIS-DDSM/<folder>/...). An image is a patient's
side and view; its labels are those of all its abnormalities, whichever files they are in. Masses and calcifications
were split one without the other, so that some patients are in both splits: they stay in test and leave train.
"""

import logging
from pathlib import Path

import pandas

from .benchmark_index import Benchmark, make_index
from .benchmark_labels import by_value, dense, four_densities, single_type
from .cbis_ddsm_boxes import locate
from .cbis_ddsm_cases import FILES, PATHOLOGIES, read_cases

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
        of = of.sort_values("split", kind="stable")  # test first: its copy of a picture that is there twice
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
    """Abnormalities, patients, pictures and labels by case file; then what the four have in common."""
    cases = read_cases(data_dir)
    counts: dict[str, int] = {}
    for kind, split in FILES:
        of = cases[(cases["kind"] == kind) & (cases["split"] == split)]
        counts |= _count(f"{kind} {split}", of)
        counts |= {f"{kind} {split}: assessment {level}": (of["level"] == level).sum() for level in range(6)}
        counts |= {f"{kind} {split}: density {level}": (of["density"] == str(level)).sum() for level in range(5)}
    counts |= _count("all", cases)
    masks, crops, pictures = (set(cases[name]) for name in ("mask_path", "crop_path", "image_path"))
    files = masks | crops | pictures
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
        "Labels are of the image, from all its abnormalities. A list of the pictures of masses, then of "
        "calcifications, has 3,103, as 71 are filed twice; one copy elsewhere states 3,120.",
        "Boxes come from ROI masks on disk, read once and kept in data_dir/cbis_ddsm_boxes.json; images whose mask is "
        "missing or of another size have none and are counted.",
    ),
)
