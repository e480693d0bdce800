"""BCS-DBT, Breast Cancer Screening - Digital Breast Tomosynthesis (TCIA, doi 10.7937/E4WT-CD02): labels and boxes.

data_dir holds the collection's CSV files, of one split or more, and its download. A row of the index is a volume. Boxes
are in the coordinates of the pixels that `read_views` turns right; their slice counts frames of the
file from 0, as in the collection's own reading code.
"""

import logging
from collections import Counter
from pathlib import Path

import pandas as pd

from dataset_scripts.corpus.bcs_dbt_volumes import BcsDbtViews, View

from .index import (
    SPLITS,
    Benchmark,
    Box,
    MetadataTable,
    collection_roots,
    files_by_element,
    make_box,
    make_index,
    read_csv,
    relative,
    say_where,
)

logger = logging.getLogger(__name__)

COLLECTION = "Breast-Cancer-Screening-DBT"
REMEDY = "give the folder with BCS-DBT-labels-*.csv, BCS-DBT-file-paths-*.csv and BCS-DBT-boxes-*.csv of the collection"
LISTS = ("labels", "boxes", "file-paths")
KEY = ("PatientID", "StudyUID", "View")
GROUPS = ("Normal", "Actionable", "Benign", "Cancer")
CORNER = ("X", "Y", "Width", "Height")
BOX_COLUMNS = (*KEY, "Slice", *CORNER, "Class", "VolumeSlices")


def read_index(data_dir: Path) -> pd.DataFrame:
    """Return the index of the volumes of each split whose labels are there.

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
            unboxed: list | None = [] if group[row] == "Normal" else None  # nothing there, or nobody boxed it
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
    """Return the newest of the releases: names end in -v2, in -PHASE-2-Jan-2024, in both or in neither."""
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
    """Return the one of GROUPS that is 1 in each row, whose KEY must be filled."""
    for column in KEY:
        labels.text(column, required=True)
    flags = pd.DataFrame({group: labels.choice(group, {"0": 0, "1": 1}).astype(int) for group in GROUPS})
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
    """Return boxes and lesion types by KEY; None for what no file says."""
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
        corners = x[row], y[row], x[row] + width[row], y[row] + height[row]
        boxes.setdefault(key, []).append(make_box(corners, table.rows["Class"][row], int(slices[row])))
        if types is not None:
            types.setdefault(key, set()).add(kinds[row])
    return boxes, types


def _paths(data_dir: Path, split: str) -> dict[tuple, tuple[str, str]] | None:
    """Return (descriptive, classic) by KEY, forward slashes; None without the list."""
    path = _find(data_dir, "file-paths", split)
    if path is None:
        return None
    table = read_csv(path, (*KEY, "descriptive_path", "classic_path"), REMEDY)
    both = (table.text(name, required=True).str.replace("\\", "/") for name in ("descriptive_path", "classic_path"))
    keys = table.rows[list(KEY)].itertuples(index=False, name=None)
    return dict(zip(keys, zip(*both, strict=True), strict=True))


def locate(index: pd.DataFrame, data_dir: Path) -> pd.DataFrame:
    """Return the index with each `path` as it is on disk, descriptive or classic, below data_dir or the folder of the
    collection; other clients call folders and files otherwise: there the SeriesInstanceUID of the headers tells.

    A volume that is not found keeps the descriptive path, which is not there. Where was looked is logged.
    """
    data_dir = Path(data_dir)
    listed = {f"{key[1]}_{key[2]}": both for split in SPLITS for key, both in (_paths(data_dir, split) or {}).items()}
    roots = collection_roots(data_dir, COLLECTION)
    found: dict[str, Path] = {}
    for image in index["image_id"]:
        stated = listed.get(image, ())
        beside = [data_dir, *(root.parent for root in roots[1:])]  # a listed path begins with the collection
        files = [root / path for path in stated for root in beside]
        files += [root / path.partition("/")[2] for path in stated for root in roots]
        if file := next((file for file in files if file.is_file()), None):
            found[image] = file
    if absent := [image for image in index["image_id"] if image in listed and image not in found]:
        series = {image: listed[image][1].split("/")[-2] for image in absent}
        shared = Counter(classic.split("/")[-2] for _, classic in listed.values())
        by_header = files_by_element(data_dir, "SeriesInstanceUID", set(found.values()))
        told = {each: files[0] for each, files in by_header.items() if len(files) == 1 and shared[each] == 1}
        found |= {image: told[each] for image, each in series.items() if each in told}
    absent = [image for image in absent if image not in found]
    say_where("bcs_dbt", data_dir, COLLECTION, absent, len(index), ", and for SeriesInstanceUID in the headers")
    paths = {image: both[0] for image, both in listed.items()} | {
        image: relative(file, data_dir) for image, file in found.items()
    }
    return index.assign(path=index["image_id"].map(paths).astype("string"))


def read_views(data_dir: Path) -> BcsDbtViews:
    """Return what sets side and orientation of the volumes right, from the newest list of paths of each split."""
    newest = (_find(data_dir, "file-paths", split) for split in SPLITS)
    return BcsDbtViews.from_csv([path for path in newest if path])


def read_tables(data_dir: Path) -> dict[str, pd.DataFrame]:
    """Return `volumes` and `studies` of each split that is there, of all where all three are, and `boxes`.

    A study is in the worst of its volumes' groups.
    """
    labels = {
        split: labels.rows.assign(part=split, group=_groups(labels)) for split, labels in _labels(data_dir).items()
    }
    if len(labels) == len(SPLITS):
        labels["all"] = pd.concat(labels.values()).assign(part="all")
    volumes = pd.concat(labels.values(), ignore_index=True)
    volumes["group"] = pd.Categorical(volumes["group"], GROUPS, ordered=True)
    studies = volumes.groupby(["part", "StudyUID"], as_index=False)["group"].max()
    paths = {split: path for split in SPLITS if split in labels and (path := _find(data_dir, "boxes", split))}
    boxes = [read_csv(path, BOX_COLUMNS, REMEDY).rows.assign(part=split) for split, path in paths.items()]
    tables = {"volumes": volumes, "studies": studies}
    if boxes:
        tables["boxes"] = pd.concat(boxes).assign(kind=lambda rows: pd.Categorical(rows["Class"], ("benign", "cancer")))
    return tables


BENCHMARK = Benchmark.from_yaml(
    __file__, read_index=read_index, read_tables=read_tables, locate=locate, read_views=read_views
)
