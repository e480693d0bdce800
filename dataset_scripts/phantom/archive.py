"""Simulated breasts with known labels: anatomy, mammogram, tomosynthesis and a small DICOM archive.

A breast is a volume of X-ray attenuation (`phantom_anatomy`, `phantom_lesions`), imaged as a mammogram and as
limited-angle tomosynthesis on the geometry of a vendor's system (`phantom_acquisition`); parameters and sources stand
in `phantom_breast`. It is a pure function of (seed, index, parameters). A patient is imaged in one view, or in several
that share density, build and lesion, not the exact tissue: views are compressed differently. Simulated, for research
on methods only.

Axes: D slices from the compression paddle to the detector, H rows along the chest wall, W columns. A left breast has
its chest wall on the left side of the image, a right breast on the right.

    python -m dataset_scripts.phantom --output DIR --num_patients 8 --seed 0 --num_proc 2
"""

import argparse
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np

from .acquisition import GEOMETRIES, acquire_2d, acquire_dbt
from .anatomy import (
    ADIPOSE,
    ANATOMY,
    DENSITY_CLASSES,
    FIBROGLANDULAR,
    LESION,
    LESION_SHAPE,
    LESION_TYPES,
    PATIENT,
    VIEWS,
    Breast,
    PhantomParameters,
    draw_anatomy,
    draw_patient,
    exposure_generator,
    glandular_fraction,
    random_generator,
)
from .dicom import DEFAULT_SYNTAX, TRANSFER_SYNTAXES, BreastInfo, BreastLabels, write_patients
from .lesions import add_lesion, draw_lesion

__all__ = [
    "ADIPOSE",
    "DENSITY_CLASSES",
    "FIBROGLANDULAR",
    "GEOMETRIES",
    "LESION_TYPES",
    "Breast",
    "BreastLabels",
    "PhantomParameters",
    "acquire_2d",
    "acquire_dbt",
    "simulate_breast",
    "write_archive",
]
DEFAULTS = PhantomParameters()
VIEWS_PER_PATIENT = (1, 2, 4)


