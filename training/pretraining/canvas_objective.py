"""The canvas objective: dense local regression from a subset of tissue tokens, and agreement of a patient's views.

Ours, not the paper's. It needs nothing that two crops share, learns from every token, and costs what it encodes.
"""

from typing import NamedTuple

import torch
from torch import nn

from modeling_mammodino import MammoDinoModel
from training.pretraining.views.sample import Batch, PretrainingViews, at_places

from .losses.coding_rate import coding_rate_loss
from .losses.dense_regression import DenseTargets, dense_regression_loss, num_statistics
from .losses.distributed import gather_rows
from .losses.sigreg import sigreg_loss
from .losses.view_agreement import view_agreement_loss
from .losses.visreg import visreg_loss
from .recipe import LossRecipe, Recipe

NUM_FITTED = 400  # images from which means, deviations and components are taken
VIEW_KINDS = ("breast", "patient", "contralateral")  # whose views, or what differs between its breasts, agree
REGULARIZERS = {"visreg": visreg_loss, "sigreg": sigreg_loss, "coding_rate": coding_rate_loss}


class CanvasOutputs(NamedTuple):
    """What the student says of one batch of canvases. K tokens of each, S statistics, C components."""

    content: torch.Tensor | None  # (B, K, S + C), predicted at each token's place; None where the recipe has none
    embeddings: dict[str, torch.Tensor]  # (B, E), by the kind of views that agree, of those that the recipe weighs
    features: torch.Tensor  # (B, D), class tokens


