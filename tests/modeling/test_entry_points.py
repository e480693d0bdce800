"""Every entry point of transformers opens a checkpoint, in a fresh process: with the package, or the folder alone."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from made_inputs import TINY_ENCODER, draw_breast, random_encoder

from modeling_mammodino import MammoDinoConfig, MammoDinoForImageClassification, MammoDinoImageProcessor

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "entry_points.py"
PROJECT = SCRIPT.parents[2]
NAMES = [
    node.name
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.decorator_list
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, phantom_archive) -> Path:
    """An encoder and a classifier as Hub folders, images, and what this process sees of them."""
    folder = tmp_path_factory.mktemp("entry_points")
    encoder = random_encoder()
    torch.manual_seed(3)
    names = dict(enumerate(("no", "maybe", "yes")))
    classifier = MammoDinoForImageClassification(MammoDinoConfig(**TINY_ENCODER, id2label=names)).eval()
    processor = MammoDinoImageProcessor(size={"height": 112, "width": 112})
    for model, name in ((encoder, "encoder"), (classifier, "classifier")):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)

    image = draw_breast()
    cv2.imwrite(str(folder / "image16.png"), image * 16)
    cv2.imwrite(str(folder / "image.png"), (image // 16).astype(np.uint8))
    dicom = next(path for path in sorted(phantom_archive.rglob("*.dcm")))
    (folder / "image.dcm").write_bytes(dicom.read_bytes())
    inputs = processor([image // 16] * 2, return_tensors="pt")
    wide = torch.randn(1, 1, 70, 140)
    with torch.inference_mode():
        output = encoder(**inputs)
        expected = {
            **inputs,
            "last_hidden_state": output.last_hidden_state,
            "features": output.pooler_output,
            "feature_map": output.last_hidden_state[:, 1 + 3 :].transpose(1, 2).unflatten(2, (8, 8)),
            "wide": wide,
            "wide_features": encoder(wide).pooler_output,
            "logits": classifier(**inputs).logits,
            "classifier_features": classifier.dinov2_with_registers(**inputs).pooler_output,
            "pixels_16_bit": processor(image * 16, return_tensors="pt")["pixel_values"],
            "pixels_dicom": processor(str(dicom), return_tensors="pt")["pixel_values"],
        }
    np.savez(folder / "expected.npz", **{name: each.numpy() for name, each in expected.items()})
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[str, dict[str, float | str]]:
    """Both processes run side by side, each with a cache of its own for remote code."""
    running = {}
    for mode in ("remote", "installed"):
        environment = os.environ | {
            "HF_MODULES_CACHE": str(folder / f"{mode}_modules"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        if mode == "installed":  # or in a checkout
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, str(SCRIPT), str(folder), mode]
        running[mode] = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    found = {}
    for mode, process in running.items():
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors[-3000:]
        found[mode] = json.loads((folder / f"{mode}.json").read_text())
    return found


@pytest.mark.parametrize("mode", ["remote", "installed"])
@pytest.mark.parametrize("entry_point", NAMES)
def test_entry_point(results, mode, entry_point):
    result = results[mode][entry_point]
    assert isinstance(result, float), result
    assert result <= 1e-6
