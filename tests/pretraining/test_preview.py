"""Images of what is seen, from the commands that draw them, and crops on real slices."""

import cv2
import numpy as np
import pytest
from made_inputs import draw_breast

from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.breast_segmentation import patch_tissue
from modeling_mammodino.tools.cli import main as mammodino
from modeling_mammodino.tools.visualize import inspect_file
from training.demo import report
from training.features import main as features
from training.heat_map import main as heat_map
from training.pretraining.recipe import ViewsRecipe
from training.pretraining.views.crops import TissueTable, tissue_aware_crops
from training.preview import main as preview


def test_inspect_darkens_exactly_the_patches_that_are_dropped(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), draw_breast())
    processor = MammoDinoImageProcessor(size={"height": 224, "width": 168}, patch_size=14)
    drawing = inspect_file(str(tmp_path / "a.png"), processor)
    image, patches = drawing[:, :168], drawing[:, -168:]
    kept = processor(tmp_path / "a.png")["tissue_mask"][0] > 0
    for row, column in np.ndindex(kept.shape):
        middle = (slice(row * 14 + 3, row * 14 + 11), slice(column * 14 + 3, column * 14 + 11))
        assert np.array_equal(patches[middle], image[middle]) == kept[row, column]


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
