"""The card of an export: made of real values, fit to be published, its snippet runs, its results can be refreshed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries  # noqa: E402
from pretrain_runs import exported_run

from dataset_scripts.corpus.reader import Corpus  # noqa: E402
from modeling_mammodino import MammoDinoModel, __version__  # noqa: E402
from modeling_mammodino.tools.model_files import check_folder  # noqa: E402
from modeling_mammodino.tools.publish import push_folder  # noqa: E402
from training.card import add_results, main  # noqa: E402
from training.pretraining.export import (  # noqa: E402
    curves,
    export_encoder,  # noqa: E402
    git_commit,
    origin,
    recipe_name,
)
from training.pretraining.monitoring import append_line, read_warnings  # noqa: E402
from training.pretraining.recipe import Recipe, load_recipe  # noqa: E402
from training.study import summary  # noqa: E402

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def encoder(phantom_corpus, tmp_path_factory) -> Path:
    """An encoder exported as a run does, after five logged steps."""
    return exported_run(tmp_path_factory.mktemp("run"), phantom_corpus) / "encoder"


@pytest.fixture
def copy(encoder, tmp_path) -> Path:
    return shutil.copytree(encoder, tmp_path / "encoder")


def probe(folder: Path, auc: float = 0.75, **models: str) -> dict:
    """Results in the form of training.probe."""
    names = ["untrained", "ours", *models]
    head = {
        "auc": {name: [auc, auc - 0.0625, auc + 0.03125] for name in names},
        "difference": {f"{a} - {b}": [0.0, -0.125, 0.125] for a in names for b in names if a != b},
    }
    task = {"classes": ["0", "1"], "learning_images": 600, "test_images": 400, "test_patients": 200}
    evaluated = {"seed": 7, "num_resamples": 500, "models": {"ours": str(folder), **models}}
    return evaluated | {"tasks": {"cancer": {**task, "knn": head, "logistic": head}}}


def test_the_card_states_data_recipe_settings_and_origin(encoder, phantom_corpus):
    text = (encoder / "README.md").read_text()
    manifest = json.loads((phantom_corpus / "manifest.json").read_text())
    assert f"{manifest['rows']} images of {manifest['volumes']} volumes" in text
    assert ", ".join(f"{count} {kind}" for kind, count in manifest["rows_by_kind"].items()) in text
    assert f"| simulated (collection `phantom`) | {manifest['rows']} |" in text and "simulated breasts only" in text
    assert "Not evaluated yet." in text and "Research use only" in text and "this is not their model" in text
    changed = ("patch_size", "image_height", "image_width", "local_crop_size", "max_steps")
    assert f"| recipe | `mammodino`, but for {', '.join(f'`{each}`' for each in changed)} |" in text
    assert "| steps | 5 |" in text
    assert "| initial weights | random |" in text
    assert f"mammodino {__version__}, torch " in text and git_commit(ROOT) in text
    assert "{{" not in text and "{%" not in text and "None" not in text
    blocks = dict(re.findall(r"```(yaml|json)\n(.*?)```", text, re.DOTALL))
    assert yaml.safe_load(blocks["yaml"]) == yaml.safe_load((encoder / "recipe.yaml").read_text())
    saved = json.loads((encoder / "preprocessor_config.json").read_text())
    settings = json.loads(blocks["json"])
    assert settings and all(saved[name] == value for name, value in settings.items())


def test_an_export_can_be_published_as_it_is(encoder, phantom_corpus):
    assert check_folder(encoder) == []
    published = "".join(path.read_text() for path in encoder.iterdir() if path.suffix in (".md", ".yaml", ".json"))
    assert str(phantom_corpus) not in published and str(encoder.parent) not in published
    assert yaml.safe_load((encoder / "recipe.yaml").read_text()).keys().isdisjoint({"corpus", "output_dir"})
    arguments = [str(encoder / "recipe.yaml"), "--corpus", "c", "--output_dir", "o"]
    assert load_recipe(arguments).flat()["image_height"] == 64  # and it is still a recipe


def test_of_a_log_that_a_crash_cut_the_rest_is_read_and_without_a_log_there_is_no_figure(
    encoder, phantom_corpus, tmp_path
):
    def export(output: Path) -> bool:
        recipe = load_recipe(["mammodino", "--corpus", str(phantom_corpus), "--output_dir", str(tmp_path)])
        export_encoder(MammoDinoModel.from_pretrained(encoder), Corpus(phantom_corpus), recipe, 5, output)
        assert check_folder(output) == []
        return "](pretraining.png)" in (output / "README.md").read_text() and (output / "pretraining.png").is_file()

    log = tmp_path / "logs" / "log.jsonl"
    assert not export(tmp_path / "without") and summary(log) == {} and read_warnings(tmp_path) == []
    for file, name in ((log, "loss_ibot"), (log.with_name("warnings.jsonl"), "warning")):
        for step in (1, 2):
            append_line(file, {"step": step, "loss": 2.0, name: step})
        file.write_text(file.read_text() + '{"step": 3, "lo')
    assert export(tmp_path / "cut") and summary(log) == {"step": 2, "loss": 2.0, "loss_ibot": 2}
    assert [each["warning"] for each in read_warnings(tmp_path)] == [1, 2]


def test_a_corpus_of_patients_is_not_called_simulated(phantom_corpus, encoder, tmp_path):
    rows = datasets.load_from_disk(str(phantom_corpus))
    number = Corpus(phantom_corpus).rows_of(0).stop
    rows = rows.map(lambda row, place: {"source": "phantom" if place < number else "site"}, with_indices=True,
                    keep_in_memory=True, features=rows.features)  # fmt: skip
    rows.save_to_disk(tmp_path / "corpus")
    shutil.copy(phantom_corpus / "manifest.json", tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus")
    recipe = load_recipe(["mammodino", "--corpus", str(phantom_corpus), "--output_dir", str(encoder.parent)])
    export_encoder(MammoDinoModel.from_pretrained(encoder), corpus, recipe, 5, tmp_path / "encoder")
    text = (tmp_path / "encoder" / "README.md").read_text()
    assert f"| simulated (collection `phantom`) | {number} |" in text and "simulated breasts only" not in text


@pytest.mark.parametrize("former", [False, True])
@pytest.mark.parametrize("published", [True, False])
def test_weights_to_start_from_are_named_by_their_hub_id_and_never_by_a_path(
    phantom_corpus, encoder, tmp_path, monkeypatch, published, former
):
    monkeypatch.chdir(tmp_path)
    if not published:
        (tmp_path / "clinic" / "anna").mkdir(parents=True)  # a folder may look like a Hub id
    places = ["--corpus", str(phantom_corpus), "--output_dir", str(encoder.parent)]
    recipe = load_recipe(["mammodino", *places, "--init_from", "clinic/anna"])
    if former:  # another run started from them, and this one goes on from its checkpoint
        (tmp_path / "checkpoint-9").mkdir()
        recipe.save(tmp_path / "checkpoint-9" / "recipe.yaml")
        (tmp_path / "checkpoint-9" / "trainer_state.json").write_text("{}")  # an older run's: it notes no origin
        recipe = load_recipe(["mammodino", *places, "--init_from_checkpoint", str(tmp_path / "checkpoint-9")])
    by_way_of = "a former run's, which started from: " if former else ""
    export_encoder(MammoDinoModel.from_pretrained(encoder), Corpus(phantom_corpus), recipe, 5, tmp_path / "encoder")
    text = (tmp_path / "encoder" / "README.md").read_text()
    assert check_folder(tmp_path / "encoder") == []
    assert ("clinic/anna" in text + (tmp_path / "encoder" / "recipe.yaml").read_text()) == published
    if published:
        assert (
            f"| initial weights | {by_way_of}`clinic/anna` on the Hub |" in text
            and "`clinic/anna`, whose license holds" in text
        )
        assert ModelCard(text).data.base_model == "clinic/anna"
    else:
        assert f"| initial weights | {by_way_of}unpublished weights |" in text and "init_from: UNPUBLISHED" in text
    recipe.origin = origin(recipe)  # as a run notes it when it begins
    for folder in ("clinic", "checkpoint-9"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    assert origin(recipe)["init_from"] == ("clinic/anna" if published else "UNPUBLISHED")


def test_the_nearest_recipe_is_named():
    places = ["--corpus", "c", "--output_dir", "o", "--save_steps", "3"]
    assert recipe_name(load_recipe(["paper", *places])) == "`paper` as shipped"
    assert recipe_name(load_recipe(["mammodino", *places, "--seed", "3"])) == "`mammodino`, but for `seed`"


@pytest.mark.slow
def test_the_snippet_of_the_card_runs_as_written_without_the_package(copy, phantom_archive, tmp_path):
    """In a fresh process, in the model's folder, beside a DICOM volume by the name that the snippet gives it."""
    snippet = re.search(r"```python\n(.*?)```", (copy / "README.md").read_text(), re.DOTALL).group(1)
    shutil.copy(sorted(phantom_archive.rglob("*_dbt.dcm"))[0], copy / "mammogram.dcm")
    without = (
        "import sys; sys.modules['modeling_mammodino'] = None; sys.meta_path = "
        "[finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
    )
    shapes = "print(*image_features.shape, *patch_features.shape, bool(image_features.isfinite().all()))"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", without + snippet + shapes], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["6", "16", "6", "12", "16", "True"]
    claimed = re.findall(r"# \(B, ([\d, ]+)\)", snippet)
    assert claimed == ["16", "12, 16"]


