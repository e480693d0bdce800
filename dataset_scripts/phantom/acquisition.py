"""Imaging of a simulated breast: cone-beam projection, detector, filtered backprojection, display.

Attenuation is that of one energy, without scatter; quantum and electronic noise, blur. The tube runs on its arc. In
the plane of rows and height, where the tube moves, rays are exact to linear interpolation [7]; along the columns each
slice is magnified once, by the tube's height in the middle of the sweep (at the ends of a 50-degree sweep that is off
by less than 1 %, and projection and backprojection agree). Tissue goes on beyond the top and the bottom of the field
as it is there. Sources by number: `anatomy`.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from scipy import fft, sparse

from .anatomy import ADIPOSE, FIBROGLANDULAR, MAMMOGRAM, TOMOSYNTHESIS, Breast, PhantomParameters


@dataclass(frozen=True)
class Geometry:
    """A tomosynthesis system. Heights are above the detector, which lies still."""

    num_views: int
    sweep_deg: float
    source_mm: float  # height of the source in the middle of the sweep
    pivot_mm: float  # height of the axis about which the tube turns
    support_mm: float  # height of the breast support
    detector_pixel_mm: float
    quanta_per_mm2: float  # detected in air, a view
    electronic_noise: float  # of a detector pixel, in quanta

    def sources_mm(self) -> np.ndarray:
        """Return place along the rows, from the middle of the field, and height of each view's source, (V, 2)."""
        angles = np.deg2rad(np.linspace(-0.5, 0.5, self.num_views) * self.sweep_deg * (self.num_views > 1))
        radius = self.source_mm - self.pivot_mm
        return np.stack([radius * np.sin(angles), self.pivot_mm + radius * np.cos(angles)], 1)


# Distances and angles [6]; Hologic's detector tilts by 4 degrees, here it lies still. Quanta: a dose like that of a
# mammogram, 100 uGy at the detector behind the breast and some 5,000 quanta per mm2 and uGy, over the views, at a
# quantum efficiency of a half; electronic noise: some thousand electrons at 400 a quantum; both to the order.
GEOMETRIES = {
    "hologic": Geometry(15, 15.0, 700.0, 0.0, 25.0, 0.14, 2.0e5, 6.0),  # Selenia Dimensions
    "siemens": Geometry(25, 50.0, 650.0, 50.0, 20.0, 0.085, 1.2e5, 4.0),  # Mammomat Inspiration
    "ge": Geometry(9, 25.0, 660.0, 40.0, 22.0, 0.1, 3.4e5, 3.0),  # SenoClaire
}
# Of the ramp: its floor, in units of 1 / thickness, and how much of it is taken off at the highest frequency. Tuned so
# that the correlation of slices and the power spectrum are those of real slices (performance.phantom_realism).
RAMP_FLOOR, APODIZATION = 0.65, 0.8
MAMMOGRAM_QUANTA = 4.0e6  # per mm2 in air


@dataclass(frozen=True)
class Rays:
    """The rays of a geometry through a volume. Detector pixels have the size of a voxel's shadow at half height."""

    project: sparse.csr_array  # rows of slices (D * H) to rows of views (V * U), in mm
    backproject: sparse.csr_array  # back, the mean over views
    magnification: np.ndarray  # of the columns of each slice, (D,), relative to the middle
    obliquity: np.ndarray  # path through a slice over its thickness, (V, U, C) float32
    columns: int  # C, of the detector


