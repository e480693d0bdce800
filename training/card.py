"""Put results, and what the training emitted, into the model card of an exported encoder, in place of earlier ones.

    python -m training.card ENCODER_FOLDER --results PROBE.json --dataset NAME --hub_dataset OWNER/NAME
    python -m training.card ENCODER_FOLDER --emissions emissions.csv

PROBE.json is what training.probe wrote. NAME says in public what the labeled data were; results on simulated breasts
are called that, by the name `phantom`. Where the data are on the Hub, too, its leaderboard of them takes the results
from `.eval_results`. emissions.csv is what CodeCarbon wrote (`codecarbon monitor -- python -m training.pretrain ...`).
"""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard

from modeling_mammodino.tools.command import CommandParser, command_line, model_folder, user_path
from modeling_mammodino.tools.files import atomic_file, write_text
from modeling_mammodino.tools.model_files import EVAL_RESULTS, check_results, results_yaml
from training.evaluation.reports import format_interval, markdown_table
from training.pretraining.export import PHANTOM

from .probe import UNTRAINED

UNDEFINED = "undefined"
HEADS = {"knn": "k-NN", "logistic": "logistic regression"}


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m training.card", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=model_folder, help="an exported encoder")
    parser.add_argument("--results", type=user_path, help="JSON file of training.probe")
    parser.add_argument("--dataset", help="with --results: public name of the labeled data, `phantom` if simulated")
    parser.add_argument("--hub_dataset", help="OWNER/NAME of the same data on the Hub, for its leaderboard")
    parser.add_argument("--model", help="the encoder's name in the results (default: found by its folder)")
    parser.add_argument("--emissions", type=user_path, help="emissions.csv of CodeCarbon; several rows are summed")
    options = parser.parse_args(arguments)
    if not (options.results or options.emissions) or options.results and not options.dataset:
        parser.error("give --results with --dataset, --emissions, or both")
    with command_line("card"):
        if options.results:
            add_results(options.folder, options.results, options.dataset, options.model, options.hub_dataset)
        if options.emissions:
            add_emissions(options.folder, options.emissions)
        print(options.folder / "README.md")


