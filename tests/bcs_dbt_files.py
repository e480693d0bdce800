"""BCS-DBT in small: lists of views and volumes whose headers may be wrong."""

import csv

import numpy as np
from dicom_builders import BREAST, SLICES, phantom
from made_inputs import REAL_DATA

from dataset_scripts.corpus.bcs_dbt_volumes import COLUMNS
from modeling_mammodino.dicom_pixels import GraySettings

LISTS = REAL_DATA / "bcs_dbt"
STUDY, SERIES = "1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2"
CLASSIC = f"Breast-Cancer-Screening-DBT/DBT-P00013/{STUDY}/{SERIES}/1-1.dcm"
DESCRIPTIVE = "Breast-Cancer-Screening-DBT/DBT-P00013/01-01-2000-DBT-S00163-MAMMO-5/20566.000000-32081/1-1.dcm"
RIGHT = np.ascontiguousarray(SLICES if BREAST.laterality == "R" else SLICES[:, :, ::-1])  # (4, 65, 47)
LEFT = np.ascontiguousarray(RIGHT[:, :, ::-1])
UNWINDOWED = GraySettings(do_voi_lut=False)


def write_list(path, *rows):
    """Rows as (View, classic_path, descriptive_path), which default to those above."""
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for view, classic, descriptive in rows:
            writer.writerow(["DBT-P00013", "DBT-S00163", view, descriptive, classic])
    return path


def write_volume(path, slices, side, series=SERIES):
    """A DBT volume whose header states `side`, right or wrong."""
    dataset, _ = phantom(True)
    dataset.PixelData, dataset.SeriesInstanceUID = slices.tobytes(), series
    anatomy = dataset.SharedFunctionalGroupsSequence[0].FrameAnatomySequence[0]
    anatomy.FrameLaterality = side
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def half_turn(slices):
    return np.ascontiguousarray(slices[:, ::-1, ::-1])
