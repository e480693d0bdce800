"""What users of the ecosystem do with a model: train it in part, under heads, in half precision; compile, export."""

import copy

import pytest
import torch
from made_inputs import TINY_ENCODER, random_encoder
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from modeling_mammodino import MammoDinoConfig, MammoDinoForImageClassification, MammoDinoModel


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(2, 1, 112, 84), "tissue_mask": (torch.rand(2, 8, 6) - 0.5).clamp_min(0)}


def bright_or_dark(num_images: int = 8) -> dict[str, torch.Tensor]:
    """A problem that can be learnt: label 1 is brighter."""
    torch.manual_seed(2)
    labels = torch.arange(num_images) % 2
    pixels = torch.randn(num_images, 1, 56, 56) + 0.5 * labels[:, None, None, None]
    return {"pixel_values": pixels, "tissue_mask": torch.ones(num_images, 4, 4), "labels": labels}


def train(model: torch.nn.Module, batch: dict, steps: int, learning_rate: float) -> list[float]:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], learning_rate)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_detr_detector_learns_on_the_backbone(tmp_path):
    torch.manual_seed(0)
    detector = DetrForObjectDetection(
        DetrConfig(
            backbone_config=MammoDinoConfig(**TINY_ENCODER, out_indices=[3]),
            num_channels=1,
            num_labels=1,
            num_queries=5,
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            dropout=0.0,
        )
    )
    pixels = torch.randn(2, 1, 112, 84) * 0.3
    pixels[0, :, 28:56, 14:42] += 2  # a bright lesion in each
    pixels[1, :, 70:98, 42:70] += 2
    boxes = torch.tensor([[28.0, 42, 28, 28], [56, 84, 28, 28]]) / torch.tensor([84.0, 112, 84, 112])  # cx, cy, w, h
    labels = [{"class_labels": torch.tensor([0]), "boxes": box[None]} for box in boxes]
    losses = train(detector.train(), {"pixel_values": pixels, "labels": labels}, steps=30, learning_rate=3e-3)
    assert losses[-1] < 0.8 * losses[0]
    detector.eval().save_pretrained(tmp_path)
    again = DetrForObjectDetection.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(pixels).pred_boxes, detector(pixels).pred_boxes, rtol=0, atol=0)


def test_a_upernet_segmenter_takes_the_backbone():
    config = UperNetConfig(
        backbone_config=MammoDinoConfig(**TINY_ENCODER, out_indices=[0, 1, 2, 3]),
        hidden_size=16,
        num_labels=2,
        auxiliary_in_channels=48,
        auxiliary_channels=8,
    )
    torch.manual_seed(0)
    segmenter = UperNetForSemanticSegmentation(config).train()
    pixels = torch.randn(2, 1, 56, 56)
    labels = torch.zeros(2, 56, 56, dtype=torch.long)
    pixels[:, :, 14:42, 14:42] += 3
    labels[:, 14:42, 14:42] = 1
    losses = train(segmenter, {"pixel_values": pixels, "labels": labels}, steps=8, learning_rate=1e-2)
    assert losses[-1] < 0.8 * losses[0]


def test_lora_trains_adapters_alone(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = MammoDinoForImageClassification(MammoDinoConfig(**TINY_ENCODER, num_labels=2))
    untouched = copy.deepcopy(base)
    lora = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"], r=4)
    model = peft.get_peft_model(base, lora)
    batch = bright_or_dark()
    losses = train(model, batch, steps=15, learning_rate=5e-3)
    assert losses[-1] < 0.5 * losses[0]
    torch.testing.assert_close(
        base.dinov2_with_registers.encoder.layer[0].mlp.fc1.weight,
        untouched.dinov2_with_registers.encoder.layer[0].mlp.fc1.weight,
        rtol=0,
        atol=0,
    )
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(untouched, tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification", "regression"])
def test_trainer_accumulates_to_the_gradient_of_the_whole_batch(tmp_path, problem_type):
    """Four batches of 2 are one of 8: the loss does not take `num_items_in_batch`, so Trainer has to divide."""
    batch, norms = bright_or_dark(), []
    targets = batch["labels"]
    if problem_type:
        targets = torch.nn.functional.one_hot(targets, 2).float() if "multi" in problem_type else targets.float()
    data = [
        {"pixel_values": image, "labels": target} for image, target in zip(batch["pixel_values"], targets, strict=True)
    ]

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *rest, model, **more):
            gradients = [each.grad.flatten() for each in model.parameters()]
            norms.append(torch.cat(gradients).norm())

    for size, parts in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        labels = 1 if problem_type == "regression" else 2
        config = MammoDinoConfig(**TINY_ENCODER, num_labels=labels, problem_type=problem_type)
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=parts, max_steps=1,
            max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(MammoDinoForImageClassification(config), arguments, train_dataset=data, callbacks=[Look()]).train()
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_every_parameter_has_a_gradient_in_fine_tuning(inputs, recompute):
    """DistributedDataParallel stops at the second step otherwise; nothing is masked, so the mask token's is zero."""
    model = MammoDinoForImageClassification(MammoDinoConfig(**TINY_ENCODER, num_labels=2)).train()
    if recompute:
        model.gradient_checkpointing_enable()
    model(**inputs, labels=torch.zeros(len(inputs["pixel_values"]), dtype=torch.long)).loss.backward()
    assert [name for name, each in model.named_parameters() if each.grad is None] == []
    assert not model.dinov2_with_registers.embeddings.mask_token.grad.any()


def test_gradient_checkpointing_recomputes_to_the_same_gradients(inputs):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = random_encoder().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.encoder.layer[0].mlp.register_forward_hook(lambda *_: calls.append(1))
        model(**inputs).last_hidden_state.square().sum().backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert len(calls) == 2  # forward, and again in backward
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=0)


