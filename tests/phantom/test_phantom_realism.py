"""The phantom beside real slices: the comparison runs, says what is missing, and both kinds have like statistics."""

import csv

import numpy as np
import pytest

from performance import phantom_realism
from performance.image_statistics import breast_mask, correlation, erode, normalised_quantiles, wasserstein


def test_missing_slices_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["realism", "--output", str(tmp_path / "out"), "--slices", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"^performance.phantom_realism: .*slices.csv is missing: give the folder"):
        phantom_realism.main()
    assert not (tmp_path / "out").exists()


def test_a_slice_of_another_width_has_no_known_pixel_size():
    with pytest.raises(ValueError, match="a slice of 300 columns: the pixel size is known of"):
        phantom_realism.on_the_phantoms_grid(np.zeros((400, 300), np.uint8))


def test_a_few_real_slices_and_phantoms(real_slices, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "slices"
    folder.mkdir()
    with open(real_slices[0].parents[1] / "slices.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    rows = [row for row in rows if row["PatientID"] in ("DBT-P00024", "DBT-P00303")]
    for row in rows:
        (folder / row["file"]).symlink_to(real_slices[0].parent / row["file"])
    with open(tmp_path / "slices.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["realism", "--output", str(out), "--slices", str(folder), "--breasts", "4"])
    phantom_realism.main()
    table = capsys.readouterr().out
    near = next(line for line in table.splitlines() if line.startswith("| correlation of slices 1 mm apart"))
    real, phantom = (float(cell.split()[0]) for cell in near.split("|")[2:4])
    assert real > 0.99 and phantom > 0.99
    key = (out / "phantom_realism_key.csv").read_text().splitlines()[1:]
    assert {line.split(",")[1] for line in key} == {"real", "phantom"}
    assert (out / "phantom_realism.png").stat().st_size > 10_000
    assert (out / "phantom_realism.md").read_text().strip() in table


def test_histogram_distance_and_correlation_by_hand():
    rng, whole = np.random.default_rng(0), np.ones((200, 200), bool)
    noise = rng.normal(size=(200, 200))
    one, other = (normalised_quantiles(image, whole) for image in (noise, 3 * noise + 50))
    assert wasserstein(one, other) == pytest.approx(0, abs=1e-9)  # brightness and contrast do not count
    flat = normalised_quantiles(rng.uniform(size=(200, 200)), whole)
    # quantiles of a uniform distribution: 5th 0, 95th 1, so (q - 0.05) / 0.9
    np.testing.assert_allclose(flat, (np.arange(1, 100) / 100 - 0.05) / 0.9, atol=0.02)
    assert correlation(noise, noise + rng.normal(size=(200, 200)), whole) == pytest.approx(0.5**0.5, abs=0.02)


def test_the_mask_is_the_breast_and_its_margin_is_along_the_skin_only():
    image = np.zeros((100, 80), np.float32)
    image[:, :50] = 0.2  # goes on beyond the top, the bottom and the chest wall
    image[40:44, 70:74] = 1  # a marker
    mask = breast_mask(image)
    assert mask[:, :48].all() and not mask[:, 54:].any()
    inside = erode(mask, 4.0, 0.4)
    edge = np.flatnonzero(~mask[50])[0] - np.flatnonzero(~inside[50])[0]
    assert abs(edge - 10) <= 1 and inside[0, 0] and inside[-1, 20]
