"""The anatomy of a compressed breast: outline, skin, nipple, muscle, fat lobules, ligaments, glandular tissue, vessels.

Everything is drawn for a left breast, chest wall at column 0; z counts from the paddle. Lengths are in mm, so that a
breast looks the same at every spacing. Sources by number: `dataset_scripts.phantom_breast`. Shapes are our choice, by
the look of real slices.
"""

from typing import NamedTuple

import cv2
import numpy as np

from dataset_scripts.phantom_breast import ADIPOSE, DENSITY_CLASSES, FIBROGLANDULAR, PhantomParameters
from dataset_scripts.phantom_outline import Outline, depth_mm, distance_to_margin_mm, draw_outline
from dataset_scripts.phantom_texture import bend, deposit, fall, fan, power_law_noise, tube

# Median share of fibroglandular tissue in the breast without skin and muscle. At 10, 40, 40 and 10 % of women in the
# classes the mean is 0.14 [2: 0.143]; here the classes are drawn more evenly.
DENSITY_MEDIANS, DENSITY_SHARES = (0.04, 0.09, 0.17, 0.30), (0.2, 0.3, 0.3, 0.2)


class Patient(NamedTuple):
    """What the views of a patient have in common."""

    laterality: str
    view: str  # the one that is taken where there is one
    density: str
    fraction: float  # of fibroglandular tissue
    reach: float  # of the nipple, as a share of the field's width
    streaks: float  # how much longer structures are along the way to the nipple
    softness: float  # of the edge of glandular tissue
    purity: float  # fibroglandular share inside glandular tissue
    ligaments: float
    lobules: float  # how much gland keeps to the walls between lobules of fat
    coarseness: float  # of lobules and ligaments
    vessels: int


def draw_patient(rng: np.random.Generator) -> Patient:
    laterality, view = rng.choice(["L", "R"]).item(), rng.choice(["CC", "MLO"]).item()
    density = int(rng.choice(4, p=DENSITY_SHARES))
    fraction = float(np.clip(DENSITY_MEDIANS[density] * np.exp(rng.normal(0, 0.27)), 0.02, 0.6))
    return Patient(
        laterality,
        view,
        DENSITY_CLASSES[density],
        fraction,
        reach=rng.uniform(0.55, 0.98),
        streaks=rng.uniform(1.0, 1.6),
        softness=rng.uniform(0.5, 1.2),
        purity=rng.uniform(0.8, 1.0),
        ligaments=rng.uniform(0.35, 0.9),
        lobules=rng.uniform(1.0, 3.5),
        coarseness=rng.uniform(1.0, 2.0),
        vessels=int(rng.integers(2, 8)),
    )


class Anatomy(NamedTuple):
    volume: np.ndarray  # attenuation in 1/mm, (D, H, W) float32
    body: np.ndarray  # share of each voxel inside the breast, (D, H, W) float32
    parenchyma: np.ndarray  # breast without skin and muscle, (D, H, W) bool
    outline: Outline
    inside_mm: np.ndarray  # distance to the silhouette's margin, (H, W) float32
    half_thickness_mm: float


def draw_anatomy(rng: np.random.Generator, patient: Patient, view: str, p: PhantomParameters) -> Anatomy:
    outline = draw_outline(rng, view, patient.reach, p)
    pixel, z_mm = p.pixel_spacing_mm, -p.slice_heights_mm
    half_mm = rng.uniform(0.42, 0.5) * p.num_slices * p.slice_spacing_mm
    inside = distance_to_margin_mm(outline.silhouette, half_mm, pixel)
    nipple_mm = rng.uniform(4, 7) if rng.random() < 0.6 else 0.0  # its radius; 0: not in profile
    depth = depth_mm(outline, inside, half_mm, z_mm, nipple_mm, pixel)
    body = np.clip(depth / pixel + 0.5, 0, 1).astype(np.float32)
    skin_mm = rng.uniform(1.3, 2.2)
    parenchyma = depth > skin_mm + pixel / 2

    noise = power_law_noise(rng, body.shape, p.voxel_mm, p.power_law_exponent, 60.0, 0.3)
    muscle = _muscle(rng, outline, noise, z_mm) if (outline.muscle_mm > 0).any() else None
    if muscle is not None:
        parenchyma &= muscle == 0
    favour = _behind_the_nipple(rng, outline)
    tissue = _glandular_noise(rng, patient, outline, favour, noise, depth, inside, z_mm, half_mm, pixel)
    fibrous = _vessels(rng, outline, half_mm, patient.vessels, p)
    _add_ligaments(rng, patient, outline, favour, tissue, fibrous, p)
    threshold = _threshold(tissue, fibrous, parenchyma, patient)
    for level, share in enumerate(fibrous):
        np.maximum(share, _gland(tissue[level] - threshold, patient), out=share)
        if muscle is not None:
            np.maximum(share, muscle[level], out=share)
        np.maximum(share, np.clip((skin_mm - depth[level]) / pixel + 0.5, 0, 1), out=share)
    if nipple_mm:
        _fill_nipple(fibrous, outline, nipple_mm, z_mm, pixel)
    volume = body * (ADIPOSE + (FIBROGLANDULAR - ADIPOSE) * fibrous)
    return Anatomy(volume, body, parenchyma, outline, inside, half_mm)


