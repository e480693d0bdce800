"""Put results into the model card of an exported encoder, in place of earlier ones.

    python -m training.card ENCODER_FOLDER --results PROBE.json --dataset NAME

PROBE.json is what training.probe wrote. NAME says in public what the labeled data were; results on simulated breasts
are called that, by the name `phantom`.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from modeling_mammodino.tools.command import CommandParser, command_line, model_folder, user_path
from modeling_mammodino.tools.files import atomic_file
from training.evaluation.reports import format_interval, markdown_table
from training.pretraining.export import PHANTOM

from .probe import UNTRAINED

UNDEFINED = "undefined"
HEADS = {"knn": "k-NN", "logistic": "logistic regression"}


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m training.card", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=model_folder, help="an exported encoder")
    parser.add_argument("--results", type=user_path, required=True, help="JSON file of training.probe")
    parser.add_argument("--dataset", required=True, help="public name of the labeled data, `phantom` if simulated")
    parser.add_argument("--model", help="the encoder's name in the results (default: found by its folder)")
    options = parser.parse_args(arguments)
    with command_line("card"):
        add_results(options.folder, options.results, options.dataset, options.model)
        print(options.folder / "README.md")


def section(name: str) -> re.Pattern[str]:
    """Return a pattern that finds what stands under a heading of a card, up to the next one or the end."""
    return re.compile(rf"(?<=^## {name}\n).*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)


def add_results(folder: Path, results_file: Path, dataset: str, model: str | None = None) -> None:
    """Write the results of one probe into the card of `folder`, in place of earlier ones, atomically.

    model: the encoder's name in the results; where None, the one that was evaluated from this folder.
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
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no field {error}; is it a file of training.probe?" if isinstance(error, KeyError) else error
        raise ValueError(f"{results_file}: {reason}") from error
    card.text = section("Results").sub(lambda _: f"\n{text}\n\n", card.text)
    data: Any = card.data
    data.model_name, data.eval_results = "MammoDINO encoder", evaluations or None
    if not evaluations:
        del data.model_name
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
        EvalResult(
            task_type="image-classification",
            task_name="classification from frozen features",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-"),
            dataset_name=f"{dataset} (simulated)" if PHANTOM in dataset.lower() else dataset,
            dataset_config=task,
            metric_type="roc_auc",
            metric_name=f"AUC, {HEADS[head]}",
            metric_value=round(value, 4),
            metric_args={
                "confidence_level": 0.95,
                "low": round(low, 4),
                "high": round(high, 4),
                "test_patients": result["test_patients"],
                "seed": results["seed"],
            },
        )
        for task, result in results["tasks"].items()
        for head in HEADS
        for value, low, high in [result[head]["auc"][model]]
        if all(math.isfinite(number) for number in (value, low, high))
    ]


if __name__ == "__main__":
    main()
