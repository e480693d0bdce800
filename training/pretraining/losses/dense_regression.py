"""Dense local regression: from each visible or masked patch token, what is seen at its place is predicted.

This is ours, not the paper's: the adjacent-slice idea taken to patches. Where an image has a neighboring slice, the
content is the neighbor's, so that a token must know what is there and not the noise of one slice. Two kinds of content,
each with a weight of its own: local statistics (brightness, bands of differences of Gaussians, orientation; Lindeberg
1994 for the scale space, Bigun and Granlund 1987 for the structure tensor) and pixels (whitened principal components of
a window around the patch). Both are computed from images without augmentation of intensity, inside the breast alone.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from .distributed import num_processes, sum_over_processes

SCALES_PX = (1.0, 2.0, 4.0, 8.0, 16.0)  # standard deviations; one of two patches is added where it is larger
WINDOWS_PATCHES = (1, 3, 5)  # sides of the windows of a statistic
ORIENTATION_SCALES = (0, 1, 2)  # of SCALES_PX
CPU_IMAGES = 4  # at once on a CPU, whose caches hold them; on other devices all of a batch
CPU_BLOCK = 48  # rows of a narrow blur at once on a CPU: of a dense matrix most is zero
WIDE_PX = 8.0  # blurs from here on are two, between which a few samples are enough
LIMIT = 5.0  # standardized targets are clipped to this, so that no rare place rules a batch


def dense_regression_loss(predicted: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean over tokens of the smooth L1 loss (Girshick 2015), mean over a token's targets.

    predicted and targets (B, K, S); weights (B, K), such as the breast fraction of each patch. Returns a scalar
    float32. The weights are summed over all processes: the mean over processes is the loss of the whole batch.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        error = functional.smooth_l1_loss(predicted.float(), targets.float(), reduction="none").mean(dim=-1)  # (B, K)
        total_weight = sum_over_processes(weights.float().sum()).clamp_min(1e-6)
        return (error * weights).sum() * num_processes() / total_weight


def scales_px(patch_size: int) -> tuple[float, ...]:
    """Return the blur scales for a patch size: SCALES_PX, and two patches where that is coarser."""
    return SCALES_PX + ((2.0 * patch_size,) if 2 * patch_size > SCALES_PX[-1] else ())


def num_statistics(patch_size: int) -> int:
    """Return how many statistics describe a patch: brightness, bands and orientations; 42 at a patch of 8 px."""
    scales = len(scales_px(patch_size))
    return len(WINDOWS_PATCHES) * (1 + scales) + 3 * scales + 3 * len(ORIENTATION_SCALES)


class DenseTargets(nn.Module):
    """Content of every patch of a canvas (H, W): local statistics and components, standardized over a sample of images.

    `fit` takes means, deviations and principal components from images; they are buffers, saved in checkpoints.
    """

    statistics_mean: torch.Tensor
    statistics_scale: torch.Tensor
    window_mean: torch.Tensor
    components: torch.Tensor

    def __init__(self, canvas: tuple[int, int], patch_size: int, num_components: int = 64):
        super().__init__()
        self.canvas, self.patch_size = canvas, patch_size
        self.scales, self.num_statistics = scales_px(patch_size), num_statistics(patch_size)
        self.num_components, self.cpu_images = num_components, CPU_IMAGES
        window = (3 * patch_size) ** 2
        self.register_buffer("statistics_mean", torch.zeros(self.num_statistics))
        self.register_buffer("statistics_scale", torch.ones(self.num_statistics))
        self.register_buffer("window_mean", torch.zeros(window))
        self.register_buffer("components", torch.zeros(num_components, window))  # rows divided by their deviation
        for axis, length in zip("yx", canvas, strict=True):
            for index, scale in enumerate(self.scales):
                for part, matrix in enumerate(blur_matrices(length, scale)):
                    self.register_buffer(f"blur_{axis}{index}_{part}", matrix, persistent=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor, tissue: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return standardized statistics (B, N, S) and components (B, N, C) of images (B, H, W) in 0..1.

        tissue (B, H, W) bool.
        """
        with torch.autocast(images.device.type, enabled=False):
            statistics = (self.statistics(images, tissue) - self.statistics_mean) / self.statistics_scale
            filters = self.components.view(-1, 1, 3 * self.patch_size, 3 * self.patch_size)
            components = functional.conv2d(self._padded(images), filters, stride=self.patch_size)
            components = components.flatten(2).transpose(1, 2) - self.components @ self.window_mean
            return statistics.clamp(-LIMIT, LIMIT), components.clamp(-LIMIT, LIMIT)

    def statistics(self, images: torch.Tensor, tissue: torch.Tensor) -> torch.Tensor:
        """Return raw statistics (B, N, S), each over breast alone: mean brightness in windows of 1, 3 and 5 patches; of
        each band its mean, log root mean square in the three windows, maximum and minimum; of each orientation scale
        the two components of the structure tensor's direction and its coherence in 3 patches."""
        size = self.cpu_images if images.device.type == "cpu" else len(images)
        parts = zip(images.split(size), tissue.to(images.dtype).split(size), strict=True)
        return torch.cat([self._statistics(*part) for part in parts])

    @torch.no_grad()
    def _statistics(self, images: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """`statistics` of a few images; inside (B, H, W) is 1 on breast, 0 elsewhere."""

        def reduced(values: torch.Tensor, how: str) -> torch.Tensor:  # (..., H, W) -> (..., h, w)
            rows = getattr(values.unflatten(-2, (-1, self.patch_size)), how)(dim=-2)  # rows first: contiguous
            return getattr(rows.unflatten(-1, (-1, self.patch_size)), how)(dim=-1)

        def means_in(values: torch.Tensor, windows: Sequence[int]) -> list[torch.Tensor]:  # (B, H, W) -> (B, h, w) each
            means = reduced(values, "sum").unsqueeze(1) / self.patch_size**2
            return [functional.avg_pool2d(means, each, stride=1, padding=each // 2).squeeze(1) for each in windows]

        both = torch.stack((images * inside, inside))  # (2, B, H, W)
        smooth = [images, *(self._blurred(both, index) for index in range(len(self.scales)))]
        shares = [each.clamp_min(1e-3) for each in means_in(inside, WINDOWS_PATCHES)]
        values = [mean / share for mean, share in zip(means_in(both[0], WINDOWS_PATCHES), shares, strict=True)]
        for finer, coarser in zip(smooth[:-1], smooth[1:], strict=True):
            band = (finer - coarser).mul_(inside)
            values += [means_in(band, [1])[0] / shares[0]]
            extremes = [reduced(band, "amax"), reduced(band, "amin")]
            squares = means_in(band.square_(), WINDOWS_PATCHES)
            values += [(square / share + 1e-6).log() / 2 for square, share in zip(squares, shares, strict=True)]
            values += extremes
        for scale in ORIENTATION_SCALES:
            x, y = (gradient.mul_(inside) for gradient in sobel(smooth[1 + scale]))
            xy, xx, yy = (means_in(product, [3])[0] for product in (x * y, x.square_(), y.square_()))
            total = xx + yy + 1e-6
            values += [(xx - yy) / total, 2 * xy / total, ((xx - yy).square() + 4 * xy.square()).sqrt() / total]
        return torch.stack(values, dim=-1).flatten(1, 2)

    @torch.no_grad()
    def fit(self, images: torch.Tensor, tissue: torch.Tensor) -> None:
        """Take means, deviations and components from a sample of images (n, H, W) in 0..1 and tissue (n, H, W) bool.

        Raises ValueError where they hold fewer patches of breast than components.
        """
        keep = functional.avg_pool2d(tissue.float().unsqueeze(1), self.patch_size).flatten(1) > 0.5  # (n, N)
        if int(keep.sum()) <= self.num_components:
            raise ValueError(
                f"{int(keep.sum())} patches of breast for {self.num_components} components; give more images"
            )
        chunks = [slice(start, start + 32) for start in range(0, len(images), 32)]
        statistics = torch.cat([self.statistics(images[each], tissue[each])[keep[each]] for each in chunks])
        self.statistics_mean.copy_(statistics.mean(dim=0))
        self.statistics_scale.copy_(statistics.std(dim=0).clamp_min(1e-4))
        count, total = 0, torch.zeros_like(self.window_mean, dtype=torch.float64)
        products = torch.zeros_like(total.outer(total))
        center = images[tissue].mean()  # taken off, so that products in float32 are exact enough
        for each in chunks:  # sums in float64: windows are many
            windows = self._windows(images[each])[keep[each]] - center
            count, total, products = count + len(windows), total + windows.sum(dim=0), products + windows.T @ windows
        mean = total / count
        variances, directions = torch.linalg.eigh(products / count - mean.outer(mean))
        mean += center
        variances, directions = variances.flip(0)[: self.num_components], directions.flip(1)[:, : self.num_components]
        signs = torch.where(directions.sum(dim=0) < 0, -1.0, 1.0)  # eigenvectors have none of their own
        deviations = (variances.clamp_min(0) + 1e-4 * variances[0]).sqrt()
        self.window_mean.copy_(mean)
        self.components.copy_((directions * signs / deviations).T)

    def _padded(self, images: torch.Tensor) -> torch.Tensor:
        return functional.pad(images.unsqueeze(1), (self.patch_size,) * 4)  # beyond the canvas is air

    def _windows(self, images: torch.Tensor) -> torch.Tensor:
        """(n, N, 9 p^2): the 3 x 3 patches around each patch."""
        return functional.unfold(self._padded(images), 3 * self.patch_size, stride=self.patch_size).transpose(1, 2)

    def _blurred(self, both: torch.Tensor, index: int) -> torch.Tensor:
        """Blur over breast alone at the scale of an index (normalized convolution, Knutsson and Westin 1993); both
        (2, B, H, W): images, zero elsewhere, and where breast is."""
        scale = self.scales[index]
        is_wide = scale >= WIDE_PX
        for part in range(1 + is_wide):
            down, across = (getattr(self, f"blur_{axis}{index}_{part}") for axis in "yx")
            if not is_wide and both.device.type == "cpu":
                both = torch.cat([down[rows, near] @ both[..., near, :] for rows, near in bands(len(down), scale)], -2)
                both = torch.cat(
                    [both[..., near] @ across[rows, near].T for rows, near in bands(len(across), scale)], -1
                )
            else:
                both = down @ both @ across.T
        values, weights = both
        return values.div_(weights.clamp_min_(1e-3))


def blur_matrices(length: int, scale: float) -> list[torch.Tensor]:
    """Return what blurs `length` pixels with standard deviation `scale`, one after the other; beyond the ends is zero.

    A wide Gaussian is two of scale / sqrt(2), and what is between them is smooth: samples scale / 2 apart, and a little
    beyond the ends, give the product to 1e-4, for a fraction of its operations.
    """
    if scale < WIDE_PX:
        return [gaussian_matrix(length, scale)]
    step = scale / 2
    samples = torch.arange(-2 * scale, length + 2 * scale, step)
    distance = samples[:, None] - torch.arange(length, dtype=torch.float32)
    near = distance.abs() <= 4 * scale  # what lies farther off are denormal numbers, slow on a CPU
    blur = torch.exp(-(distance / scale).square()) * near / (math.sqrt(math.pi) * scale)  # of variance scale^2 / 2
    return [blur, step * blur.T.contiguous()]


def bands(length: int, scale: float) -> list[tuple[slice, slice]]:
    """Cut the rows of a Gaussian matrix into blocks: which rows, and the columns that are not zero there."""
    reach = int(4 * scale + 0.5)
    starts = range(0, length, CPU_BLOCK)
    return [
        (slice(start, start + CPU_BLOCK), slice(max(start - reach, 0), start + CPU_BLOCK + reach)) for start in starts
    ]


def gaussian_matrix(length: int, scale: float) -> torch.Tensor:
    """Return (length, length), whose row i blurs at i with standard deviation `scale`, cut at four of them; beyond the
    ends is zero."""
    places = torch.arange(length, dtype=torch.float32)
    distance = places[:, None] - places
    kernel = torch.exp(-(distance / scale).square() / 2) * (distance.abs() <= 4 * scale + 0.5)
    reach = int(4 * scale + 0.5)
    return kernel / torch.exp(-(torch.arange(-reach, reach + 1) / scale).square() / 2).sum()


def sobel(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients along x and y (B, H, W), zero beyond the border."""
    padded = functional.pad(images, (1, 1, 1, 1))
    right, down = padded[:, :, 2:] - padded[:, :, :-2], padded[:, 2:] - padded[:, :-2]  # cheaper than a convolution
    return right[:, :-2] + 2 * right[:, 1:-1] + right[:, 2:], down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
