"""The sheet of breast masks: a tile for every file, and none lost."""

import cv2
import numpy as np
import pytest
from conftest import draw_breast

from modeling_mammodino.rendering import make_thumbnail
from modeling_mammodino.tools.visualize import CAPTION_PX, TILE_PX, draw_tile

TILE_HEIGHT = TILE_PX + CAPTION_PX


def has_ink(tile: np.ndarray) -> bool:
    return bool(tile.max(axis=2).mean() > 5)


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    for seed in range(3):
        cv2.imwrite(str(source / f"breast{seed}.png"), draw_breast(seed=seed))
    return source


def test_a_tile_for_every_file(mammodino, folder, tmp_path, capsys):
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("ignored")
    mammodino("contact_sheet", folder, "--output", tmp_path / "sheet.png", "--columns", "3")
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "sheet.png") and "broken.png" in said.err and "breast" not in said.err
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * TILE_HEIGHT, 3 * TILE_PX, 3)
    shown = [sheet[y : y + TILE_HEIGHT, x : x + TILE_PX] for y in (0, TILE_HEIGHT) for x in (0, TILE_PX, 2 * TILE_PX)]
    assert [has_ink(tile) for tile in shown] == [True] * 4 + [False] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "sheet.png"]  # nothing left over


def test_the_middle_slice_of_a_volume(mammodino, phantom_archive, tmp_path):
    volume = next(phantom_archive.rglob("*dbt.dcm"))
    mammodino("contact_sheet", volume, "--output", tmp_path / "sheet.png")
    assert cv2.imread(str(tmp_path / "sheet.png")).shape == (TILE_HEIGHT, TILE_PX, 3)


def test_many_files_fill_pages(mammodino, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("modeling_mammodino.tools.visualize.TILES_PER_PAGE", 2)
    mammodino("contact_sheet", folder, "--output", tmp_path / "sheet.png", "--columns", "2")
    pages = [tmp_path / "sheet-000.png", tmp_path / "sheet-001.png"]
    assert capsys.readouterr().out.split() == [str(page) for page in pages]
    assert [cv2.imread(str(page)).shape[1] for page in pages] == [2 * TILE_PX, TILE_PX]


def test_the_outline_follows_the_mask_in_the_color_of_its_confidence():
    thumbnail = make_thumbnail(draw_breast())
    sure, doubtful = (
        draw_tile(thumbnail._replace(confidence=confidence), "a.png").astype(int) for confidence in (1.0, 0.0)
    )
    changed = np.argwhere((sure != doubtful).any(axis=2)[:TILE_PX])
    assert len(changed) > 100
    scale = max(thumbnail.breast.shape) / TILE_PX
    rows, columns = (changed * scale).astype(int).T
    near = cv2.dilate(thumbnail.breast.astype(np.uint8), np.ones((7, 7))) > cv2.erode(
        thumbnail.breast.astype(np.uint8), np.ones((7, 7)), borderValue=0
    )
    assert near[rows, columns].mean() > 0.98
    green, red = sure[tuple(changed.T)], doubtful[tuple(changed.T)]
    assert (green[:, 1] > green[:, 2]).all() and (red[:, 2] > red[:, 1]).all()


@pytest.mark.parametrize("arguments", [["--output", "a.jpg"], ["--output", "a.png", "--columns", "0"]])
def test_what_cannot_be_drawn_is_refused(mammodino, folder, tmp_path, arguments, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="mammodino contact_sheet: --"):
        mammodino("contact_sheet", folder, *arguments)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no image found"):
        mammodino("contact_sheet", tmp_path / "empty", "--output", "a.png")
    assert not (tmp_path / "a.png").exists()
