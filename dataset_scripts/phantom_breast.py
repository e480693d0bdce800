"""What a simulated breast is: its parameters, the tissues' attenuation, its random streams, and the result.

Sources, by number below and in the modules beside this one:

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

import numpy as np

from dataset_scripts.phantom_dicom import BreastLabels

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
        """Height of each slice above the middle of the volume, (D,) float32; the first is nearest to the paddle."""
        return ((self.num_slices - 1) / 2 - np.arange(self.num_slices, dtype=np.float32)) * self.slice_spacing_mm


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
    """Counter-based: one independent stream for each (seed, index, stream)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64), counter=[0, 0, 0, stream]))


def exposure_generator(seed: int, index: int, laterality: str, view: str, purpose: int) -> np.random.Generator:
    """The stream of one purpose (ANATOMY, ...) in one of a patient's four exposures."""
    return random_generator(seed, index, 8 + 4 * VIEWS.index((laterality, view)) + purpose)