@lru_cache(maxsize=8)
def trace(geometry: Geometry, p: PhantomParameters) -> Rays:
    """Trace the rays through a volume of p's shape: matrices that interpolate linearly along the rows."""
    pitch, height, depth = p.pixel_spacing_mm, p.height_px, p.num_slices
    z = geometry.support_mm + p.num_slices * p.slice_spacing_mm / 2 + p.slice_heights_mm.astype(np.float64)  # (D,)
    middle = geometry.support_mm + p.num_slices * p.slice_spacing_mm / 2
    y = (np.arange(height) - (height - 1) / 2) * pitch  # rows from the middle, (H,)
    sources = geometry.sources_mm()  # (V, 2)
    source_y, source_z = sources[:, 0, None], sources[:, 1, None]
    # Where the ray from each source through a point (y, z) meets the plane of half height; views are compared there.
    reach = lambda y, z: source_y + (y - source_y) * (source_z - middle) / (source_z - z)  # noqa: E731
    edge = max(abs(reach(side, z)).max() for side in (y[0], y[-1]))
    margin = int(np.ceil((edge - y[-1]) / pitch)) + 1
    u = (np.arange(height + 2 * margin) - (height - 1) / 2 - margin) * pitch  # (U,)
    views, rows = len(sources), len(u)

    def interpolate(position, length):
        """Return rows of a matrix that reads `position` (..., in rows) out of blocks of `length` rows; edges go on."""
        position = np.clip(position, 0, length - 1)
        low = np.minimum(position.astype(int), length - 2)
        return np.stack([low, low + 1], -1), np.stack([1 - (position - low), position - low], -1)

    # (V, U, D): the row in each slice that a ray to detector row u crosses
    at = source_y[:, :, None] + (u[:, None] - source_y[:, :, None]) * ((source_z - z) / (source_z - middle))[:, None]
    index, weight = interpolate((at - y[0]) / pitch, height)
    index += (np.arange(depth) * height)[:, None]
    project = _matrix(
        index.reshape(views * rows, -1), weight.reshape(views * rows, -1) * p.slice_spacing_mm, depth * height
    )
    # (D, H, V): the detector row of each voxel in each view
    meet = np.stack([reach(one, z).T for one in y], 1)
    index, weight = interpolate((meet - u[0]) / pitch, rows)
    index += (np.arange(views) * rows)[:, None]
    backproject = _matrix(index.reshape(depth * height, -1), weight.reshape(depth * height, -1) / views, views * rows)
    magnification = (geometry.source_mm - middle) / (geometry.source_mm - z)
    columns = int(np.ceil(p.width_px * magnification.max()))
    slope_y = (u - source_y)[:, :, None] / (source_z - middle)[:, :, None]
    slope_x = (np.arange(columns) + 0.5) * pitch / (source_z - middle)[:, :, None]
    obliquity = np.sqrt(1 + slope_y**2 + slope_x**2).astype(np.float32)
    return Rays(project, backproject, magnification, obliquity, columns)


def _matrix(index, weight, columns: int) -> sparse.csr_array:
    starts = np.arange(len(index) + 1) * index.shape[1]
    return sparse.csr_array(
        (weight.astype(np.float32).ravel(), index.astype(np.int32).ravel(), starts.astype(np.int32)),
        (len(index), columns),
    )


def _stretch(slices, factors, columns: int):
    """Stretch slices (D, H, W) along the columns from the chest wall, (D, H, columns)."""
    wide = np.empty((*slices.shape[:2], columns), np.float32)
    for one, factor, out in zip(slices, factors, wide, strict=True):
        # column c of the result lies at (c + 0.5) / factor - 0.5
        matrix = np.array([[factor, 0, (factor - 1) / 2], [0, 1, 0]])
        cv2.warpAffine(one, matrix, (columns, len(one)), out, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)
    return wide


def project(volume, geometry: Geometry, p: PhantomParameters):
    """Return line integrals (V, U, C) float32 of a volume (D, H, W) whose chest wall is column 0."""
    rays = trace(geometry, p)
    wide = _stretch(volume, rays.magnification, rays.columns)
    views = rays.project @ wide.reshape(-1, rays.columns)
    return views.reshape(rays.obliquity.shape) * rays.obliquity


def detect(rng, integral, quanta: float, electronic_noise: float, blur_px: float, known=0.0):
    """Measure line integrals (V, H, W) as a detector does: noise of `quanta` in air and of electronics, then blur.

    The logarithm of N + e quanta, N of Poisson and e of Gaussian distribution, in its Gaussian limit. `known` (V, H, W)
    is what the beam went through beside the integral; it is in the noise, and is subtracted again.
    """
    noisy, known = rng.standard_normal(integral.shape, dtype=np.float32), np.broadcast_to(known, integral.shape)
    for view, one, other in zip(noisy, integral, known, strict=True):
        detected = cv2.exp(-one - other) * np.float32(quanta)
        view *= np.sqrt(detected + np.float32(electronic_noise**2)) / detected
        view += one
        if blur_px > 0.1:
            cv2.GaussianBlur(view, (0, 0), blur_px, dst=view)
    return noisy


