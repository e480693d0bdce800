"""The phantom's physics against closed forms: tissue's statistics, the systems' geometry, attenuation, noise."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from dataset_scripts.phantom.acquisition import (
    GEOMETRIES,
    acquire_2d,
    acquire_dbt,
    detect,
    project,
    reconstruct,
    trace,
)
from dataset_scripts.phantom.anatomy import (
    ADIPOSE,
    ANATOMY,
    DENSITY_CLASSES,
    DENSITY_MEDIANS,
    FIBROGLANDULAR,
    PATIENT,
    PhantomParameters,
    deposit,
    draw_anatomy,
    draw_patient,
    exposure_generator,
    glandular_fraction,
    power_law_noise,
    random_generator,
)
from dataset_scripts.phantom.archive import simulate_breast
from performance.image_statistics import breast_mask, erode, power_law_exponent, power_spectrum

SMALL = PhantomParameters(num_slices=10, height_px=96, width_px=64, pixel_spacing_mm=1.8, slice_spacing_mm=4.0)
FINE = PhantomParameters(num_slices=40, height_px=160, width_px=48, pixel_spacing_mm=0.4, slice_spacing_mm=1.25)


def from_the_detector(geometry, p):
    """Heights in mm of the slices' middles and of the plane of half height, above the detector."""
    heights = geometry.support_mm + (p.num_slices - 1 - np.arange(p.num_slices) + 0.5) * p.slice_spacing_mm
    return heights, geometry.support_mm + p.num_slices * p.slice_spacing_mm / 2


