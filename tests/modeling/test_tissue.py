"""The breast mask on images whose truth is known, and on real slices where they lie beside the checkout."""

import csv
import logging

import numpy as np
import pytest
from made_inputs import REAL_DATA

from modeling_mammodino.breast_segmentation import (
    LOW_CONFIDENCE,
    breast_box,
    chest_wall_side,
    find_breast,
    patch_tissue,
)
from modeling_mammodino.rendering import RenderSettings, make_thumbnail, plan_rendering  # noqa: E402

cv2 = pytest.importorskip("cv2")


H, W = 600, 450
Y, X = np.mgrid[:H, :W].astype(np.float32)


def segment_breast(image: np.ndarray) -> np.ndarray:
    return find_breast(image).mask


def simulated(level: float = 90.0) -> tuple[np.ndarray, np.ndarray]:
    """A half ellipse on the left with texture and a skin line that fades, on air of value 0; and its truth."""
    rng = np.random.default_rng(0)
    radius = np.sqrt(((Y - H * 0.52) / (H * 0.38)) ** 2 + (X / (W * 0.6)) ** 2)
    texture = np.zeros((H, W), np.float32)
    for scale, amplitude in ((50, 15), (15, 10), (4, 5)):
        coarse = rng.standard_normal((H // scale + 2, W // scale + 2)).astype(np.float32)
        texture += amplitude * cv2.resize(coarse, (W, H), interpolation=cv2.INTER_CUBIC)
    image = level * np.clip((1 - radius) * W * 0.6 / 12, 0, 1) + texture * np.clip((1 - radius) * 5, 0, 1)
    return np.clip(image, 0, 255), radius < 1


def u8(image: np.ndarray) -> np.ndarray:
    return np.clip(image, 0, 255).astype(np.uint8)


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


def noise(sigma: float, shape: tuple[int, int] = (H, W)) -> np.ndarray:
    return np.random.default_rng(1).normal(0, sigma, shape)


def test_outline_includes_the_skin():
    image, truth = simulated()
    mask = segment_breast(u8(image))
    assert mask.dtype == bool and mask.shape == (H, W)
    assert overlap(mask, truth) > 0.98


@pytest.mark.parametrize("sigma", [2, 10, 20])
def test_air_that_is_noisy_and_not_zero(sigma: float):
    image, truth = simulated()
    assert overlap(segment_breast(image + 60 + noise(sigma)), truth) > 0.95


def test_air_with_a_gradient():
    image, truth = simulated()
    assert overlap(segment_breast(u8(image + 20 + 20 * X / W + noise(2))), truth) > 0.95


@pytest.mark.parametrize("frame_px", [0, 1, 2, 8, 30])
@pytest.mark.parametrize("frame_value", [0, 255])
def test_film_with_label_tape_and_scanner_frame(frame_px: int, frame_value: int):
    image, truth = simulated()
    image = image + 25 + noise(3)
    image[40:100, 300:420] = 240  # label
    image[60:80, 310:410:10] = 40  # its letters
    image[350:560, 390:415] = 200  # tape
    inside = np.zeros((H, W), bool)
    inside[frame_px : H - frame_px, frame_px : W - frame_px] = True
    mask = segment_breast(u8(np.where(inside, image, frame_value)))
    assert overlap(mask, truth & inside) > 0.96
    assert not mask[:, 300:].any()


@pytest.mark.parametrize("where", ["row", "column", "border"])
def test_bright_line_of_one_pixel(where: str):
    image, truth = simulated()
    if where == "row":
        image[150] = 255
    elif where == "column":
        image[:, 300] = 255
    else:
        image[0], image[-1], image[:, 0], image[:, -1] = 255, 255, 255, 255
    assert overlap(segment_breast(u8(image)), truth) > 0.97


def test_pectoral_muscle_belongs_to_the_breast():
    image, truth = simulated()
    muscle = X / (W * 0.35) + Y / (H * 0.55) < 1
    mask = segment_breast(u8(np.where(muscle, 170, image) + 10))
    assert overlap(mask, truth | muscle) > 0.97


def test_bright_rim_of_a_tomosynthesis_slice_stays_in():
    image, truth = simulated()
    rim = truth & ~cv2.erode(truth.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
    rim[:, :5] = False
    mask = segment_breast(u8(np.where(rim, 250, image)))
    assert mask[rim].mean() > 0.99
    assert overlap(mask, truth) > 0.96


def test_the_larger_component_at_a_side_wins_over_a_free_one():
    image, truth = simulated()
    image[380:, 300:] = 220  # a wedge in the corner, smaller than the breast
    mask = segment_breast(u8(image))
    assert overlap(mask, truth) > 0.98


def test_holes_are_filled():
    image, truth = simulated()
    image[280:330, 60:110] = 0
    assert segment_breast(u8(image))[280:330, 60:110].all()


@pytest.mark.parametrize(
    ("factor", "offset", "dtype"),
    [(257, 0, np.uint16), (10, 3, np.uint16), (1, 100, np.int16), (1000, 10**7, np.int32)]
    + [(1 / 255, 0, np.float32), (0.37, -812.5, np.float64), (3.3, 1e4, np.float64)],
)
def test_intensity_scale_does_not_matter(factor: float, offset: float, dtype: type):
    image = u8(simulated()[0] + 20 + noise(3))
    mask = segment_breast(image)
    scaled = segment_breast((image * np.float64(factor) + offset).astype(dtype))
    assert (mask != scaled).mean() < 1e-4


def test_mirrored_and_turned_images():
    image, truth = simulated()
    image = u8(image + 20 + noise(3))
    mask = segment_breast(image)
    assert (segment_breast(image[:, ::-1]) != mask[:, ::-1]).mean() < 1e-4
    for turns in (1, 2, 3):
        assert overlap(segment_breast(np.rot90(image, turns)), np.rot90(truth, turns)) > 0.97


def test_nan_and_infinity_are_air():
    image, truth = simulated()
    image = np.where(truth, image + 50, np.nan)
    image[5, 440] = np.inf
    assert overlap(segment_breast(image), truth) > 0.98
    assert not segment_breast(np.full((64, 64), np.nan)).any()


@pytest.mark.parametrize("image", [np.zeros((H, W), np.uint8), np.full((H, W), 0.1, np.float32), 50 + noise(5)])
def test_no_breast_no_mask(image: np.ndarray):
    assert not segment_breast(image).any()


def test_a_label_alone_is_no_breast():
    image = 25 + noise(3)
    image[40:100, 300:420] = 240
    assert not segment_breast(u8(image)).any()


def test_a_crop_inside_the_breast_is_all_breast():
    image, truth = simulated()
    crop = u8(image)[220:400, 10:180]
    assert truth[220:400, 10:180].all()
    assert segment_breast(crop).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (5, 2), (1, 300), (300, 1), (0, 5), (33, 31), (3000, 20)])
def test_tiny_and_thin_images(shape: tuple[int, int]):
    image = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    assert segment_breast(image).shape == shape


def test_large_image_goes_by_its_thumbnail():
    image, truth = simulated()
    size = (4 * W + 3, 4 * H + 5)
    mask = segment_breast(cv2.resize(u8(image), size))
    assert mask.shape == size[::-1]
    assert overlap(mask, cv2.resize(truth.astype(np.uint8), size) > 0) > 0.97


def test_color_planes_are_refused():
    with pytest.raises(ValueError, match="2-D"):
        segment_breast(np.zeros((3, 64, 64)))


def film(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The breast on a gray base that slopes, with grain; and its truth."""
    image, truth = simulated()
    return 0.8 * image + 25 + 12 * (X / W + Y / H) + noise(3), truth


def black_margins(image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    around = ((30, 20), (90, 130))
    return np.pad(image, around), np.pad(truth, around)


def slanted_border(image: np.ndarray, truth: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    border = (X > W * (0.93 + 0.04 * Y / H)) | (Y < 0.03 * H + 0.02 * X)
    return np.where(border, level, image), truth & ~border


def label_on_the_skin(image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    skin = int(np.flatnonzero(truth[H // 2])[-1])
    label = np.s_[H // 2 - 40 : H // 2 + 10, skin - 10 : skin + 90]
    image, truth = image.copy(), truth.copy()
    image[label], truth[label] = 240, False
    return image, truth


def paddle(image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside = (Y > 0.05 * H) & (Y < 0.95 * H) & (X < 0.85 * W)
    return image + 8 * inside, truth


def collimated(image: np.ndarray, truth: np.ndarray, is_round: bool) -> tuple[np.ndarray, np.ndarray]:
    if is_round:
        field = (Y - H / 2) ** 2 + (X - W * 0.4) ** 2 < (0.48 * H) ** 2
    else:
        field = (Y > 0.06 * H) & (Y < 0.94 * H) & (X < 0.9 * W)
    return np.where(field, image + 40, 0), truth & field


def implant(image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    filled = ((Y - H * 0.52) / (H * 0.22)) ** 2 + ((X - W * 0.1) / (W * 0.25)) ** 2 < 1
    return np.where(filled, 245, 0.5 * image), truth


def redacted(image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Black boxes: over a label, at the side and across the skin; the film's base is gray."""
    skin = int(np.flatnonzero(truth[H // 2])[-1])
    image, truth = image + 40, truth.copy()
    for box in (
        np.s_[60:110, 330:400],
        np.s_[300:420, 410:450],
        np.s_[H // 2 - 20 : H // 2 + 20, skin - 30 : skin + 40],
    ):
        image[box], truth[box] = 0, False
    return image, truth


def wavy_border(image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    border = Y > H * (0.975 + 0.02 * np.sin(X / 40))
    return np.where(border | (X < 6), 250, image), truth


def nearly_black(image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image = 0.1 * image
    image[40:90, 330:420] = 250  # a label, and letters that are none
    image[60:70, 250:310:6] = 250
    return image, truth


COMPOSED = {
    "film with redaction boxes": lambda: redacted(*film()),
    "film with a wavy white border": lambda: wavy_border(*film()),
    "nearly black film": lambda: nearly_black(*simulated()),
    "sloping film": lambda: film(),
    "film with black margins": lambda: black_margins(*film()),
    "film with a slanted white border": lambda: slanted_border(*film(), 255),
    "film with a slanted black border": lambda: slanted_border(*film(), 0),
    "label on the skin": lambda: label_on_the_skin(*film()),
    "paddle": lambda: paddle(*simulated()),
    "rectangular collimation": lambda: collimated(*simulated(), False),
    "round collimation": lambda: collimated(*simulated(), True),
    "implant": lambda: implant(*simulated()),
}


@pytest.mark.parametrize("turns", [0, 1], ids=["upright", "lying"])
@pytest.mark.parametrize("image", COMPOSED)
def test_composed_images(image: str, turns: int):
    image, truth = COMPOSED[image]()
    found = find_breast(np.rot90(u8(image), turns))
    assert overlap(found.mask, np.rot90(truth, turns)) > 0.93
    assert found.confidence >= LOW_CONFIDENCE, found.warning
    assert np.array_equal(found.mask, segment_breast(np.rot90(u8(image), turns)))


def test_confidence_falls_with_the_evidence():
    image, _ = simulated()
    clear = find_breast(u8(image + 20 + noise(2)))
    assert clear.confidence > 0.95 and clear.outside_fraction < 0.01
    mirrored = u8(np.maximum(image, image[::-1, ::-1]) + 20 + noise(2))  # two breasts, one on each side
    crop = find_breast(u8(image)[220:400, 10:180])
    assert crop.mask.all() and crop.confidence < LOW_CONFIDENCE and "no air" in crop.warning
    filled = find_breast(u8(np.where((Y > 60) & (Y < H - 60) & (X < W - 60), 120 + noise(1), 10)))  # an empty plate
    assert filled.mask.any() and filled.confidence < LOW_CONFIDENCE and "rectangle" in filled.warning
    assert find_breast(mirrored).confidence < clear.confidence
    nothing = find_breast(np.zeros((H, W), np.uint8))
    assert not nothing.mask.any() and nothing.confidence == nothing.outside_fraction == 0


def test_what_lies_outside_is_measured():
    image, truth = simulated()
    image[40:100, 300:420] = 240  # 7,200 pixels of label
    found = find_breast(u8(image))
    assert found.outside_fraction == pytest.approx(7200 / (7200 + truth.sum()), rel=0.1)
    assert not found.mask[40:100, 300:420].any()


def test_a_doubtful_mask_is_logged_once_with_its_name(caplog):
    image, _ = simulated()
    sure, doubtful = make_thumbnail(u8(image)), make_thumbnail(np.ascontiguousarray(u8(image)[220:400, 10:180]))
    with caplog.at_level(logging.WARNING):
        plan_rendering([sure], RenderSettings(), "sure.png")
    assert not caplog.records and sure.confidence > 0.95
    with caplog.at_level(logging.WARNING):
        plan_rendering([doubtful], RenderSettings(), "crop.png")
    assert doubtful.confidence < LOW_CONFIDENCE and len(caplog.records) == 1
    assert all(word in caplog.text for word in ("crop.png", "0.20", "no air", "contact_sheet"))
    caplog.clear()
    unsure = sure._replace(confidence=0.1, outside_fraction=0.3)  # one slice of a volume
    plan_rendering([sure, unsure, sure], RenderSettings(), "volume")
    assert len(caplog.records) == 1 and all(word in caplog.text for word in ("volume", "0.10", "30 %"))


def test_breast_box():
    mask = np.zeros((100, 80), bool)
    mask[20:60, 0:50] = True
    assert breast_box(mask, 0) == (20, 0, 60, 50)
    assert breast_box(mask) == (19, 0, 61, 51)
    assert breast_box(mask, 5.0) == (0, 0, 100, 80)
    assert breast_box(np.zeros((7, 9), bool)) == (0, 0, 7, 9)


def test_chest_wall_side():
    _, truth = simulated()
    assert chest_wall_side(truth) == "left"
    assert chest_wall_side(truth[:, ::-1]) == "right"
    free = np.zeros((100, 100), bool)
    free[40:60, 60:80] = True
    assert chest_wall_side(free) == "right"
    assert chest_wall_side(np.zeros((4, 4), bool)) == "left"


def test_patch_tissue_by_hand():
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    assert np.allclose(patch_tissue(mask, (1, 1)), 0.5)
    assert np.allclose(patch_tissue(mask, (2, 3)), mask)
    assert np.allclose(patch_tissue(mask, (1, 2)), [[(2 + 0.5) / 3, 0.5 / 3]])
    assert np.allclose(patch_tissue(mask, (4, 3)), np.repeat(mask, 2, axis=0))  # finer than the pixels


@pytest.mark.parametrize("grid", [(37, 37), (16, 9), (1, 7)])
def test_patch_tissue_keeps_the_area(grid: tuple[int, int]):
    mask = np.random.default_rng(0).random((259, 131)) < 0.3
    tissue = patch_tissue(mask, grid)
    assert tissue.shape == grid and tissue.dtype == np.float32
    assert tissue.mean() == pytest.approx(mask.mean(), abs=1e-6)
    finer = np.repeat(np.repeat(mask, grid[0], axis=0), grid[1], axis=1)  # now the grid divides it
    exact = finer.reshape(grid[0], mask.shape[0], grid[1], mask.shape[1]).mean(axis=(1, 3))
    assert np.allclose(tissue, exact, atol=1e-6)


@pytest.mark.skipif(not (REAL_DATA / "bcs_dbt").is_dir(), reason="real slices are not beside this checkout")
def test_real_tomosynthesis_slices():
    with open(REAL_DATA / "bcs_dbt" / "slices.csv", newline="") as rows:
        boxed = [row for row in csv.DictReader(rows) if row["X"]]
    assert len(boxed) == 51
    for row in boxed:
        image = cv2.imread(str(REAL_DATA / "bcs_dbt" / "slices" / row["file"]), cv2.IMREAD_GRAYSCALE)
        found = find_breast(image)
        mask, above_air = found.mask, image > 8
        assert found.confidence >= LOW_CONFIDENCE, (row["file"], found.warning)
        x, y, width, height = (int(float(row[name])) for name in ("X", "Y", "Width", "Height"))
        box = np.s_[y : y + height, x : x + width]
        assert mask[box][above_air[box]].mean() >= 0.99, row["file"]
        assert mask.sum() <= 1.1 * above_air.sum(), row["file"]


@pytest.mark.skipif(not (REAL_DATA / "cdd_cesm").is_dir(), reason="real CESM images are not beside this checkout")
def test_real_subtracted_images():
    paths = sorted((REAL_DATA / "cdd_cesm" / "subtracted_512").rglob("*.png"))
    assert paths
    for path in paths:
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        found = find_breast(image)
        mask, above_air = found.mask, image > 8
        assert found.confidence >= LOW_CONFIDENCE, (path.name, found.warning)
        assert mask[above_air].mean() > 0.9, path.name
        assert mask.sum() <= 1.1 * above_air.sum(), path.name
        assert chest_wall_side(mask) == {"L": "left", "R": "right"}[path.stem.split("_")[1]], path.name
