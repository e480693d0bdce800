"""Lesions of a simulated breast: masses, calcification clusters and architectural distortion, benign and malignant.

The kinds differ in the words of the BI-RADS lexicon that speak for or against malignancy [5]. Masses: oval and
circumscribed against irregular, microlobulated or indistinct, and denser. Spicules: fine and many about a dense core.
Calcifications: round, punctate and alike against fine, pleomorphic, along a duct. Distortion: spicules about a lucent
center (a radial scar) against spicules about a small dense one, drawn in more strongly. The words overlap, as do the
sizes and contrasts, which span easy to hard: shares and ranges are our choice. Sources by number: `anatomy`.
"""

from typing import NamedTuple

import cv2
import numpy as np

from .anatomy import (
    ADIPOSE,
    CALCIFICATION,
    CARCINOMA,
    FIBROGLANDULAR,
    LESION_TYPES,
    Anatomy,
    PhantomParameters,
    deposit,
    tube,
)

CANCER_PROBABILITY = {"mass_round": 0.1, "mass_spiculated": 0.92, "calcification": 0.45, "distortion": 0.55}


class Lesion(NamedTuple):
    """What the views of a patient have in common of a lesion."""

    lesion_type: str
    malignant: bool
    suspicious: bool  # whether it looks malignant; most that look so are
    radius_mm: float
    contrast: float  # of a mass, in fibroglandular tissue over fat
    depth: float  # from the nipple (0) to the chest wall (1)
    across: float  # from one side of the breast (-1) to the other (1): medial to lateral
    upward: float  # from below (-1) to above (1)


class Place(NamedTuple):
    """Where a lesion lies in a view: its center in mm and the window of the volume that it may touch."""

    center: tuple[float, float, float]  # z, y, x from the middle of the first voxel
    window: tuple[slice, ...]
    z: np.ndarray  # distances from the center in mm, (d, 1, 1), (h, 1) and (w,) float32
    y: np.ndarray
    x: np.ndarray


def draw_lesion(rng: np.random.Generator, probability: float) -> Lesion | None:
    if rng.random() >= probability:
        return None
    lesion_type = rng.choice(LESION_TYPES).item()
    malignant = bool(rng.random() < CANCER_PROBABILITY[lesion_type])
    suspicious = malignant if rng.random() < 0.85 else not malignant
    # Diameter 9 to 28 mm. Carcinoma attenuates 1.1 times as much over fat as fibroglandular tissue, fibroadenomas and
    # cysts about as much [1]; the wider range is of what is mixed in.
    radius = float(np.exp(rng.uniform(np.log(4.5), np.log(14.0))))
    dense = (CARCINOMA - ADIPOSE) / (FIBROGLANDULAR - ADIPOSE)
    contrast = rng.uniform(0.75, 1.3) * (dense if suspicious else 1.0)
    return Lesion(
        lesion_type, malignant, suspicious, radius, contrast, *rng.uniform((0.15, -0.8, -0.8), (0.85, 0.8, 0.8))
    )


def add_lesion(rng, lesion: Lesion, anatomy: Anatomy, view: str, p: PhantomParameters) -> np.ndarray:
    """Return the volume (D, H, W) with the lesion in it; as the given one elsewhere."""
    radius = min(lesion.radius_mm, 0.45 * float(anatomy.inside_mm.max()))
    place, flat = _place(lesion, radius, anatomy, view, p)
    draw = {"calcification": _calcifications, "distortion": _distortion}.get(lesion.lesion_type, _mass)
    volume = anatomy.volume.copy()
    patch = volume[place.window]
    draw(rng, lesion, place, radius, flat, patch, p)
    # No more than there is breast, and nothing of what rounding left.
    before, body = anatomy.volume[place.window], anatomy.body[place.window]
    patch[:] = np.where((body > 0.5) & (np.abs(patch - before) > 1e-5), patch, before)
    return volume


