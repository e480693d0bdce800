"""Which volume a sample shows: epochs, and kinds mixed by weight."""

import datasets
import numpy as np
import pytest
import torch
from pretrain_runs import CROPS

from dataset_scripts.corpus.reader import Corpus
from training.pretraining.losses.koleo import koleo_loss
from training.pretraining.recipe import SAMPLES_PER_BLOCK, ViewsRecipe, load_recipe, parse_kind_weights
from training.pretraining.views.order import VolumeOrder
from training.pretraining.views.sample import PretrainingViews, collate

KINDS = ["ffdm"] * 5 + ["dbt"] * 3 + ["synthetic_2d"] * 4
WHERE = ["--corpus", "c", "--output_dir", "o"]


def views(corpus, *weights: str) -> PretrainingViews:
    recipe = ViewsRecipe(global_crop_size=64, local_crop_size=32, num_local_crops=2, kind_weights=list(weights))
    return PretrainingViews(Corpus(corpus), recipe, patch_size=16, seed=5, global_batch_size=8)


@pytest.fixture(scope="module")
def corpus_of_one_kind(phantom_corpus, tmp_path_factory):
    """The phantom corpus less all rows but one kind's."""

    def keep(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        rows = datasets.load_from_disk(str(phantom_corpus))
        rows.select(np.flatnonzero(np.asarray(rows["kind"]) == kind)).save_to_disk(folder)
        (folder / "manifest.json").write_text((phantom_corpus / "manifest.json").read_text())
        return folder

    return keep


def test_kinds_come_by_their_weights_and_volumes_of_a_kind_equally_often():
    order = VolumeOrder(3, KINDS, {"dbt": 2.0, "ffdm": 1.0})
    drawn = np.array([order[index] for index in range(3 * SAMPLES_PER_BLOCK)])
    visits = np.bincount(drawn, minlength=len(KINDS))
    assert visits[5:8].sum() == pytest.approx(2 * SAMPLES_PER_BLOCK, abs=3) and visits[8:].sum() == 0
    assert visits[:5].max() - visits[:5].min() <= 1 and visits[5:8].max() - visits[5:8].min() <= 1
    batches = (drawn.reshape(-1, 64) >= 5).mean(axis=1)  # share of DBT: a mix within each batch, not in turns
    assert batches.mean() == pytest.approx(2 / 3, abs=1e-3)
    assert batches.std() == pytest.approx(np.sqrt(2 / 9 / 64), rel=0.25)
    dbt = drawn[drawn >= 5]
    assert all(sorted(dbt[start : start + 3]) == [5, 6, 7] for start in range(0, 3000, 3))  # epochs within the kind


def test_a_volume_is_a_pure_function_of_seed_and_index():
    for weights in ({}, {"dbt": 2.0, "ffdm": 1.0}, {"synthetic_2d": 1.0}):
        order, again, other = (VolumeOrder(seed, KINDS, weights) for seed in (3, 3, 4))
        straight = [order[index] for index in range(10000)]
        for index in np.random.default_rng(0).permutation(10000)[:300].tolist():
            assert again[index] == straight[index]
        assert [other[index] for index in range(100)] != straight[:100]


def test_without_weights_an_epoch_visits_every_volume_once():
    order = VolumeOrder(0, KINDS, {})
    for epoch in range(3):
        assert sorted(order[12 * epoch + place] for place in range(12)) == list(range(12))


@pytest.mark.parametrize(
    "pairs",
    [["dbt"], ["dbt=x"], ["dbt=0"], ["dbt=-1"], ["=1"], ["dbt=1", "dbt=2"], ["dbt=inf"], ["dbt=1", "ffdm=1e-9"]],
)
def test_a_wrong_weight_is_refused_by_name(pairs):
    with pytest.raises(ValueError, match="kind_weights=.*"):
        load_recipe([CROPS, *WHERE, "--kind_weights", *pairs])


def test_weights_from_yaml_and_from_the_command_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text("kind_weights: [dbt=2, ffdm=0.5]\n")
    for arguments in ([str(tmp_path / "recipe.yaml")], [CROPS, "--kind_weights", "dbt=2", "ffdm=0.5"]):
        recipe = load_recipe([*arguments, *WHERE])
        assert parse_kind_weights(recipe.views.kind_weights) == {"dbt": 2.0, "ffdm": 0.5}


def test_a_weight_for_a_kind_that_the_corpus_lacks_is_refused(phantom_corpus):
    with pytest.raises(ValueError, match=r"kind_weights names ct, which the corpus lacks; it has dbt, ffdm"):
        views(phantom_corpus, "dbt=1", "ct=1")


def test_corpora_of_one_kind_and_mixed_ones_give_whole_batches(phantom_corpus, corpus_of_one_kind):
    only_2d, only_dbt = (collate([views(corpus_of_one_kind(kind))[i] for i in range(8)]) for kind in ("ffdm", "dbt"))
    assert only_2d["slice_pairs"].shape == (0, 2, 1, 64, 64) and only_2d["slice_tissue"].shape == (0, 4, 4)
    assert only_dbt["slice_pairs"].shape == (8, 2, 1, 64, 64)
    weighed = views(phantom_corpus, "dbt=3", "ffdm=1")
    batch = collate([weighed[index] for index in range(32)])
    is_dbt = weighed.corpus.kinds[batch["volume"].numpy()] == "dbt"
    assert 16 < is_dbt.sum() < 32 and len(batch["slice_pairs"]) == is_dbt.sum()


def test_slices_of_one_volume_that_meet_in_a_batch_are_no_neighbors_in_koleo(phantom_corpus):
    """12 DBT volumes at a weight far above the others': of 32 samples many share a volume."""
    weighed = views(phantom_corpus, "dbt=30", "ffdm=1")
    batch = collate([weighed[index] for index in range(32)])
    volume, rows = batch["volume"], batch["row"]
    assert len(volume.unique()) < 20
    ids = np.asarray(weighed.corpus.rows.data.column("volume_id"))[rows.numpy()]
    assert ((volume[:, None] == volume[None]).numpy() == (ids[:, None] == ids[None])).all()

    features = torch.nn.functional.one_hot(volume).float()  # slices of a volume look the same
    apart = koleo_loss(features, volume)
    assert apart == pytest.approx(-np.log(np.sqrt(2)), abs=1e-4)  # the nearest neighbor is of another volume
    assert koleo_loss(features) > apart + 5  # ungrouped, slices of a volume would be driven apart
