"""A backbone under one linear layer: its loss and its predictions; and how it and other heads are saved and opened."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers.utils import CONFIG_NAME

from modeling_mammodino import MammoDinoForImageClassification, MammoDinoImageProcessor
from modeling_mammodino.tools.files import atomic_folder
from training.evaluation.backbones.preprocessing import MammoDinoImages
from training.evaluation.backbones.registry import Backbone, load_backbone
from training.evaluation.run_settings import FinetuneSettings

from .heads import AttentionPooling, empty_pooling
from .multiple_instance import MultipleInstanceHead
from .predictor import Predictor
from .tiles import Tiling

logger = logging.getLogger(__name__)

HEAD_FILE, BACKBONE_FILE, DESCRIPTION_FILE = "head.safetensors", "backbone.safetensors", "classifier.json"
NOTICE = "Research use only: not a medical device."


class ImageClassifier(nn.Module):
    """Slices of images -> log-probabilities of the images.

    Args:
        backbone: as it comes, or with adapters of peft around it.
        head: nn.Linear(F, C).
        class_weights (C,): of the loss; ones where classes weigh as they are.
    """

    class_weights: torch.Tensor

    def __init__(self, backbone: nn.Module, head: nn.Linear, class_weights: np.ndarray):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.register_buffer("class_weights", torch.tensor(class_weights, dtype=torch.float32), persistent=False)

    def forward(
        self,
        pixel_values: torch.Tensor,
        num_slices: torch.Tensor,
        labels: torch.Tensor | None = None,
        tissue_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """pixel_values (N, C, H, W) and tissue_mask (N, h, w): the slices of B images, one image after the other;
        num_slices (B,), labels (B,) int64.

        Returns `logits` (B, C): the logarithm of an image's probabilities, the mean over its slices; and with labels
        `loss`: the mean over slices of the weighted cross entropy, each slice with the label of its image.
        """
        of_slices = functional.log_softmax(self.head(self.backbone(pixel_values, tissue_mask)).float(), dim=1)  # (N, C)
        image = torch.repeat_interleave(torch.arange(len(num_slices), device=num_slices.device), num_slices)  # (N,)
        outputs = {"logits": log_mean(of_slices, image, num_slices)}
        if labels is not None:
            wanted = labels[image]
            losses = functional.nll_loss(of_slices, wanted, reduction="none") * self.class_weights[wanted]
            outputs["loss"] = losses.mean()
        return outputs

    def train(self, mode: bool = True) -> "ImageClassifier":
        """Set the mode, but keep batch norms at the statistics that they came with: the head starts from features under
        these, and a batch of slices of few volumes has poor ones."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def log_mean(of_slices: torch.Tensor, image: torch.Tensor, num_slices: torch.Tensor) -> torch.Tensor:
    """Return (B, C), the logarithm of the mean probability of each image's slices; of_slices (N, C), image (N,)."""
    wide = image[:, None].expand_as(of_slices)
    highest = of_slices.new_full((len(num_slices), of_slices.shape[1]), -torch.inf)
    highest = highest.scatter_reduce(0, wide, of_slices.detach(), "amax")
    sums = torch.zeros_like(highest).index_add(0, image, (of_slices - highest[image]).exp())
    return (sums / num_slices[:, None]).log() + highest


def add_adapters(backbone: Backbone, settings: FinetuneSettings) -> nn.Module:
    """Put low-rank adapters in the backbone's `lora_targets` (Hu et al. 2021), all else frozen."""
    adapters = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=backbone.lora_targets,
    )
    return get_peft_model(backbone, adapters)


