"""The anatomy of a compressed breast: outline, skin, nipple, muscle, fat lobules, ligaments, glandular tissue, vessels.

Everything is drawn for a left breast, chest wall at column 0; z counts from the paddle. Compressed tissue is flat under
the paddles and bulges in a half circle at the margin. Lengths are in mm, so that a breast looks the same at every
spacing. Shapes and proportions are our choice, by the look of real slices. Sources, by number here and in the modules
beside this one:

1. Johns, Yaffe, Phys. Med. Biol. 32 (1987) 675: attenuation of fat, fibroglandular tissue and carcinoma.
2. Yaffe et al., Med. Phys. 36 (2009) 5437: volumetric density from breast CT; 0.14 in the mean without the skin, 0.19
   with it, and 95 % of women below 0.45.
3. Burgess, Jacobson, Judy, Med. Phys. 28 (2001) 419: mammograms have a power spectrum of f^-3, nearly.
4. Bakic et al., Med. Phys. 38 (2011) 3165; Graff, Proc. SPIE 9783 (2016) 978309: what a software breast consists of,
   skin, compartments of fat between Cooper's ligaments, glandular tissue, ducts and vessels.
5. ACR BI-RADS Atlas, 5th edition (2013), mammography: the lexicon of masses, calcifications and distortion, and which
   words speak for malignancy. Attenuation, sizes and shares of the kinds are our choice within it.
6. Vimieiro et al., DBT reconstruction toolbox (XXVI Brazilian Congress on Biomedical Engineering, 2018): geometry of
   Hologic's and GE's systems. Badal et al., Comput. Phys. Commun. 261 (2021) 107779: of Siemens' system (VICTRE).
   Sechopoulos, Med. Phys. 40 (2013) 014301: review of all.
7. Joseph, IEEE Trans. Med. Imaging 1 (1982) 192: projection by linear interpolation along the ray.
8. Mertelmeier et al., Proc. SPIE 6142 (2006) 61420F: filters of tomosynthesis backprojection.
"""

from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
from scipy import fft

# Linear attenuation in 1/mm at about 20 keV [1]; muscle and skin count as fibroglandular. Calcification: between
# calcium oxalate (0.9) and hydroxyapatite (2.0) at that energy.
ADIPOSE, FIBROGLANDULAR, CARCINOMA, CALCIFICATION = 0.0456, 0.0802, 0.0844, 1.2

DENSITY_CLASSES = ("A", "B", "C", "D")
LESION_TYPES = ("mass_round", "mass_spiculated", "calcification", "distortion")
VENDORS = ("hologic", "siemens", "ge", "mixed")
VIEWS = (("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO"))

LEAST_MM = (10, 40, 15)  # thickness, along the chest wall, from it: what holds a breast

# Random streams of a patient, and of each exposure of VIEWS.
PATIENT, LESION = 0, 1
ANATOMY, LESION_SHAPE, TOMOSYNTHESIS, MAMMOGRAM = range(4)


def _option(default, low, high, meaning: str):
    return field(default=default, metadata={"help": meaning, "limits": (low, high)})


