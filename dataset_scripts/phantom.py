"""Simulated breasts with known labels: anatomy, mammogram, tomosynthesis and a small DICOM archive.

A breast is a volume of X-ray attenuation: skin, adipose tissue, fibroglandular tissue from power-law noise, ligaments,
vessels and, in about half, a lesion. It is imaged as a mammogram and as limited-angle tomosynthesis with its
out-of-plane blur. Each breast is a pure function of (seed, index). The acquisition is of first order: parallel shifts,
one energy, no scatter. More physics belongs in `_project` and `_reconstruct`; the anatomy need not know.

Axes: D slices from the compression paddle to the detector, H rows along the chest wall, W columns. A left breast has
its chest wall on the left side of the image, a right breast on the right.

    python -m dataset_scripts.phantom --output DIR --num_patients 8 --seed 0 --num_proc 2
"""

import argparse
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial, reduce
from itertools import repeat
from pathlib import Path

import cv2
import numpy as np
from scipy import fft

from dataset_scripts.phantom_dicom import BreastInfo, BreastLabels, write_patients
from dataset_scripts.phantom_encoding import DEFAULT_SYNTAX, TRANSFER_SYNTAXES

# Linear attenuation in 1/mm at about 20 keV, after Johns and Yaffe, Phys. Med. Biol. 32 (1987) 675. Muscle and skin
# count as fibroglandular.
ADIPOSE, FIBROGLANDULAR, CALCIFICATION = 0.0456, 0.0802, 1.2

DENSITY_CLASSES = ("A", "B", "C", "D")
LESION_TYPES = ("mass_round", "mass_spiculated", "calcification")


def _option(default, low, high, meaning: str):
    return field(default=default, metadata={"help": meaning, "limits": (low, high)})


@dataclass(frozen=True)
class PhantomParameters:
    """What is simulated and how it is imaged. Each is an option of the command line too."""

    num_slices: int = _option(20, 4, 200, "slices D of a breast")
    height_px: int = _option(256, 48, 4096, "rows H, along the chest wall")
    width_px: int = _option(160, 32, 4096, "columns W, from the chest wall to the nipple")
    pixel_spacing_mm: float = _option(0.7, 0.02, 4, "pixel spacing in mm")
    slice_spacing_mm: float = _option(2.0, 0.2, 10, "slice spacing in mm")
    power_law_exponent: float = _option(3.0, 0, 6, "exponent of the power spectrum of tissue")
    lesion_probability: float = _option(0.5, 0, 1, "share of breasts with a lesion")
    num_projections: int = _option(15, 1, 99, "views of a tomosynthesis sweep")
    angle_range_deg: float = _option(40.0, 0, 120, "whole sweep of the tube in degrees")
    photons_per_view: float = _option(2e4, 1, 1e12, "quanta per pixel in air, one view of a sweep")
    photons_2d: float = _option(1e5, 1, 1e12, "quanta per pixel in air, mammogram")
    detector_blur_px: float = _option(0.6, 0, 10, "sigma of the detector's point spread in pixels")

    def __post_init__(self):
        for option in fields(self):
            (low, high), value = option.metadata["limits"], getattr(self, option.name)
            if not low <= value <= high:
                raise ValueError(f"{option.name}={value} is outside {low} to {high}")


@dataclass(frozen=True)
class Breast:
    """A simulated breast, as it lies in its images."""

    volume: np.ndarray  # attenuation in 1/mm, (D, H, W) float32
    body: np.ndarray  # share of each voxel inside the breast, (D, H, W) float32
    labels: BreastLabels
    laterality: str  # "L" or "R"
    view: str  # "CC" or "MLO"
    parameters: PhantomParameters
    seed: int
    index: int


