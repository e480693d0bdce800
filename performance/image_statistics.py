"""Statistics of images of breasts, for comparing kinds of images: all take gray planes and millimeters.

Masks are (H, W) bool, images (H, W) of any number type; spacings are of square pixels.
"""

import cv2
import numpy as np

WINDOW_MM = 25.6  # of the power spectrum
BAND = (0.15, 0.7)  # cycles/mm over which the exponent is fitted
EDGE_MM = 5.0  # left out along the skin: its bright line is no tissue


def breast_mask(image: np.ndarray, background: float = 8 / 255) -> np.ndarray:
    """The largest connected part of an image in 0..1 that is brighter than `background`."""
    smooth = cv2.GaussianBlur(np.asarray(image, np.float32), (0, 0), 1)
    count, parts, boxes, _ = cv2.connectedComponentsWithStats((smooth > background).astype(np.uint8))
    if count < 2:
        return np.zeros(image.shape, bool)
    return parts == 1 + boxes[1:, cv2.CC_STAT_AREA].argmax()


def erode(mask: np.ndarray, edge_mm: float, pixel_mm: float) -> np.ndarray:
    """A mask without a margin; along the image's borders, where tissue goes on, nothing is taken."""
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    reach = int(edge_mm / pixel_mm) + 1
    padded = cv2.copyMakeBorder(padded, reach, reach, reach, reach, cv2.BORDER_REPLICATE)
    inside = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[reach + 1 : -reach - 1, reach + 1 : -reach - 1]
    return inside * pixel_mm > edge_mm


def power_spectrum(image, mask, pixel_mm: float, window_mm: float = WINDOW_MM) -> tuple[np.ndarray, np.ndarray] | None:
    """Frequencies in cycles/mm and radial mean power, both (N,): the mean over windows that lie inside the mask.

    Hann windows that overlap by half, without their mean (Welch, 1967). None where no window fits.
    """
    size = round(window_mm / pixel_mm)
    hann = np.hanning(size)[:, None] * np.hanning(size)
    total, count = np.zeros((size, size)), 0
    for top in range(0, image.shape[0] - size + 1, size // 2):
        for left in range(0, image.shape[1] - size + 1, size // 2):
            window = np.s_[top : top + size, left : left + size]
            if mask[window].all():
                part = image[window].astype(np.float64)
                total += np.abs(np.fft.fft2((part - (part * hann).sum() / hann.sum()) * hann)) ** 2
                count += 1
    if not count:
        return None
    axis = np.fft.fftfreq(size, 1 / size)
    ring = np.rint(np.hypot(axis[:, None], axis)).astype(int).ravel()
    power = np.bincount(ring, total.ravel()) / np.bincount(ring) / count
    kept = np.arange(1, size // 2)
    return kept / (size * pixel_mm), power[kept]


def power_law_exponent(image, mask, pixel_mm: float, band: tuple[float, float] = BAND) -> float:
    """beta of power ~ frequency^-beta, a straight line through the logarithms in the band; NaN where none fits.

    Of mammograms it is about 3 (Burgess, Jacobson, Judy, Med. Phys. 28 (2001) 419).
    """
    found = power_spectrum(image, mask, pixel_mm)
    if found is None:
        return float("nan")
    frequency, power = found
    inside = (frequency >= band[0]) & (frequency <= band[1])
    return float(-np.polyfit(np.log(frequency[inside]), np.log(power[inside]), 1)[0])


def normalised_quantiles(image, mask) -> np.ndarray:
    """Percentiles 1 to 99 of the gray values in a mask, (99,), where the 5th is 0 and the 95th is 1."""
    low, high = np.percentile(image[mask], (5, 95))
    return (np.percentile(image[mask], np.arange(1, 100)) - low) / (high - low)


def wasserstein(one: np.ndarray, other: np.ndarray) -> float:
    """Distance between two distributions that are given by their quantiles."""
    return float(np.abs(one - other).mean())


def correlation(one, other, mask) -> float:
    """Pearson's, of the pixels in a mask."""
    return float(np.corrcoef(one[mask], other[mask])[0, 1])