@pytest.mark.parametrize(
    ("vendor", "views", "sweep_deg", "source_mm", "pixel_mm"),
    [("hologic", 15, 15, 700, 0.14), ("siemens", 25, 50, 650, 0.085), ("ge", 9, 25, 660, 0.1)],
)
def test_the_systems_are_those_of_the_vendors(vendor, views, sweep_deg, source_mm, pixel_mm):
    geometry = GEOMETRIES[vendor]
    across, height = geometry.sources_mm().T
    angles = np.rad2deg(np.arctan2(across, height - geometry.pivot_mm))
    assert len(angles) == views and geometry.detector_pixel_mm == pixel_mm
    np.testing.assert_allclose(angles, np.linspace(-sweep_deg / 2, sweep_deg / 2, views), atol=1e-9)
    np.testing.assert_allclose(np.hypot(across, height - geometry.pivot_mm), source_mm - geometry.pivot_mm)
    assert height[views // 2] == pytest.approx(source_mm)


@pytest.mark.parametrize("vendor", GEOMETRIES)
def test_a_slab_attenuates_by_beer_and_lambert(vendor):
    """-log(I / I0) = mu * thickness / cos, the angle being that of the ray from the source to the pixel."""
    geometry, p = GEOMETRIES[vendor], FINE
    slab = np.full((40, 160, 48), ADIPOSE, np.float32)
    slab[10:14] = FIBROGLANDULAR
    integral = project(slab, geometry, p)
    depth = (36 * ADIPOSE + 4 * FIBROGLANDULAR) * p.slice_spacing_mm
    _, middle = from_the_detector(geometry, p)
    views, rows, columns = integral.shape
    for view, (across, height) in zip(integral, geometry.sources_mm(), strict=True):
        y = (np.arange(rows) - (rows - 1) / 2) * p.pixel_spacing_mm - across  # in the plane of half height
        x = (np.arange(columns) + 0.5) * p.pixel_spacing_mm
        cosine = (height - middle) / np.sqrt(y[:, None] ** 2 + x**2 + (height - middle) ** 2)
        np.testing.assert_allclose(view, depth / cosine, rtol=1e-5)


@pytest.mark.parametrize("vendor", GEOMETRIES)
def test_a_point_casts_its_shadow_where_the_ray_through_it_falls(vendor):
    geometry, p = GEOMETRIES[vendor], FINE
    heights, middle = from_the_detector(geometry, p)
    for level, row, column in ((3, 30, 20), (20, 80, 5), (37, 120, 40)):
        volume = np.zeros((40, 160, 48), np.float32)
        volume[level, row, column] = 1
        views = project(volume, geometry, p)
        y, x = (row - 79.5) * p.pixel_spacing_mm, (column + 0.5) * p.pixel_spacing_mm
        for view, (across, height) in zip(views, geometry.sources_mm(), strict=True):
            stretch = (height - middle) / (height - heights[level])
            weight = view / view.sum()
            seen_y = (weight.sum(axis=1) @ np.arange(len(view)) - (len(view) - 1) / 2) * p.pixel_spacing_mm
            seen_x = (weight.sum(axis=0) @ np.arange(view.shape[1]) + 0.5) * p.pixel_spacing_mm
            assert seen_y == pytest.approx(across + (y - across) * stretch, abs=0.5 * p.pixel_spacing_mm)
            assert seen_x == pytest.approx(x * stretch, rel=0.01, abs=0.1 * p.pixel_spacing_mm)


@pytest.mark.parametrize("vendor", GEOMETRIES)
def test_a_speck_blurs_out_of_its_plane_along_the_sweep(vendor):
    """Noise-free: sharpest where it is, far from it a row of faint copies, one for each view, none across the sweep."""
    geometry, speck = GEOMETRIES[vendor], np.zeros((40, 160, 48), np.float32)
    speck[16, 80, 24] = 1
    found = reconstruct(project(speck, geometry, FINE), geometry, FINE)
    contrast = found[:, 79:82, 23:26].max(axis=(1, 2))
    assert contrast.argmax() == 16 and np.unravel_index(found[16].argmax(), (160, 48)) == (80, 24)
    assert contrast[16] > contrast[12] > contrast[8] and contrast[16] > 3 * contrast[0]
    ghost = found[0] / found[0].max()
    rows = np.flatnonzero(ghost.max(axis=1) > 0.25)
    spread_mm = 2 * np.tan(np.deg2rad(geometry.sweep_deg / 2)) * 16 * 1.25
    assert np.ptp(rows) * 0.4 == pytest.approx(spread_mm, rel=0.2)  # to parallax of the source's distance
    assert np.abs(ghost[:, 30:]).max() < 0.02 and np.abs(ghost[:, :18]).max() < 0.02


def test_a_wider_sweep_tells_slices_apart_better():
    speck, widths = np.zeros((40, 160, 48), np.float32), {}
    speck[20, 80, 24] = 1
    for vendor, geometry in GEOMETRIES.items():
        contrast = reconstruct(project(speck, geometry, FINE), geometry, FINE)[:, 80, 24]
        widths[vendor] = (contrast > contrast.max() / 2).sum()
    assert widths["siemens"] < widths["ge"] < widths["hologic"]


@pytest.mark.parametrize(("through", "quanta", "electronic"), [(0.0, 400, 0.0), (1.5, 2000, 0.0), (2.5, 5000, 30.0)])
def test_noise_has_the_variance_of_poisson_and_electronics(through, quanta, electronic):
    integral = np.full((2, 200, 200), through, np.float32)
    noise = detect(np.random.default_rng(0), integral, quanta, electronic, 0.0) - integral
    rng = np.random.default_rng(1)
    counted = rng.poisson(quanta * np.exp(-through), 80_000) + rng.normal(0, electronic, 80_000)
    drawn = -np.log(counted / quanta) - through
    assert noise.std() == pytest.approx(drawn.std(), rel=0.03) and abs(noise.mean()) < 0.02 * noise.std()
    blurred = detect(np.random.default_rng(0), integral, quanta, electronic, 1.0) - integral
    # white noise through a Gaussian of sigma s px keeps 1 / (4 pi s^2) of its variance
    assert blurred[:, 5:-5, 5:-5].var() == pytest.approx(noise.var() / (4 * np.pi), rel=0.05)


def test_noise_of_slices_falls_with_dose_until_electronics_rule():
    breast, geometry = simulate_breast(SMALL, 0, 0), GEOMETRIES["hologic"]
    inside = breast.body.sum(axis=0) > 8
    clean, *noisy = (
        acquire_dbt(replace(breast, parameters=replace(SMALL, dose=dose)))[5, inside].astype(float)
        for dose in (100.0, 1.0, 0.1)
    )
    little, much = ((each - clean).std() for each in noisy)
    through = np.exp(-breast.volume.sum(axis=0)[inside].mean() * SMALL.slice_spacing_mm)
    quanta = geometry.quanta_per_mm2 * SMALL.pixel_spacing_mm**2 * through * np.array([1.0, 0.1])
    electronics = geometry.electronic_noise**2 * (SMALL.pixel_spacing_mm / geometry.detector_pixel_mm) ** 2
    expected = np.sqrt(quanta + electronics) / quanta
    assert much / little == pytest.approx(expected[1] / expected[0], rel=0.2)
    assert expected[1] / expected[0] > np.sqrt(10)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 3.6])
def test_noise_falls_as_the_power_of_frequency_that_was_asked_for(exponent):
    shape, spacing = (40, 96, 128), (1.0, 0.5, 0.5)
    powers = []
    for seed in range(3):
        noise = power_law_noise(np.random.default_rng(seed), (*shape,), spacing, exponent, 1e3, 1e-3)
        powers.append(np.abs(np.fft.rfft2(noise, axes=(1, 2)).mean(axis=0)) ** 2)  # f_z = 0: a plane of the spectrum
    frequency = np.hypot(np.fft.fftfreq(96, 0.5)[:, None], np.fft.rfftfreq(128, 0.5))
    band = (frequency > 0.1) & (frequency < 0.8)
    slope = np.polyfit(np.log(frequency[band]), np.log(np.mean(powers, axis=0)[band]), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.25)
    flat = power_law_noise(np.random.default_rng(0), shape, spacing, 0.0, 1e3, 1e-3)
    assert flat.std() == pytest.approx(1, abs=0.05)


