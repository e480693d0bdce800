"""The anatomy of a compressed breast: outline, skin, nipple, muscle, fat lobules, ligaments, glandular tissue, vessels.

Everything is drawn for a left breast, chest wall at column 0; z counts from the paddle. Lengths are in mm, so that a
breast looks the same at every spacing. Sources by number: `dataset_scripts.phantom_breast`. Shapes are our choice, by
the look of real slices.
"""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from scipy import fft

from dataset_scripts.phantom_breast import ADIPOSE, DENSITY_CLASSES, FIBROGLANDULAR, PhantomParameters

# Median share of fibroglandular tissue in the breast without skin and muscle. At 10, 40, 40 and 10 % of women in the
# classes the mean is 0.145 [2: 0.143]; here the classes are drawn more evenly.
DENSITY_MEDIANS, DENSITY_SHARES = (0.04, 0.09, 0.18, 0.33), (0.2, 0.3, 0.3, 0.2)


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
        reach=rng.uniform(0.5, 0.97),
        streaks=rng.uniform(1.1, 1.9),
        softness=rng.uniform(0.5, 1.2),
        purity=rng.uniform(0.8, 1.0),
        ligaments=rng.uniform(0.25, 0.7),
        vessels=int(rng.integers(1, 6)),
    )


class Outline(NamedTuple):
    """A left breast from above."""

    silhouette: np.ndarray  # (H, W) bool
    muscle_mm: np.ndarray  # how far inside the pectoral muscle, (H, W) float32; negative outside
    nipple: tuple[float, float]  # row, column of its base
    half_height: float  # rows


class Anatomy(NamedTuple):
    volume: np.ndarray  # attenuation in 1/mm, (D, H, W) float32
    body: np.ndarray  # share of each voxel inside the breast, (D, H, W) float32
    parenchyma: np.ndarray  # breast without skin and muscle, (D, H, W) bool
    outline: Outline
    inside_mm: np.ndarray  # distance to the silhouette's margin, (H, W) float32
    half_thickness_mm: float


@lru_cache(maxsize=8)
def _power_law_gain(shape: tuple, spacing: tuple, exponent: float, longest_mm: float, shortest_mm: float):
    axes = [fft.fftfreq(n, d) for n, d in zip(shape[:2], spacing[:2], strict=True)] + [
        fft.rfftfreq(shape[2], spacing[2])
    ]
    square = sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij", sparse=True))  # (cycles/mm)^2
    gain = (square + longest_mm**-2) ** (-exponent / 4) * np.exp(-square * shortest_mm**2)
    count = np.prod(shape)  # values; unit variance, from numbers of variance 1/12 for real and imaginary part
    waves = 2 * (gain**2).sum() - (gain[..., 0] ** 2).sum() - (shape[2] % 2 == 0) * (gain[..., -1] ** 2).sum()
    return (gain * count / np.sqrt(waves / 6)).astype(np.float32)