def test_results_enter_the_card_and_the_index_again_and_again(copy, tmp_path):
    results = tmp_path / "probe.json"
    results.write_text(json.dumps(probe(copy, plain="/somewhere/plain")))
    main([str(copy), "--results", str(results), "--dataset", "phantom"])
    first = (copy / "README.md").read_text()
    assert "**Phantom results: simulated breasts" in first and "Not evaluated" not in first
    scores = " | ".join(["0.750 [0.688, 0.781]"] * 3)
    row = f"| cancer | k-NN | 600 files | 400 files, 200 patients | {scores} | +0.000 [-0.125, +0.125] |"
    assert row in first and "500 bootstrap resamples of patients; seed 7" in first
    assert "/somewhere" not in first and str(copy) not in first and check_folder(copy) == []
    evaluation = ModelCard(first).data.eval_results[0]
    assert (evaluation.dataset_name, evaluation.dataset_config) == ("phantom (simulated)", "cancer")
    assert (evaluation.metric_type, evaluation.metric_value) == ("roc_auc", 0.75)
    assert (evaluation.metric_args["low"], evaluation.metric_args["high"]) == (0.6875, 0.7812)

    main([str(copy), "--results", str(results), "--dataset", "phantom"])
    assert (copy / "README.md").read_text() == first
    results.write_text(json.dumps(probe(copy, auc=0.5)))
    main([str(copy), "--results", str(results), "--dataset", "CMMD, held-out patients"])
    second = (copy / "README.md").read_text()
    assert "0.750" not in second and "0.500 [0.438, 0.531]" in second and "Phantom results" not in second
    assert first.partition("## Results")[0].partition("# A MammoDINO")[2] in second
    assert first.partition("## Limits")[2] == second.partition("## Limits")[2]


