"""RSNA Screening Mammography Breast Cancer Detection (Kaggle, 2022): the train part, whose labels are public.

data_dir holds the competition's train.csv and train_images/<patient_id>/<image_id>.dcm. Images: MONOCHROME1 occurs,
and the header says where; it must not be guessed from the site.
"""

from pathlib import Path

import pandas

from .index import DENSITIES, Benchmark, Definition, by_value, dense, four_densities, make_index
from .tables import MetadataTable, find_file, read_csv, tally

COLUMNS = (
    "site_id", "patient_id", "image_id", "laterality", "view", "age", "cancer", "biopsy", "invasive", "BIRADS",
    "implant", "density", "machine_id", "difficult_negative_case",
)  # fmt: skip
REMEDY = "give the folder with train.csv and train_images of rsna-breast-cancer-detection as downloaded from Kaggle"


def read_index(data_dir: Path) -> pandas.DataFrame:
    """SCHEMA rows of the 54,706 train images. Raises FileNotFoundError, ValueError naming file, row, column."""
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
    }
    return make_index(pandas.DataFrame(rows).to_dict("records"), "rsna")


def _read(data_dir: Path) -> MetadataTable:
    return read_csv(find_file(data_dir, ["train.csv"], REMEDY), COLUMNS, REMEDY)


def count(data_dir: Path) -> dict[str, int]:
    """Images, patients, breasts, sites, labels, machines; images where the name says nothing else."""
    table = _read(data_dir)
    site, density, birads = "site " + table.rows["site_id"], table.text("density"), table.whole("BIRADS")
    patient = table.rows["patient_id"]
    cancer = table.whole("cancer", required=True) == 1
    breast = patient + "_" + table.rows["laterality"]
    per_patient = patient.value_counts()
    first = ~patient.duplicated()
    counts = {
        "images": len(patient),
        "patients": patient.nunique(),
        "breasts": breast.nunique(),
        "fewest images of a patient": per_patient.min(),
        "most images of a patient": per_patient.max(),
        **tally(site),
        **tally(site[first], "patients of {}"),
        **tally(table.rows["laterality"], "laterality {}"),
        **tally(table.rows["view"], "view {}"),
        **tally(table.whole("cancer"), "cancer {}"),
        **tally(site[cancer], "cancer 1 of {}"),
        "cancer 1, breasts": breast[cancer].nunique(),
        "cancer 1, patients": patient[cancer].nunique(),
        "cancer 1 with a BIRADS other than 0": ((birads != 0) & cancer).fillna(False).sum(),
        **{f"{name} 1": (table.whole(name) == 1).sum() for name in ("biopsy", "invasive", "implant")},
        "difficult_negative_case True": (table.rows["difficult_negative_case"].str.lower() == "true").sum(),
        "age missing": table.text("age").isna().sum(),
        **tally(birads, "BIRADS {}"),
        "BIRADS 1 or 2 of site 2": (birads.isin([1, 2]) & (site == "site 2")).sum(),
        **tally(density, "density {}"),
        "density missing of site 1": (density.isna() & (site == "site 1")).sum(),
        **{f"patients of density {each}": patient[density == each].nunique() for each in DENSITIES},
        "patients of density missing": patient.nunique() - patient[density.notna()].nunique(),
        **tally("machine " + table.rows["machine_id"] + " of " + site),
    }
    return {name: int(value) for name, value in {**dict.fromkeys(PUBLISHED, 0), **counts}.items()}


_MACHINES = {
    1: {49: 23529, 93: 1915, 216: 1908, 210: 1070, 170: 923, 190: 145, 197: 29},
    2: {48: 8699, 29: 8267, 21: 8221},
}
PUBLISHED = {
    "images": 54706, "patients": 11913, "breasts": 23826,
    "fewest images of a patient": 4, "most images of a patient": 14,
    "site 1": 29519, "site 2": 25187, "patients of site 1": 5818, "patients of site 2": 6095,
    "laterality R": 27439, "laterality L": 27267,
    "view MLO": 27903, "view CC": 26765, "view AT": 19, "view LM": 10, "view ML": 8, "view LMO": 1,
    "cancer 0": 53548, "cancer 1": 1158, "cancer 1 of site 1": 664, "cancer 1 of site 2": 494,
    "cancer 1, breasts": 492, "cancer 1, patients": 486, "cancer 1 with a BIRADS other than 0": 0,
    "biopsy 1": 2969, "invasive 1": 818, "implant 1": 1477, "difficult_negative_case True": 7705, "age missing": 37,
    "BIRADS missing": 28420, "BIRADS 1": 15772, "BIRADS 0": 8249, "BIRADS 2": 2265, "BIRADS 1 or 2 of site 2": 0,
    "density A": 3105, "density B": 12651, "density C": 12175, "density D": 1539, "density missing": 25236,
    "density missing of site 1": 49,
    "patients of density A": 553, "patients of density B": 2511, "patients of density C": 2436,
    "patients of density D": 309, "patients of density missing": 6104,
    **{f"machine {each} of site {site}": n for site, machines in _MACHINES.items() for each, n in machines.items()},
}  # fmt: skip

_RECALL = "1 negative, 2 benign, 0 recalled for more imaging (inferred: every cancer with an assessment has 0)"
_by_birads = by_value("birads", "all", f"{_RECALL}; of both sites", "birads", {1: "1", 2: "2", 0: "0"})


def _of_site_1(index: pandas.DataFrame) -> pandas.Series:
    return _by_birads.label(index).where(index["density"].notna())


BENCHMARK = Benchmark(
    name="rsna",
    title="RSNA Screening Mammography Breast Cancer Detection",
    homepage="https://www.kaggle.com/competitions/rsna-breast-cancer-detection",
    license="Kaggle competition rules",
    citation="Carr et al., RSNA Screening Mammography Breast Cancer Detection, Kaggle, 2022",
    read_index=read_index,
    definitions=(
        by_value(
            "cancer",
            "cancer",
            "positive: the breast has cancer by the column `cancer`, in every view of it; negative: all others",
            "cancer",
            {0: "no cancer", 1: "cancer"},
        ),
        Definition(
            "birads",
            "site_1",
            f"{_RECALL}; left out: images without a density, so that all are of site 1, as site 2 states only 0",
            _by_birads.classes,
            _of_site_1,
        ),
        _by_birads,
        four_densities("ACR density, which only site 1 states"),
        dense("ACR density, which only site 1 states"),
    ),
    count=count,
    published=PUBLISHED,
    no_sharing="the competition's rules forbid passing its data on; whoever needs them accepts the rules on Kaggle",
    notes=(
        "No official validation or test split with labels: patients are held out.",
        "Lesion presence and lesion type: absent, as there are no lesion labels; a recall (BIRADS 0) is no lesion.",
        "Site 2 has no density and of BIRADS only 0 or nothing: telling the sites apart pays. Density tasks are of "
        "site 1; the default definition of birads is too.",
    ),
)
