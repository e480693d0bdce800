"""Train a lesion detector on an encoder and evaluate it on held-out patients. Research use only.

    python -m training.detect --labels LABELS.csv --encoder MODEL --output_dir DIR [--name value ...]
    python -m training.detect --dataset NAME --data_dir DIR --encoder MODEL --output_dir DIR [--name value ...]

In output_dir: the detector in model/, predictions.parquet and lesions.parquet in pixels of the images, detections.png
and froc.png to look at, and at last result.json: mAP over boxes, and sensitivity at 1, 2 and 4 false positives an
image, with 95 % intervals over patients. Started again after a kill, a run resumes; when it is finished, it returns its
result.
"""

import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import RTDetrForObjectDetection

from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.tools.command import command_line
from modeling_mammodino.tools.embed import find_device
from modeling_mammodino.tools.files import write_json
from training.evaluation.detection.boxes import DetectionTable, load_boxes
from training.evaluation.detection.data import DetectionImages, LesionImageRenderer, render_training_images
from training.evaluation.detection.detector import build_detector, open_start
from training.evaluation.detection.find_lesions import find_lesions, lesion_table, prediction_table
from training.evaluation.detection.lesion_metrics import Found, evaluate, froc_marks
from training.evaluation.detection.train_detector import train_detector
from training.evaluation.plots import draw_detections, draw_froc
from training.evaluation.reports import format_interval, markdown_table
from training.evaluation.run_settings import DetectionSettings
from training.evaluation.runs import (
    NOTICE,
    PREDICTIONS_FILE,
    SETTINGS_FILE,
    how_it_was_run,
    refuse_torchrun,
    run_once,
    write_parquet,
)
from training.pretraining.compute import keep_freed_memory

logger = logging.getLogger(__name__)

CHECKPOINTS, IMAGES = "checkpoints", "images"  # removed when the result is written


def run_detection(settings: DetectionSettings) -> dict[str, Any]:
    """Run, resume, or return at once what `settings` ask for: the content of result.json.

    Raises ValueError or OSError, one line, for what cannot be used. One process a run.
    """
    refuse_torchrun("a detection run")
    return run_once(settings, lambda: run(settings), (CHECKPOINTS, IMAGES))


def run(settings: DetectionSettings) -> dict[str, Any]:
    started, output = time.monotonic(), Path(settings.output_dir)
    table = load_boxes(
        settings.dataset,
        settings.data_dir,
        seed=settings.seed,
        validation_fraction=settings.validation_fraction,
        test_fraction=settings.test_fraction,
        allow_missing=settings.allow_missing,
    )
    encoder, processor = open_start(settings.encoder, settings.init == "random", settings.seed)
    renderer = LesionImageRenderer(on_canvas(processor, settings), table.views)
    detector: Any = build_detector(
        encoder,
        settings.map_width,
        settings.decoder_layers,
        settings.num_queries,
        settings.spatial_prior,
        settings.seed,
    ).to(find_device("auto"))  # type: ignore[arg-type]
    write_json(output / SETTINGS_FILE, settings.what_is_computed())

    learned: dict[str, Any] = {}
    refused: dict[str, str] = {}
    if settings.num_train_epochs:
        learned, refused = train(detector, table, renderer, settings, output)
        detector.save_pretrained(output / "model")
        renderer.processor.save_pretrained(output / "model")
    found, of_test = find_lesions(detector, table.images["test"], renderer, settings)
    refused |= of_test
    check_lesions("test", (len(each.lesions) > 0 for each in found), of_test)

    rule = (settings.hit, settings.hit_iou)
    kinds = by_kind(found)
    metrics = {name: evaluate(each, *rule, settings.num_resamples, settings.seed) for name, each in kinds.items()}
    write_parquet(output / PREDICTIONS_FILE, prediction_table(found, *rule))
    write_parquet(output / "lesions.parquet", lesion_table(found, *rule))
    title = f"{table.benchmark.title}: {len(found)} images of {table.counts['test']['patients']} patients"
    draw_detections(table.images["test"], found, renderer, title, output / "detections.png")
    draw_froc({name: froc_marks(each, *rule) for name, each in kinds.items()}, title, output / "froc.png")
    return {
        "notice": NOTICE,
        "dataset": table.benchmark.name,
        "encoder": {"source": settings.encoder, "init": settings.init, "width": encoder.config.hidden_size},
        "detector": {
            "class": type(detector).__name__,
            "parameters": sum(each.numel() for each in detector.parameters()),
        },
        "counts": table.counts | {"refused": len(refused)},
        "evaluated": {name: counted(each) for name, each in kinds.items()},
        "learned": learned,
        "metrics": {name: {metric: list(value) for metric, value in of.items()} for name, of in metrics.items()},
        **how_it_was_run(settings, "pycocotools"),
        "seconds": round(time.monotonic() - started, 1),
    }


