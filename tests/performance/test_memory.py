"""The memory of a step: counted on fake tensors it is what a real one allocates, and what recipes say."""

import re

import pytest
import torch
from pretrain_runs import SEPARATE, tiny

from performance.memory import count_memory, prepare_step
from training.pretraining.recipe import RECIPES, load_recipe

CANVAS = ["--dense_statistics_weight", "1", "--breast_weight", "1", "--patient_weight", "1", "--views_per_patient", "4"]


@pytest.mark.parametrize(
    "options", [[], [*CANVAS, "--gradient_checkpointing", "true"], [*SEPARATE, "--gram_weight", "1"]]
)
def test_the_peak_is_what_torchs_profiler_sees_of_a_real_step(options):
    """In float32, in which the CPU's kernels allocate what a GPU's do."""
    recipe = tiny("--bf16", "false", "--adjacent_patch_weight", "1", "--num_prototypes", "512", *options)
    state, kept, peak = count_memory(recipe)
    student, before, forward = prepare_step(recipe)
    assert state == sum(each.nbytes for each in before) + 2 * sum(each.nbytes for each in student.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward().backward()
    events = profiler.profiler.kineto_results.events()
    sizes = torch.tensor([event.nbytes() for event in events if event.name() == "[memory]"])
    assert int(sizes.cumsum(0).max()) == pytest.approx(peak - state, rel=0.05) and 0 < kept < peak


SLOW = ("high_resolution", "continue_from_dinov2")  # a minute; what they say was counted by the command


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_what_it_needs(path):
    (said,) = re.findall(r"[Mm]emory by count: ([\d.]+) GiB", path.read_text().replace("\n# ", " "))
    if path.stem in SLOW:
        return
    _, _, peak = count_memory(load_recipe([path.stem, "--corpus", "none", "--output_dir", "none"]))
    assert peak / 2**30 == pytest.approx(float(said), rel=0.05, abs=0.05)