def _place(lesion: Lesion, radius: float, anatomy: Anatomy, view: str, p: PhantomParameters) -> tuple[Place, float]:
    """Return the admissible place next to where the patient has it, and how flat it is pressed."""
    pixel, half_mm, (height, width) = p.pixel_spacing_mm, anatomy.half_thickness_mm, anatomy.inside_mm.shape
    # A CC view shows the breast from above, an MLO view from the side: depth is the same in both, as radiologists
    # measure it from the nipple.
    along_rows, along_beam = (lesion.across, lesion.upward) if view == "CC" else (-lesion.upward, lesion.across)
    nipple, inside = anatomy.outline.nipple, np.where(anatomy.outline.muscle_mm < 0, anatomy.inside_mm, 0)
    wanted = nipple[0] + along_rows * anatomy.outline.half_height, (1 - lesion.depth) * nipple[1]
    needed = 1.8 * radius + 4 if lesion.lesion_type == "distortion" else radius + 4
    room = inside > min(needed, 0.9 * inside.max())
    room[:, : min(int(radius / pixel), width // 2)] = False
    places = np.argwhere(room)
    places = places if len(places) else np.argwhere(inside == inside.max())
    row, column = places[((places - wanted) ** 2).sum(axis=1).argmin()]
    flat = min(0.85, 0.75 * half_mm / radius)  # compressed with the breast
    # Where the breast bulges at its margin, less of its height is deep enough.
    deep_enough = max(half_mm - flat * (needed - 4) - 2, 0) ** 2
    level = along_beam * np.sqrt(max(deep_enough - max(half_mm - inside[row, column], 0) ** 2, 0))
    middle = (p.num_slices - 1) / 2 * p.slice_spacing_mm
    reach, deep = int(2.4 * radius / pixel) + 1, int(2.4 * flat * radius / p.slice_spacing_mm) + 2
    slice_ = int(round((middle + level) / p.slice_spacing_mm))
    window = tuple(
        slice(max(at - span, 0), min(at + span + 1, length))
        for at, span, length in zip(
            (slice_, row, column), (deep, reach, reach), (p.num_slices, height, width), strict=True
        )
    )
    center = (middle + level, row * pixel, column * pixel)
    z, y, x = (
        (np.arange(s.start, s.stop) * size - at).astype(np.float32)
        for s, size, at in zip(window, p.voxel_mm, center, strict=True)
    )
    return Place(center, window, z[:, None, None], y[:, None], x), flat


def _blend(patch, share, relative: float) -> None:
    """Replace a share of each voxel by tissue of `relative` fibroglandular attenuation over fat."""
    patch += share * (np.float32(ADIPOSE + (FIBROGLANDULAR - ADIPOSE) * relative) - patch)


def _spicules(rng, place: Place, shape, count: int, start_mm: float, length_mm: float, width_mm: float, p):
    """Draw shares of voxels (d, h, w) float32 of fine lines that radiate from the center, thinner outward."""
    canvas, step = np.zeros(shape, np.float32), 0.4 * p.pixel_spacing_mm
    origin = np.array([s.start for s in place.window]) * p.voxel_mm
    for heading in rng.uniform(0, 2 * np.pi) + (np.arange(count) + rng.uniform(-0.3, 0.3, count)) * 2 * np.pi / count:
        first = np.array([0, np.sin(heading), np.cos(heading)]) * start_mm
        points = tube(rng, place.center - origin + first, heading, length_mm * rng.uniform(0.6, 1.2), 0.03, 0.0, step)
        points[:, 0] += np.linspace(0, rng.normal(0, 0.2) * length_mm, len(points))
        taper = np.linspace(1, 0.3, len(points)) ** 2
        deposit(canvas, points, np.pi / 4 * width_mm**2 * step * taper, p.voxel_mm)
    sigma = max(0.35 * width_mm / p.pixel_spacing_mm, 0.4)
    return np.stack([cv2.GaussianBlur(level, (0, 0), sigma) for level in canvas]).clip(0, 1)


def _mass(rng, lesion: Lesion, place: Place, radius: float, flat: float, patch, p: PhantomParameters) -> None:
    spiculated, turn = lesion.lesion_type == "mass_spiculated", rng.uniform(0, np.pi)
    irregular = lesion.suspicious or spiculated
    squash = rng.uniform(0.75, 1.0) if irregular else rng.uniform(0.6, 0.9)
    along, across = place.x * np.cos(turn) + place.y * np.sin(turn), place.y * np.cos(turn) - place.x * np.sin(turn)
    distance = np.sqrt(along**2 * squash + across**2 / squash + (place.z / flat) ** 2, dtype=np.float32)
    angle, rough = np.arctan2(place.y, place.x), 0.05 if irregular else 0.015
    outline = 1 + sum(
        rough * np.clip(rng.normal(), -1.5, 1.5) * np.cos(k * angle + rng.uniform(0, 6.28)) for k in range(2, 5)
    )
    if irregular:  # microlobulated
        outline = outline + sum(0.012 * rng.normal() * np.cos(k * angle + rng.uniform(0, 6.28)) for k in range(5, 12))
    margin = rng.uniform(1.5, 3.5) if irregular else rng.uniform(0.5, 1.0)  # indistinct or circumscribed
    core = radius * (0.75 if spiculated else 1.0) * outline.astype(np.float32)
    share = np.clip((core - distance) / max(margin, p.pixel_spacing_mm) + 0.5, 0, 1)
    if spiculated:
        count, width = (int(rng.integers(18, 30)), 2.2) if lesion.suspicious else (int(rng.integers(8, 14)), 1.6)
        lines = _spicules(rng, place, patch.shape, count, 0.5 * radius, radius * rng.uniform(1.0, 1.55), width, p)
        np.maximum(share, lines, out=share)
    elif not irregular and rng.random() < 0.5:  # a rim of fat, the halo of what pushes tissue aside
        _blend(patch, 0.6 * np.clip(1 - np.abs(distance - core - 1.5) / 1.5, 0, 1), 0.0)
    _blend(patch, share, lesion.contrast)


def _calcifications(rng, lesion: Lesion, place: Place, radius: float, flat: float, patch, p: PhantomParameters) -> None:
    canvas = np.zeros(patch.shape, np.float32)
    count = int(rng.integers(12, 40) if lesion.suspicious else rng.integers(5, 20))
    spread = np.array([0.45 * flat, 0.45, 0.45]) * radius
    where = np.clip(rng.normal(0, 1, (count, 3)), -2, 2) * spread
    if lesion.suspicious:  # fine and pleomorphic, along a duct
        heading = rng.uniform(-0.6, 0.6)
        turn = np.array([[np.cos(heading), -np.sin(heading)], [np.sin(heading), np.cos(heading)]])
        where[:, 1:] = where[:, 1:] * (0.45, 1.5) @ turn
        diameters = np.exp(rng.normal(np.log(0.55), 0.35, count)).clip(0.25, 1.2)
    else:  # round and alike
        diameters = rng.uniform(0.5, 1.1) * rng.uniform(0.9, 1.1, count)
    origin = np.array([s.start for s in place.window]) * p.voxel_mm
    deposit(canvas, np.array(place.center) - origin + where, np.pi / 6 * diameters**3, p.voxel_mm)
    patch += canvas.clip(0, 1) * (np.float32(CALCIFICATION) - patch)


def _distortion(rng, lesion: Lesion, place: Place, radius: float, flat: float, patch, p: PhantomParameters) -> None:
    """Draw tissue toward the center: each voxel shows what lay farther out."""
    reach, pull = 1.8 * radius, rng.uniform(1.0, 1.5) if lesion.suspicious else rng.uniform(0.6, 1.0)
    square = (place.y**2 + place.x**2) / np.float32(reach**2)  # (h, w)
    rows, columns = np.indices(patch.shape[1:], np.float32)
    for level, z in zip(patch, place.z.ravel() / (flat * reach), strict=True):
        away = np.maximum(1 - square - np.float32(z**2), 0) ** 2 * np.float32(pull)
        map_x = (columns + away * place.x / p.pixel_spacing_mm).astype(np.float32)
        map_y = (rows + away * place.y / p.pixel_spacing_mm).astype(np.float32)
        drawn = cv2.remap(level, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        level[:] = np.where((away > 1e-3) & (drawn > 0.9 * ADIPOSE), drawn, level)  # no air
    count = int(rng.integers(14, 24) if lesion.suspicious else rng.integers(10, 18))
    lines = _spicules(rng, place, patch.shape, count, 0.15 * radius, radius * rng.uniform(1.1, 1.6), 2.0, p)
    distance = np.sqrt(place.x**2 + place.y**2 + (place.z / flat) ** 2, dtype=np.float32)
    center = np.clip((0.3 * radius - distance) / 1.5 + 0.5, 0, 1)
    _blend(patch, lines, lesion.contrast)
    _blend(patch, center, lesion.contrast if lesion.suspicious else 0.1)
