"""What does a simulated breast cost? Anatomy with lesion, tomosynthesis and mammogram, at two sizes, on one thread.

python -m performance.phantom [--breasts 24] [--vendor hologic]
"""

import argparse
import platform
import time

import cv2
import numpy as np
import scipy

from dataset_scripts.phantom.archive import GEOMETRIES, PhantomParameters, acquire_2d, acquire_dbt, simulate_breast

BAR_SECONDS = 3.0  # a volume of the larger size


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m performance.phantom", description=__doc__.splitlines()[0])
    parser.add_argument("--breasts", type=int, default=24, help="breasts of each size (default 24)")
    parser.add_argument("--vendor", choices=list(GEOMETRIES), default="hologic")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    versions = ", ".join(f"{each.__name__} {each.__version__}" for each in (cv2, np, scipy))
    print(f"{options.breasts} breasts, {options.vendor}, one thread, {platform.machine()}, {versions}")
    print("| size | anatomy | tomosynthesis | mammogram | together: median (min, max) CPU s |\n|---|---|---|---|---|")
    sizes = (
        PhantomParameters(vendor=options.vendor),
        PhantomParameters(40, 512, 320, pixel_spacing_mm=0.4, slice_spacing_mm=1.25, vendor=options.vendor),
    )
    for p in sizes:
        acquire_dbt(simulate_breast(p, 0, options.breasts))  # what is computed once for a size
        seconds = np.array([time_breast(p, index) for index in range(options.breasts)])
        parts, total = np.median(seconds, axis=0), seconds.sum(axis=1)
        cells = " | ".join(f"{part:.3f}" for part in parts)
        spread = f"{np.median(total):.3f} ({total.min():.3f}, {total.max():.3f})"
        print(f"| {p.num_slices} x {p.height_px} x {p.width_px} | {cells} | {spread} |")
    verdict = "within" if np.median(total) <= BAR_SECONDS else "OVER"
    print(f"the larger: {verdict} {BAR_SECONDS:g} s a volume")


def time_breast(p: PhantomParameters, index: int) -> list[float]:
    """CPU seconds of the three parts."""
    started = time.process_time()
    breast = simulate_breast(p, 0, index)
    simulated = time.process_time()
    acquire_dbt(breast)
    imaged = time.process_time()
    acquire_2d(breast)
    return [simulated - started, imaged - simulated, time.process_time() - imaged]


if __name__ == "__main__":
    main()