def on_canvas(processor: MammoDinoImageProcessor, settings: DetectionSettings) -> MammoDinoImageProcessor:
    """Return the encoder's image processor with the canvas of the settings. Raises ValueError for one that patches do
    not fill."""
    size = {
        "height": settings.image_height or processor.size["height"],
        "width": settings.image_width or processor.size["width"],
    }
    return MammoDinoImageProcessor.from_dict({**processor.to_dict(), "size": size})


def train(
    detector: RTDetrForObjectDetection,
    table: DetectionTable,
    renderer: LesionImageRenderer,
    settings: DetectionSettings,
    output: Path,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what was learned, and the images that were refused. Raises as `check_lesions`."""
    if find_device("auto").type == "cpu":
        keep_freed_memory()
    parts: dict[str, DetectionImages] = {}
    refused: dict[str, str] = {}
    for split in ("train", "validation"):
        rows, of_split = render_training_images(
            table.images[split],
            renderer,
            settings.slices_per_volume,
            settings.lesion_slice_reach,
            output / IMAGES,
            settings.dataloader_num_workers,
        )
        refused |= of_split
        parts[split] = DetectionImages(rows, renderer, settings.seed)
        check_lesions(split, parts[split].has_lesion, of_split)
        logger.info("%s: %d images, %d with lesions", split, len(rows), parts[split].has_lesion.sum())
    return train_detector(detector, parts["train"], parts["validation"], settings, output / CHECKPOINTS), refused


def check_lesions(split: str, has_lesion: Iterable[bool], refused: dict[str, str]) -> None:
    """Raise ValueError naming the first refusal where a split has no lesion left."""
    if not any(has_lesion):
        raise ValueError(
            f"{split}: no image with a lesion is left; {len(refused)} images were refused, the first: "
            f"{next(iter(refused.values()), '')}"
        )


def by_kind(found: list[Found]) -> dict[str, list[Found]]:
    """Return all images, and mammograms and volumes apart where there are both."""
    kinds = {
        "mammograms": [each for each in found if each.num_slices == 1],
        "volumes": [each for each in found if each.num_slices > 1],
    }
    return {"images": found} | (kinds if all(kinds.values()) else {})


def counted(found: list[Found]) -> dict[str, int]:
    return {
        "images": len(found),
        "patients": len({each.patient_id for each in found}),
        "lesions": sum(len(each.lesions) for each in found),
    }


def format_result(result: dict[str, Any]) -> str:
    """Return the scores as a Markdown table, a row a kind of image."""
    metrics = list(result["metrics"]["images"])
    rows = []
    for name, scores in result["metrics"].items():
        evaluated = result["evaluated"][name]
        about = f"{evaluated['images']} {name}, {evaluated['patients']} patients"
        rows.append([about, evaluated["lesions"], *(format_interval(scores[metric]) for metric in metrics)])
    return "\n".join(markdown_table(["test", "lesions", *metrics], rows))


def main(arguments: list[str] | None = None) -> None:
    with command_line("detect"):
        settings = DetectionSettings.parse(sys.argv[1:] if arguments is None else arguments)
        print(format_result(run_detection(settings)))


if __name__ == "__main__":
    main()