def test_sdpa_and_eager_agree_and_show_what_is_asked(inputs):
    model = random_encoder()
    sdpa = model(**inputs, output_hidden_states=True)
    model.set_attn_implementation("eager")
    eager = model(**inputs, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(eager.last_hidden_state, sdpa.last_hidden_state, rtol=0, atol=1e-5)
    assert len(eager.attentions) == 3 and len(eager.hidden_states) == len(sdpa.hidden_states) == 4


@pytest.mark.parametrize("with_mask", [False, True])
def test_bfloat16_and_autocast_stay_near_float32(inputs, with_mask):
    if not with_mask:
        del inputs["tissue_mask"]
    model = random_encoder()
    expected = model(**inputs).pooler_output
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**inputs).pooler_output
    half = copy.deepcopy(model).to(torch.bfloat16)(**inputs).pooler_output
    assert half.dtype == torch.bfloat16
    scale = expected.abs().max()
    assert (mixed - expected).abs().max() < 0.03 * scale
    assert (half.float() - expected).abs().max() < 0.05 * scale


def test_device_map_and_dtype_at_load(tmp_path, inputs):
    pytest.importorskip("accelerate")
    model = random_encoder()
    model.save_pretrained(tmp_path)
    loaded = MammoDinoModel.from_pretrained(tmp_path, device_map="auto", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded(**inputs).pooler_output.dtype == torch.bfloat16
    parts = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "encoder.layer.2": "cpu"}
    offloaded = MammoDinoModel.from_pretrained(
        tmp_path, device_map={**parts, "layernorm": "cpu"}, offload_folder=tmp_path / "offload"
    ).eval()
    torch.testing.assert_close(offloaded(**inputs).pooler_output, model(**inputs).pooler_output, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_compiled_with_and_without_mask(inputs):
    model = random_encoder(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True)
    pixels = inputs["pixel_values"]
    for tissue in (None, inputs["tissue_mask"], inputs["tissue_mask"].flip(0, 1).roll(1, 2)):
        expected = model(pixels, tissue_mask=tissue).last_hidden_state
        result = compiled(pixels, tissue_mask=tissue).last_hidden_state
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_exported_graph_takes_any_batch_and_mask(inputs):
    model, batch = random_encoder(), torch.export.Dim("batch", min=1, max=64)
    shapes = {"pixel_values": {0: batch}, "tissue_mask": {0: batch}}
    exported = torch.export.export(model, (), dict(inputs), dynamic_shapes=shapes).module()
    others = {"pixel_values": torch.randn(5, 1, 112, 84), "tissue_mask": (torch.rand(5, 8, 6) - 0.7).clamp_min(0)}
    expected = model(**others).last_hidden_state
    torch.testing.assert_close(exported(**others).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_mask", [False, True])
def test_onnxruntime_agrees(tmp_path, inputs, with_mask):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, batch = random_encoder(), torch.export.Dim("batch", min=1, max=64)
    names = list(inputs) if with_mask else ["pixel_values"]
    program = torch.onnx.export(
        model,
        kwargs={name: inputs[name] for name in names},
        input_names=names,
        output_names=["last_hidden_state", "pooler_output"],
        dynamic_shapes={name: {0: batch} for name in names},
        dynamo=True,
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    others = {"pixel_values": torch.randn(3, 1, 112, 84), "tissue_mask": (torch.rand(3, 8, 6) - 0.5).clamp_min(0)}
    others = {name: others[name] for name in names}
    expected = model(**others)
    result = session.run(None, {name: each.numpy() for name, each in others.items()})
    torch.testing.assert_close(torch.from_numpy(result[0]), expected.last_hidden_state, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(result[1]), expected.pooler_output, rtol=0, atol=1e-4)