def random_generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """Counter-based: one independent stream for each (seed, index, stream)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64), counter=[0, 0, 0, stream]))


@lru_cache(maxsize=8)
def _power_law_gain(shape: tuple, spacing: tuple, exponent: float, longest_mm: float, shortest_mm: float):
    axes = [fft.fftfreq(n, d) for n, d in zip(shape[:2], spacing[:2], strict=True)] + [
        fft.rfftfreq(shape[2], spacing[2])
    ]
    square = sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij", sparse=True))  # (cycles/mm)^2
    return ((square + longest_mm**-2) ** (-exponent / 4) * np.exp(-square * shortest_mm**2)).astype(np.float32)


def power_law_noise(rng, p: PhantomParameters, exponent: float, longest_mm: float, shortest_mm: float):
    """Gaussian noise (D, H, W) float32 of unit variance; power falls as frequency^-exponent between two wavelengths."""
    shape = (fft.next_fast_len(p.num_slices * 3 // 2), p.height_px, p.width_px)  # D padded: its ends must not meet
    spacing = (p.slice_spacing_mm, p.pixel_spacing_mm, p.pixel_spacing_mm)
    gain = _power_law_gain(shape, spacing, exponent, longest_mm, shortest_mm)
    spectrum = rng.standard_normal((*gain.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    noise = fft.irfftn(spectrum * gain, s=shape, workers=1)[: p.num_slices]
    return noise / noise.std()


def _outline(rng, view: str, height: int, width: int):
    """A left breast's silhouette and pectoral muscle (H, W) bool, its nipple (row, column) and half height in rows."""
    y, x, pectoral = np.arange(height), np.arange(width), np.zeros((height, width), bool)
    reach, shape, power = rng.uniform(0.55, 0.92) * width, rng.uniform(1.9, 2.7), rng.uniform(1.7, 2.2)
    if view == "CC":
        nipple, upper, floor = rng.uniform(0.43, 0.57) * height, rng.uniform(0.34, 0.46) * height, 0.0
        lower = upper * rng.uniform(0.9, 1.1)
    else:
        nipple, lower = rng.uniform(0.55, 0.66) * height, rng.uniform(0.26, 0.34) * height
        upper, floor = nipple * rng.uniform(1.0, 1.2), rng.uniform(0.2, 0.45)
        top, bottom = rng.uniform(0.25, 0.55) * width, rng.uniform(0.4, 0.75) * height
        pectoral = x < (top * np.clip(1 - y / bottom, 0, 1) ** rng.uniform(0.8, 1.25))[:, None]
    away = np.where(y < nipple, (nipple - y) / upper, (y - nipple) / lower)
    skin = np.clip(1 - away**shape, 0, 1) ** (1 / power)
    skin = np.where(y < nipple, floor + (1 - floor) * skin, skin)
    wobble = sum(rng.normal() / k * np.sin(k * np.pi * y / height + rng.uniform(0, 6.28)) for k in (2, 3, 4))
    skin *= reach * (1 + 0.03 * wobble)
    tip = float(skin[int(nipple)])
    silhouette = x < skin[:, None]
    if rng.random() < 0.6:  # nipple in profile
        silhouette |= np.hypot(y[:, None] - nipple, x[None] - tip + 0.015 * height) < 0.03 * height
    return silhouette, pectoral, (nipple, tip), (upper + lower) / 2


def _depth_mm(silhouette, half_thickness_mm: float, z_mm, pixel_spacing_mm: float):
    """Distance to the skin (D, H, W) and in the plane (H, W): flat under the paddles, a half circle at the margin."""
    margin = int(np.ceil(half_thickness_mm / pixel_spacing_mm)) + 2  # tissue goes on beyond the chest wall and the top
    padded = cv2.copyMakeBorder(silhouette.astype(np.uint8), margin, margin, margin, 0, cv2.BORDER_REPLICATE)
    inside = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[margin:-margin, margin:] * pixel_spacing_mm
    rim = np.maximum(half_thickness_mm - inside, 0) + half_thickness_mm * 2 * (~silhouette)
    return half_thickness_mm - np.sqrt(rim.astype(np.float32) ** 2 + z_mm[:, None, None] ** 2), inside


def _fan(noise, apex, stretch: float):
    """Bend noise (D, H, W) so that its structures run toward the apex (row, column), as ducts and ligaments do."""
    y, x = np.indices(noise.shape[1:], np.float32)
    along = np.hypot(y - apex[0], x - apex[1]) / stretch
    across = np.arctan2(y - apex[0], apex[1] - x) * (noise.shape[1] / 2.5)
    return np.stack([cv2.remap(s, along, across, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP) for s in noise])


