"""The teacher of Gram anchoring: an earlier state of the teacher's encoder, which may look at larger crops."""

import copy

import torch
from torch import nn

from ..recipe import Recipe
from .student_teacher import Batch, Network, encode


class GramTeacher(nn.Module):
    """A frozen copy of the teacher's encoder, taken at `gram_start_step` and anew every `gram_update_steps`, at most
    `gram_max_updates` times (Siméoni et al. 2025, DINOv3). When it is taken follows from the recipe and the step alone,
    so a resumed run needs its weights and no counter."""

    def __init__(self, teacher: Network, recipe: Recipe):
        super().__init__()
        self.loss, self.tissue_tokens = recipe.loss, recipe.views.tissue_tokens
        self.keeps_to_tissue = recipe.views.tissue_aware_masks or recipe.views.tissue_tokens
        self.backbone = copy.deepcopy(teacher.backbone)

    def is_taken_at(self, step: int) -> bool:
        since, every = step - self.loss.gram_start_step, self.loss.gram_update_steps
        is_update = every > 0 and since > 0 and since % every == 0 and since // every <= self.loss.gram_max_updates
        return since == 0 or is_update

    def at(self, step: int, teacher: Network) -> "GramTeacher | None":
        """Itself, after taking the teacher's weights where that is due before `step`; None where it has not begun."""
        if self.is_taken_at(step):
            self.backbone.load_state_dict(teacher.backbone.state_dict())
        return self if step >= self.loss.gram_start_step else None

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Patch features (G*B, N, D) of the whole global crops, on the student's grid."""
        crops, tissue = batch.get("gram_crops", batch["global_crops"]), batch.get("gram_tissue", batch["global_tissue"])
        _, patches = encode(self.backbone, crops, tissue if self.tissue_tokens else None)
        return resize_patches(patches, tuple(tissue.shape[1:]), tuple(batch["global_tissue"].shape[1:]))

    def counted_patches(self, batch: Batch) -> torch.Tensor | None:
        """(G*B, N) bool: those with breast, where masks or tokens keep to it (our choice: air resembles air in any
        teacher); else None, all."""
        return batch["global_tissue"].flatten(1) > 0 if self.keeps_to_tissue else None


def resize_patches(patches: torch.Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> torch.Tensor:
    """Features (n, h*w, D) of a patch grid (h, w) on another, (n, h'*w', D): bicubic, float32. Dropped patches are
    zero, which changes the length of what they are mixed into, not its direction."""
    if grid == wanted:
        return patches
    maps = patches.float().transpose(1, 2).unflatten(2, grid)  # (n, D, h, w)
    return nn.functional.interpolate(maps, size=wanted, mode="bicubic").flatten(2).transpose(1, 2)
