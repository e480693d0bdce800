"""BCS-DBT, Breast Cancer Screening - Digital Breast Tomosynthesis (TCIA, doi 10.7937/E4WT-CD02): labels and boxes.

data_dir holds the collection's CSV files, of one split or more, and its download. A row of the index is a volume. Boxes
are in the coordinates of the pixels that `bcs_dbt.BcsDbtViews.correct` turns right; their slice counts frames of the
file from 0, as in the collection's own reading code.
"""

import logging
from pathlib import Path

import pandas

from dataset_scripts.corpus.bcs_dbt_volumes import View

from .index import Benchmark, Box, by_value, make_index, single_type
from .tables import MetadataTable, collection_roots, read_csv, relative

logger = logging.getLogger(__name__)

COLLECTION = "Breast-Cancer-Screening-DBT"
REMEDY = "give the folder with BCS-DBT-labels-*.csv, BCS-DBT-file-paths-*.csv and BCS-DBT-boxes-*.csv of the collection"
SPLITS = ("train", "validation", "test")
LISTS = ("labels", "boxes", "file-paths")
KEY = ("PatientID", "StudyUID", "View")
GROUPS = ("Normal", "Actionable", "Benign", "Cancer")
CORNER = ("X", "Y", "Width", "Height")
BOX_COLUMNS = (*KEY, "Slice", *CORNER, "Class", "VolumeSlices")


def read_index(data_dir: Path) -> pandas.DataFrame:
    """SCHEMA rows of the volumes of each split whose labels are there.

    `path` is the descriptive one, missing where the list of paths is. Raises FileNotFoundError without any labels,
    ValueError naming file, row and column. What is not there is logged.
    """
    rows, tables = [], _labels(data_dir)
    if absent := [split for split in SPLITS if split not in tables]:
        logger.info("bcs_dbt: no labels of %s: a part of the collection", " and ".join(absent))
    for split, labels in tables.items():
        group = _groups(labels)
        boxes, types = _boxes(data_dir, split, labels)
        paths = _paths(data_dir, split)
        lists = [path.name for what in LISTS if (path := _find(data_dir, what, split))]
        logger.info("bcs_dbt: %s: from %s; what other lists say is missing", split, ", ".join(lists))
        for row, key in enumerate(labels.rows[list(KEY)].itertuples(index=False, name=None)):
            view = View.parse(key[2])
            if view is None:
                raise labels.fault(row, "View", "not one of lcc, lmlo, rcc, rmlo, perhaps with a number")
            unboxed = [] if group[row] == "Normal" else None  # nothing there, or nobody boxed it
            rows.append(
                {
                    "patient_id": key[0],
                    "study_id": key[1],
                    "breast_id": f"{key[1]}_{view.laterality}",
                    "image_id": f"{key[1]}_{key[2]}",
                    "laterality": view.laterality,
                    "view": view.view,
                    "split": split,
                    "path": paths and paths.get(key, (None,))[0],
                    "cancer": int(group[row] == "Cancer"),
                    "lesion": {"Normal": 0, "Actionable": None}.get(group[row], 1),
                    "lesion_types": types and (sorted(types[key]) if key in types else unboxed),
                    "boxes": boxes and boxes.get(key, unboxed),
                }
            )
    return make_index(rows, "bcs_dbt")


def _find(data_dir: Path, what: str, split: str) -> Path | None:
    """Of the releases that are there the newest: names end in -v2, in -PHASE-2-Jan-2024, in both or in neither."""
    found = sorted(
        Path(data_dir).glob(f"BCS-DBT?{what}-{split}*.csv"),
        key=lambda path: ("PHASE-2" in path.name, "-v2" in path.name, path.name),
    )
    return found[-1] if found else None


def _labels(data_dir: Path) -> dict[str, MetadataTable]:
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"{data_dir}: no such folder; {REMEDY}")
    paths = {split: path for split in SPLITS if (path := _find(data_dir, "labels", split))}
    if not paths:
        raise FileNotFoundError(f"{data_dir}: no BCS-DBT-labels-*.csv; {REMEDY}")
    return {split: read_csv(path, (*KEY, *GROUPS), REMEDY) for split, path in paths.items()}


