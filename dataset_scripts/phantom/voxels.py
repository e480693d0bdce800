"""A voxel breast of others, imaged as the phantom's own: a MetaImage file (.mhd) of tissue codes, such as VICTRE's.

The anatomy is then not ours (VICTRE: Badano et al., JAMA Netw. Open 1 (2018) e185474); projection, detector,
reconstruction and files are. Axes of the file: x from the chest wall to the nipple, y along the chest wall, z up, from
the breast support to the paddle.
"""

import gzip
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from .anatomy import (
    ADIPOSE,
    CARCINOMA,
    DENSITY_CLASSES,
    DENSITY_MEDIANS,
    FIBROGLANDULAR,
    Breast,
    BreastLabels,
    PhantomParameters,
    place_of,
)

FAT, SKIN, NIPPLE, MUSCLE, MASS = 1, 2, 33, 40, 200
OUTSIDE = (0, 50)  # air, compression paddle
GLANDULAR = (29, 88, 95, 125, 150, 225)  # gland, ligament, terminal unit, duct, artery, vein
# Codes of Graff's phantom [4] -> attenuation in 1/mm at 20 keV [1]; what is neither fat nor cancer counts as
# fibroglandular, as in `anatomy`. The paddle is left out: its plane shadow would only be subtracted again.
ATTENUATION = (
    dict.fromkeys(OUTSIDE, 0.0)
    | dict.fromkeys((SKIN, NIPPLE, MUSCLE, *GLANDULAR), FIBROGLANDULAR)
    | {FAT: ADIPOSE, MASS: CARCINOMA}
)


def read_metaimage(file: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Return the codes (z, y, x) uint8 of a MetaImage file and its spacing in mm, likewise.

    The voxels lie beside the header, plain or as .gz. Raises ValueError naming the field that is not supported, OSError
    where a file is missing.
    """
    fields: dict[str, str] = dict(
        re.findall(r"^\s*(\w+)\s*=\s*(.*?)\s*$", file.read_text(errors="replace"), re.MULTILINE)
    )
    for name, wanted in {"NDims": "3", "ElementType": "MET_UCHAR", "CompressedData": "False"}.items():
        if fields.get(name, "False" if name == "CompressedData" else None) != wanted:
            raise ValueError(f"{file}: {name} = {fields.get(name)}, must be {wanted}; save it so")
    try:
        width, height, depth = map(int, fields["DimSize"].split())
        x_mm, y_mm, z_mm = map(float, fields.get("ElementSpacing", fields.get("ElementSize", "")).split())
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: DimSize and ElementSpacing must hold three numbers each") from error
    raw = file.parent / fields.get("ElementDataFile", f"{file.stem}.raw")
    if not raw.exists() and (packed := raw.with_name(f"{raw.name}.gz")).exists():
        content = gzip.decompress(packed.read_bytes())
    else:
        content = raw.read_bytes()
    if len(content) != width * height * depth:
        raise ValueError(f"{raw}: {len(content)} bytes, {file.name} says {width} x {height} x {depth}; fetch it again")
    return np.frombuffer(content, np.uint8).reshape(depth, height, width), (z_mm, y_mm, x_mm)


def voxel_breast(file: Path, parameters: PhantomParameters, seed: int = 0) -> Breast:
    """Return the breast of a file as a left one in CC view, on voxels as near to the parameters' spacings as fit.

    The field is the file's, whatever the parameters say; rows are as high as columns are wide but for half a pixel over
    the whole field.

    Labels are read from the codes: the mass (called cancer, for VICTRE's is spiculated), and the class of density whose
    median of the phantom is nearest. Raises ValueError for a code that is not of ATTENUATION.
    """
    codes, (z_mm, y_mm, x_mm) = read_metaimage(file)
    found = np.bincount(codes.reshape(-1), minlength=256)
    if unknown := sorted(set(np.flatnonzero(found).tolist()) - ATTENUATION.keys()):
        raise ValueError(f"{file}: unknown tissue code {unknown[0]}; known are {', '.join(map(str, ATTENUATION))}")
    if not (breast := found[[FAT, MASS, *GLANDULAR]].sum()):
        raise ValueError(f"{file}: holds no breast, only air, paddle, skin and muscle; give another file")
    depth, height, width = (
        max(1, round(count * mm / spacing))
        for count, mm, spacing in zip(codes.shape, (z_mm, y_mm, x_mm), parameters.voxel_mm, strict=True)
    )
    shape: dict[str, Any] = {"num_slices": depth, "height_px": height, "width_px": width}
    shape |= {"slice_spacing_mm": codes.shape[0] * z_mm / depth, "pixel_spacing_mm": codes.shape[2] * x_mm / width}
    try:
        p = replace(parameters, **shape)
    except ValueError as error:
        raise ValueError(f"{file}: at these spacings {error}; give others") from error
    table = np.zeros(256, np.float32)
    table[list(ATTENUATION)] = list(ATTENUATION.values())
    volume, body, mass = (
        _resample(values, codes, (depth, height, width))
        for values in (table, (table > 0).astype(np.float32), (np.arange(256) == MASS).astype(np.float32))
    )
    fraction = found[[MASS, *GLANDULAR]].sum() / breast
    density = np.abs(np.log(max(fraction, 1e-3) / np.array(DENSITY_MEDIANS))).argmin()
    labels = BreastLabels(DENSITY_CLASSES[density], float(fraction))
    if mass.any():
        labels = replace(labels, lesion=1, lesion_type="mass_spiculated", cancer=1, **place_of(mass))
    vendor = "hologic" if p.vendor == "mixed" else p.vendor
    return Breast(volume, body, labels, "L", "CC", p, seed, 0, vendor)


def _resample(values: np.ndarray, codes: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the mean of `values` of the codes (z, y, x) in each voxel of `shape`, float32; the first is uppermost."""
    depth, height, width = shape
    flat = np.empty((len(codes), height * width), np.float32)
    for one, out in zip(codes[::-1], flat, strict=True):
        out[:] = cv2.resize(values[one], (width, height), interpolation=cv2.INTER_AREA).ravel()
    edges, planes = np.linspace(0, len(codes), depth + 1)[:, None], np.arange(len(codes))
    share = np.clip(np.minimum(edges[1:], planes + 1) - np.maximum(edges[:-1], planes), 0, 1)
    share /= share.sum(axis=1, keepdims=True)  # (depth, z): how much of a slice each plane is
    return (share.astype(np.float32) @ flat).reshape(shape)
