"""What the page answers, without its server: pictures, similarity, nearest images, one-line reasons; uploads do not
stay."""

import configparser
import re
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet
import pytest
import torch
from dicom_builders import CT, build, save
from made_inputs import draw_breast, random_encoder

from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.tools import demo_page
from modeling_mammodino.tools.features import embed_files

pytest.importorskip("gradio", reason="gradio is not installed: pip install -c constraints.txt -e '.[demo]'")
from space import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "NUM_PATIENTS", 2)
        processor = MammoDinoImageProcessor(size={"height": 112, "width": 84}, patch_size=14)
        return app.Page(random_encoder(), processor, tmp_path_factory.mktemp("examples"))


@pytest.fixture
def upload(tmp_path):
    """Put a copy of a file, or bytes, where uploads come."""

    def put(name, content):
        path = tmp_path / "cache" / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy(content, path) if isinstance(content, Path) else path.write_bytes(content)
        return str(path)

    return put


def png(image) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def test_an_upload_is_seen_as_its_file_is_and_does_not_stay_on_the_disk(page, upload):
    volume = next(example.path for example in page.examples if "dbt" in example.path.name)
    path = upload("own.dcm", volume)
    opened = page.open_upload([path])
    assert not Path(path).exists() and opened.name == "own.dcm" and opened.examined.seen.num_slices == 20
    inputs = page.image_processor(volume, return_tensors="pt")
    tokens = page.model(**inputs).last_hidden_state[10]
    np.testing.assert_allclose(opened.examined.embedding, tokens[0].detach(), rtol=1e-5, atol=1e-6)
    inside = inputs["tissue_mask"][10].flatten() > 0
    patches = tokens[1 + page.model.config.num_register_tokens :][inside]
    np.testing.assert_allclose(opened.examined.patches, patches.detach(), rtol=1e-5, atol=1e-6)
    moved = page.open_slice(opened, 3)
    tokens = page.model(**{name: value[3:4] for name, value in inputs.items()}).last_hidden_state[0]
    np.testing.assert_allclose(moved.examined.embedding, tokens[0].detach(), rtol=1e-5, atol=1e-6)
    assert moved.axes is opened.axes and moved.patch == opened.patch


def test_slices_in_files_of_their_own_are_one_volume_in_order_of_position(page, upload, tmp_path):
    about = {"SOPClassUID": CT, "PositionerType": "MAMMOGRAPHIC", "SeriesInstanceUID": "1.2.9"}
    paths = []
    for n in (2, 0, 1):
        dataset = build(draw_breast(seed=n), SOPInstanceUID=f"1.2.9.{n}", InstanceNumber=n, **about)
        paths.append(upload(f"{n}.dcm", Path(save(dataset, tmp_path, f"{n}.dcm"))))
    opened = page.open_upload(paths)
    assert [name for name, _ in opened.files] == ["0.dcm", "1.dcm", "2.dcm"] and opened.examined.seen.num_slices == 3
    first = page.open_slice(opened, 0).examined.seen
    assert (first.slice_index, first.num_slices) == (0, 3) and not np.array_equal(
        first.image, opened.examined.seen.image
    )


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"text.dcm": b"no image"}, "text.dcm: not a readable image"),
        ({"photo.png": png(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))}, "photo.png: .*color"),
        ({"black.png": png(np.zeros((90, 90), np.uint8))}, "black.png: every pixel has the same value"),
        ({"a.png": png(draw_breast()), "b.png": png(draw_breast(seed=1))}, "a.png and 1 more: not the slices of one"),
    ],
)
def test_what_cannot_be_used_gets_one_line_and_does_not_stay(page, upload, files, reason):
    paths = [upload(name, content) for name, content in files.items()]
    with pytest.raises(app.CANNOT_USE, match=reason) as refusal:
        page.open_upload(paths)
    assert "\n" not in str(refusal.value) and not any(Path(path).exists() for path in paths)


def test_a_file_that_is_too_large_is_not_read(page, upload, monkeypatch):
    monkeypatch.setattr(app, "MAX_UPLOAD_MB", 0)
    monkeypatch.setattr(app, "group_paths", lambda paths: pytest.fail("read"))
    with pytest.raises(ValueError, match="large.png: 0 MB; this page takes at most 0 MB"):
        page.open_upload([upload("large.png", b"1")])