def _groups(labels: MetadataTable) -> list[str]:
    """The one of GROUPS that is 1 in each row."""
    flags = pandas.DataFrame({group: labels.choice(group, {"0": 0, "1": 1}).astype(int) for group in GROUPS})
    wrong = flags.sum(axis=1) != 1
    if wrong.any():
        raise labels.fault(int(wrong.argmax()), "Normal", f"but one of {', '.join(GROUPS)} must be 1")
    repeated = labels.rows.duplicated(list(KEY))
    if repeated.any():
        raise labels.fault(int(repeated.argmax()), "View", "which the study has in an earlier row")
    return flags.idxmax(axis=1).tolist()


def _boxes(
    data_dir: Path, split: str, labels: MetadataTable
) -> tuple[dict[tuple, list[Box]] | None, dict[tuple, set[str]] | None]:
    """Boxes and lesion types by KEY; None for what no file says."""
    path = _find(data_dir, "boxes", split)
    if path is None:
        return None, None
    table = read_csv(path, BOX_COLUMNS, REMEDY, optional=("AD",))
    known = set(labels.rows[list(KEY)].itertuples(index=False, name=None))
    slices, depth = (table.whole(name, required=True) for name in ("Slice", "VolumeSlices"))
    x, y, width, height = (table.number(name, required=True) for name in CORNER)
    table.choice("Class", {"benign": 0, "cancer": 1})
    boxes: dict[tuple, list[Box]] = {}
    types: dict[tuple, set[str]] | None = None
    if "AD" in table.rows:
        types = {}
        kinds = table.choice("AD", {"0": "mass", "1": "architectural distortion"})
    for row, key in enumerate(table.rows[list(KEY)].itertuples(index=False, name=None)):
        if key not in known:
            raise table.fault(row, "View", f"of {key[1]}, which has no row in {labels.path.name}")
        if not 0 <= slices[row] < depth[row]:
            raise table.fault(row, "Slice", f"not in 0..{depth[row] - 1} by VolumeSlices")
        if not (width[row] > 0 and height[row] > 0):
            raise table.fault(row, "Width", "and Width and Height must be positive")
        left, top = float(x[row]), float(y[row])
        box = Box(
            x0=left, y0=top, x1=left + float(width[row]), y1=top + float(height[row]),
            slice=int(slices[row]), label=table.rows["Class"][row],
        )  # fmt: skip
        boxes.setdefault(key, []).append(box)
        if types is not None:
            types.setdefault(key, set()).add(kinds[row])
    return boxes, types


def _paths(data_dir: Path, split: str) -> dict[tuple, tuple[str, str]] | None:
    """(descriptive, classic) by KEY, forward slashes; None without the list."""
    path = _find(data_dir, "file-paths", split)
    if path is None:
        return None
    table = read_csv(path, (*KEY, "descriptive_path", "classic_path"), REMEDY)
    both = (table.text(name, required=True).str.replace("\\", "/") for name in ("descriptive_path", "classic_path"))
    keys = table.rows[list(KEY)].itertuples(index=False, name=None)
    return dict(zip(keys, zip(*both, strict=True), strict=True))


def locate(index: pandas.DataFrame, data_dir: Path) -> pandas.DataFrame:
    """The index with each `path` as it is on disk, descriptive or classic, also in a manifest-* folder."""
    data_dir = Path(data_dir)
    listed = {f"{key[1]}_{key[2]}": both for split in SPLITS for key, both in (_paths(data_dir, split) or {}).items()}
    roots = list(dict.fromkeys([data_dir, *(root.parent for root in collection_roots(data_dir, COLLECTION)[1:])]))

    def on_disk(image: str) -> str | None:
        stated = listed.get(image, ())
        files = (root / path for path in stated for root in roots)
        return next((relative(file, data_dir) for file in files if file.is_file()), next(iter(stated), None))

    return index.assign(path=index["image_id"].map(on_disk).astype("string"))


