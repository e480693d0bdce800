"""Heat maps of one file: a picture for a look, and one line where something cannot be used."""

import cv2
import pytest
from conftest import draw_breast, random_encoder

from modeling_mammodino import MammoDinoImageProcessor
from training.heat_map import draw_heat_maps, main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    random_encoder().save_pretrained(folder)
    MammoDinoImageProcessor(size={"height": 112, "width": 112}, patch_size=14).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "breast.png"
    cv2.imwrite(str(path), draw_breast())
    return path


def test_a_picture_is_written_and_each_map_is_of_the_breast(model, picture, tmp_path):
    output = tmp_path / "map.png"
    maps = draw_heat_maps(str(picture), str(model), output)
    assert output.stat().st_size > 10_000 and len(maps) >= 3


def test_a_volume_gives_the_slice_that_is_asked_for(model, phantom_archive, tmp_path):
    volume = next(phantom_archive.rglob("*_dbt.dcm"))
    for number in (0, 3):
        main([str(volume), "--model", str(model), "--output", str(tmp_path / f"{number}.png"), "--slice", str(number)])
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "3.png").read_bytes()


@pytest.mark.parametrize(("file", "words"), [("nothing.png", "nothing.png"), ("text.png", "text.png")])
def test_what_cannot_be_used_is_said_in_one_line(model, tmp_path, file, words):
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path / file), "--model", str(model), "--output", str(tmp_path / "map.png")])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "map.png").exists()