def _vessels(rng, shape, nipple, pixel_spacing_mm: float):
    """Thin bright tubes that wander from the chest wall, (D, H, W) float32 in 0..1."""
    vessels, steps = np.zeros(shape, np.float32), int(nipple[1] * 0.8) + 8
    for _ in range(rng.integers(1, 5)):
        heading = np.cumsum(rng.normal(0, 0.09, steps)) + rng.uniform(-0.4, 0.4)
        rows = nipple[0] + rng.uniform(-0.3, 0.3) * shape[1] + np.cumsum(np.sin(heading))
        columns = rng.uniform(0, 8) + np.cumsum(np.cos(heading))
        level = np.clip(rng.uniform(0.2, 0.8) * shape[0] + np.cumsum(rng.normal(0, 0.12, steps)), 0, shape[0] - 1)
        points = np.stack([level, rows, columns]).round().astype(int)
        points = points[:, ((points >= 0) & (points < np.array(shape)[:, None])).all(axis=0)]
        vessels[tuple(points)] = rng.uniform(0.6, 1.4)
    sigma = max(0.9 / pixel_spacing_mm, 0.6)
    return np.stack([cv2.GaussianBlur(s, (0, 0), sigma) if s.any() else s for s in vessels]) * (2.2 * sigma)


def _lesion(rng, lesion_type: str, inside_mm, half_mm: float, z_mm, p: PhantomParameters):
    """A lesion as its share of each voxel (D, H, W) float32, its attenuation in 1/mm, and the probability of cancer."""
    spiculated, share = lesion_type == "mass_spiculated", np.zeros((len(z_mm), *inside_mm.shape), np.float32)
    # Diameter 8 to 25 mm, less where the breast is small; compressed with the breast.
    radius = min(np.exp(rng.uniform(np.log(4.0), np.log(12.5))), 0.45 * inside_mm.max())
    flat = rng.uniform(0.7, 1.0) * min(1, 0.75 * half_mm / radius)
    columns = np.arange(p.width_px) * p.pixel_spacing_mm
    places = np.argwhere((inside_mm > min(radius + 4, 0.9 * inside_mm.max())) & (columns > radius))
    row, column = rng.choice(places if len(places) else np.argwhere(inside_mm == inside_mm.max()))
    window_px = int(2.4 * radius / p.pixel_spacing_mm) + 1
    top, left = max(row - window_px, 0), max(column - window_px, 0)
    patch = share[:, top : row + window_px + 1, left : column + window_px + 1]  # a view
    z, y, x = np.ogrid[[slice(n) for n in patch.shape]]
    z = (z_mm - rng.uniform(-1, 1) * max(half_mm - flat * radius - 2, 0) * 0.8).astype(np.float32)[:, None, None]
    y, x = (np.float32(p.pixel_spacing_mm) * axis for axis in (y + (top - row), x + (left - column)))
    if lesion_type == "calcification":
        pleomorphic = rng.random() < 0.5
        for _ in range(rng.integers(10, 30)):
            where = np.clip(rng.normal(0, 0.45, 3), -1, 1) * radius * (flat, 1, 1)
            speck = tuple(np.abs(axis.ravel() - at).argmin() for axis, at in zip((z, y, x), where, strict=True))
            diameter_mm = rng.uniform(0.3, 1.1) if pleomorphic else rng.uniform(0.55, 0.8)
            patch[speck] += np.pi / 6 * diameter_mm**3 / (p.pixel_spacing_mm**2 * p.slice_spacing_mm)
        return share.clip(0, 1), CALCIFICATION, 0.7 if pleomorphic else 0.1
    edge, turn, squash = max(0.8, p.pixel_spacing_mm), rng.uniform(0, np.pi), rng.uniform(0.7, 1.0)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    distance = np.sqrt(along**2 * squash + across**2 / squash + (z / flat) ** 2)
    angle, rough = np.arctan2(y, x), 0.04 if spiculated else 0.025
    outline = 1 + sum(rough * rng.normal() * np.cos(k * angle + rng.uniform(0, 6.28)) for k in range(2, 7))
    core = radius * (0.65 if spiculated else 1.0) * outline
    patch[:] = np.clip((core - distance) / (edge * (1 + spiculated)) + 0.5, 0, 1)
    for _ in range(rng.integers(14, 27) if spiculated else 0):
        heading, tilt, length = rng.uniform(0, 6.28), rng.normal(0, 0.25), radius * rng.uniform(1.1, 2.3)
        dz, dy, dx = np.sin(tilt), np.cos(tilt) * np.sin(heading), np.cos(tilt) * np.cos(heading)
        reach = z * dz + y * dy + x * dx
        away = (z - reach * dz) ** 2 / 6 + (y - reach * dy) ** 2 + (x - reach * dx) ** 2
        taper = np.clip(1 - reach / length, 0, 1) * (reach > 0)
        np.maximum(patch, 0.9 * taper * np.exp(-away / (2 * (0.9 * edge) ** 2)), out=patch)
    patch[patch < 0.03] = 0
    # Tumour attenuates about 1.1 times as much as fibroglandular tissue; the wider range spans easy to hard.
    relative = rng.uniform(0.85, 1.7) + 0.35 * spiculated
    return share, ADIPOSE + (FIBROGLANDULAR - ADIPOSE) * relative, 0.92 if spiculated else 0.06


