"""An archive of simulated breasts: DICOM files and labels.csv.

    python -m dataset_scripts.phantom --output DIR --num_patients 8 --seed 0 --num_proc 2
    python -m dataset_scripts.phantom --output DIR --voxels BREAST.mhd --pixel_spacing_mm 0.2 --slice_spacing_mm 1

A breast is a volume of X-ray attenuation (`anatomy`, `lesions`), imaged as a mammogram and as limited-angle
tomosynthesis on the geometry of a vendor's system (`acquisition`), and written as `dicom`. It is a pure function of
(seed, index, parameters). A patient is imaged in one view, or in several that share density, build and lesion, not the
exact tissue: views are compressed differently. Simulated, for research on methods only.

Axes: D slices from the compression paddle to the detector, H rows along the chest wall, W columns. A left breast has
its chest wall on the left side of the image, a right breast on the right.
"""

import csv
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from modeling_mammodino.tools.command import CommandParser, command_line, show_progress, user_path
from modeling_mammodino.tools.files import atomic_file

from .acquisition import GEOMETRIES, acquire_2d, acquire_dbt
from .anatomy import (
    ANATOMY,
    LESION,
    LESION_SHAPE,
    PATIENT,
    VIEWS,
    Breast,
    BreastLabels,
    PhantomParameters,
    draw_anatomy,
    draw_patient,
    exposure_generator,
    glandular_fraction,
    place_of,
    random_generator,
)
from .dicom import (
    DEFAULT_SYNTAX,
    TRANSFER_SYNTAXES,
    BreastInfo,
    check_encoder,
    mammogram_dataset,
    save,
    tomosynthesis_dataset,
)
from .lesions import add_lesion, draw_lesion
from .voxels import voxel_breast

VIEWS_PER_PATIENT = (1, 2, 4)
LABEL_COLUMNS = (
    *("file", "patient", "laterality", "view", "kind"),  # kind: "dbt" or "ffdm"; file: relative to labels.csv
    *("density", "lesion", "lesion_type", "cancer", "x0", "y0", "x1", "y1", "lesion_slice"),
    *("lesion_first_slice", "lesion_last_slice", "glandular_fraction", "vendor"),  # last: the last with lesion in it
)
Exposure = tuple[int, str | None, str | None] | Path  # patient, laterality, view; or a file of voxels


