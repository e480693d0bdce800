"""A release of a run: half precision opens as float32, a card keeps what was written by hand, the same files give the
same archive."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from made_inputs import draw_breast
from pretrain_runs import exported_run
from safetensors.torch import load_file

from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.tools.model_files import check_folder
from modeling_mammodino.tools.publish import push_folder
from training.card import section
from training.release import main, pack

ROOT = Path(__file__).parents[2]
AUC = {"density": {"auc": [0.8, 0.7, 0.9], "images": 40, "patients": 10}}


@pytest.fixture(scope="module")
def run(phantom_corpus, tmp_path_factory) -> Path:
    """A finished run with the files of its last checkpoint."""
    folder = exported_run(tmp_path_factory.mktemp("run") / "small", phantom_corpus)
    (folder / "checkpoint-5").mkdir()
    for name in ("student.safetensors", "optimizer.safetensors", "trainer_state.json", "recipe.yaml"):
        (folder / "checkpoint-5" / name).write_text(name)
    return folder


@pytest.fixture
def results(tmp_path) -> Path:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": {"ours": {"scores": AUC}, "untrained": {}}}))
    return file


def release(run: Path, folder: Path, *options) -> None:
    main([str(run), str(folder), *map(str, options)])


def test_half_precision_opens_as_float32_and_moves_features_by_little(run, results, tmp_path):
    release(run, tmp_path / "small", "--results", results, "--row", "ours", "--beside", "untrained")
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    inputs = MammoDinoImageProcessor.from_pretrained(tmp_path / "small")(draw_breast(), return_tensors="pt")
    full, half = (MammoDinoModel.from_pretrained(each).eval() for each in (run / "encoder", tmp_path / "small"))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    with torch.inference_mode():
        tokens, moved = full(**inputs).pooler_output, half(**inputs).pooler_output
    assert 0 < (tokens - moved).abs().max() < 2e-3 * tokens.std()
    assert check_folder(tmp_path / "small") == []
    text = (tmp_path / "small" / "README.md").read_text()
    assert "| density | 40 images, 10 patients | 0.800 [0.700, 0.900] | - |" in text and "](seen.png)" in text
    (found,) = ModelCard(text).data.eval_results
    assert (found.dataset_name, found.metric_value, found.metric_args["low"]) == ("density", 0.8, 0.7)


def test_what_is_written_by_hand_stays_and_must_be_of_the_runs_images(run, results, tmp_path):
    folder = tmp_path / "small"
    release(run, folder, "--results", results, "--row", "ours")
    card, before = ModelCard.load(folder / "README.md"), (folder / "README.md").read_text()
    images = section("Data").search(card.text)[0].split("| pretraining data | ")[1].split()[0]
    by_hand = {"Data": f"{images} images of C. Doe.", "Limits": "None known.", "License": "Of C. Doe."}
    for name, text in by_hand.items():
        card.text = section(name).sub(f"\\n{text}\\n\\n", card.text)
    card.data.license = "cc-by-nc-4.0"
    card.save(folder / "README.md")
    release(run, folder)  # the same weights: results stay, too
    after = ModelCard.load(folder / "README.md")
    assert all(f"## {name}\n\n{text}\n" in after.text for name, text in by_hand.items())
    assert after.data.license == "cc-by-nc-4.0" and "0.800 [0.700, 0.900]" in after.text
    assert section("How it was made").search(before)[0] == section("How it was made").search(after.text)[0]
    other = shutil.copytree(run, tmp_path / "other")
    MammoDinoModel(MammoDinoModel.from_pretrained(run / "encoder").config).save_pretrained(other / "encoder")
    for text, source, message in (
        (after.text, other, "results are of other weights; give --results and --row"),
        (after.text.replace(f"{images} images", "7 images"), run, f"not the {images} images of this run"),
        (after.text.replace("## Limits", "### Limits"), run, "has no section `## Limits`"),
    ):
        after.text = text
        after.save(folder / "README.md")
        kept = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(SystemExit, match=message):
            release(source, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


def test_in_the_checkout_code_is_linked_and_a_push_sends_the_files(run, results, monkeypatch):
    folder = ROOT / "model_cards" / "of_a_test"
    try:
        release(run, folder, "--results", results, "--row", "ours")
        links = {path.name: os.readlink(path) for path in folder.iterdir() if path.is_symlink()}
        assert links == {path.name: f"../../modeling_mammodino/{path.name}" for path in folder.glob("*.py")} != {}
        sent: dict[str, bytes | Path] = {}
        monkeypatch.setattr("modeling_mammodino.tools.publish.upload", lambda _, files, **options: sent.update(files))
        push_folder(folder, "me/small")
        assert sent.keys() >= links.keys() and sent["dicom.py"] == (ROOT / "modeling_mammodino/dicom.py").read_bytes()
        (folder / "dicom.py").unlink()
        (folder / "dicom.py").symlink_to("../../setup.cfg")
        (folder / "rendering.py").unlink()
        (folder / "rendering.py").symlink_to("../nowhere.py")
        differs, leads_nowhere, missing = check_folder(folder)
        assert differs.startswith("rendering.py: a link to ../nowhere.py") and "dicom.py: differs" in leads_nowhere
        assert missing.startswith("rendering.py: missing")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_what_cannot_be_shipped_is_refused_before_anything_is_written(run, results, tmp_path):
    for arguments, message in (
        ([tmp_path, tmp_path / "small"], "holds no encoder/model.safetensors"),
        (
            [run, tmp_path / "small", "--results", results, "--row", "theirs"],
            "no row 'theirs', but 'ours'",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            release(*arguments)
    large = shutil.copytree(run, tmp_path / "large")
    model = MammoDinoModel.from_pretrained(large / "encoder")
    model.layernorm.weight.data[0] = 1e5
    model.save_pretrained(large / "encoder")
    with pytest.raises(SystemExit, match="layernorm.weight is not finite as float16"):
        release(large, tmp_path / "small")
    assert not (tmp_path / "small").exists() and not list(tmp_path.glob(".*"))


def test_the_archive_has_full_precision_and_heads_and_nothing_of_one_run_alone(run, results, tmp_path):
    archive = tmp_path / "tiny.tar.gz"
    release(run, tmp_path / "small", "--results", results, "--row", "ours", "--archive", archive)
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "out", filter="data")
    folder = tmp_path / "out" / "tiny"
    files = {path.name: path.read_bytes() for path in (folder / "checkpoint-5").iterdir()}
    assert files.keys() == {"student.safetensors", "trainer_state.json", "recipe.yaml"}
    assert files["recipe.yaml"] == (run / "encoder" / "recipe.yaml").read_bytes()  # names no folder
    assert (folder / "model.safetensors").read_bytes() == (run / "encoder" / "model.safetensors").read_bytes()
    assert (folder / "README.md").read_bytes() == (tmp_path / "small" / "README.md").read_bytes()


def test_an_archive_depends_on_nothing_but_the_files(tmp_path):
    files = {"sub/weights": tmp_path / "weights", "config.json": tmp_path / "config.json"}
    for name, path in files.items():
        path.write_text(name)
    first = pack(files, tmp_path / "a" / "tiny.tar.gz").read_bytes()
    os.utime(tmp_path / "config.json", (1, 1))
    again = pack(dict(reversed(files.items())), tmp_path / "b" / "tiny.tar.gz")
    assert again.read_bytes() == first and not list(again.parent.glob(".*"))