def section(name: str) -> re.Pattern[str]:
    """Return a pattern that finds what stands under a heading of a card, up to the next one or the end."""
    return re.compile(rf"(?<=^## {name}\n).*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)


def add_results(
    folder: Path, results_file: Path, dataset: str, model: str | None = None, hub_dataset: str | None = None
) -> None:
    """Write the results of one probe into the card of `folder`, in place of earlier ones, atomically.

    model: the encoder's name in the results; where None, the one that was evaluated from this folder.
    hub_dataset: OWNER/NAME of the data on the Hub: linear probes enter `.eval_results`, too.
    Raises ValueError or OSError naming the file and the remedy.
    """
    card_file = folder / "README.md"
    card = ModelCard(card_file.read_text())
    if not section("Results").search(card.text):
        raise ValueError(f"{card_file}: has no section `## Results`; export the encoder again")
    try:
        results = json.loads(results_file.read_text())
        model = model or name_of(folder, results)
        if model not in results["models"]:
            raise ValueError(f"has no model {model!r}, but {', '.join(results['models'])}; give --model")
        text, evaluations = results_section(results, model, dataset), evaluation_results(results, model, dataset)
        entries = leaderboard_entries(evaluations, hub_dataset) if hub_dataset else ""
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no field {error}; is it a file of training.probe?" if isinstance(error, KeyError) else error
        raise ValueError(f"{results_file}: {reason}") from error
    card.text = section("Results").sub(lambda _: f"\n{text}\n\n", card.text)
    index(card, evaluations)
    with atomic_file(card_file) as temporary:
        card.save(temporary)
    if hub_dataset and entries:
        write_text(folder / EVAL_RESULTS / f"{hub_dataset.replace('/', '--')}.yaml", entries)


def index(card: ModelCard, evaluations: list[EvalResult]) -> None:
    """Put results into the metadata of a card as the Hub's model-index, in place of earlier ones."""
    data: Any = card.data
    data.model_name, data.eval_results = "MammoDINO encoder", evaluations or None
    if not evaluations:
        del data.model_name


def leaderboard_entries(evaluations: list[EvalResult], hub_dataset: str) -> str:
    """Return a file of `.eval_results` of the linear probes, a task each. Raises ValueError where the name is none."""
    entries = []
    for each in evaluations:
        known: dict[str, Any] = each.metric_args or {}
        if each.metric_name == f"AUC, {HEADS['logistic']}":
            notes = f"frozen features, logistic regression: AUC, 95 % interval {known['low']} to {known['high']} over "
            notes += f"{known['test_patients']} held-out patients"
            entries.append(EvalResultEntry(hub_dataset, str(each.dataset_config), each.metric_value, notes=notes))
    text = results_yaml(entries)
    if complaint := next(check_results(text.encode()), None):
        raise ValueError(f"--hub_dataset {hub_dataset}: {complaint}")
    return text


def add_emissions(folder: Path, emissions_file: Path) -> None:
    """Write what CodeCarbon measured into the metadata of the card of `folder`, in place of what stood there.

    Raises ValueError or OSError naming the file and the remedy."""
    with emissions_file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    try:
        grams = 1000 * sum(float(row["emissions"]) for row in rows)  # the file has kg
        last = rows[-1]
        emissions = {
            "emissions": float(f"{grams:.3g}"),
            "source": f"CodeCarbon {last['codecarbon_version']}",
            "training_type": "pre-training",
            "geographical_location": ", ".join(filter(None, (last.get("region"), last.get("country_name")))),
            "hardware_used": ", ".join(filter(None, (last.get("gpu_model"), last.get("cpu_model")))),
        }
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{emissions_file}: not a table of CodeCarbon ({error!r}); give its emissions.csv") from error
    card_file = folder / "README.md"
    card = ModelCard(card_file.read_text())
    card.data["co2_eq_emissions"] = {name: value for name, value in emissions.items() if value != ""}
    with atomic_file(card_file) as temporary:
        card.save(temporary)


def name_of(folder: Path, results: dict[str, Any]) -> str:
    """Return the name under which the encoder in `folder` was evaluated."""
    found = [name for name, evaluated in results["models"].items() if Path(evaluated).resolve() == folder.resolve()]
    if len(found) != 1:
        evaluated = ", ".join(f"{name} ({path})" for name, path in results["models"].items())
        raise ValueError(
            f"does not evaluate {folder}, but {evaluated}; give --model NAME if it is the same encoder moved"
        )
    return found[0]


def results_section(results: dict[str, Any], model: str, dataset: str) -> str:
    """Return the AUCs as text and a table: this encoder, the untrained one, the others, and the gain over the
    untrained."""
    is_phantom = PHANTOM in dataset.lower()
    others = [name for name in results["models"] if name != model]
    lines = ["**Phantom results: simulated breasts, which say nothing about patients.**", ""] if is_phantom else []
    lines += [
        f"Frozen features on {dataset}: AUC on held-out patients (of more than two classes the macro average of one "
        f"against the rest), with 95 % intervals from {results['num_resamples']} bootstrap resamples of patients; seed "
        f"{results['seed']}. *Untrained*: the same architecture with random weights.",
        "",
    ]
    columns = ["task", "head", "learned on", "tested on", "this encoder", "untrained", *others, "over untrained"]
    rows = []
    for task, result in results["tasks"].items():
        tested = f"{result['test_images']} files, {result['test_patients']} patients"
        for head, head_name in HEADS.items():
            auc, difference = result[head]["auc"], result[head]["difference"]
            scores = [interval_text(auc[name]) for name in (model, UNTRAINED, *others)]
            gain = interval_text(difference[f"{model} - {UNTRAINED}"], signed=True)
            rows.append([task, head_name, f"{result['learning_images']} files", tested, *scores, gain])
    if any(UNDEFINED in row for row in rows):
        lines[-1:] = ["", f"*{UNDEFINED}*: the held-out patients lack one of the classes.", ""]
    return "\n".join([*lines, *markdown_table(columns, rows)])


def interval_text(interval: list[float], signed: bool = False) -> str:
    """Return an interval as text, or UNDEFINED where one of its numbers is."""
    return format_interval(interval, signed) if all(map(math.isfinite, interval)) else UNDEFINED


def evaluation_results(results: dict[str, Any], model: str, dataset: str) -> list[EvalResult]:
    """Return the encoder's AUCs as the Hub's model-index takes them; an undefined one is left out."""
    return [
        evaluation(dataset, f"AUC, {HEADS[head]}", auc, result["test_patients"], config=task, seed=results["seed"])
        for task, result in results["tasks"].items()
        for head in HEADS
        if all(map(math.isfinite, auc := result[head]["auc"][model]))
    ]


def evaluation(
    dataset: str, name: str, auc: list[float], patients: int, config: str | None = None, **arguments: Any
) -> EvalResult:
    """Return an AUC with its interval, three finite numbers, as the Hub's model-index takes it."""
    value, low, high = (round(number, 4) for number in auc)
    return EvalResult(
        task_type="image-classification",
        task_name="classification from frozen features",
        dataset_type=re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-"),
        dataset_name=f"{dataset} (simulated)" if PHANTOM in dataset.lower() else dataset,
        dataset_config=config,
        metric_type="roc_auc",
        metric_name=name,
        metric_value=value,
        metric_args={"confidence_level": 0.95, "low": low, "high": high, "test_patients": patients, **arguments},
    )


if __name__ == "__main__":
    main()