def glandular_fraction(anatomy: Anatomy) -> float:
    """Share of fibroglandular tissue in the breast without skin and muscle, by its attenuation."""
    mean = anatomy.volume.mean(where=anatomy.parenchyma, dtype=np.float64)
    return float((mean - ADIPOSE) / (FIBROGLANDULAR - ADIPOSE))


def _behind_the_nipple(rng, outline: Outline):
    """Where glandular tissue is favoured: 1 in the middle of the disc, 0 at its margin, negative outside, (H, W)."""
    y, x = np.indices(outline.silhouette.shape, np.float32)
    row, column = outline.nipple
    centre = row - rng.uniform(-0.05, 0.25) * outline.half_height, column * rng.uniform(0.45, 0.65)
    extent = rng.uniform(0.35, 0.6) * outline.half_height, column * rng.uniform(0.35, 0.6)
    return (1 - ((y - centre[0]) / extent[0]) ** 2 - ((x - centre[1]) / extent[1]) ** 2).astype(np.float32)


def _glandular_noise(rng, patient, outline: Outline, favour, noise, depth, inside, z_mm, half_mm: float, pixel: float):
    """Noise (D, H, W) float32 whose high values become gland [3]: it runs toward the nipple, and keeps off the skin."""
    apex = outline.nipple[0], outline.nipple[1] + 60 / pixel
    maps = fan(inside.shape, apex, patient.streaks, 1)
    favour = rng.uniform(0.4, 2.0) * np.maximum(favour, -3)
    favour -= 4 * fall(-np.maximum(inside, 0) / np.float32(rng.uniform(3, 7)))
    favour -= 9 * (outline.muscle_mm > -2)
    middle, spread = rng.uniform(-0.4, 0.4) * half_mm, rng.uniform(0.5, 0.9) * half_mm
    tissue = np.empty_like(noise)
    for level, z in enumerate(z_mm):
        under_the_skin = fall(np.maximum(depth[level], 0) * np.float32(-1 / 2.5))
        away = np.float32(1.2 * ((z - middle) / spread) ** 2)
        tissue[level] = bend(noise[level], maps) + (favour - away) - 3 * under_the_skin
    return tissue


