"""The flag for burned-in text: found where it was written, silent where there is none."""

import numpy as np
import pytest
from made_inputs import REAL_DATA, draw_breast

from dataset_scripts.corpus.burned_in import longest_row, looks_annotated  # noqa: E402
from modeling_mammodino.breast_segmentation import find_breast  # noqa: E402

cv2 = pytest.importorskip("cv2")


HEIGHT, WIDTH = 1600, 1200


def segment_breast(image: np.ndarray) -> np.ndarray:
    return find_breast(image).mask


@pytest.fixture(scope="module")
def plane() -> np.ndarray:
    """(H, W) float32 in 0..1, the breast on the left."""
    return cv2.resize(draw_breast(HEIGHT // 2, WIDTH // 2).astype(np.float32) / 4095, (WIDTH, HEIGHT)) * 0.8


def written(plane: np.ndarray, text: str, place: tuple[int, int], size: float = 1.2, level: float = 1.0) -> np.ndarray:
    strokes = np.zeros(plane.shape, np.uint8)
    cv2.putText(strokes, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, 255, 2, cv2.LINE_AA)
    share = strokes / np.float32(255)
    return plane * (1 - share) + level * share


@pytest.mark.parametrize(("full_scale", "dtype"), [(255, np.uint8), (4095, np.uint16), (65535, np.uint16), (1, float)])
@pytest.mark.parametrize("place", [(700, 100), (150, 800)], ids=["in air", "on the breast"])
def test_white_text_at_any_depth(plane, place, full_scale, dtype):
    pixels = (written(plane, "DOE 1961-04-12", place) * full_scale).astype(dtype)
    clean = (plane * full_scale).astype(dtype)
    breast = segment_breast(clean)
    assert looks_annotated(pixels, breast)
    assert not looks_annotated(clean, breast)


def test_black_text_on_a_label(plane):
    labeled = plane.copy()
    labeled[60:140, 680:1150] = 0.95
    breast = segment_breast(plane)
    assert not looks_annotated(labeled, breast)
    assert looks_annotated(written(labeled, "ID 00482913", (700, 110), level=0.0), breast)


def test_text_that_runs_upwards(plane):
    turned = np.ascontiguousarray(np.rot90(written(np.rot90(plane).copy(), "ID 00482913", (60, 100)), -1))
    assert looks_annotated(turned, segment_breast(plane))


def test_a_marker_of_three_letters_is_flagged_and_one_letter_is_not(plane):
    breast = segment_breast(plane)
    assert looks_annotated(written(plane, "R CC", (800, 200), 2.0), breast)
    assert not looks_annotated(written(plane, "R", (800, 200), 2.0), breast)


def test_full_size_text_is_found_on_every_second_pixel(plane):
    large = cv2.resize(plane, (3328, 4096))
    assert looks_annotated(written(large, "ID 00482913", (2000, 300)), segment_breast(plane))


def test_nothing_to_read():
    assert longest_row(np.zeros((64, 64), np.uint8), np.zeros((64, 64), bool)) == 0
    noise = np.random.default_rng(0).integers(0, 4096, (600, 400)).astype(np.uint16)
    assert not looks_annotated(noise, np.zeros((60, 40), bool))


@pytest.mark.skipif(not (REAL_DATA / "bcs_dbt").is_dir(), reason="real slices are not beside this checkout")
def test_real_slices_carry_no_text():
    for path in sorted((REAL_DATA / "bcs_dbt" / "slices").glob("*.jpg"))[::5]:
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        assert not looks_annotated(image, segment_breast(image)), path.name
