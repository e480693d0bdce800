"""Heat maps: each against its definition, and evidence that adds up to what the classifier answers."""

import cv2
import numpy as np
import pytest
import torch
from made_inputs import TINY_ENCODER, draw_breast, random_encoder
from sklearn.decomposition import PCA

from modeling_mammodino import MammoDinoConfig, MammoDinoForImageClassification, MammoDinoImageProcessor
from training.evaluation.heat_maps import class_evidence, encode, heat_maps, residual
from training.heat_map import main as heat_map


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tissue = (torch.rand(1, 8, 6, generator=generator) - 0.4).clamp_min(0)
    return torch.randn(1, 1, 112, 84, generator=generator), tissue


def test_attention_is_the_class_tokens_on_the_patches_that_are_encoded():
    pixels, tissue = inputs()
    model = random_encoder()
    patches = encode(model, pixels, tissue)
    attentions = model(pixels, tissue_mask=tissue, output_attentions=True).attentions[-1]
    assert attentions.shape[-1] == 4 + int((tissue > 0).sum())
    expected = attentions[0, :, 0, 4:].mean(0).detach().numpy()
    np.testing.assert_allclose(patches.attention * expected.mean(), expected, rtol=1e-5)
    grid = heat_maps(patches)[0].values
    np.testing.assert_array_equal(np.isnan(grid), tissue[0].numpy() == 0)
    np.testing.assert_allclose(grid[tissue[0].numpy() > 0], patches.attention)


def test_a_strange_patch_stands_out():
    rng = np.random.default_rng(0)
    breast = rng.normal(size=(60, 8)) @ rng.normal(size=(8, 32)) + 3  # usual patches vary in eight ways
    assert residual(breast).max() < 1e-6
    breast += 0.01 * rng.normal(size=breast.shape)
    breast[7] += 0.3 * rng.normal(size=32)
    assert residual(breast).argmax() == 7
    usual = np.delete(np.arange(60), 7)
    expected = PCA(8).fit(breast)
    rebuilt = expected.inverse_transform(expected.transform(breast))
    np.testing.assert_allclose(residual(breast), np.linalg.norm(breast - rebuilt, axis=1), atol=1e-9)
    assert residual(breast)[7] > 5 * np.median(residual(breast)[usual])


@pytest.mark.parametrize("num_classes", [2, 3])
def test_mean_evidence_is_the_classifiers_answer(num_classes):
    torch.manual_seed(1)
    whole = MammoDinoForImageClassification(MammoDinoConfig(**TINY_ENCODER, num_labels=num_classes)).eval()
    torch.nn.init.normal_(whole.classifier.weight)
    torch.nn.init.normal_(whole.classifier.bias)
    pixels, tissue = inputs()
    logits = whole(pixels, tissue_mask=tissue).logits[0].double().detach().numpy()
    patches = encode(whole.dinov2_with_registers, pixels, tissue)
    mean = patches.weights @ class_evidence(patches, whole.classifier)
    expected = [logit - np.delete(logits, number).mean() for number, logit in enumerate(logits)]
    np.testing.assert_allclose(mean, expected, atol=1e-4)


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    config = MammoDinoConfig(
        **TINY_ENCODER, id2label={0: "no cancer", 1: "cancer"}, label2id={"no cancer": 0, "cancer": 1}
    )
    MammoDinoForImageClassification(config).save_pretrained(folder)
    MammoDinoImageProcessor(size={"height": 112, "width": 84}, patch_size=14).save_pretrained(folder)
    return folder


def test_the_command_draws_files(classifier_folder, phantom_archive, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), draw_breast())
    volume = next(phantom_archive.rglob("*_dbt.dcm"))
    widths = []
    for file, more in ((tmp_path / "a.png", []), (volume, ["--slice", "4"])):
        heat_map([str(file), "--model", str(classifier_folder), "--output", str(tmp_path / "out.png"), *more])
        image = cv2.imread(str(tmp_path / "out.png"))
        assert image.std() > 20
        widths.append(image.shape[1])
        (tmp_path / "out.png").unlink()
    assert widths[0] == widths[1] == pytest.approx(5 * 3.2 * 200, abs=2)  # the image, three maps, evidence


def test_what_cannot_be_used_is_named_in_one_line(classifier_folder, phantom_archive, tmp_path):
    (tmp_path / "text.dcm").write_text("no image")
    volume = str(next(phantom_archive.rglob("*_dbt.dcm")))
    common = ["--output", str(tmp_path / "out.png")]
    for arguments, message in (
        ([str(tmp_path / "text.dcm"), "--model", str(classifier_folder)], "text.dcm"),
        ([volume, "--model", str(classifier_folder), "--slice", "6"], "slice 6 was asked for"),
        ([volume, "--model", str(tmp_path / "nothing")], "no such folder"),
        ([volume, "--model", str(classifier_folder), "--head", str(tmp_path / "nothing")], "--head .*no such folder"),
    ):
        with pytest.raises(SystemExit, match=f"heat_map: .*{message}"):
            heat_map([*arguments, *common])
    assert not (tmp_path / "out.png").exists()