def power_law_noise(rng, shape, spacing_mm, exponent: float, longest_mm: float, shortest_mm: float):
    """Gaussian noise (D, H, W) float32 of unit variance; power falls as frequency^-exponent between two wavelengths.

    Periodic along rows and columns; along the slices not, for the ends of a breast must not meet.
    """
    padded = (fft.next_fast_len(shape[0] * 5 // 4), *shape[1:])
    gain = _power_law_gain(padded, spacing_mm, exponent, longest_mm, shortest_mm)
    # Even numbers will do, and cost a third: each value is a sum over all waves, which makes it Gaussian.
    spectrum = rng.random((*gain.shape, 2), dtype=np.float32)
    spectrum -= np.float32(0.5)
    spectrum *= gain[..., None]
    return fft.irfftn(spectrum.view(np.complex64)[..., 0], s=padded, workers=1, overwrite_x=True)[: shape[0]]


def _outline(rng, view: str, reach: float, p: PhantomParameters) -> Outline:
    height, width = p.height_px, p.width_px
    y, x, muscle = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32), None
    reach, shape, power = reach * width * rng.uniform(0.95, 1.05), rng.uniform(1.6, 2.3), rng.uniform(1.5, 2.1)
    if view == "CC":
        nipple, floor = rng.uniform(0.43, 0.57) * height, 0.0
        upper = height * np.clip(0.24 + 0.34 * reach / width + rng.normal(0, 0.04), 0.28, 0.58)
        lower = upper * rng.uniform(0.9, 1.1)
        if rng.random() < 0.3:  # a sliver of muscle
            bulge, middle = rng.uniform(0.02, 0.1) * width, nipple + rng.uniform(-0.1, 0.1) * height
            muscle = bulge * (1 - ((y - middle) / (rng.uniform(0.2, 0.35) * height)) ** 2)
    else:
        nipple, lower = rng.uniform(0.52, 0.66) * height, rng.uniform(0.28, 0.44) * height
        upper, floor = nipple * rng.uniform(1.0, 1.2), rng.uniform(0.25, 0.5)
        top, bottom = rng.uniform(0.25, 0.5) * width, rng.uniform(0.4, 0.7) * height
        muscle = top * np.clip(1 - y / bottom, 0, 1) ** rng.uniform(0.8, 1.2)
        muscle -= (y > bottom) * (y - bottom)
    away = np.where(y < nipple, (nipple - y) / upper, (y - nipple) / lower)
    skin = np.clip(1 - away**shape, 0, 1) ** (1 / power)
    skin = np.where(y < nipple, floor + (1 - floor) * skin, skin)
    wobble = sum(rng.normal() / k * np.sin(k * np.pi * y / height + rng.uniform(0, 6.28)) for k in (2, 3, 4))
    skin *= reach * (1 + 0.03 * wobble)
    if view == "MLO" and rng.random() < 0.5:  # the fold under the breast, and the abdomen's beginning
        fold = nipple + lower * rng.uniform(0.85, 1.0)
        skin = np.maximum(skin, rng.uniform(0.08, 0.3) * width * np.sqrt(np.clip((y - fold) / (0.2 * height), 0, 1)))
    muscle_mm = np.full((height, width), -1e3, np.float32)
    if muscle is not None:
        muscle_mm = ((muscle[:, None] - x) * p.pixel_spacing_mm).astype(np.float32)
    return Outline(x < skin[:, None], muscle_mm, (nipple, float(skin[int(nipple)])), (upper + lower) / 2)


def _inside_mm(silhouette, margin_mm: float, pixel_spacing_mm: float):
    """Distance to the silhouette's margin (H, W) in mm, negative outside.

    Tissue goes on beyond the chest wall, the top and the bottom.
    """
    margin = int(np.ceil(margin_mm / pixel_spacing_mm)) + 2
    padded = cv2.copyMakeBorder(silhouette.astype(np.uint8), margin, margin, margin, 0, cv2.BORDER_REPLICATE)
    signed = cv2.distanceTransform(padded, cv2.DIST_L2, 5) - cv2.distanceTransform(1 - padded, cv2.DIST_L2, 5)
    signed = cv2.GaussianBlur(signed, (0, 0), 1.5)  # the silhouette is of whole pixels, skin is not
    return signed[margin:-margin, margin:] * np.float32(pixel_spacing_mm)


def _depth_mm(outline: Outline, inside, half_mm: float, z_mm, bump_mm: float, pixel_spacing_mm: float):
    """Depth in the breast (D, H, W) in mm: flat under the paddles, a half circle at the margin, a ball for a nipple."""
    rim = np.maximum(half_mm - inside, 0)
    depth = half_mm - np.sqrt(rim**2 + z_mm[:, None, None] ** 2)
    if bump_mm:
        row, column = (int(each) for each in outline.nipple)
        reach = int(2 * bump_mm / pixel_spacing_mm) + 2
        window = np.s_[:, max(row - reach, 0) : row + reach, max(column - reach, 0) : column + reach]
        y, x = (np.arange(s.start, s.start + n) for s, n in zip(window[1:], depth[window].shape[1:], strict=True))
        square = ((y - row) ** 2)[:, None] + (x - column + 0.5 * bump_mm / pixel_spacing_mm) ** 2
        away = np.sqrt(square * pixel_spacing_mm**2 + 0.5 * z_mm[:, None, None] ** 2)
        depth[window] = np.maximum(depth[window], bump_mm - away)
    return depth


def _fan(shape, apex, stretch: float, grid: float):
    """Where in noise, on a grid that is `grid` times as coarse, to look for each pixel: structures run to the apex.

    Ducts and ligaments do so. Two maps (H, W) for cv2.remap.
    """
    y, x = np.indices(shape, np.float32)
    along = np.hypot(y - apex[0], x - apex[1]) / stretch
    across = np.arctan2(y - apex[0], apex[1] - x) * (shape[0] / 2.5)
    return along / grid, across / grid


def _bend(noise, maps):
    return cv2.remap(noise, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def _fall(negative):
    """exp of what is negative, without the denormal numbers that cost so much."""
    return cv2.exp(np.maximum(negative, np.float32(-20)))


def deposit(canvas, points_mm, volumes_mm3, voxel_mm) -> None:
    """Add specks of matter to shares of voxels (D, H, W), each spread over its eight neighbours: volume is kept.

    points_mm: (N, 3), z, y, x from the centre of the first voxel; what falls outside the canvas is left out.
    """
    position = np.asarray(points_mm, np.float64) / voxel_mm
    low = np.floor(position).astype(int)
    offset = position - low
    share = np.broadcast_to(volumes_mm3, len(position)) / np.prod(voxel_mm)
    for corner in np.ndindex(2, 2, 2):
        at = low + corner
        weight = share * np.prod(np.where(corner, offset, 1 - offset), axis=1)
        kept = ((at >= 0) & (at < canvas.shape)).all(axis=1)
        np.add.at(canvas, tuple(at[kept].T), weight[kept].astype(canvas.dtype))


def tube(rng, start_mm, heading: float, length_mm: float, wander: float, rise: float, step_mm: float):
    """Points (N, 3) of a tube that wanders in the plane from `start_mm` (z, y, x)."""
    steps = max(int(length_mm / step_mm), 2)
    angle = heading + np.cumsum(rng.normal(0, wander * np.sqrt(step_mm), steps))
    level = rise * np.cumsum(rng.normal(0, np.sqrt(step_mm), steps))
    return np.asarray(start_mm) + np.stack(
        [level, np.cumsum(np.sin(angle)) * step_mm, np.cumsum(np.cos(angle)) * step_mm], 1
    )


def _vessels(rng, shape, nipple_mm, half_mm: float, count: int, p: PhantomParameters):
    """Thin tubes that wander from the chest wall, and their branches: shares of voxels (D, H, W) float32."""
    canvas, step = np.zeros(shape, np.float32), 0.5 * p.pixel_spacing_mm
    middle = (p.num_slices - 1) / 2 * p.slice_spacing_mm
    for _ in range(count):
        radius, heading = rng.uniform(0.5, 1.2), rng.uniform(-0.4, 0.4)
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
    return np.stack([cv2.GaussianBlur(s, (0, 0), sigma) if s.any() else s for s in canvas])


def draw_anatomy(rng, patient: Patient, view: str, p: PhantomParameters) -> Anatomy:
    outline = _outline(rng, view, patient.reach, p)
    pixel, z_mm = p.pixel_spacing_mm, -p.slice_heights_mm
    half_mm = rng.uniform(0.42, 0.5) * p.num_slices * p.slice_spacing_mm
    inside = _inside_mm(outline.silhouette, half_mm, pixel)
    bump_mm = rng.uniform(4, 7) if rng.random() < 0.6 else 0.0  # a nipple in profile
    depth = _depth_mm(outline, inside, half_mm, z_mm, bump_mm, pixel)
    body = np.clip(depth / pixel + 0.5, 0, 1).astype(np.float32)
    skin_mm = rng.uniform(1.3, 2.2)
    parenchyma = (depth > skin_mm) & (outline.muscle_mm < 0)

    # Glandular tissue: power-law noise that runs toward the nipple, favoured behind it, kept off the subcutaneous fat.
    shape = body.shape
    nipple, apex = outline.nipple, (outline.nipple[0], outline.nipple[1] + 60 / pixel)
    noise = power_law_noise(rng, shape, p.voxel_mm, p.power_law_exponent, 60.0, 0.3)
    fan = _fan(shape[1:], apex, patient.streaks, 1)
    y, x = np.indices(shape[1:], np.float32)
    centre = (nipple[0] - rng.uniform(-0.05, 0.25) * outline.half_height, nipple[1] * rng.uniform(0.45, 0.65))
    extent = (rng.uniform(0.35, 0.6) * outline.half_height, nipple[1] * rng.uniform(0.3, 0.5))
    behind_nipple = 1 - ((y - centre[0]) / extent[0]) ** 2 - ((x - centre[1]) / extent[1]) ** 2
    favour = rng.uniform(0.4, 2.0) * np.maximum(behind_nipple, -3) - 4 * np.exp(
        -np.maximum(inside, 0) / rng.uniform(3, 7)
    )
    favour -= 9 * (outline.muscle_mm > -2)
    level_mm, spread_mm = rng.uniform(-0.4, 0.4) * half_mm, rng.uniform(0.5, 0.9) * half_mm
    tissue = np.empty(shape, np.float32)
    for level in range(shape[0]):
        fat = _fall(np.maximum(depth[level], 0) * np.float32(-1 / 2.5))
        away = np.float32(1.2 * ((z_mm[level] - level_mm) / spread_mm) ** 2)
        tissue[level] = _bend(noise[level], fan) + (favour - away) - 3 * fat

    # Cooper's ligaments: the zero levels of smooth noises, thin curved sheets that close around lobules of fat.
    grid = max(int(1.6 / pixel), 1)
    coarse = (shape[0], -(-shape[1] // grid), -(-shape[2] // grid))
    spacing = (p.slice_spacing_mm, pixel * grid, pixel * grid)
    fine_fan = _fan(shape[1:], apex, 2.6, grid)
    fields = [power_law_noise(rng, coarse, spacing, 3.0, longest, 1.5) for longest in (40.0, 20.0)]
    fibrous = _vessels(rng, shape, (nipple[0] * pixel, nipple[1] * pixel), half_mm, patient.vessels, p)
    for level in range(shape[0]):
        first, second = (_bend(each[level], fine_fan) for each in fields)
        sheets = _fall(first * first * np.float32(-1 / 0.09**2)) * np.clip(second, 0, 1)
        sheets += _fall(second * second * np.float32(-1 / 0.12**2)) * np.clip(-first, 0, 1)
        np.maximum(fibrous[level], patient.ligaments * sheets, out=fibrous[level])
        tissue[level] += 0.5 * first + 0.9 * second

    tissue *= 1 / patient.softness
    threshold = _threshold(tissue, fibrous, parenchyma, patient)
    muscle = _muscle(rng, outline, noise, pixel) if (outline.muscle_mm > -3).any() else None
    for level in range(shape[0]):
        gland = _gland(tissue[level] - np.float32(threshold), patient)
        np.maximum(fibrous[level], gland, out=fibrous[level])
        if muscle is not None:
            np.maximum(fibrous[level], muscle[level], out=fibrous[level])
        skin = np.clip((skin_mm - depth[level]) / pixel + 0.5, 0, 1)
        np.maximum(fibrous[level], skin, out=fibrous[level])
    if bump_mm:
        _fill_nipple(fibrous, outline, bump_mm, z_mm, pixel)
    volume = body * (ADIPOSE + (FIBROGLANDULAR - ADIPOSE) * fibrous)
    return Anatomy(volume, body, parenchyma, outline, inside, half_mm)


def _fill_nipple(fibrous, outline: Outline, bump_mm: float, z_mm, pixel: float) -> None:
    """Fibrous tissue in and behind the nipple."""
    y, x = np.indices(fibrous.shape[1:], np.float32)
    square = ((y - outline.nipple[0]) ** 2 + ((x - outline.nipple[1]) / 2) ** 2) * pixel**2
    for level, z in zip(fibrous, z_mm, strict=True):
        np.maximum(level, 0.7 * _fall(-(((square + z**2) / np.float32(bump_mm) ** 2) ** 2)), out=level)


def _muscle(rng, outline: Outline, noise, pixel: float):
    """Share of muscle (D, H, W) float32: fibres along its edge, fat between them."""
    edge = np.clip(outline.muscle_mm / 2 + 0.5, 0, 1)
    rows, columns = (int(n.max()) + 1 for n in np.nonzero(edge))
    turn = float(np.arctan2(rows, columns) + rng.normal(0, 0.1))
    sine, cosine = np.float32(np.sin(turn)), np.float32(np.cos(turn))
    y, x = np.indices((rows, columns), np.float32)
    along, across = x * cosine - y * sine, x * sine + y * cosine
    maps = along / 8, across / 1.5
    muscle, share = np.zeros(noise.shape, np.float32), np.float32(rng.uniform(0.25, 0.45))
    for out, level in zip(muscle, noise, strict=True):
        out[:rows, :columns] = edge[:rows, :columns] * share * (1 + 0.25 * np.clip(_bend(level, maps), -2, 2))
    return muscle


def _gland(excess, patient: Patient):
    """Share of glandular tissue where noise exceeds the threshold: it saturates, but is nowhere flat."""
    excess = np.maximum(excess, 0)
    return np.float32(patient.purity) * excess / (excess + np.float32(0.4))


def _threshold(tissue, fibrous, parenchyma, patient: Patient) -> float:
    """Above which noise is gland, so that the breast has the patient's share of fibroglandular tissue."""
    sample = np.s_[::2, ::3, ::3]
    kept = parenchyma[sample]
    noise, others = tissue[sample][kept], fibrous[sample][kept]
    low, high = float(noise.min()) - 1, float(noise.max())
    for _ in range(14):
        middle = (low + high) / 2
        share = np.maximum(_gland(noise - np.float32(middle), patient), others).mean()
        low, high = (middle, high) if share > patient.fraction else (low, middle)
    return (low + high) / 2


def glandular_fraction(anatomy: Anatomy) -> float:
    """Share of fibroglandular tissue in the breast without skin and muscle, by its attenuation."""
    mean = anatomy.volume.mean(where=anatomy.parenchyma & (anatomy.body > 0.999), dtype=np.float64)
    return float((mean - ADIPOSE) / (FIBROGLANDULAR - ADIPOSE))
