"""Does the phantom look like real slices? Both in one image, and four statistics of both in a table.

python -m performance.phantom_realism --output DIR [--slices ../shared/data/bcs_dbt/slices] [--breasts 60] [--seed 0]

Real slices (BCS-DBT, Hologic, 8 bits) are brought to the phantom's 0.4 mm, laid with the chest wall on the left and cut
to its field of 205 x 128 mm; phantoms are 50 slices of 1 mm, brought to 8 bits. Statistics: the histogram inside the
breast (Wasserstein distance to the median of the real slices of other patients, 5th percentile 0 and 95th 1), the
exponent of the power spectrum, the share of the image that is tissue, and the correlation of slices of a volume by
their distance. DIR gets `phantom_realism.png`, both kinds in random order, its key, and the table.
"""

import argparse
import csv
import itertools
from pathlib import Path

import cv2
import numpy as np

from dataset_scripts.phantom.archive import PhantomParameters, acquire_2d, acquire_dbt, simulate_breast
from modeling_mammodino.image_io import read_image
from modeling_mammodino.tools.command import user_path

from .image_statistics import (
    BAND,
    EDGE_MM,
    breast_mask,
    correlation,
    erode,
    normalised_quantiles,
    power_law_exponent,
    wasserstein,
)
from .images import REAL_DATA

PIXEL_MM = 0.4
FIELD_PX = (512, 320)
PARAMETERS = PhantomParameters(50, *FIELD_PX, pixel_spacing_mm=PIXEL_MM, slice_spacing_mm=1.0)
# The JPEG files do not tell. 2457 x 1996 is the large field of 24 x 29 cm (0.112 mm: Vimieiro's toolbox, geometry of
# the Selenia Dimensions); 2457 x 1890 is then that of 18 x 24 cm.
REAL_PIXEL_MM = {1996: 0.112, 1890: 0.094}
DISTANCES_MM = (1, 3, 5, 8, 10, 12, 15, 18, 22)
COLUMNS, ROWS = 6, 4
NAME = "phantom_realism"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m performance.phantom_realism", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=user_path, required=True, help="folder to write")
    parser.add_argument(
        "--slices", type=user_path, default=REAL_DATA / "bcs_dbt" / "slices", help="folder of real slices"
    )
    parser.add_argument("--breasts", type=int, default=60, help="phantoms (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the phantoms and of the image's order (default 0)")
    options = parser.parse_args()
    try:
        real = read_real_slices(options.slices)
    except (ValueError, OSError) as error:
        raise SystemExit(f"performance.phantom_realism: {error}") from None
    options.output.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)
    phantoms, correlations = simulate(options.breasts, options.seed)
    table = compare(real, phantoms, correlations)
    print(table)
    (options.output / f"{NAME}.md").write_text(table + "\n")
    show(real, phantoms, options.output, np.random.default_rng(options.seed))
    print(f"image: {options.output / NAME}.png; key: {options.output / NAME}_key.csv")


def read_real_slices(folder: Path) -> list[dict]:
    """Each: image (H, W) float32 in 0..1 on the phantom's grid, patient, volume (or None) and slice."""
    table = folder.parent / "slices.csv"
    if not table.is_file():
        raise ValueError(f"{table} is missing: give the folder of the BCS-DBT slices with --slices")
    with open(table, newline="") as stream:
        rows = list(csv.DictReader(stream))
    found = []
    for row in rows:
        volume = (row["PatientID"], row["View"]) if row["View"] else None
        image = on_the_phantoms_grid(read_image(folder / row["file"]))
        position = int(row["Slice"]) if volume else None
        found.append({"image": image, "patient": row["PatientID"], "volume": volume, "slice": position})
    return found