@dataclass(frozen=True)
class PhantomParameters:
    """What is simulated and how it is imaged. Each is an option of the command line too.

    The defaults are for small models; 40 slices of 512 x 320 at 0.4 and 1.25 mm are the same breasts, finer.
    """

    num_slices: int = _option(20, 4, 200, "slices D of a breast")
    height_px: int = _option(256, 48, 4096, "rows H, along the chest wall")
    width_px: int = _option(160, 32, 4096, "columns W, from the chest wall to the nipple")
    pixel_spacing_mm: float = _option(0.8, 0.02, 4, "pixel spacing in mm")
    slice_spacing_mm: float = _option(2.5, 0.2, 10, "slice spacing in mm")
    power_law_exponent: float = _option(3.6, 0, 6, "exponent of the three-dimensional power spectrum of tissue")
    lesion_probability: float = _option(0.5, 0, 1, "share of patients with a lesion")
    vendor: str = field(default="hologic", metadata={"help": f"whose system: {', '.join(VENDORS)}", "choices": VENDORS})
    dose: float = _option(1.0, 0.01, 100, "quanta, as a multiple of the system's")
    detector_blur_mm: float = _option(0.15, 0, 10, "sigma of the detector's and the moving tube's point spread in mm")

    def __post_init__(self):
        for option in fields(self):
            value, limits = getattr(self, option.name), option.metadata.get("limits")
            if limits and not limits[0] <= value <= limits[1]:
                raise ValueError(f"{option.name}={value} is outside {limits[0]} to {limits[1]}")
            if not limits and value not in option.metadata["choices"]:
                raise ValueError(f"{option.name}={value!r} must be one of {', '.join(option.metadata['choices'])}")
        size = [n * mm for n, mm in zip((self.num_slices, self.height_px, self.width_px), self.voxel_mm, strict=True)]
        if any(mm < least for mm, least in zip(size, LEAST_MM, strict=True)):
            text, least = (" x ".join(f"{mm:g}" for mm in each) for each in (size, LEAST_MM))
            raise ValueError(
                f"a field of {text} mm holds no breast: raise slices, rows, columns or spacings to {least}"
            )

    @property
    def voxel_mm(self) -> tuple[float, float, float]:
        return self.slice_spacing_mm, self.pixel_spacing_mm, self.pixel_spacing_mm

    @property
    def slice_heights_mm(self) -> np.ndarray:
        """Return each slice's height above the volume's middle, (D,) float32; the first is nearest to the paddle."""
        return ((self.num_slices - 1) / 2 - np.arange(self.num_slices, dtype=np.float32)) * self.slice_spacing_mm


@dataclass(frozen=True)
class BreastLabels:
    """The truth about a breast, in the coordinates of its images."""

    density: str  # BI-RADS class, "A".."D"
    glandular_fraction: float  # of the breast's volume without pectoral muscle
    lesion: int = 0
    lesion_type: str = "none"  # or mass_round, mass_spiculated, calcification, distortion
    cancer: int = 0
    box: tuple[int, int, int, int] | None = None  # x0, y0, x1, y1 in pixels, half-open
    lesion_slice: int | None = None  # slice of the lesion's center
    lesion_slices: tuple[int, int] | None = None  # first and last + 1


