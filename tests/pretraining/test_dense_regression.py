"""Dense targets against OpenCV and numpy, place by place, and what a linear layer can read from them."""

import cv2
import numpy as np
import pytest
import torch
from made_inputs import draw_breast
from scipy.ndimage import gaussian_filter

from training.pretraining.losses.dense_regression import DenseTargets, dense_regression_loss

CANVAS, PATCH = (64, 48), 8


@pytest.fixture(scope="module")
def canvases() -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve drawn breasts on a canvas: images (n, H, W) in 0..1 and their breasts."""
    images = np.stack([draw_breast(*CANVAS, seed=seed) for seed in range(12)]).astype(np.float32) / 4095
    return torch.from_numpy(images), torch.from_numpy(images > 0.1)


def masked_blur(image, inside, scale):
    def blur(x):
        return cv2.GaussianBlur(x, (0, 0), scale, borderType=cv2.BORDER_CONSTANT)

    return blur(image * inside) / np.maximum(blur(inside), 1e-3)


def statistics_at(image, inside, row, column):
    """The statistics of one patch, by loops over its windows with OpenCV's own filters."""
    smooth = [image] + [masked_blur(image, inside, scale) for scale in (1, 2, 4, 8, 16)]

    def window(values, side):
        """Mean over the window of `side` patches; what lies beyond the canvas counts as zero."""
        reach = side // 2 * PATCH
        top, left = row * PATCH - reach, column * PATCH - reach
        bottom, right = (row + 1) * PATCH + reach, (column + 1) * PATCH + reach
        part = values[max(top, 0) : bottom, max(left, 0) : right]
        return part.sum() / ((bottom - top) * (right - left))

    def mean(values, side):
        return window(values, side) / max(window(inside, side), 1e-3)

    out = [mean(image * inside, side) for side in (1, 3, 5)]
    place = np.s_[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    for finer, coarser in zip(smooth[:-1], smooth[1:], strict=True):
        band = (finer - coarser) * inside
        out += [mean(band, 1)] + [0.5 * np.log(mean(band**2, side) + 1e-6) for side in (1, 3, 5)]
        out += [band[place].max(), band[place].min()]
    for each in smooth[1:4]:
        x, y = (
            cv2.Sobel(each, cv2.CV_32F, *axes, ksize=3, borderType=cv2.BORDER_CONSTANT) * inside
            for axes in ((1, 0), (0, 1))
        )
        xx, yy, xy = window(x * x, 3), window(y * y, 3), window(x * y, 3)
        total = xx + yy + 1e-6
        out += [(xx - yy) / total, 2 * xy / total, np.hypot(xx - yy, 2 * xy) / total]
    return np.array(out)


@pytest.mark.parametrize("place", [(3, 2), (0, 0), (7, 5), (5, 1)])
def test_statistics_are_those_of_opencv(canvases, place):
    images, tissue = canvases
    targets = DenseTargets(CANVAS, PATCH)
    found = targets.statistics(images[:1], tissue[:1])[0].view(8, 6, -1)[place]
    expected = statistics_at(images[0].numpy(), tissue[0].numpy().astype(np.float32), *place)
    assert len(expected) == targets.num_statistics == 42
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("patch", [8, 12])
def test_blurs_are_those_of_scipy(patch):
    """On a canvas of several blocks of a narrow blur."""
    images = torch.from_numpy(draw_breast(144, 120, seed=3).astype(np.float32) / 4095)[None]
    tissue = images > 0.1
    targets = DenseTargets((144, 120), patch)
    both = torch.stack((images * tissue, tissue.float()))
    for index, scale in enumerate(targets.scales):
        values, weights = (
            gaussian_filter(each.double().numpy()[0], scale, mode="constant", truncate=4.0) for each in both
        )
        found = targets._blurred(both, index)[0].numpy()
        inside = tissue[0].numpy()
        np.testing.assert_allclose(found[inside], values[inside] / weights[inside], atol=3e-4, err_msg=str(scale))


def test_components_are_whitened_and_reconstruct_the_window(canvases):
    images, tissue = canvases
    targets = DenseTargets(CANVAS, PATCH, num_components=16)
    targets.fit(images, tissue)
    _, components = targets(images, tissue)
    padded = np.pad(images.numpy(), ((0, 0), (PATCH, PATCH), (PATCH, PATCH)))
    keep = tissue.view(12, 8, 8, 6, 8).float().mean(dim=(2, 4)).numpy() > 0.5
    windows = np.stack(
        [padded[n, r * 8 : r * 8 + 24, c * 8 : c * 8 + 24].ravel() for n, r, c in zip(*np.nonzero(keep), strict=True)]
    )
    values, vectors = np.linalg.eigh(np.cov(windows.T.astype(np.float64), bias=True))
    largest, vector = values[-1], vectors[:, -1] * (1 if vectors[:, -1].sum() >= 0 else -1)
    expected = (windows - windows.mean(0)) @ vector / np.sqrt(largest * (1 + 1e-4))
    found = components.view(12, 8, 6, 16).numpy()[keep]
    np.testing.assert_allclose(found[:, 0], expected.clip(-5, 5), atol=2e-3)
    np.testing.assert_allclose(np.cov(found.T), np.eye(16), atol=0.15)


def test_standardized_statistics_have_mean_zero_and_deviation_one(canvases):
    images, tissue = canvases
    targets = DenseTargets(CANVAS, PATCH)
    targets.fit(images, tissue)
    keep = torch.nn.functional.avg_pool2d(tissue.float(), PATCH).flatten(1) > 0.5
    statistics = targets(images, tissue)[0][keep]
    assert statistics.mean(0).abs().max() < 0.1 and (statistics.std(0) - 1).abs().max() < 0.25


def test_what_lies_outside_the_breast_changes_no_statistic(canvases):
    images, tissue = canvases
    other = torch.where(tissue, images, torch.rand(images.shape, generator=torch.Generator().manual_seed(1)))
    targets = DenseTargets(CANVAS, PATCH)
    inside = torch.nn.functional.avg_pool2d(tissue.float(), PATCH).flatten(1) == 1
    kept = [2, *range(3, 33)]  # brightness in 5 patches, bands
    torch.testing.assert_close(
        targets.statistics(images, tissue)[inside][:, kept],
        targets.statistics(other, tissue)[inside][:, kept],
        atol=2e-2, rtol=0,
    )  # fmt: skip


def test_the_loss_is_the_weighted_smooth_l1():
    generator = torch.Generator().manual_seed(0)
    predicted, targets = (3 * torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    weights = torch.tensor([[1.0, 0.5, 0.0], [0.25, 1.0, 1.0]])
    total = 0.0
    for b in range(2):
        for k in range(3):
            errors = (predicted[b, k] - targets[b, k]).abs().tolist()
            total += weights[b, k].item() * np.mean([e**2 / 2 if e < 1 else e - 0.5 for e in errors])
    assert dense_regression_loss(predicted, targets, weights).item() == pytest.approx(total / 3.75, rel=1e-5)


def test_too_few_patches_are_refused(canvases):
    images, tissue = canvases
    with pytest.raises(ValueError, match="components"):
        DenseTargets(CANVAS, PATCH).fit(images[:1], tissue[:1])