def count(data_dir: Path) -> dict[str, int]:
    """Volumes, studies, patients and boxes of each split that is there; of all where all three are."""
    tables = _labels(data_dir)
    counts: dict[str, int] = {}
    parts = []
    for split, labels in tables.items():
        rows = labels.rows.assign(group=_groups(labels))
        parts.append(rows)
        counts |= _count(split, rows)
        path = _find(data_dir, "boxes", split)
        if path is not None:
            classes = read_csv(path, BOX_COLUMNS, REMEDY).rows["Class"]
            counts[f"{split}: boxes"] = len(classes)
            counts |= {f"{split}: boxes of {name}": (classes == name).sum() for name in ("benign", "cancer")}
    if len(parts) == len(SPLITS):
        counts |= _count("all", pandas.concat(parts, ignore_index=True))
    return {name: int(value) for name, value in counts.items()}


def _count(split: str, rows: pandas.DataFrame) -> dict[str, int]:
    """A study counts in the worst of its volumes' groups."""
    worst = rows["group"].map(GROUPS.index).groupby(rows["StudyUID"]).max()
    return {
        f"{split}: volumes": len(rows),
        f"{split}: studies": rows["StudyUID"].nunique(),
        f"{split}: patients": rows["PatientID"].nunique(),
        **{f"{split}: {group}": (rows["group"] == group).sum() for group in GROUPS},
        **{f"{split}: studies {group}": (worst == rank).sum() for rank, group in enumerate(GROUPS)},
    }


PUBLISHED = {
    "train: volumes": 19148, "train: studies": 4838, "train: patients": 4362,
    "train: Normal": 18232, "train: Actionable": 716, "train: Benign": 124, "train: Cancer": 76,
    "validation: volumes": 1163,
    "validation: Normal": 928, "validation: Actionable": 160, "validation: Benign": 38, "validation: Cancer": 37,
    "test: volumes": 1721, "test: Normal": 1356, "test: Actionable": 244, "test: Benign": 61, "test: Cancer": 60,
    "train: boxes": 224, "validation: boxes": 75, "test: boxes": 136,
    "all: volumes": 22032, "all: studies": 5610, "all: patients": 5060,
    "all: studies Normal": 5129, "all: studies Actionable": 280, "all: studies Benign": 112, "all: studies Cancer": 89,
    # published nowhere: counted in the released files
    "train: boxes of benign": 137, "train: boxes of cancer": 87,
    "train: studies Normal": 4558, "train: studies Actionable": 179, "train: studies Benign": 62,
    "train: studies Cancer": 39,
}  # fmt: skip

BENCHMARK = Benchmark(
    name="bcs_dbt",
    title="BCS-DBT: Breast Cancer Screening - Digital Breast Tomosynthesis",
    homepage="https://doi.org/10.7937/E4WT-CD02",
    license="CC BY-NC 4.0",
    citation="Buda et al., Detection of masses and architectural distortions in digital breast tomosynthesis, "
    "JAMA Network Open 4(8), e2119100, 2021",
    read_index=read_index,
    definitions=(
        by_value(
            "cancer",
            "biopsy",
            "positive: the view shows a cancer proven by biopsy; negative: benign by biopsy, actionable and normal",
            "cancer",
            {0: "no cancer", 1: "cancer"},
        ),
        by_value(
            "lesion",
            "biopsied",
            "positive: the view shows a lesion that was biopsied, benign or cancer; negative: normal; left out: "
            "actionable, recalled without a biopsy, so that nobody boxed what was seen",
            "lesion",
            {0: "normal", 1: "lesion"},
        ),
        single_type(
            "mass_or_distortion",
            "AD of the view's boxes: 1 architectural distortion, 0 taken as mass, the two kinds that were boxed; left "
            "out: views without a box or with both",
            {"mass": "mass", "architectural distortion": "architectural distortion"},
        ),
    ),
    count=count,
    published=PUBLISHED,
    locate=locate,
    notes=(
        "CC BY-NC: sharing needs attribution and is for non-commercial use only.",
        "Volumes: side and orientation of some files are wrong; dataset_scripts.corpus.bcs_dbt_volumes sets them right, and the boxes "
        "are in those coordinates.",
        "Official split into train, validation and test; which of them is there is said.",
        "No BI-RADS and no density in the labels, so neither task.",
        "A box stands on the slice where the lesion is seen best; other slices of the lesion have none.",
    ),
)