def place_of(lesion: np.ndarray) -> dict[str, Any]:
    """Return what BreastLabels say of the place of a lesion: of its weights (D, H, W), 0 where it is not."""
    touched, weights = lesion != 0, np.abs(lesion).sum(axis=(1, 2))
    spans = [np.flatnonzero(touched.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    slices, (y0, y1), (x0, x1) = ((int(span[0]), int(span[-1]) + 1) for span in spans)
    center = int(np.average(np.arange(len(weights)), weights=weights).round())
    return {"box": (x0, y0, x1, y1), "lesion_slice": center, "lesion_slices": slices}


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
    vendor: str = "hologic"

    def random_generator(self, purpose: int) -> np.random.Generator:
        return exposure_generator(self.seed, self.index, self.laterality, self.view, purpose)


def random_generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """Return the counter-based generator of a stream, independent for each (seed, index, stream)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64), counter=[0, 0, 0, stream]))


def exposure_generator(seed: int, index: int, laterality: str, view: str, purpose: int) -> np.random.Generator:
    """Return the generator of one purpose (ANATOMY, ...) in one of a patient's four exposures."""
    return random_generator(seed, index, 8 + 4 * VIEWS.index((laterality, view)) + purpose)


class Outline(NamedTuple):
    """A left breast from above."""

    silhouette: np.ndarray  # (H, W) bool
    muscle_mm: np.ndarray  # how far inside the pectoral muscle, (H, W) float32; negative outside
    nipple: tuple[float, float]  # row, column of its base
    half_height: float  # rows


def draw_outline(rng, view: str, reach: float, p: PhantomParameters) -> Outline:
    height, width = p.height_px, p.width_px
    y, x, muscle = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32), None
    reach, shape, power = reach * width * rng.uniform(0.95, 1.05), rng.uniform(1.4, 2.2), rng.uniform(1.4, 2.1)
    if view == "CC":
        nipple, floor = rng.uniform(0.43, 0.57) * height, 0.0
        upper = height * np.clip(0.24 + 0.34 * reach / width + rng.normal(0, 0.04), 0.28, 0.58)
        lower = upper * rng.uniform(0.9, 1.1)
        if rng.random() < 0.2:  # a sliver of muscle
            bulge, middle = rng.uniform(0.01, 0.06) * width, nipple + rng.uniform(-0.1, 0.1) * height
            muscle = bulge * (1 - ((y - middle) / (rng.uniform(0.2, 0.35) * height)) ** 2)
    else:
        nipple, lower = rng.uniform(0.52, 0.66) * height, rng.uniform(0.28, 0.44) * height
        upper, floor = nipple * rng.uniform(1.0, 1.2), rng.uniform(0.25, 0.5)
        top, bottom = rng.uniform(0.25, 0.5) * width, rng.uniform(0.4, 0.7) * height
        muscle = top * np.clip(1 - y / bottom, 0, 1) ** rng.uniform(0.8, 1.2)
        muscle -= (y > bottom) * (y - bottom)
    away = np.where(y < nipple, (nipple - y) / upper, (y - nipple) / lower)
    skin = np.clip(1 - away**shape, 0, 1) ** (1 / power)
    if view == "MLO":  # from the axilla hollow, then round
        hollow = rng.uniform(0, 0.7)
        skin = np.where(y < nipple, (1 - hollow) * skin + hollow * (1 + np.cos(np.pi * np.minimum(away, 1))) / 2, skin)
    skin = np.where(y < nipple, floor + (1 - floor) * skin, skin)
    wobble = sum(rng.normal() / k * np.sin(k * np.pi * y / height + rng.uniform(0, 6.28)) for k in (2, 3, 4))
    skin *= reach * (1 + 0.03 * wobble)
    if view == "MLO" and rng.random() < 0.5:  # the fold under the breast, and the abdomen's beginning
        fold = nipple + lower * rng.uniform(0.85, 1.0)
        skin = np.maximum(skin, rng.uniform(0.04, 0.2) * width * np.sqrt(np.clip((y - fold) / (0.2 * height), 0, 1)))
    muscle_mm = np.full((height, width), -1e3, np.float32)
    if muscle is not None:
        muscle_mm = ((muscle[:, None] - x) * p.pixel_spacing_mm).astype(np.float32)
    return Outline(x < skin[:, None], muscle_mm, (nipple, float(skin[int(nipple)])), (upper + lower) / 2)


def distance_to_margin_mm(silhouette, margin_mm: float, pixel_spacing_mm: float):
    """Return the distance to the silhouette's margin (H, W) in mm, negative outside.

    Tissue goes on beyond the chest wall, the top and the bottom.
    """
    margin = int(np.ceil(margin_mm / pixel_spacing_mm)) + 2
    padded = cv2.copyMakeBorder(silhouette.astype(np.uint8), margin, margin, margin, 0, cv2.BORDER_REPLICATE)
    signed = cv2.distanceTransform(padded, cv2.DIST_L2, 5) - cv2.distanceTransform(1 - padded, cv2.DIST_L2, 5)
    signed = cv2.GaussianBlur(signed, (0, 0), 1.5)  # the silhouette is of whole pixels, skin is not
    return signed[margin:-margin, margin:] * np.float32(pixel_spacing_mm)


def depth_mm(outline: Outline, inside, half_mm: float, z_mm, bump_mm: float, pixel_spacing_mm: float):
    """Return depth in the breast (D, H, W) in mm: flat under paddles, round at the margin, a ball for a nipple."""
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
    """Draw Gaussian noise (D, H, W) float32 of unit variance; power falls as frequency^-exponent between wavelengths.

    Periodic along rows and columns; along the slices not, for the ends of a breast must not meet.
    """
    padded = (fft.next_fast_len(shape[0] * 5 // 4), *shape[1:])
    gain = _power_law_gain(padded, spacing_mm, exponent, longest_mm, shortest_mm)
    # Uniform numbers will do, and cost a third: each value is a sum over all waves, which makes it Gaussian.
    spectrum = rng.random((*gain.shape, 2), dtype=np.float32)
    spectrum -= np.float32(0.5)
    spectrum *= gain[..., None]
    return fft.irfftn(spectrum.view(np.complex64)[..., 0], s=padded, workers=1, overwrite_x=True)[: shape[0]]


def fan(shape, apex, stretch: float, grid: float):
    """Return two maps (H, W) for cv2.remap by which structures in noise, `grid` times as coarse, run to the apex.

    Ducts and ligaments do so.
    """
    y, x = np.indices(shape, np.float32)
    along = np.hypot(y - apex[0], x - apex[1]) / stretch
    across = np.arctan2(y - apex[0], apex[1] - x) * (shape[0] / 2.5)
    return along / grid, across / grid


def bend(noise, maps):
    return cv2.remap(noise, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def fall(negative):
    """Return exp of what is negative, without the denormal numbers that cost so much."""
    return cv2.exp(np.maximum(negative, np.float32(-20)))


def deposit(canvas, points_mm, volumes_mm3, voxel_mm) -> None:
    """Add specks of matter to shares of voxels (D, H, W), each spread over its eight neighbors: volume is kept.

    points_mm: (N, 3), z, y, x from the center of the first voxel; what falls outside the canvas is left out.
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
    """Draw points (N, 3) of a tube that wanders in the plane from `start_mm` (z, y, x)."""
    steps = max(int(length_mm / step_mm), 2)
    angle = heading + np.cumsum(rng.normal(0, wander * np.sqrt(step_mm), steps))
    level = rise * np.cumsum(rng.normal(0, np.sqrt(step_mm), steps))
    return np.asarray(start_mm) + np.stack(
        [level, np.cumsum(np.sin(angle)) * step_mm, np.cumsum(np.cos(angle)) * step_mm], 1
    )


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
    favor = _behind_the_nipple(rng, outline)
    tissue = _glandular_noise(rng, patient, outline, favor, noise, depth, inside, z_mm, half_mm, pixel)
    fibrous = _vessels(rng, outline, half_mm, patient.vessels, p)
    _add_ligaments(rng, patient, outline, favor, tissue, fibrous, p)
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
    """Return the share of fibroglandular tissue in the breast without skin and muscle, by its attenuation."""
    mean = anatomy.volume.mean(where=anatomy.parenchyma, dtype=np.float64)
    return float((mean - ADIPOSE) / (FIBROGLANDULAR - ADIPOSE))


def _behind_the_nipple(rng, outline: Outline):
    """Draw where glandular tissue is favored, (H, W): 1 in the middle of a disc, 0 at its margin, negative outside."""
    y, x = np.indices(outline.silhouette.shape, np.float32)
    row, column = outline.nipple
    center = row - rng.uniform(-0.05, 0.25) * outline.half_height, column * rng.uniform(0.45, 0.65)
    extent = rng.uniform(0.35, 0.6) * outline.half_height, column * rng.uniform(0.35, 0.6)
    return (1 - ((y - center[0]) / extent[0]) ** 2 - ((x - center[1]) / extent[1]) ** 2).astype(np.float32)


def _glandular_noise(rng, patient, outline: Outline, favor, noise, depth, inside, z_mm, half_mm: float, pixel: float):
    """Draw noise (D, H, W) float32 whose high values become gland [3]: toward the nipple, and off the skin."""
    apex = outline.nipple[0], outline.nipple[1] + 60 / pixel
    maps = fan(inside.shape, apex, patient.streaks, 1)
    favor = rng.uniform(0.4, 2.0) * np.maximum(favor, -3)
    favor -= 4 * fall(-np.maximum(inside, 0) / np.float32(rng.uniform(3, 7)))
    favor -= 9 * (outline.muscle_mm > -2)
    middle, spread = rng.uniform(-0.4, 0.4) * half_mm, rng.uniform(0.5, 0.9) * half_mm
    tissue = np.empty_like(noise)
    for level, z in enumerate(z_mm):
        under_the_skin = fall(np.maximum(depth[level], 0) * np.float32(-1 / 2.5))
        away = np.float32(1.2 * ((z - middle) / spread) ** 2)
        tissue[level] = bend(noise[level], maps) + (favor - away) - 3 * under_the_skin
    return tissue


def _add_ligaments(rng, patient, outline: Outline, favor, tissue, fibrous, p: PhantomParameters) -> None:
    """Add Cooper's ligaments to `fibrous`, and take the lobules of fat between them out of `tissue`.

    Ligaments are the zero levels of two smooth noises: thin curved sheets that close around compartments [4]. Gland
    keeps to the sheets of the second; what is far from them is a lobule of fat.
    """
    pixel, (depth, height, width) = p.pixel_spacing_mm, tissue.shape
    grid = max(int(1.6 / pixel), 1)  # smooth noise needs no more
    shape, spacing = (depth, -(-height // grid), -(-width // grid)), (p.slice_spacing_mm, pixel * grid, pixel * grid)
    fields = [power_law_noise(rng, shape, spacing, 3.0, *span) for span in ((40.0, 4.0), (20.0, 3.0))]
    apex = outline.nipple[0], outline.nipple[1] + 60 / pixel
    maps = fan((height, width), apex, 1.5 * patient.streaks, grid * patient.coarseness)
    strength = np.float32(patient.ligaments) * (0.3 + 0.7 * np.clip(favor + 2, 0, 1))
    for level in range(depth):
        first, second = (bend(each[level], maps) for each in fields)
        sheets = fall(first * first * np.float32(-1 / 0.1**2)) * np.clip(second + 0.1, 0, 1)
        sheets += fall(second * second * np.float32(-1 / 0.14**2)) * np.clip(0.1 - first, 0, 1)
        np.maximum(fibrous[level], np.minimum(strength * sheets, 1), out=fibrous[level])
        tissue[level] += 0.8 * first - np.float32(patient.lobules) * np.abs(second)
    tissue *= np.float32(1 / patient.softness)


def _gland(excess, patient: Patient):
    """Return the share of glandular tissue where noise exceeds the threshold: it saturates, but is nowhere flat."""
    excess = np.maximum(excess, 0)
    return np.float32(patient.purity) * excess / (excess + np.float32(0.4))


def _threshold(tissue, fibrous, parenchyma, patient: Patient) -> np.float32:
    """Return the level above which noise is gland, so that the breast has the patient's share of fibroglandular tissue.

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
    """Draw thin tubes from the chest wall, and their branches, as shares of voxels (D, H, W) float32."""
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
    """Put fibrous tissue in and behind the nipple."""
    y, x = np.indices(fibrous.shape[1:], np.float32)
    square = ((y - outline.nipple[0]) ** 2 + ((x - outline.nipple[1]) / 2) ** 2) * pixel**2
    for level, z in zip(fibrous, z_mm, strict=True):
        np.maximum(level, 0.7 * fall(-(((square + z**2) / np.float32(0.8 * radius_mm) ** 2) ** 2)), out=level)


def _muscle(rng, outline: Outline, noise, z_mm):
    """Draw the share of muscle (D, H, W) float32: fibers along its edge, fat between; it thins out toward the edge."""
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
        fibers = np.float32(share) * (1 + 0.3 * np.clip(bend(level, maps), -2, 2))
        out[:rows, :columns] = edge * np.minimum(fibers, 1)
    return muscle