def simulate_breast(
    parameters: PhantomParameters,
    seed: int,
    index: int,
    lesion: bool = True,
    laterality: str | None = None,
    view: str | None = None,
) -> Breast:
    """Simulate the breast of patient (seed, index), in the patient's own view or in another.

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
    volume, body, labels = anatomy.volume, anatomy.body, BreastLabels(patient.density, glandular_fraction(anatomy))
    found, before = draw_lesion(random_generator(seed, index, LESION), p.lesion_probability), volume
    if found and lesion and laterality == patient.laterality:
        shape = exposure_generator(seed, index, laterality, view, LESION_SHAPE)
        volume = add_lesion(shape, found, anatomy, view, p)
    if laterality == "R":
        volume, body, before = (np.ascontiguousarray(each[..., ::-1]) for each in (volume, body, before))
    if found and lesion and laterality == patient.laterality:
        kind, cancer = found.lesion_type, int(found.malignant)
        labels = replace(labels, lesion=1, lesion_type=kind, cancer=cancer, **place_of(volume - before))
    return Breast(volume, body, labels, laterality, view, p, seed, index, vendor)


def write_archive(
    output: str | Path,
    num_patients: int,
    seed: int = 0,
    parameters: PhantomParameters | None = None,
    num_proc: int = 1,
    first_patient: int = 0,
    transfer_syntax: str = DEFAULT_SYNTAX,
    views_per_patient: int = 1,
    voxels: Sequence[Path] = (),
) -> Path:
    """Write DIR/PHANTOM-000012/{L,R}_{CC,MLO}_{dbt,2d}.dcm, then DIR/labels.csv; return that.

    labels.csv covers the patients of this call and comes last: where it stands, the archive is complete.

    Args:
        views_per_patient: 1, a view of one breast; 2, both views of it; 4, both of both breasts.
        voxels: MetaImage files of tissue codes, imaged in place of simulated patients; see `voxel_breast`.

    Raises:
        ValueError: of views_per_patient, transfer_syntax or a file of voxels.
        ImportError: where the encoder is not installed.
    """
    patients = range(first_patient, first_patient + num_patients)
    exposures: list[Exposure] = list(voxels) or list(_exposures(patients, views_per_patient))
    check_encoder(transfer_syntax)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    write = partial(
        _write_exposure,
        seed=seed,
        parameters=parameters or PhantomParameters(),
        output=output,
        transfer_syntax=transfer_syntax,
    )
    show = partial(show_progress, total=len(exposures), unit="breast")
    if num_proc > 1:  # spawn: safe beside threads of the caller
        with ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), cv2.setNumThreads, (1,)) as pool:
            rows = list(show(pool.map(write, exposures, chunksize=4)))
    else:
        rows = list(show(map(write, exposures)))
    labels = output / "labels.csv"
    with atomic_file(labels) as temporary, temporary.open("w", newline="") as stream:
        csv.writer(stream).writerows([LABEL_COLUMNS, *chain.from_iterable(rows)])
    return labels


def _exposures(patients: range, views_per_patient: int) -> Iterator[Exposure]:
    if views_per_patient not in VIEWS_PER_PATIENT:
        raise ValueError(f"views_per_patient={views_per_patient}: must be one of {VIEWS_PER_PATIENT}")
    by_number: dict[int, Sequence[tuple[str | None, str | None]]]
    by_number = {1: [(None, None)], 2: [(None, "CC"), (None, "MLO")], 4: VIEWS}
    return ((patient, laterality, view) for patient in patients for laterality, view in by_number[views_per_patient])


def _write_exposure(
    exposure: Exposure, seed: int, parameters: PhantomParameters, output: Path, transfer_syntax: str
) -> list[tuple]:
    """Write the volume and the mammogram of one view of a breast; return their rows of labels."""
    if isinstance(exposure, Path):
        breast, patient = voxel_breast(exposure, parameters, seed), exposure.stem
    else:
        number, laterality, view = exposure
        breast, patient = simulate_breast(parameters, seed, number, laterality=laterality, view=view), f"{number:06d}"
    spacing_mm = breast.parameters.pixel_spacing_mm, breast.parameters.slice_spacing_mm
    info = BreastInfo(f"PHANTOM-{patient}", breast.laterality, breast.view, *spacing_mm, seed, breast.vendor)
    truth = breast.labels
    first, end = truth.lesion_slices or (None, None)
    lesion = (truth.lesion, truth.lesion_type, truth.cancer, *(truth.box or (None,) * 4), truth.lesion_slice)
    labels = (truth.density, *lesion, first, end and end - 1, f"{truth.glandular_fraction:.4f}", info.vendor)
    rows = []
    datasets = {
        "dbt": tomosynthesis_dataset(acquire_dbt(breast), info),
        "2d": mammogram_dataset(acquire_2d(breast), info),
    }
    for kind, dataset in datasets.items():
        file = f"{info.patient}/{info.laterality}_{info.view}_{kind}.dcm"
        save(dataset, output / file, transfer_syntax)
        rows.append((file, info.patient, info.laterality, info.view, {"2d": "ffdm"}.get(kind, kind), *labels))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(
        prog="python -m dataset_scripts.phantom",
        description="Write an archive of simulated mammograms and DBT with labels.",
    )
    parser.add_argument("--output", type=user_path, required=True, help="folder to write")
    numbers: dict[str, tuple[Any, str]] = {
        "num_patients": (8, "patients"),
        "first_patient": (0, "number of the first patient"),
    }
    numbers |= {"seed": (0, "the archive is a function of it"), "num_proc": (1, "processes")}
    options = fields(PhantomParameters)
    numbers |= {each.name: (each.default, each.metadata["help"]) for each in options if "limits" in each.metadata}
    for name, (default, meaning) in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{meaning} (default {default})")
    for each in options:
        if "choices" in each.metadata:
            parser.add_argument(f"--{each.name}", default=each.default, **each.metadata)
    parser.add_argument(
        "--views_per_patient",
        type=int,
        choices=VIEWS_PER_PATIENT,
        default=1,
        help="1: a view of one breast; 2: both views of it; 4: both of both breasts (default 1)",
    )
    parser.add_argument(
        "--voxels",
        nargs="+",
        type=user_path,
        default=(),
        metavar="MHD",
        help="image these voxel breasts, such as VICTRE's, in place of simulated patients, at the spacings given here",
    )
    parser.add_argument(
        "--transfer_syntax",
        choices=TRANSFER_SYNTAXES,
        default=DEFAULT_SYNTAX,
        help="how the pixels are encoded, to try a pipeline on it; 8 bits where it holds no 12 (default %(default)s)",
    )
    given = vars(parser.parse_args(arguments))
    with command_line("phantom"):
        parameters = PhantomParameters(**{each.name: given.pop(each.name) for each in options})
        write_archive(parameters=parameters, **given)
