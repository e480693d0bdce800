"""The sheet of breast masks: a tile for every file, and none lost."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from dicom_builders import CT, build, save
from made_inputs import draw_breast, random_encoder

from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.rendering import make_thumbnail
from modeling_mammodino.tools import visualize
from modeling_mammodino.tools.visualize import CAPTION_PX, TILE_PX, draw_tile, tiles

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
    assert "contact_sheet: 100%" in said.err
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * TILE_HEIGHT, 3 * TILE_PX, 3)
    shown = [sheet[y : y + TILE_HEIGHT, x : x + TILE_PX] for y in (0, TILE_HEIGHT) for x in (0, TILE_PX, 2 * TILE_PX)]
    assert [has_ink(tile) for tile in shown] == [True] * 4 + [False] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "sheet.png"]  # nothing left over


def test_the_middle_slice_of_a_volume(mammodino, phantom_archive, tmp_path):
    volume = next(phantom_archive.rglob("*dbt.dcm"))
    mammodino("contact_sheet", volume, "--output", tmp_path / "sheet.png")
    assert cv2.imread(str(tmp_path / "sheet.png")).shape == (TILE_HEIGHT, TILE_PX, 3)


def test_a_volume_of_one_file_a_slice_is_one_tile(mammodino, tmp_path):
    for n in range(3):
        about = {"SOPClassUID": CT, "PositionerType": "MAMMOGRAPHIC", "SeriesInstanceUID": "1.2.9"}
        save(build(draw_breast(seed=n), SOPInstanceUID=f"1.2.9.{n}", InstanceNumber=n, **about), tmp_path, f"{n}.dcm")
    mammodino("contact_sheet", tmp_path, "--output", tmp_path / "sheet.png")
    assert cv2.imread(str(tmp_path / "sheet.png")).shape == (TILE_HEIGHT, TILE_PX, 3)


def test_the_mask_that_is_drawn_is_the_one_that_the_model_uses(tmp_path, monkeypatch):
    """By the tissue finder of its processor: lungs belong to the body and are dark as air."""
    y, x = np.mgrid[:256, :256]
    body = ((y - 128) / 75) ** 2 + ((x - 128) / 100) ** 2 < 1
    lungs = [((y - 128) / 55) ** 2 + ((x - center) / 42) ** 2 < 1 for center in (85, 172)]
    image = np.where(body & ~lungs[0] & ~lungs[1], 1000, 20) + np.random.default_rng(0).integers(0, 20, body.shape)
    cv2.imwrite(str(tmp_path / "chest.png"), image.astype(np.uint16))
    processor, drawn = MammoDinoImageProcessor(tissue_finder="body"), []
    monkeypatch.setattr(visualize, "draw_tile", lambda thumbnail, name: drawn.append(thumbnail))
    list(tiles([[tmp_path / "chest.png"]], processor))
    ((_, rendered),) = processor.render_source(tmp_path / "chest.png", (200, 200))
    np.testing.assert_array_equal(drawn[0].breast, rendered.small.breast)
    assert drawn[0].breast[rendered.small.breast.shape[0] // 2, drawn[0].breast.shape[1] // 3]  # a lung


def test_inspect_draws_the_patches_that_the_encoder_keeps(mammodino, folder, tmp_path, monkeypatch):
    model = random_encoder(tissue_threshold=0.5)
    processor = MammoDinoImageProcessor(size={"height": 112, "width": 112})
    for each in (model, processor):
        each.save_pretrained(tmp_path / "model")
    kept, encoded_patches = [], visualize.encoded_patches
    monkeypatch.setattr(
        visualize, "encoded_patches", lambda image, mask: (kept.append(mask), encoded_patches(image, mask))[1]
    )
    output = tmp_path / "deep" / "seen.png"
    mammodino("inspect", folder / "breast0.png", "--model", tmp_path / "model", "--output", output)
    inputs = processor(folder / "breast0.png", return_tensors="pt")
    patches = model(**inputs).last_hidden_state[0, 1 + model.config.num_register_tokens :]
    np.testing.assert_array_equal(kept[0].ravel(), (patches != 0).any(dim=1))
    assert kept[0].sum() < (inputs["tissue_mask"] > 0).sum() and output.exists()


def test_names_that_are_not_utf8_are_drawn_escaped(mammodino, folder, tmp_path, capsys):
    """OpenCV ends the process where such a name is drawn."""
    (folder / "breast0.png").rename(os.fsdecode(os.fsencode(folder) + b"/K\xf6ln.png"))
    Path(os.fsdecode(os.fsencode(folder) + b"/broken \xfc.png")).write_bytes(b"")
    mammodino("contact_sheet", folder, "--output", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").exists() and "broken \\udcfc.png: " in capsys.readouterr().err


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


def test_an_output_that_cannot_be_written_is_said_before_any_work(mammodino, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "tiles", None)
    (tmp_path / "file").touch()
    (tmp_path / "a.png").mkdir()
    for output, words in (("file/a.png", "Not a directory|File exists"), ("a.png", "is a folder; give a file in it")):
        with pytest.raises(SystemExit, match=words):
            mammodino("contact_sheet", folder, "--output", tmp_path / output)
