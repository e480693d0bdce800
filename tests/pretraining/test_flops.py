"""The FLOPs of a step against torch's own counter, and against figures known of DINOv2."""

import time

import pytest
import torch
from pretrain_runs import CROPS, SEPARATE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dataset_scripts.corpus.reader import Corpus
from modeling_mammodino import MammoDinoConfig, MammoDinoModel
from training.pretrain import compute_losses, weighted_sum
from training.pretraining.compute import block_flops, matmul_peak, patch_embedding_flops, step_flops
from training.pretraining.losses.targets import TeacherTargets
from training.pretraining.networks import Network, make_teacher
from training.pretraining.recipe import ModelRecipe, Recipe, load_recipe
from training.pretraining.views.sample import PretrainingViews, collate

SMALL = {"hidden_size": 384, "num_attention_heads": 6, "num_channels": 3, "num_register_tokens": 0}


def counted(call) -> float:
    """Attention as plain products: the counter misses parts of the CPU's flash attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def forward_flops(config: MammoDinoConfig, num_patches: int, num_kept: int) -> float:
    tokens = 1 + config.num_register_tokens + num_kept
    return patch_embedding_flops(config, num_patches) + block_flops(config, tokens)


def test_dinov2_small_costs_what_is_known_of_it():
    config = MammoDinoConfig(**SMALL)
    assert forward_flops(config, 256, 256) == pytest.approx(12.25e9, rel=1e-3)  # 224 px
    assert forward_flops(config, 49, 49) == pytest.approx(2.19e9, rel=1e-3)  # 98 px
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0].view(-1)[:77] = True  # half of the crops are masked, 10 to 50 % of each
    batch = {"global_tissue": torch.ones(2, 16, 16), "local_tissue": torch.ones(8, 7, 7), "masks": masks,
             "slice_tissue": torch.ones(0, 16, 16)}  # fmt: skip
    recipe = Recipe(ModelRecipe(hidden_size=384, num_prototypes=65536))
    assert step_flops(batch, config, recipe) == pytest.approx(166e9, rel=0.01)


@pytest.mark.parametrize("swiglu", [False, True])
def test_a_forward_is_what_the_counter_counts(swiglu):
    config = MammoDinoConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=112,
                             use_swiglu_ffn=swiglu)  # fmt: skip
    model, pixels, tissue = MammoDinoModel(config).eval(), torch.randn(1, 1, 112, 112), torch.zeros(1, 8, 8)
    tissue[:, :3] = 1
    with torch.no_grad():
        assert forward_flops(config, 64, 64) == counted(lambda: model(pixels))
        assert forward_flops(config, 64, 24) == counted(lambda: model(pixels, tissue_mask=tissue))


@pytest.mark.parametrize("switches", [[], ["--drop_path_rate", "0.3"], ["--tissue_tokens", "true"],
                                      ["--adjacent_slice_weight", "0", "--num_local_crops", "0"],
                                      ["--adjacent_patch_weight", "0", *SEPARATE],
                                      ["--dino_weight", "0", "--ibot_weight", "0", "--koleo_weight", "0"]])  # fmt: skip
def test_a_step_is_what_the_counter_counts(phantom_corpus, switches):
    """All of it: teacher, student, backward; what is left out (the losses, the norms) is next to nothing, but for what
    is repeated to save memory: the teacher's logits of the global crops, for either of DINO's terms."""
    recipe = load_recipe([CROPS, "--corpus", str(phantom_corpus), "--output_dir", "-", "--adjacent_patch_weight",
                          "0.5", "--num_prototypes", "4096", "--teacher_targets", "centering",
                          *switches])  # fmt: skip
    corpus = Corpus(phantom_corpus)
    pairs = recipe.loss.adjacent_slice_weight > 0
    views = PretrainingViews(corpus, recipe.views, recipe.model.patch_size, 0, 4, pairs)
    batch = collate([views[index] for index in range(4)])
    student = Network(recipe).train()
    teacher, targets = make_teacher(student), TeacherTargets(recipe)

    def step() -> None:
        losses, _ = compute_losses(batch, student, teacher, targets, 0.07, recipe)
        weighted_sum(losses, recipe).backward()

    expected = step_flops(batch, student.backbone.config, recipe)
    repeated = 2 * len(batch["global_crops"]) * recipe.model.head_bottleneck_size * recipe.model.num_prototypes
    assert counted(step) - repeated * (recipe.loss.dino_weight > 0) == pytest.approx(expected, rel=2e-3)


def test_the_peak_takes_no_time_in_any_precision():
    """bfloat16 on a CPU without units for it: a product of 2,048 rows takes half a minute."""
    started = time.perf_counter()
    assert matmul_peak("cpu", torch.bfloat16) > 1e7
    assert time.perf_counter() - started < 5


def test_the_peak_is_that_of_this_machine():
    assert 1e9 < matmul_peak("cpu", torch.float32, side=512) < 1e14