def reconstruct(views, geometry: Geometry, p: PhantomParameters):
    """Return the filtered backprojection (D, H, W) in 1/mm of line integrals (V, U, C).

    The ramp along the tube's way is |f| times the spread of tan(angle), apodized [8], with a floor: below it the sweep
    hardly tells slices apart, and it keeps wide structures, as the vendors' filters do.
    """
    rays = trace(geometry, p)
    length, spread = fft.next_fast_len(views.shape[1] * 5 // 4), 2 * np.tan(np.deg2rad(geometry.sweep_deg / 2))
    frequency = fft.rfftfreq(length, p.pixel_spacing_mm)
    ramp = np.clip(frequency * spread, RAMP_FLOOR / (p.num_slices * p.slice_spacing_mm), 1 / p.slice_spacing_mm)
    ramp *= 1 - APODIZATION * np.sin(np.pi / 2 * frequency / frequency[-1]) ** 2
    spectrum = fft.rfft(views / rays.obliquity, length, axis=1)
    spectrum *= ramp.astype(np.float32)[:, None]
    filtered = fft.irfft(spectrum, length, axis=1)[:, : views.shape[1]]
    slices = rays.backproject @ np.ascontiguousarray(filtered).reshape(-1, views.shape[2])
    slices = slices.reshape(p.num_slices, p.height_px, -1)
    return _stretch(slices, 1 / rays.magnification, p.width_px)


def _display(rng, fibrous, shadow):
    """Return 12-bit uint16 for display: vendors window an image by its own tissue; brightness does not tell density.

    Inside the breast the 5th percentile comes to about 0.13 of the range and the mean to 0.25, as in real slices,
    whatever tissue there is; air is 0.
    """
    sample = np.s_[..., ::3, ::3]
    inside = np.broadcast_to(shadow[sample] > 0.5, fibrous[sample].shape)
    values = fibrous[sample][inside]
    low, mean = (np.percentile(values, 5), values.mean()) if len(values) else (0.0, 1.0)
    dark, middle = rng.uniform(0.105, 0.15), rng.uniform(0.225, 0.29)
    value = fibrous - np.float32(low)
    value *= np.float32((middle - dark) / max(mean - low, 0.02))
    value += np.float32(dark)
    bright = np.maximum(value - np.float32(0.5), 0)  # highlights are compressed, so that dense masses keep structure
    value -= bright * bright / (bright + np.float32(0.5))
    np.clip(value, 0, 1, out=value)
    value *= (4095 * np.minimum(shadow, 1) * (shadow > 0.05)).astype(np.float32)
    return np.rint(value, out=value).astype(np.uint16)


def _flip(array, breast: Breast):
    """Flip between the image's side and the chest wall at column 0."""
    return np.ascontiguousarray(array[..., ::-1]) if breast.laterality == "R" else array


def acquire_dbt(breast: Breast) -> np.ndarray:
    """Return tomosynthesis slices (D, H, W) uint16, 12 bits; the thinner margin is flattened by the known thickness."""
    p, rng, geometry = breast.parameters, breast.random_generator(TOMOSYNTHESIS), GEOMETRIES[breast.vendor]
    body = _flip(breast.body, breast)
    shadow = body.sum(axis=0)
    # What is not fat; the fat weakens the beam, as thick as from the middle of the sweep, and is flattened away.
    excess = project(_flip(breast.volume, breast) - np.float32(ADIPOSE) * body, geometry, p)
    margin, wider = (excess.shape[1] - p.height_px) // 2, excess.shape[2] - p.width_px
    fat = cv2.copyMakeBorder(shadow, margin, margin, 0, wider, cv2.BORDER_REPLICATE) * trace(geometry, p).obliquity
    quanta = geometry.quanta_per_mm2 * p.dose * p.pixel_spacing_mm**2
    electronic = geometry.electronic_noise * p.pixel_spacing_mm / geometry.detector_pixel_mm
    blur_px = p.detector_blur_mm / p.pixel_spacing_mm
    views = detect(rng, excess, quanta, electronic, blur_px, fat * np.float32(ADIPOSE * p.slice_spacing_mm))
    slices = reconstruct(views, geometry, p) / np.float32(FIBROGLANDULAR - ADIPOSE)
    return _flip(_display(rng, slices, shadow / 3), breast)


def acquire_2d(breast: Breast) -> np.ndarray:
    """Return a mammogram (H, W) uint16, 12 bits: one projection, noisy, blurred, margin flattened, air 0."""
    p, rng, geometry = breast.parameters, breast.random_generator(MAMMOGRAM), GEOMETRIES[breast.vendor]
    integral, thickness = breast.volume.sum(0) * p.slice_spacing_mm, breast.body.sum(0) * p.slice_spacing_mm
    quanta, pixels = MAMMOGRAM_QUANTA * p.dose * p.pixel_spacing_mm**2, p.pixel_spacing_mm / geometry.detector_pixel_mm
    blur_px = p.detector_blur_mm / p.pixel_spacing_mm
    detected = detect(rng, integral[None], quanta, geometry.electronic_noise * pixels, blur_px)[0] - ADIPOSE * thickness
    fibrous = detected / ((FIBROGLANDULAR - ADIPOSE) * p.num_slices * p.slice_spacing_mm)
    return _display(rng, fibrous, thickness / (3 * p.slice_spacing_mm))