def on_the_phantoms_grid(plane: np.ndarray) -> np.ndarray:
    """A real plane (H, W) of 8 bits as the phantom would show it, FIELD_PX float32 in 0..1."""
    if plane.shape[1] not in REAL_PIXEL_MM:
        raise ValueError(f"a slice of {plane.shape[1]} columns: the pixel size is known of {list(REAL_PIXEL_MM)} only")
    scale, (height, width) = REAL_PIXEL_MM[plane.shape[1]] / PIXEL_MM, FIELD_PX
    if plane[:, :200].mean() < plane[:, -200:].mean():
        plane = np.ascontiguousarray(plane[:, ::-1])
    size = round(plane.shape[1] * scale), round(plane.shape[0] * scale)
    image = cv2.resize(plane, size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    rows = np.flatnonzero(breast_mask(image).any(axis=1))
    top = int(np.clip((rows[0] + rows[-1] - height) // 2, 0, max(len(image) - height, 0)))
    image = image[top : top + height, :width]
    return np.pad(image, [(0, n - m) for n, m in zip(FIELD_PX, image.shape, strict=True)])


def simulate(count: int, seed: int) -> tuple[list[dict], dict[int, list[float]]]:
    """A slice of each phantom, and the correlation of slices by their distance in mm."""
    phantoms, found, rng = [], {distance: [] for distance in DISTANCES_MM}, np.random.default_rng(seed)
    for index in range(count):
        breast = simulate_breast(PARAMETERS, seed, index)
        slices = acquire_dbt(breast)
        slices = slices[..., ::-1] if breast.laterality == "R" else slices
        slices = np.rint(slices * np.float32(255 / 4095)) / np.float32(255)
        middle = PARAMETERS.num_slices // 2
        image = np.ascontiguousarray(slices[middle + rng.integers(-10, 11)])
        mammogram = acquire_2d(breast) / np.float32(4095)
        inside = erode(breast.body.max(axis=0) > 0, EDGE_MM, PIXEL_MM)
        exponent_2d = power_law_exponent(mammogram, inside, PIXEL_MM)
        phantoms.append({"image": image, "patient": index, "volume": None, "exponent_2d": exponent_2d})
        for distance in DISTANCES_MM:
            first = middle - distance // 2
            found[distance].append(slice_correlation(slices[first], slices[first + distance]))
    return phantoms, found


def slice_correlation(one: np.ndarray, other: np.ndarray) -> float:
    masks = [erode(breast_mask(np.ascontiguousarray(each)), 2.0, PIXEL_MM) for each in (one, other)]
    return correlation(one, other, masks[0] & masks[1])


def compare(real: list[dict], phantoms: list[dict], correlations: dict[int, list[float]]) -> str:
    for each in (*real, *phantoms):
        image = each["image"]
        mask = breast_mask(image)
        inside = erode(mask, EDGE_MM, PIXEL_MM)
        each |= {"tissue": mask.mean(), "quantiles": normalised_quantiles(image, inside)}
        each |= {"exponent": power_law_exponent(image, inside, PIXEL_MM)}
        each |= dict(zip(("5th", "median", "95th"), np.percentile(image[inside], (5, 50, 95)), strict=True))
    for each in (*real, *phantoms):
        others = [one["quantiles"] for one in real if one["patient"] != each["patient"]]
        each["histogram"] = wasserstein(each["quantiles"], np.median(others, axis=0))
    names = {
        "histogram": "histogram inside the breast: distance to real slices",
        **{
            key: f"gray inside the breast, {key}{' percentile' * (key != 'median')}, of 1"
            for key in ("5th", "median", "95th")
        },
        "exponent": f"exponent of the power spectrum, {BAND[0]} to {BAND[1]} cycles/mm",
        "tissue": "tissue, share of the image",
    }
    lines = [f"| median (5th, 95th percentile) | {len(real)} real slices | {len(phantoms)} phantoms |", "|---|---|---|"]
    for key, name in names.items():
        cells = (spread([each[key] for each in group]) for group in (real, phantoms))
        lines.append(f"| {name} | {' | '.join(cells)} |")
        if key == "exponent":
            measured = spread([each["exponent_2d"] for each in phantoms])
            lines.append(f"| the same, of mammograms | about 3 (Burgess et al., 2001) | {measured} |")
    pairs: dict[int, list[float]] = {}
    for one, other in itertools.combinations(real, 2):
        if one["volume"] and one["volume"] == other["volume"]:
            found = slice_correlation(one["image"], other["image"])
            pairs.setdefault(abs(one["slice"] - other["slice"]), []).append(found)
    for distance in sorted(pairs):
        values = ", ".join(f"{value:.3f}" for value in pairs[distance])
        cell = spread(correlations[distance]) if distance in correlations else ""
        lines.append(f"| correlation of slices {distance} mm apart | {values} | {cell} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    low, middle, high = np.nanpercentile(values, (5, 50, 95))
    return f"{middle:.3f} ({low:.3f}, {high:.3f})"


def show(real: list[dict], phantoms: list[dict], output: Path, rng: np.random.Generator) -> None:
    """Both kinds in random order, numbered; the key tells which is which."""
    half, (height, width) = COLUMNS * ROWS // 2, FIELD_PX
    chosen = []
    for kind, group in (("real", real), ("phantom", phantoms)):
        chosen += [(kind, group[index]) for index in rng.permutation(len(group))[:half]]
    order = rng.permutation(len(chosen))
    canvas, key = np.zeros((ROWS * height, COLUMNS * width), np.uint8), ["number,kind,patient"]
    for number, index in enumerate(order):
        kind, each = chosen[index]
        row, column = divmod(number, COLUMNS)
        image = np.rint(np.clip(each["image"] * 1.5, 0, 1) * 255).astype(np.uint8)  # as one would window it
        cv2.putText(image, str(number + 1), (width - 48, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 160)
        canvas[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
        key.append(f"{number + 1},{kind},{each['patient']}")
    cv2.imwrite(str(output / f"{NAME}.png"), canvas)
    (output / f"{NAME}_key.csv").write_text("\n".join(key) + "\n")


if __name__ == "__main__":
    main()