class BatchStandardization(nn.Module):
    """BatchNorm (Ioffe and Szegedy 2015) over the batches of all processes, without running statistics: heads are
    used in training alone, and a run by two processes is the run by one."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            variance, mean = torch.var_mean(gather_rows(features.float()), dim=0, correction=0)
            return (features.float() - mean) * torch.rsqrt(variance + 1e-5) * self.weight + self.bias


class CanvasHeads(nn.Module):
    """A linear layer from patch tokens to content, and a projector (LeJEPA's, BatchNorm MLP) for each kind of view."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        model, loss = recipe.model, recipe.loss
        self.content = None
        if loss.dense_statistics_weight or loss.dense_components_weight:
            self.content = nn.Linear(model.hidden_size, num_statistics(model.patch_size) + model.dense_components)

        def projector() -> nn.Sequential:
            layers: list[nn.Module] = []
            for width in (2 * model.hidden_size, model.projector_hidden_size):
                layers += [
                    nn.Linear(width, model.projector_hidden_size, bias=False),
                    BatchStandardization(model.projector_hidden_size),
                    nn.GELU(),
                ]
            return nn.Sequential(*layers, nn.Linear(model.projector_hidden_size, model.projector_size))

        self.projectors = nn.ModuleDict({kind: projector() for kind in VIEW_KINDS if view_weight(loss, kind)})

    def forward(self, backbone: MammoDinoModel, pixels: torch.Tensor, batch: Batch) -> CanvasOutputs:
        """Encode the kept tokens of each canvas, standardized pixels (B, 1, H, W), and project them."""
        states = backbone(
            pixels, bool_masked_pos=batch["canvas_masks"].flatten(1), tissue_mask=batch["canvas_tokens"]
        ).last_hidden_state
        cls, patches = states[:, 0], states[:, 1 + backbone.config.num_register_tokens :]
        patches = at_places(patches, batch["canvas_places"]).unflatten(0, (len(cls), -1))  # equally many of each
        view = torch.cat((cls, patches.mean(dim=1)), dim=1)  # (B, 2 D)
        embeddings = {kind: projector(view) for kind, projector in self.projectors.items()}
        return CanvasOutputs(None if self.content is None else self.content(patches), embeddings, cls)


def view_weight(loss: LossRecipe, kind: str) -> float:
    """Return the weight of agreement between the views of a kind of VIEW_KINDS."""
    return getattr(loss, f"{kind}_weight")


def canvas_losses(
    seen: CanvasOutputs, batch: Batch, targets_of: DenseTargets, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """Return the unweighted losses by name: content at each place, agreement and spread of each kind of view."""
    losses: dict[str, torch.Tensor] = {}
    if seen.content is not None:
        places, shape = batch["canvas_places"], seen.content.shape[:2]
        statistics, components = targets_of(batch["canvas_target"].float() / 255, batch["canvas_tissue"])
        inside = nn.functional.avg_pool2d(batch["canvas_tissue"].float().unsqueeze(1), targets_of.patch_size)
        tissue = at_places(inside.flatten(1), places).view(shape)
        predicted = seen.content.split((targets_of.num_statistics, targets_of.num_components), dim=-1)
        for name, weight, prediction, target in (
            ("dense_statistics", recipe.loss.dense_statistics_weight, predicted[0], statistics),
            ("dense_components", recipe.loss.dense_components_weight, predicted[1], components),
        ):
            if weight:
                losses[name] = dense_regression_loss(prediction, at_places(target, places).view(*shape, -1), tissue)
    for kind, embeddings in seen.embeddings.items():
        groups = batch["breast" if kind == "breast" else "patient"]
        if kind == "contralateral":
            embeddings, groups = breast_differences(embeddings, groups, recipe.views.views_per_patient)
        losses[f"{kind}_agreement"] = view_agreement_loss(embeddings, groups)
        losses[f"{kind}_spread"] = REGULARIZERS[recipe.loss.view_regularizer](embeddings)
    return losses


def breast_differences(
    embeddings: torch.Tensor, patients: torch.Tensor, views_per_patient: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Subtract, view by view, the second breast's embedding from the first's: (B, E) -> (B / 2, E), and their patients.

    Batches come in groups of one patient, the first half of one breast, drawn by chance, the second of the other, in
    the same order of views. Where there is one breast only, both halves are of it, and what differs is chance, which
    agrees with nothing. patients (B,) int64.
    """
    size = views_per_patient // 2
    first, second = embeddings.float().view(-1, 2, size, embeddings.shape[-1]).unbind(1)  # (patients, views, E)
    return (first - second).flatten(0, 1), patients.view(-1, views_per_patient)[:, :size].flatten()


@torch.no_grad()
def prepare_canvas(
    backbone: MammoDinoModel, views: PretrainingViews, recipe: Recipe, device: torch.device
) -> DenseTargets:
    """Return the targets of a new run, fitted to images of its corpus, and start the patch embedding of a random
    encoder where the recipe whitens it. Which images is a function of the seed; a resumed run loads both from its
    checkpoint instead."""
    model = recipe.model
    targets = DenseTargets((model.image_height, model.image_width), model.patch_size, model.dense_components).to(device)
    images, tissue = (part.to(device) for part in views.plain_canvases(NUM_FITTED))
    targets.fit(images, tissue)
    if model.whiten_patch_embeddings and not model.init_from:
        mean, std = views.corpus.image_processor.mean_and_std
        whiten_patch_embeddings(backbone, (images - mean) / std, tissue)
    return targets


@torch.no_grad()
def whiten_patch_embeddings(backbone: MammoDinoModel, images: torch.Tensor, tissue: torch.Tensor) -> None:
    """Start the patch embedding, in place, as random mixtures of ZCA-whitened patches (Coates and Ng 2012), so that the
    first features are neither brightness alone nor noise.

    images (n, H, W) as the encoder sees them; tissue (n, H, W) bool. Random numbers are torch's.
    """
    projection = backbone.embeddings.patch_embeddings.projection
    patch = projection.kernel_size[0]
    patches = nn.functional.unfold(images.unsqueeze(1), patch, stride=patch).transpose(1, 2)  # (n, N, p^2)
    inside = nn.functional.avg_pool2d(tissue.float().unsqueeze(1), patch).flatten(1) > 0.5
    patches = patches[inside].double()
    patches = patches[patches.std(dim=1) > 1e-2]
    mean = patches.mean(dim=0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    whitening = vectors / (values.clamp_min(0) + 1e-3 * values[-1]).sqrt() @ vectors.T
    mixtures = torch.randn(projection.out_channels, patch**2, dtype=torch.float64) / patch
    weight = (mixtures.to(images.device) @ whitening / 2).float()
    projection.weight.copy_(weight.view_as(projection.weight))
    if projection.bias is not None:
        projection.bias.copy_(-weight @ mean.float())