def _add_ligaments(rng, patient, outline: Outline, favour, tissue, fibrous, p: PhantomParameters) -> None:
    """Cooper's ligaments into `fibrous`, and the lobules of fat between them out of `tissue`.

    Ligaments are the zero levels of two smooth noises: thin curved sheets that close around compartments [4]. Gland
    keeps to the sheets of the second; what is far from them is a lobule of fat.
    """
    pixel, (depth, height, width) = p.pixel_spacing_mm, tissue.shape
    grid = max(int(1.6 / pixel), 1)  # smooth noise needs no more
    shape, spacing = (depth, -(-height // grid), -(-width // grid)), (p.slice_spacing_mm, pixel * grid, pixel * grid)
    fields = [power_law_noise(rng, shape, spacing, 3.0, *span) for span in ((40.0, 4.0), (20.0, 3.0))]
    apex = outline.nipple[0], outline.nipple[1] + 60 / pixel
    maps = fan((height, width), apex, 1.5 * patient.streaks, grid * patient.coarseness)
    strength = np.float32(patient.ligaments) * (0.3 + 0.7 * np.clip(favour + 2, 0, 1))
    for level in range(depth):
        first, second = (bend(each[level], maps) for each in fields)
        sheets = fall(first * first * np.float32(-1 / 0.1**2)) * np.clip(second + 0.1, 0, 1)
        sheets += fall(second * second * np.float32(-1 / 0.14**2)) * np.clip(0.1 - first, 0, 1)
        np.maximum(fibrous[level], np.minimum(strength * sheets, 1), out=fibrous[level])
        tissue[level] += 0.8 * first - np.float32(patient.lobules) * np.abs(second)
    tissue *= np.float32(1 / patient.softness)


def _gland(excess, patient: Patient):
    """Share of glandular tissue where noise exceeds the threshold: it saturates, but is nowhere flat."""
    excess = np.maximum(excess, 0)
    return np.float32(patient.purity) * excess / (excess + np.float32(0.4))


def _threshold(tissue, fibrous, parenchyma, patient: Patient) -> np.float32:
    """Above which noise is gland, so that the breast has the patient's share of fibroglandular tissue.

    Vessels and ligaments may have 0.7 of it; where they have more they are thinned.
    """
    sample = np.flatnonzero(parenchyma)
    sample = sample[:: len(sample) // 50_000 + 1]
    noise, others = tissue.ravel()[sample], fibrous.ravel()[sample]
    if (excess := float(others.mean()) / (0.7 * patient.fraction)) > 1:
        fibrous *= np.float32(1 / excess)
        others = others / np.float32(excess)
    low, high = noise.min() - 1, noise.max()
    for _ in range(14):
        middle = (low + high) / 2
        share = np.maximum(_gland(noise - middle, patient), others).mean()
        low, high = (middle, high) if share > patient.fraction else (low, middle)
    return np.float32((low + high) / 2)


def _vessels(rng, outline: Outline, half_mm: float, count: int, p: PhantomParameters):
    """Thin tubes that wander from the chest wall, and their branches: shares of voxels (D, H, W) float32."""
    canvas, step = np.zeros((p.num_slices, *outline.silhouette.shape), np.float32), 0.5 * p.pixel_spacing_mm
    nipple_mm = np.array(outline.nipple) * p.pixel_spacing_mm
    middle = (p.num_slices - 1) / 2 * p.slice_spacing_mm
    for _ in range(count):
        radius, heading = rng.uniform(0.5, 1.3), rng.uniform(-0.4, 0.4)
        start = (
            middle + rng.uniform(-0.8, 0.8) * half_mm,
            nipple_mm[0] + rng.uniform(-55, 55),
            rng.uniform(0, 0.4) * nipple_mm[1],
        )
        trunk = tube(rng, start, heading, nipple_mm[1] * 0.75, 0.06, 0.25, step)
        pieces = [(trunk, radius)]
        for _ in range(rng.integers(1, 4)):
            at = trunk[rng.integers(len(trunk))]
            turn = heading + rng.choice([-1, 1]) * rng.uniform(0.3, 0.9)
            pieces.append((tube(rng, at, turn, rng.uniform(15, 40), 0.08, 0.25, step), 0.7 * radius))
        for points, size in pieces:
            taper = np.linspace(1, 0.5, len(points)) ** 2
            deposit(canvas, points, np.pi * size**2 * step * taper, p.voxel_mm)
    sigma = 0.5 / p.pixel_spacing_mm
    return np.stack([np.minimum(cv2.GaussianBlur(s, (0, 0), sigma), 1) if s.any() else s for s in canvas])


def _fill_nipple(fibrous, outline: Outline, radius_mm: float, z_mm, pixel: float) -> None:
    """Fibrous tissue in and behind the nipple."""
    y, x = np.indices(fibrous.shape[1:], np.float32)
    square = ((y - outline.nipple[0]) ** 2 + ((x - outline.nipple[1]) / 2) ** 2) * pixel**2
    for level, z in zip(fibrous, z_mm, strict=True):
        np.maximum(level, 0.7 * fall(-(((square + z**2) / np.float32(0.8 * radius_mm) ** 2) ** 2)), out=level)


def _muscle(rng, outline: Outline, noise, z_mm):
    """Share of muscle (D, H, W) float32: fibres along its edge, fat between them; it thins out toward the edge."""
    lean, share, thinning = rng.uniform(-0.5, 0.5), rng.uniform(0.4, 0.75), np.float32(1 / rng.uniform(15, 40))
    rows, columns = (int(n.max()) + 1 for n in np.nonzero(outline.muscle_mm > -15))
    turn = float(np.arctan2(rows, columns) + rng.normal(0, 0.1))
    sine, cosine = np.float32(np.sin(turn)), np.float32(np.cos(turn))
    y, x = np.indices((rows, columns), np.float32)
    maps = (x * cosine - y * sine) / 8, (x * sine + y * cosine) / np.float32(1.2)
    muscle, inside = np.zeros(noise.shape, np.float32), outline.muscle_mm[:rows, :columns]
    for out, level, z in zip(muscle, noise, z_mm, strict=True):
        deep = inside + np.float32(lean * z)
        edge = np.clip(deep / 3 + 0.5, 0, 1) * np.clip(0.6 + 0.4 * deep * thinning, 0, 1)
        fibres = np.float32(share) * (1 + 0.3 * np.clip(bend(level, maps), -2, 2))
        out[:rows, :columns] = edge * np.minimum(fibres, 1)
    return muscle