def simulate_breast(parameters: PhantomParameters, seed: int, index: int, lesion: bool = True) -> Breast:
    """The breast of (seed, index). `lesion=False` gives the same breast with its lesion left out."""
    p, rng = parameters, random_generator(seed, index, 0)
    laterality, view = rng.choice(["L", "R"]).item(), rng.choice(["CC", "MLO"]).item()
    density = int(rng.choice(4, p=(0.2, 0.3, 0.3, 0.2)))
    # Glandular share; classes overlap. Yaffe et al., Med. Phys. 36 (2009) 5437: mean 0.19, 95 % of women below 0.45.
    fraction = float(np.clip((0.06, 0.13, 0.24, 0.40)[density] * np.exp(rng.normal(0, 0.27)), 0.02, 0.6))
    silhouette, pectoral, nipple, half_height = _outline(rng, view, p.height_px, p.width_px)
    half_mm = rng.uniform(0.40, 0.5) * p.num_slices * p.slice_spacing_mm
    z_mm = ((np.arange(p.num_slices) - (p.num_slices - 1) / 2) * p.slice_spacing_mm).astype(np.float32)
    depth, inside = _depth_mm(silhouette, half_mm, z_mm, p.pixel_spacing_mm)
    body = np.clip(depth / p.pixel_spacing_mm + 0.5, 0, 1).astype(np.float32)

    # Fibroglandular tissue: noise that runs toward the nipple, favoured behind it, kept off the subcutaneous fat.
    apex = (nipple[0], nipple[1] + 25 / p.pixel_spacing_mm)
    tissue = _fan(power_law_noise(rng, p, p.power_law_exponent, 60.0, 1.2), apex, 1.4)
    y, x = np.indices(silhouette.shape, np.float32)
    centre = (nipple[0] - rng.uniform(-0.05, 0.25) * half_height, nipple[1] * rng.uniform(0.45, 0.65))
    extent = (rng.uniform(0.4, 0.65) * half_height, nipple[1] * rng.uniform(0.35, 0.55))
    behind_nipple = 1 - ((y - centre[0]) / extent[0]) ** 2 - ((x - centre[1]) / extent[1]) ** 2
    tissue += rng.uniform(0.4, 0.9) * np.maximum(behind_nipple, -3) - 4 * np.exp(-np.maximum(inside, 0) / 4)
    tissue = np.where(pectoral, -9, tissue - 2 * np.exp(-np.maximum(depth, 0) / 2)).astype(np.float32)
    sample = np.s_[::2, ::3, ::3]
    breast_voxels = (body[sample] > 0.5) & ~pectoral[sample[1:]]
    threshold = np.quantile(tissue[sample][breast_voxels], 1 - fraction)
    glandular = np.clip((tissue - threshold) / rng.uniform(0.5, 1.1) + 0.5, 0, 1)
    truth = (DENSITY_CLASSES[density], float(glandular[sample][breast_voxels].mean()))
    glandular *= np.float32(rng.uniform(0.45, 0.85))

    # Cooper's ligaments: the zero level of a second noise, thin curved sheets between lobules of fat.
    sheets = _fan(power_law_noise(rng, p, 3.0, 25.0, 1.0), apex, 1.8)
    ligaments = rng.uniform(0.15, 0.6) * np.exp(-((sheets / 0.13) ** 2))
    muscle = cv2.GaussianBlur(pectoral.astype(np.float32), (0, 0), 1.5 / p.pixel_spacing_mm) * rng.uniform(0.4, 0.7)
    vessels = _vessels(rng, body.shape, nipple, p.pixel_spacing_mm)
    skin = np.clip((1.6 - depth) / 1.2 + 0.5, 0, 1)  # about 1.6 mm
    fibrous = reduce(np.maximum, (glandular, ligaments, muscle * (1 + 0.1 * sheets.clip(-1.5, 1.5)), vessels, skin))
    volume = body * (ADIPOSE + (FIBROGLANDULAR - ADIPOSE) * fibrous + 0.0008 * tissue.clip(-2, 2))

    lesion_rng = random_generator(seed, index, 1)
    if lesion_rng.random() < p.lesion_probability and lesion:
        lesion_type = lesion_rng.choice(LESION_TYPES).item()
        inside_mm = np.where(pectoral, 0, inside)
        share, attenuation, cancer_probability = _lesion(lesion_rng, lesion_type, inside_mm, half_mm, z_mm, p)
        share *= body
        volume += share * (attenuation - volume)
        spans = [np.flatnonzero(share.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
        (d0, d1), (y0, y1), (x0, x1) = ((int(span[0]), int(span[-1]) + 1) for span in spans)
        x0, x1 = (p.width_px - x1, p.width_px - x0) if laterality == "R" else (x0, x1)
        middle = int(np.average(np.arange(p.num_slices), weights=share.sum(axis=(1, 2))).round())
        truth += (1, lesion_type, int(lesion_rng.random() < cancer_probability), (x0, y0, x1, y1), middle, (d0, d1))
    side = np.s_[:, :, :: -1 if laterality == "R" else 1]
    volume, body = (np.ascontiguousarray(array[side], np.float32) for array in (volume, body))
    return Breast(volume, body, BreastLabels(*truth), laterality, view, p, seed, index)


def _shift(image, offset: float, start: int, rows: int):
    """Rows start + offset .. of an image, linearly interpolated."""
    whole = int(np.floor(offset))
    share, image = np.float32(offset - whole), image[start + whole :]
    return (1 - share) * image[:rows] + share * image[1 : rows + 1]


def _project(volume, offsets_px, margin: int, slice_spacing_mm: float):
    """Parallel projections (V, H + 2 margin, W): each slice shifted along the rows by its height times tan(angle)."""
    padded = np.pad(volume, ((0, 0), (2 * margin, 2 * margin), (0, 0)), mode="edge")
    rows = repeat(volume.shape[1] + 2 * margin)
    return np.stack([sum(map(_shift, padded, view, repeat(margin), rows)) for view in offsets_px]) * slice_spacing_mm


def _detect(rng, integral, photons: float, blur_px: float):
    """Line integrals (V, H, W) as detected: Poisson noise of the quanta, in its Gaussian limit, then blur."""
    noise = rng.standard_normal(integral.shape, dtype=np.float32) * np.sqrt(np.exp(integral) / photons)
    return np.stack([cv2.GaussianBlur(view, (0, 0), blur_px) if blur_px else view for view in integral + noise])


def _reconstruct(views, offsets_px, margin: int, p: PhantomParameters):
    """Filtered backprojection (D, H, W) in 1/mm: the ramp is |f| times the spread of tan(angle), with a floor.

    Below the floor the sweep hardly tells slices apart; it keeps wide structures, as the vendors' filters do.
    """
    length, spread = fft.next_fast_len(views.shape[1] * 3 // 2), 2 * np.tan(np.deg2rad(p.angle_range_deg / 2))
    frequency = fft.rfftfreq(length, p.pixel_spacing_mm)
    ramp = np.clip(frequency * spread, 1.2 / (p.num_slices * p.slice_spacing_mm), 1 / p.slice_spacing_mm)
    ramp *= 0.5 + 0.5 * np.cos(np.pi * frequency / frequency[-1])  # Hann
    filtered = fft.irfft(fft.rfft(views, length, axis=1) * ramp.astype(np.float32)[:, None], length, axis=1)
    rows = repeat(views.shape[1] - 2 * margin)
    return np.stack([sum(map(_shift, filtered, column, repeat(margin), rows)) for column in -offsets_px.T]) / len(views)


def _display(rng, fibrous, shadow):
    """12-bit uint16 for display: exposure, gain and contrast differ from image to image; air is 0."""
    base, gain, gamma = rng.uniform(0.16, 0.3), rng.uniform(0.3, 0.55), np.exp(rng.uniform(-0.5, 0.5))
    value = np.clip((base + gain * fibrous) * np.minimum(shadow, 1), 0, 1) ** gamma * rng.uniform(0.7, 1.0)
    return np.where(shadow > 0.05, value * 4095, 0).round().astype(np.uint16)


def acquire_dbt(breast: Breast) -> np.ndarray:
    """Tomosynthesis slices (D, H, W) uint16, 12 bits; the thinner margin is flattened, by the known thickness."""
    p, rng = breast.parameters, random_generator(breast.seed, breast.index, 2)
    angles = np.deg2rad(np.linspace(-0.5, 0.5, p.num_projections) * p.angle_range_deg * (p.num_projections > 1))
    height_mm = (np.arange(p.num_slices) - (p.num_slices - 1) / 2) * p.slice_spacing_mm
    offsets_px = np.tan(angles)[:, None] * height_mm / p.pixel_spacing_mm  # (V, D)
    margin = int(np.ceil(np.abs(offsets_px).max())) + 2
    integral, thickness = (_project(v, offsets_px, margin, p.slice_spacing_mm) for v in (breast.volume, breast.body))
    detected = _detect(rng, integral, p.photons_per_view, p.detector_blur_px) - ADIPOSE * thickness
    slices = _reconstruct(detected, offsets_px, margin, p) / (FIBROGLANDULAR - ADIPOSE)
    return _display(rng, slices, thickness[len(angles) // 2, margin:-margin] / (3 * p.slice_spacing_mm))


def acquire_2d(breast: Breast) -> np.ndarray:
    """A mammogram (H, W) uint16, 12 bits: one projection with noise, blur, margin flattened, breast bright on air 0."""
    p, rng = breast.parameters, random_generator(breast.seed, breast.index, 3)
    integral, thickness = breast.volume.sum(0) * p.slice_spacing_mm, breast.body.sum(0) * p.slice_spacing_mm
    detected = _detect(rng, integral[None], p.photons_2d, p.detector_blur_px)[0] - ADIPOSE * thickness
    fibrous = detected / ((FIBROGLANDULAR - ADIPOSE) * p.num_slices * p.slice_spacing_mm)
    return _display(rng, 1.3 * fibrous, thickness / (3 * p.slice_spacing_mm))


def _image(patient: int, seed: int, parameters: PhantomParameters):
    breast = simulate_breast(parameters, seed, patient)
    spacing_mm = parameters.pixel_spacing_mm, parameters.slice_spacing_mm
    info = BreastInfo(f"PHANTOM-{patient:06d}", breast.laterality, breast.view, *spacing_mm, seed)
    return info, breast.labels, acquire_dbt(breast), acquire_2d(breast)


def write_archive(
    output,
    num_patients,
    seed=0,
    parameters=PhantomParameters(),
    num_proc=1,
    first_patient=0,
    transfer_syntax=DEFAULT_SYNTAX,
) -> Path:
    """Write DIR/PHANTOM-000012/{L,R}_{CC,MLO}_{dbt,2d}.dcm, one breast a patient, then DIR/labels.csv; return that.

    labels.csv covers the patients of this call and comes last: where it stands, the archive is complete.
    """
    patients = range(first_patient, first_patient + num_patients)
    image = partial(_image, seed=seed, parameters=parameters)
    return write_patients(output, patients, image, num_proc, transfer_syntax)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Write an archive of simulated mammograms and DBT with labels.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    counts = {
        "num_patients": (8, "patients, one breast view each"),
        "first_patient": (0, "number of the first patient"),
    }
    counts |= {"seed": (0, "the archive is a function of it"), "num_proc": (1, "processes")}
    counts |= {option.name: (option.default, option.metadata["help"]) for option in fields(PhantomParameters)}
    for name, (default, meaning) in counts.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{meaning} (default {default})")
    parser.add_argument(
        "--transfer_syntax",
        choices=TRANSFER_SYNTAXES,
        default=DEFAULT_SYNTAX,
        help="how the pixels are encoded, to try a pipeline on it; 8 bits where it holds no 12 (default %(default)s)",
    )
    options = vars(parser.parse_args(arguments))
    parameters = PhantomParameters(**{option.name: options.pop(option.name) for option in fields(PhantomParameters)})
    write_archive(parameters=parameters, **options)


if __name__ == "__main__":
    main()