def test_results_on_a_data_set_of_the_hub_and_emissions_are_published_as_the_hub_reads_them(copy, tmp_path, hub):
    results, emissions = tmp_path / "probe.json", tmp_path / "emissions.csv"
    results.write_text(json.dumps(probe(copy)))
    rows = [("0.002", "3.0.4", "Germany", "", "1 x NVIDIA H200"), ("0.0015", "3.0.4", "Germany", "", "1 x NVIDIA H200")]
    columns = "emissions,codecarbon_version,country_name,region,gpu_model"
    emissions.write_text("\n".join([columns, *map(",".join, rows)]))
    arguments = [
        "--results",
        str(results),
        "--dataset",
        "CMMD",
        "--hub_dataset",
        "me/cmmd",
        "--emissions",
        str(emissions),
    ]
    main([str(copy), *arguments])
    push_folder(copy, "me/with_results")
    files = hub.files("me/with_results")
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/me--cmmd.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("me/cmmd", "cancer", 0.75)
    assert entry.notes.endswith("95 % interval 0.6875 to 0.7812 over 200 held-out patients")
    data = ModelCard(files["README.md"].decode()).data
    assert [each.dataset_config for each in data.eval_results] == ["cancer", "cancer"]  # two heads, in the model-index
    assert data["co2_eq_emissions"] == {
        "emissions": 3.5, "source": "CodeCarbon 3.0.4", "training_type": "pre-training",
        "geographical_location": "Germany", "hardware_used": "1 x NVIDIA H200",
    }  # fmt: skip
    for spoiled, more, message in (
        (probe(copy), ["--hub_dataset", "cmmd"], "--hub_dataset cmmd: .* OWNER/NAME"),
        ({}, ["--emissions", str(results)], "not a table of CodeCarbon"),
    ):
        results.write_text(json.dumps(spoiled))
        given = ["--results", str(results), "--dataset", "CMMD"] if spoiled else []
        with pytest.raises(SystemExit, match=message):
            main([str(copy), *given, *more])
    assert files[".eval_results/me--cmmd.yaml"] == (copy / ".eval_results" / "me--cmmd.yaml").read_bytes()


