"""Breast Cancer Screening - Digital Breast Tomosynthesis (BCS-DBT; TCIA, doi 10.7937/E4WT-CD02): the true views.

For some volumes of the collection the header's laterality, or the orientation of the pixels, is wrong; the View of its
file lists is right. As in the collection's own reading code, the breast lies on the side whose edge column is brighter,
and where that is not the view's side the image is turned by half a turn. That code asks each slice; here the first
frame speaks for its volume, so that all slices agree. The collection's boxes are in the coordinates of the turned
pixels; their Slice counts frames in the order of the file.

    views = BcsDbtViews.from_csv(["BCS-DBT-file-paths-train-v2.csv"])
    slices = map(views.correction(path), iter_slices(path))
    images = image_processor.render_source(path, (518, 518), correct=views.correction(path))
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modeling_mammodino.dicom import Mammogram, frame_order, iter_slices, open_dicom
from modeling_mammodino.dicom_header import identifier
from modeling_mammodino.dicom_pixels import GraySettings
from modeling_mammodino.image_io import ImageFile, InvalidImageError

COLUMNS = ("PatientID", "StudyUID", "View", "descriptive_path", "classic_path")
UNWINDOWED = GraySettings(do_modality_lut=False, do_voi_lut=False)
PATH_PARTS = 4  # patient, study, series, file; what stands before depends on the download
REMEDY = "give the collection's BCS-DBT-file-paths-*.csv as downloaded"


class View(NamedTuple):
    laterality: str  # "L" or "R"
    view: str  # "CC" or "MLO"

    @classmethod
    def parse(cls, text: str) -> "View | None":
        """Parse the collection's notation: lcc, rmlo, and with the number of a repeated view lcc2, rmlo1."""
        found = re.fullmatch(r"([lr])(cc|mlo)\d*", text.strip().lower())
        return cls(found[1].upper(), found[2].upper()) if found else None


@dataclass
class BcsDbtViews:
    """View of each file that the lists know, and what became of the files that were asked for.

    Attributes:
        by_series: View by SeriesInstanceUID; None where two views share a series, so that the path decides.
        by_path: View by the last four parts of a path, classic or descriptive.
        counts: files asked of `correction`: "known", "turned" (of these), and "unknown", which are left as they are.
    """

    by_series: dict[str, View | None] = field(repr=False)
    by_path: dict[tuple[str, ...], View] = field(repr=False)
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def from_csv(cls, paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> "BcsDbtViews":
        """Read one or more BCS-DBT-file-paths-*.csv. Raises ValueError naming file, line, column and remedy."""
        by_series: dict[str, View | None] = {}
        by_path: dict[tuple[str, ...], View] = {}
        for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
            for line, row in _rows(Path(path)):
                view, where = View.parse(row["View"]), f"{path}, line {line}"
                if view is None:
                    raise ValueError(f"{where}: View is {row['View']!r}, not one of lcc, lmlo, rcc, rmlo; {REMEDY}")
                classic, descriptive = (
                    _path_key(row[name], f"{where}: {name}") for name in ("classic_path", "descriptive_path")
                )
                for key in (classic, descriptive):
                    if by_path.setdefault(key, view) != view:
                        raise ValueError(f"{where}: View contradicts an earlier line for {'/'.join(key)}; {REMEDY}")
                series = classic[-2]
                if not re.fullmatch(r"[0-9.]+", series):
                    raise ValueError(f"{where}: classic_path: {series!r} is not a SeriesInstanceUID; {REMEDY}")
                by_series[series] = view if by_series.get(series, view) == view else None
        return cls(by_series, by_path)

    def view_of(self, source: Any) -> View | None:
        """Return the view of a path, ImageFile or Dataset, by SeriesInstanceUID, else by path; None if not listed."""
        try:
            series = identifier(open_dicom(source).header, "SeriesInstanceUID")
        except InvalidImageError:  # no DICOM file; who reads it says so
            series = ""
        if found := self.by_series.get(series):
            return found
        if isinstance(source, ImageFile):
            source = source.identity or source.name
        elif not isinstance(source, (str, os.PathLike)):
            source = getattr(source, "filename", None) or ""
        return self.by_path.get(_parts(str(source))[-PATH_PARTS:])

    def correction(self, source: Any) -> Callable[[Mammogram], Mammogram]:
        """Return what corrects laterality, view and orientation of each slice of `source`; one call a volume, counted.

        Reads the header and, of a listed volume, the first frame; of a list of files, those of the first. Raises
        InvalidImageError as `iter_slices` does where a listed volume cannot be read.
        """
        source = source[0] if isinstance(source, (list, tuple)) else source
        view = self.view_of(source)
        if view is None:
            self.counts["unknown"] += 1
            return _unchanged
        opened = open_dicom(source)
        at = frame_order(opened).index(0)
        first = next(iter_slices(opened, UNWINDOWED, indices=[at]))
        turn = image_side(first.pixels) != view.laterality
        self.counts.update(known=1, turned=int(turn))
        return partial(_corrected, view=view, turn=turn)

    def correct(self, source: Any, slices: Iterable[Mammogram]) -> Iterator[Mammogram]:
        """Correct the `slices` of `source`, one at a time."""
        return map(self.correction(source), slices)


def image_side(pixels: np.ndarray) -> str:
    """Return "R" where the right edge column of (H, W) pixels, brighter is denser, has the larger sum, else "L"."""
    left, right = (pixels[:, column].sum(dtype=np.float64) for column in (0, -1))
    return "R" if left < right else "L"


def _unchanged(mammogram: Mammogram) -> Mammogram:
    return mammogram


def _corrected(mammogram: Mammogram, view: View, turn: bool) -> Mammogram:
    pixels = np.ascontiguousarray(mammogram.pixels[::-1, ::-1]) if turn else mammogram.pixels
    return replace(mammogram, pixels=pixels, laterality=view.laterality, view=view.view)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line number and row, each with all COLUMNS."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise ValueError(f"{path}: no column {missing[0]}; {REMEDY}")
            for row in reader:
                if empty := [name for name in COLUMNS if not (row[name] or "").strip()]:
                    raise ValueError(f"{path}, line {reader.line_num}: {empty[0]} is empty; {REMEDY}")
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file ({type(error).__name__}); {REMEDY}") from error


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[/\\]", path.strip()) if part)


def _path_key(path: str, where: str) -> tuple[str, ...]:
    parts = _parts(path)[-PATH_PARTS:]
    if len(parts) < PATH_PARTS:
        raise ValueError(f"{where} has {len(parts)} parts, not patient, study, series and file; {REMEDY}")
    return parts