def test_similarity_is_the_cosine_with_the_patch_that_was_clicked(page):
    opened = page.open_example(0)
    examined, scale = opened.examined, -(-760 // 112)
    row, column = np.argwhere(examined.kept)[7]
    chosen = page.choose_patch(opened, int((column + 0.9) * 14 * scale), int((row + 0.1) * 14 * scale))
    assert chosen.patch == (row, column)
    found = examined.similarity(row, column)
    cosines = torch.cosine_similarity(torch.from_numpy(examined.patches), torch.from_numpy(examined.patches[7:8]))
    np.testing.assert_allclose(found[examined.kept], cosines, atol=1e-5)
    assert np.isnan(found[~examined.kept]).all()
    row, column = np.argwhere(~examined.kept)[0]
    assert page.choose_patch(opened, int(column * 14 * scale), int(row * 14 * scale)) is opened  # background
    *pictures, (low, high) = page.drawings(chosen)
    assert {picture.shape for picture in pictures} == {(112 * scale, 84 * scale, 3)} and low < high == pytest.approx(1)
    corner = chosen.patch[0] * 14 * scale, chosen.patch[1] * 14 * scale
    assert (pictures[2][corner] == 255).all()


def test_nearest_examples_are_ranked_by_the_centered_cosine_without_the_image_itself(page):
    opened = page.open_example(2)
    embeddings = np.stack([example.embedding for example in page.examples])
    centered = embeddings - embeddings.mean(axis=0)
    centered /= np.linalg.norm(centered, axis=1, keepdims=True)
    expected = centered @ centered[2]
    ranked = page.nearest(opened)
    assert [number for number, _ in ranked] == [n for n in np.argsort(-expected) if n != 2]
    np.testing.assert_allclose([like for _, like in ranked], [expected[n] for n, _ in ranked], atol=1e-5)
    assert page.nearest(replace(opened, example=None))[0][0] == 2


def test_the_download_is_the_row_that_embed_writes(page):
    opened = page.open_example(0)
    table = pyarrow.parquet.read_table(BytesIO(page.table(opened))).to_pydict()
    (result,) = embed_files([page.examples[0].path], page.model, page.image_processor)
    np.testing.assert_allclose(table["embedding"], result.embeddings, rtol=1e-5, atol=1e-6)
    assert table["path"] == [page.examples[0].path.name] and table["slice"] == [0] and table["num_slices"] == [1]
    np.testing.assert_allclose(table["tissue_fraction"], result.tissue_fraction)


def test_a_warning_is_said_and_names_are_no_markup(page, upload):
    opened = page.open_upload([upload("<b>x.png", png(4095 - draw_breast()))])
    words = app.describe(page, opened)
    assert "air is bright" in words and "<b>x" not in words and "&lt;b&gt;x.png" in words
    assert not page.open_example(0).warnings  # of this image, not of all


def test_the_space_installs_what_the_extra_does():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras, wanted = setup["options.extras_require"], set()
    for text in (setup["options"]["install_requires"], extras["codecs"], extras["embed"], extras["demo"]):
        wanted |= {
            line.strip() for line in text.splitlines() if not line.strip().startswith(("#", "mammodino", "gradio"))
        }
    wanted -= {""}
    listed = (ROOT / "space" / "requirements.txt").read_text().splitlines()
    assert {line for line in listed if not line.startswith("#")} == wanted
    pinned = re.search(r"^gradio==(\S+)", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    assert f"sdk_version: {pinned}\n" in (ROOT / "space" / "README.md").read_text()


def test_a_missing_gradio_and_a_missing_page_are_named_with_the_remedy(mammodino, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_page, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"mammodino demo: .*pip install -c constraints.txt -e '.\[demo\]'"):
        mammodino("demo", "--model", "m")
    monkeypatch.setattr(demo_page, "PAGE", tmp_path / "app.py")
    with pytest.raises(SystemExit, match="run it in a checkout"):
        mammodino("demo", "--model", "m")