def save_classifier(
    folder: Path, backbone: Backbone, predictor: Predictor, classes: tuple[str, ...], meaning: str, is_frozen: bool
) -> None:
    """Write `folder`, atomically, for `open_classifier`: where it can be, encoder and head in one, as
    AutoModelForImageClassification opens them; else parts, of a frozen encoder without the encoder itself."""
    head, reason = predictor.head, why_no_auto_model(backbone, predictor.head)
    with atomic_folder(folder, replace=True) as temporary:
        predictor.save(temporary)
        if not reason:
            config: Any = type(backbone.model.config).from_dict(backbone.model.config.to_dict())
            config.id2label = dict(enumerate(classes))
            config.label2id = {name: number for number, name in enumerate(classes)}
            model = MammoDinoForImageClassification(config)
            model.dinov2_with_registers.load_state_dict(backbone.model.state_dict())
            model.classifier.load_state_dict(head.state_dict())
            model.save_pretrained(temporary)
            backbone.preprocess.image_processor.save_pretrained(temporary)
            opens = (
                "AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True) opens it; its logits "
                "are of one slice and not calibrated: training.predict does both."
            )
        else:
            opens = f"No model for AutoModelForImageClassification, for {reason}; training.predict opens it."
            logger.info("%s: %s", folder, opens)
            for name, module in {HEAD_FILE: head, **({} if is_frozen else {BACKBONE_FILE: backbone.model})}.items():
                state = {key: tensor.detach().cpu().contiguous() for key, tensor in module.state_dict().items()}
                save_file(state, temporary / name)
            description = {
                "notice": NOTICE,
                "kind": backbone.kind,
                "source": backbone.source,
                "weights": backbone.settings()["weights"],
                "last_layers": backbone.last_layers,
                "width": backbone.width,
                "classes": classes,
                "head": _describe(head),
            }
            (temporary / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")
        about = f"{NOTICE}\n\nClasses, by number: {', '.join(classes)}. {meaning}\n\n{opens}\n"
        (temporary / "README.md").write_text(about)


def why_no_auto_model(backbone: Backbone, head: nn.Module) -> str:
    """Return why MammoDinoForImageClassification cannot be backbone and head in one; empty where it can."""
    if not isinstance(backbone.preprocess, MammoDinoImages):
        return f"{backbone.kind} under this rule for features has no class there"
    if backbone.last_layers > 1:
        return "its head takes class tokens of several layers"
    if isinstance(head, MultipleInstanceHead):
        return "its head takes tiles beside the whole view"
    return "" if isinstance(head, nn.Linear) else "its head pools slices by attention"


def _describe(head: nn.Module) -> dict[str, Any]:
    if isinstance(head, MultipleInstanceHead):
        return {"kind": "mil", "ordered": head.ordered, "tiling": asdict(head.tiling)}
    return {"kind": "attention" if isinstance(head, AttentionPooling) else "linear"}


def _make_head(about: dict[str, Any], width: int, num_classes: int) -> nn.Module:
    if about["kind"] == "mil":
        return MultipleInstanceHead(width, num_classes, about["ordered"], Tiling(**about["tiling"]))
    if about["kind"] == "attention":
        return empty_pooling(width, num_classes)
    return nn.Linear(width, num_classes)


def open_classifier(folder: Path, source: str | None = None) -> tuple[Backbone, Any, list[str]]:
    """Return backbone, head (nn.Linear, AttentionPooling or MultipleInstanceHead) and class names of a folder.

    `source`: where the backbone is now that a folder of parts names, if elsewhere than noted. Raises ValueError where
    its weights are not those that the head was learned on.
    """
    if (folder / CONFIG_NAME).is_file():
        whole: Any = MammoDinoForImageClassification.from_pretrained(folder).eval()
        images = MammoDinoImages(MammoDinoImageProcessor.from_pretrained(folder))
        backbone = Backbone("mammodino", str(folder), whole.dinov2_with_registers, images).eval()
        return backbone, whole.classifier, [whole.config.id2label[number] for number in range(whole.num_labels)]
    description = json.loads((folder / DESCRIPTION_FILE).read_text())
    backbone = load_backbone(
        description["kind"], source or description["source"], last_layers=description.get("last_layers", 1)
    )
    if (folder / BACKBONE_FILE).is_file():
        backbone.model.load_state_dict(load_file(folder / BACKBONE_FILE))
    if backbone.settings()["weights"] != description["weights"]:
        raise ValueError(f"{folder}: its head was learned on other weights than those of {backbone.source}")
    head = _make_head(description.get("head", {"kind": "linear"}), description["width"], len(description["classes"]))
    head.load_state_dict(load_file(folder / HEAD_FILE))
    return backbone, head.eval(), description["classes"]