def test_the_measured_exponent_is_that_of_an_image_of_known_spectrum():
    """White noise filtered in the plane; and the spectrum of a sine has its peak at its frequency."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(512, 0.4), np.fft.fftfreq(512, 0.4)))
    whole = np.ones((512, 512), bool)
    for beta in (2.0, 3.0):
        gain = np.maximum(frequency, 1 / 205) ** (-beta / 2)
        image = np.fft.ifft2(np.fft.fft2(rng.normal(size=(512, 512))) * gain).real
        assert power_law_exponent(image, whole, 0.4) == pytest.approx(beta, abs=0.15)
    frequencies, power = power_spectrum(np.sin(2 * np.pi * 0.5 * 0.4 * np.arange(512))[None] + 0 * image, whole, 0.4)
    assert frequencies[power.argmax()] == pytest.approx(0.5, abs=1 / 25.6)
    assert np.isnan(power_law_exponent(image, ~whole, 0.4))


def test_slices_have_the_exponent_of_mammograms():
    """About 3 [Burgess 2001]; 3.3 (2.7, 3.7) in real slices of BCS-DBT, measured in the same way."""
    p = PhantomParameters(16, 512, 320, pixel_spacing_mm=0.4, slice_spacing_mm=3.0)
    found = []
    for index in range(8):
        image = acquire_dbt(simulate_breast(p, 0, index))[8] / np.float32(4095)
        found.append(power_law_exponent(image, erode(breast_mask(image), 5.0, 0.4), 0.4))
    assert 2.6 < np.nanmedian(found) < 3.7 and np.nanmin(found) > 2.0 and np.nanmax(found) < 4.2


def test_volumetric_density_is_the_one_that_was_drawn_and_its_classes_overlap():
    drawn, measured = {name: [] for name in DENSITY_CLASSES}, []
    for index in range(120):
        patient = draw_patient(random_generator(5, index, PATIENT))
        drawn[patient.density].append(patient.fraction)
        if index < 30:
            rng = exposure_generator(5, index, patient.laterality, patient.view, ANATOMY)
            anatomy = draw_anatomy(rng, patient, patient.view, SMALL)
            measured.append((glandular_fraction(anatomy), patient.fraction))
            label = simulate_breast(SMALL, 5, index).labels
            assert (label.density, label.glandular_fraction) == (patient.density, measured[-1][0])
    found, wanted = np.transpose(measured)
    np.testing.assert_allclose(found, wanted, rtol=0.1)  # the nipple is filled afterwards
    assert np.median(np.abs(found / wanted - 1)) < 0.02
    medians = [np.median(drawn[name]) for name in DENSITY_CLASSES]
    np.testing.assert_allclose(medians, DENSITY_MEDIANS, rtol=0.2)
    for low, high in zip(DENSITY_CLASSES, DENSITY_CLASSES[1:], strict=False):
        assert max(drawn[low]) > min(drawn[high])


def test_tissue_attenuates_as_fat_to_fibroglandular_and_is_inside_the_body():
    for index in range(10):
        breast = simulate_breast(SMALL, 2, index, lesion=False)
        assert breast.volume[breast.body == 0].max(initial=0) == 0
        inside = breast.volume[breast.body == 1]
        assert inside.min() >= ADIPOSE * 0.999 and inside.max() <= FIBROGLANDULAR * 1.001


def test_brightness_does_not_tell_density():
    fractions, slices, mammograms = [], [], []
    for index in range(100):
        breast = simulate_breast(SMALL, 3, index)
        inside = breast.body.max(axis=0) > 0.5
        fractions.append(breast.labels.glandular_fraction)
        slices.append(acquire_dbt(breast)[:, inside].mean())
        mammograms.append(acquire_2d(breast)[inside].mean())
    for brightness in (slices, mammograms):
        assert abs(spearmanr(fractions, brightness).statistic) < 0.3  # 0.26 at p = 0.01


def test_specks_keep_their_volume():
    rng, voxel = np.random.default_rng(0), (2.0, 0.7, 0.7)
    canvas = np.zeros((8, 20, 20), np.float32)
    points, volumes = rng.uniform(2.1, (12, 12, 12), (50, 3)), rng.uniform(0.01, 0.5, 50)
    deposit(canvas, points, volumes, voxel)
    assert canvas.sum() * np.prod(voxel) == pytest.approx(volumes.sum(), rel=1e-5)
    center = [(canvas.sum(axis=axes) @ np.arange(n)) for axes, n in (((1, 2), 8), ((0, 2), 20), ((0, 1), 20))]
    np.testing.assert_allclose(np.array(center) / canvas.sum() * voxel, volumes @ points / volumes.sum(), rtol=1e-4)
    deposit(canvas, [(-9.0, 0.0, 0.0)], 1.0, voxel)  # beside the canvas: nothing
    assert canvas.sum() * np.prod(voxel) == pytest.approx(volumes.sum(), rel=1e-5)


def test_rays_are_traced_once_for_a_shape():
    assert trace(GEOMETRIES["ge"], FINE) is trace(GEOMETRIES["ge"], FINE)
