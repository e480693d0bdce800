"""Images of what is seen, from the commands that draw them, and crops on real slices."""

import cv2
import numpy as np
import pytest
from made_inputs import draw_breast
from PIL import Image

from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.breast_segmentation import patch_tissue
from modeling_mammodino.tools.cli import main as mammodino
from modeling_mammodino.tools.examine import look
from modeling_mammodino.tools.figure import Key, Panel, draw_figure, even_columns, write_figure
from modeling_mammodino.tools.visualize import LEFT_OUT, colored_patches, encoded_patches, enlarged, scale_bar
from training.demo import report
from training.features import main as features
from training.heat_map import main as heat_map
from training.pretraining.recipe import ViewsRecipe
from training.pretraining.views.crops import TissueTable, tissue_aware_crops
from training.preview import main as preview


def test_patches_that_are_dropped_are_painted_over_and_those_kept_are_not():
    kept = np.random.default_rng(0).random((8, 6)) < 0.5
    image = enlarged(draw_breast(112, 84).astype(np.uint8))
    side, drawn, colored = (
        image.shape[0] // 8,
        encoded_patches(image, kept),
        colored_patches(image, kept[..., None] * np.ones(3), kept),
    )
    for row, column in np.ndindex(kept.shape):
        middle = tuple(slice(place * side + 3, (place + 1) * side - 3) for place in (row, column))
        expected = image[middle] if kept[row, column] else np.uint8(LEFT_OUT)
        assert (drawn[middle] == expected).all()
        assert (colored[middle] == (255 if kept[row, column] else np.uint8(LEFT_OUT))).all()


def test_the_scale_bar_is_as_long_as_the_detector_says(phantom_archive):
    """A mammogram of 1.4 mm a pixel, its rows enlarged to the canvas: so many of its pixels are as long as the bar."""
    file = next(phantom_archive.rglob("*_2d.dcm"))
    processor = MammoDinoImageProcessor(size={"height": 224, "width": 168}, patch_size=14)
    seen = look(str(file), processor)
    ((_, rendered),) = processor.render_source(file, (224, 168), slices_per_volume=1)
    assert seen.px_per_mm == pytest.approx(rendered.placement.scale_y / 1.4)
    assert scale_bar(seen.px_per_mm, 1000).length_px == round(50 * seen.px_per_mm)
    np.testing.assert_array_equal(patch_tissue(seen.breast, (16, 12)), seen.tissue_mask)


def test_a_figure_holds_its_panels_and_the_longest_of_names(tmp_path):
    panel = np.full((90, 120, 3), (1, 2, 3), np.uint8)
    figure = draw_figure(
        "t " * 400, [Panel(panel, "x" * 300), Panel(panel + 3, "K\udcf6ln.png")], [Key("words", [(9, 8, 7)])]
    )
    assert (figure == (1, 2, 3)).all(axis=2).sum() == (figure == (4, 5, 6)).all(axis=2).sum() == 90 * 120
    assert (figure == (9, 8, 7)).all(axis=2).any() and (figure[:, -28:] == 255).all()
    write_figure(figure, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").info["dpi"] == pytest.approx((200, 200), abs=0.1)


@pytest.mark.parametrize(
    ("count", "most", "columns"), [(1, 4, 1), (2, 4, 2), (6, 4, 3), (8, 4, 4), (7, 4, 4), (5, 3, 3)]
)
def test_rows_of_panels_leave_few_places_empty(count, most, columns):
    assert even_columns(count, most) == columns


def test_the_commands_write_their_images(phantom_archive, tmp_path):
    for source in (next(phantom_archive.rglob("*_dbt.dcm")), next(phantom_archive.rglob("*_2d.dcm"))):
        preview([str(source), "--output", str(tmp_path / "views.png"), "--recipe", "mammodino"])
        mammodino(["inspect", str(source), "--output", str(tmp_path / "seen.png")])
        for name in ("views.png", "seen.png"):
            image = cv2.imread(str(tmp_path / name))
            assert image.shape[0] > 300 and image.std() > 20
            (tmp_path / name).unlink()


def test_a_bad_file_is_named_in_one_line(tmp_path):
    (tmp_path / "text.dcm").write_text("no image")
    for command in (preview, lambda arguments: mammodino(["inspect", *arguments])):
        with pytest.raises(SystemExit, match="text.dcm"):
            command([str(tmp_path / "text.dcm"), "--output", str(tmp_path / "out.png")])
    assert not (tmp_path / "out.png").exists()


def test_an_output_is_checked_and_its_folder_made_before_the_work(tmp_path, monkeypatch):
    for command in (preview, features, heat_map):
        with pytest.raises(SystemExit, match="x.pdf: give a name that ends in .png"):
            command(
                ["a.dcm", "--output", str(tmp_path / "x.pdf"), *(["--model", "m"] if command is not preview else [])]
            )
    with pytest.raises(SystemExit, match="no such file|No such file"):
        preview([str(tmp_path / "gone.dcm"), "--output", str(tmp_path / "new" / "a.png")])
    assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())


def test_crops_of_real_slices_hold_the_recipes_minimum(real_slices):
    """Global and local crops of the default recipe on every third real slice; plain crops on the same do not."""
    views, processor, rng = ViewsRecipe(), MammoDinoImageProcessor(), np.random.default_rng(0)
    ratio = tuple(views.crop_ratio)
    below = 0
    for path in real_slices[::3]:
        for _, rendered in processor.render_source(path, (512, 512)):
            tissue = rendered.tissue
            height, width = tissue.shape
            table = TissueTable(patch_tissue(tissue, (height // 4, width // 4)), (height, width))
            for scale, least in (
                (views.global_crop_scale, views.global_min_tissue),
                (views.local_crop_scale, views.local_min_tissue),
            ):
                crops = tissue_aware_crops(rng, table, tuple(scale), ratio, least, count=40)
                assert crops.fit.all() and (crops.tissue_fractions >= least).all()
                plain = tissue_aware_crops(rng, table, tuple(scale), ratio, 0, count=40)
                below += int((plain.tissue_fractions < least).sum())
    assert below > 0.1 * 2 * 40 * len(real_slices[::3])


def test_the_report_says_what_came_out_also_when_it_disappoints():
    def row(*difference: float) -> dict:
        score = {"auc": [0.7, 0.6, 0.8], "images": 300, "patients": 300, "minus_untrained": list(difference)}
        return {"scores": {"phantom lesion": score}}

    untrained = {"scores": {"phantom lesion": {"auc": [0.6, 0.5, 0.7], "images": 300, "patients": 300}}}
    rows = {"pretrained here": row(-0.2, -0.3, -0.1), "shipped": row(0.0, -0.1, 0.1), "untrained": untrained}
    text = report(rows, [("python -m x", 3.0)], seed=4)
    assert "*pretrained here*, against the same architecture untrained: worse on phantom lesion (-0.200 [-0.300" in text
    assert "*shipped*, against the same architecture untrained: no difference excludes zero" in text
    assert "simulated" in text and "One seed (4)" in text and "300 images of 300 patients" in text