def simulate_breast(
    parameters: PhantomParameters,
    seed: int,
    index: int,
    lesion: bool = True,
    laterality: str | None = None,
    view: str | None = None,
) -> Breast:
    """The breast of patient (seed, index), in the patient's own view or in another.

    Args:
        lesion: False gives the same breast with its lesion left out.
        laterality: "L" or "R". The lesion, if there is one, is in the breast that is taken when None is given.
        view: "CC" or "MLO".
    """
    p, rng = parameters, random_generator(seed, index, PATIENT)
    patient, vendor = draw_patient(rng), p.vendor
    if vendor == "mixed":
        vendor = rng.choice(list(GEOMETRIES)).item()
    laterality, view = laterality or patient.laterality, view or patient.view
    if (laterality, view) not in VIEWS:
        raise ValueError(f"laterality={laterality!r}, view={view!r}: must be L or R, and CC or MLO")
    anatomy = draw_anatomy(exposure_generator(seed, index, laterality, view, ANATOMY), patient, view, p)
    volume, truth = anatomy.volume, (patient.density, glandular_fraction(anatomy))
    found = draw_lesion(random_generator(seed, index, LESION), p.lesion_probability)
    if found and lesion and laterality == patient.laterality:
        shape = exposure_generator(seed, index, laterality, view, LESION_SHAPE)
        volume = add_lesion(shape, found, anatomy, view, p)
        difference = np.abs(volume - anatomy.volume)
        spans = [np.flatnonzero(difference.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
        (d0, d1), (y0, y1), (x0, x1) = ((int(span[0]), int(span[-1]) + 1) for span in spans)
        x0, x1 = (p.width_px - x1, p.width_px - x0) if laterality == "R" else (x0, x1)
        middle = int(np.average(np.arange(p.num_slices), weights=difference.sum(axis=(1, 2))).round())
        truth += (1, found.lesion_type, int(found.malignant), (x0, y0, x1, y1), middle, (d0, d1))
    side = np.s_[:, :, :: -1 if laterality == "R" else 1]
    volume, body = (np.ascontiguousarray(array[side]) for array in (volume, anatomy.body))
    return Breast(volume, body, BreastLabels(*truth), laterality, view, p, seed, index, vendor)


def _image(exposure: tuple[int, str | None, str | None], seed: int, parameters: PhantomParameters):
    patient, laterality, view = exposure
    breast = simulate_breast(parameters, seed, patient, laterality=laterality, view=view)
    spacing_mm = parameters.pixel_spacing_mm, parameters.slice_spacing_mm
    info = BreastInfo(f"PHANTOM-{patient:06d}", breast.laterality, breast.view, *spacing_mm, seed, breast.vendor)
    return info, breast.labels, acquire_dbt(breast), acquire_2d(breast)


def _exposures(patients: range, seed: int, views_per_patient: int) -> list[tuple[int, str | None, str | None]]:
    if views_per_patient not in VIEWS_PER_PATIENT:
        raise ValueError(f"views_per_patient={views_per_patient}: must be one of {VIEWS_PER_PATIENT}")
    if views_per_patient == 1:
        return [(patient, None, None) for patient in patients]
    if views_per_patient == 2:
        return [(patient, None, view) for patient in patients for view in ("CC", "MLO")]
    return [(patient, *view) for patient in patients for view in VIEWS]


def write_archive(
    output,
    num_patients,
    seed=0,
    parameters=DEFAULTS,
    num_proc=1,
    first_patient=0,
    transfer_syntax=DEFAULT_SYNTAX,
    views_per_patient=1,
) -> Path:
    """Write DIR/PHANTOM-000012/{L,R}_{CC,MLO}_{dbt,2d}.dcm, then DIR/labels.csv; return that.

    labels.csv covers the patients of this call and comes last: where it stands, the archive is complete.

    Args:
        views_per_patient: 1, a view of one breast; 2, both views of it; 4, both of both breasts.
    """
    patients = range(first_patient, first_patient + num_patients)
    image = partial(_image, seed=seed, parameters=parameters)
    return write_patients(output, _exposures(patients, seed, views_per_patient), image, num_proc, transfer_syntax)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Write an archive of simulated mammograms and DBT with labels.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    counts = {"num_patients": (8, "patients"), "first_patient": (0, "number of the first patient")}
    counts |= {"seed": (0, "the archive is a function of it"), "num_proc": (1, "processes")}
    numbers = [option for option in fields(PhantomParameters) if "limits" in option.metadata]
    counts |= {option.name: (option.default, option.metadata["help"]) for option in numbers}
    for name, (default, meaning) in counts.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{meaning} (default {default})")
    for option in fields(PhantomParameters):
        if "choices" in option.metadata:
            choices = option.metadata["choices"]
            parser.add_argument(
                f"--{option.name}", choices=choices, default=option.default, help=option.metadata["help"]
            )
    parser.add_argument(
        "--views_per_patient",
        type=int,
        choices=VIEWS_PER_PATIENT,
        default=1,
        help="1: a view of one breast; 2: both views of it; 4: both of both breasts (default 1)",
    )
    parser.add_argument(
        "--transfer_syntax",
        choices=TRANSFER_SYNTAXES,
        default=DEFAULT_SYNTAX,
        help="how the pixels are encoded, to try a pipeline on it; 8 bits where it holds no 12 (default %(default)s)",
    )
    options = vars(parser.parse_args(arguments))
    try:
        parameters = PhantomParameters(**{o.name: options.pop(o.name) for o in fields(PhantomParameters)})
        write_archive(parameters=parameters, **options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"dataset_scripts.phantom.archive: {error}") from None


if __name__ == "__main__":
    main()
