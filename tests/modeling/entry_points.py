"""Open a checkpoint by every entry point of transformers: `python entry_points.py FOLDER remote|installed`.

`remote` hides the package, so that the folder's own code must serve. Writes, for each entry point, the largest
difference from what the writing process saw, or the error. FOLDER is made by test_entry_points.py.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, pipeline  # noqa: E402
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: E402

FOLDER, REMOTE = Path(sys.argv[1]), sys.argv[2] == "remote"
if REMOTE:
    sys.modules["modeling_mammodino"] = None  # importing it now fails, wherever it is installed
else:
    import modeling_mammodino  # noqa: F401 (registers its classes)


TRUST = {"trust_remote_code": REMOTE}
ENCODER, CLASSIFIER = FOLDER / "encoder", FOLDER / "classifier"
EXPECTED = np.load(FOLDER / "expected.npz")
INPUTS = {name: torch.from_numpy(EXPECTED[name]) for name in ("pixel_values", "tissue_mask")}
IMAGE = str(FOLDER / "image.png")


ENTRY_POINTS = []


def entry_point(function: Callable[[], float]) -> Callable[[], float]:
    ENTRY_POINTS.append(function)
    return function


def difference(result: torch.Tensor | np.ndarray | list, name: str) -> float:
    return float(np.abs(np.asarray(torch.as_tensor(result).detach().float()) - EXPECTED[name]).max())


@entry_point
def auto_config() -> float:
    config = AutoConfig.from_pretrained(ENCODER, **TRUST)
    return float(config.model_type != "mammodino" or config.hidden_size != 48)


@entry_point
def auto_model() -> float:
    return difference(AutoModel.from_pretrained(ENCODER, **TRUST)(**INPUTS).last_hidden_state, "last_hidden_state")


@entry_point
def auto_model_without_mask_not_square() -> float:
    model = AutoModel.from_pretrained(ENCODER, **TRUST)
    return difference(model(torch.from_numpy(EXPECTED["wide"])).pooler_output, "wide_features")


@entry_point
def auto_model_of_a_classifier() -> float:
    return difference(AutoModel.from_pretrained(CLASSIFIER, **TRUST)(**INPUTS).pooler_output, "classifier_features")


@entry_point
def auto_model_for_image_classification() -> float:
    model = AutoModelForImageClassification.from_pretrained(CLASSIFIER, **TRUST)
    return difference(model(**INPUTS).logits, "logits")


@entry_point
def auto_model_for_image_classification_of_an_encoder() -> float:
    model = AutoModelForImageClassification.from_pretrained(ENCODER, num_labels=5, **TRUST)
    assert model(**INPUTS).logits.shape == (2, 5)
    features = model.base_model(**INPUTS).pooler_output
    return difference(features, "features")


@entry_point
def auto_backbone() -> float:
    config = AutoConfig.from_pretrained(ENCODER, out_indices=[1, 3], **TRUST)
    backbone = AutoBackbone.from_config(config, **TRUST)
    backbone.load_state_dict(AutoModel.from_pretrained(ENCODER, **TRUST).state_dict())
    return difference(backbone.eval()(**INPUTS).feature_maps[-1], "feature_map")


@entry_point
def auto_image_processor() -> float:
    inputs = AutoImageProcessor.from_pretrained(ENCODER, **TRUST)([IMAGE] * 2, return_tensors="pt")
    pixels = difference(inputs["pixel_values"], "pixel_values")
    return max(pixels, difference(inputs["tissue_mask"], "tissue_mask"))


@entry_point
def auto_image_processor_keeps_16_bits() -> float:
    processor = AutoImageProcessor.from_pretrained(ENCODER, **TRUST)
    return difference(processor(str(FOLDER / "image16.png"), return_tensors="pt")["pixel_values"], "pixels_16_bit")


@entry_point
def auto_image_processor_reads_dicom() -> float:
    processor = AutoImageProcessor.from_pretrained(ENCODER, **TRUST)
    return difference(processor(str(FOLDER / "image.dcm"), return_tensors="pt")["pixel_values"], "pixels_dicom")


@entry_point
def pipeline_image_feature_extraction() -> float:
    extract = pipeline("image-feature-extraction", model=str(ENCODER), **TRUST)
    features = extract(IMAGE, return_tensors=True)
    pooled = extract(Image.open(IMAGE), pool=True, return_tensors=True)
    dense = EXPECTED["last_hidden_state"][:1]
    return max(float(np.abs(features.numpy() - dense).max()), float(np.abs(pooled.numpy() - dense[:, 0]).max()))


@entry_point
def pipeline_image_classification() -> float:
    scores = pipeline("image-classification", model=str(CLASSIFIER), **TRUST)([IMAGE, IMAGE], top_k=None)
    by_label = {each["label"]: each["score"] for each in scores[0]}
    expected = torch.from_numpy(EXPECTED["logits"])[0].softmax(0)
    return max(abs(by_label[name] - float(expected[index])) for index, name in enumerate(("no", "maybe", "yes")))


@entry_point
def bfloat16() -> float:
    model = AutoModel.from_pretrained(ENCODER, dtype=torch.bfloat16, **TRUST)
    features = model(**INPUTS).pooler_output
    assert features.dtype == torch.bfloat16
    assert difference(features, "features") < 0.05 * np.abs(EXPECTED["features"]).max()
    return 0.0


@entry_point
def eager_attentions_and_hidden_states() -> float:
    model = AutoModel.from_pretrained(ENCODER, attn_implementation="eager", **TRUST)
    outputs = model(**INPUTS, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 3 and len(outputs.hidden_states) == 4
    return difference(outputs.last_hidden_state, "last_hidden_state")


@entry_point
def gradient_checkpointing() -> float:
    model = AutoModel.from_pretrained(ENCODER, **TRUST).train()
    model.gradient_checkpointing_enable()
    outputs = model(**INPUTS).pooler_output
    outputs.sum().backward()
    return difference(outputs, "features")


@entry_point
def saved_again() -> float:
    copy = FOLDER / f"again_{sys.argv[2]}"
    AutoModel.from_pretrained(ENCODER, **TRUST).save_pretrained(copy)
    AutoImageProcessor.from_pretrained(ENCODER, **TRUST).save_pretrained(copy)
    assert (copy / "modeling_mammodino.py").exists()
    inputs = AutoImageProcessor.from_pretrained(copy, **TRUST)([IMAGE] * 2, return_tensors="pt")
    return difference(AutoModel.from_pretrained(copy, **TRUST)(**inputs).last_hidden_state, "last_hidden_state")


if __name__ == "__main__":
    results: dict[str, float | str] = {}
    for open_it in ENTRY_POINTS:
        try:
            results[open_it.__name__] = open_it()
        except Exception:
            results[open_it.__name__] = traceback.format_exc(limit=-3)
    (FOLDER / f"{sys.argv[2]}.json").write_text(json.dumps(results))