def test_corpora_of_the_hub_are_named_and_those_of_a_folder_are_not(tmp_path):
    def made(corpus: str, *more: str) -> Recipe:
        return load_recipe(["mammodino", "--corpus", corpus, "--output_dir", str(tmp_path), *more])

    assert origin(made(str(tmp_path)))["corpora"] == origin(made("s3://bucket/corpus"))["corpora"] == []
    of_the_hub = made("hf://datasets/clinic/screening@v2/data")
    assert origin(of_the_hub)["corpora"] == ["clinic/screening"]
    of_the_hub.save(tmp_path / "recipe.yaml")
    (tmp_path / "trainer_state.json").write_text("{}")  # of a run that did not note its origin
    continued = made("hf://datasets/clinic/other", "--init_from_checkpoint", str(tmp_path))
    assert origin(continued)["corpora"] == ["clinic/other", "clinic/screening"]


def test_an_undefined_score_is_said_and_not_indexed(copy, tmp_path):
    results = tmp_path / "probe.json"
    results.write_text(json.dumps(probe(copy, auc=float("nan"))))
    add_results(copy, results, "CMMD")
    card = ModelCard.load(copy / "README.md")
    assert "| undefined | undefined |" in card.text and "*undefined*: the held-out patients lack" in card.text
    assert card.data.eval_results is None
    assert check_folder(copy) == []


def test_results_that_are_not_of_this_encoder_are_refused(copy, tmp_path):
    before, results = (copy / "README.md").read_bytes(), tmp_path / "probe.json"
    for content, more, message in (
        (json.dumps(probe(tmp_path / "other")), [], r"does not evaluate .*but ours \(.*other\); give --model NAME"),
        (json.dumps(probe(copy)), ["--model", "mine"], "has no model 'mine', but ours"),
        ('{"models": {}', [], "probe.json: Expecting"),
        ('{"tasks": {}}', [], "no field 'models'; is it a file of training.probe"),
    ):
        results.write_text(content)
        with pytest.raises(SystemExit, match=message):
            main([str(copy), "--results", str(results), "--dataset", "phantom", *more])
    (copy / "README.md").write_text("# Another card")
    results.write_text(json.dumps(probe(copy)))
    with pytest.raises(SystemExit, match="no section `## Results`; export the encoder again"):
        main([str(copy), "--results", str(results), "--dataset", "phantom"])
    (copy / "README.md").write_bytes(before)
    add_results(copy, results, "phantom", "ours")
    assert sorted(path.name for path in copy.iterdir() if path.name.startswith(".")) == []


def test_the_commit_is_that_of_the_checkout(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_commit(tmp_path) == "unknown (not a checkout)"
    git("init"), (tmp_path / "a").write_text("1"), git("add", "a"), git("commit", "-m", "one")
    assert git_commit(tmp_path) == f"`{git('rev-parse', 'HEAD')}`"
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == f"`{git('rev-parse', 'HEAD')}`, with uncommitted changes"
    (tmp_path / "inside").mkdir()
    assert git_commit(tmp_path / "inside") == "unknown (not a checkout)"


def test_a_loss_that_is_off_or_that_a_batch_had_no_pairs_for_is_no_point_of_a_curve():
    names = ("step", "loss_adjacent_slice", "loss_gram", "feature_rank")
    lines = [{"step": 0, "knn_auc": 0.5}, *(dict(zip(names, of, strict=True)) for of in ((1, 4, 0, 9), (2, 0, 0, 0)))]
    assert curves(lines) == {
        "losses (unweighted)": {"loss_adjacent_slice": [(1, 4)]},
        "feature rank (RankMe)": {"feature_rank": [(1, 9), (2, 0)]},
        "k-NN of the teacher": {"knn_auc": [(0, 0.5)]},
    }
