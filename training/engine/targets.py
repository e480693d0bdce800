"""Teacher logits to targets, by Sinkhorn-Knopp or by centering."""

from typing import NamedTuple

import torch
from torch import nn

from ..losses.centering import Centering
from ..losses.sinkhorn import sinkhorn_knopp
from ..recipe import Recipe
from .student_teacher import Outputs, num_patch_prototypes


class Targets(NamedTuple):
    """Probabilities over prototypes, each of the shape of its logits in `Outputs`."""

    global_cls: torch.Tensor  # (G, B, K)
    masked_patches: torch.Tensor  # (M, K)
    slice_cls: torch.Tensor  # (P, K)
    slice_patches: torch.Tensor  # (T, K)


class TeacherTargets(nn.Module):
    """Class tokens are balanced together, patches together; each kind has a centre of its own."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.use_centering = recipe.loss.teacher_targets == "centering"
        if self.use_centering:
            self.cls_center = Centering(recipe.model.num_prototypes)
            self.patch_center = Centering(num_patch_prototypes(recipe.model))

    @torch.no_grad()
    def forward(self, teacher: Outputs, temperature: float) -> Targets:
        cls = torch.cat((teacher.global_cls.flatten(0, 1), teacher.slice_cls))
        patches = torch.cat((teacher.masked_patches, teacher.slice_patches))
        if self.use_centering:
            cls, patches = self.cls_center(cls, temperature), self.patch_center(patches, temperature)
        else:
            cls, patches = sinkhorn_knopp(cls, temperature), sinkhorn_knopp(patches, temperature)
        num_global, num_masked = teacher.global_cls.shape[:2].numel(), len(teacher.masked_patches)
        return Targets(
            cls[:num_global].view_as(teacher.global_cls), patches[:num_masked], cls[num_global:], patches[num_masked:]
        )
