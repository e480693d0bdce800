"""Predict with a run of training.finetune or training.detect on any files. Research use only.

    python -m training.predict RUN FILES... --output predictions.parquet [--heat_maps FOLDER]

RUN is the output_dir of a finished run: frozen, attention, mil, lora, full or detection. FILES are images, folders, or
tables with a column `file` (relative to the table) and, where breasts and patients are to be predicted, `patient` with
`laterality` or `breast`, as label tables have them (docs/finetuning.md). The output, .parquet or .csv, has a row an
image, and for each way of aggregation a row a breast and a patient: `class`, the most probable one, p_CLASS, calibrated
on the run's validation part, uncalibrated_CLASS, as the head says, and how far the breast mask can be trusted. Of
detection a row a box, in pixels of the file, and the highest score of images, breasts and patients. A file that cannot
be used has a row with the reason; the others go on.
"""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dataset_scripts.benchmarks.labels import read_images
from modeling_mammodino.tools.command import CommandParser, command_line, show_progress, user_model, user_path
from modeling_mammodino.tools.embed import find_device
from modeling_mammodino.tools.features import find_files, paths_below
from modeling_mammodino.tools.files import atomic_file, check_output
from training.evaluation.detection.boxes import BoxedImage
from training.evaluation.detection.data import LesionImageRenderer
from training.evaluation.detection.detector import load_detector
from training.evaluation.detection.find_lesions import find_lesions, prediction_table
from training.evaluation.finetuning.aggregation import GROUPS, IDENTIFIERS
from training.evaluation.finetuning.feature_cache import Encoded, SliceFeatures, encode_images
from training.evaluation.finetuning.image_classifier import open_classifier
from training.evaluation.finetuning.multiple_instance import MultipleInstanceHead
from training.evaluation.finetuning.predictor import CALIBRATED, Predictor, encoding_of
from training.evaluation.plots import draw_heat_maps
from training.evaluation.run_settings import DetectionSettings, FinetuneSettings, RunSettings
from training.evaluation.runs import MODEL_FOLDER, RESULT_FILE, read_json

from .heat_map import check_drawable, map_file

logger = logging.getLogger(__name__)

TABLES = (".csv", ".parquet")
IMAGES_AT_ONCE = 256  # whose tiles are in memory


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m training.predict", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=user_path, help="output_dir of training.finetune or training.detect")
    parser.add_argument("files", nargs="+", type=user_path, help="images, folders, or tables with a column `file`")
    parser.add_argument("--output", type=user_path, required=True, help=".parquet or .csv to write")
    parser.add_argument("--heat_maps", type=user_path, help="folder for a PNG an image, a volume's middle slice")
    parser.add_argument("--source", type=user_model, help="where the run's frozen encoder is now, if it was moved")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read and render; 0: this one")
    options = parser.parse_args(arguments)
    with command_line("predict"):
        check_output(options.output, *TABLES)
        table = predict(
            options.run, read_files_and_tables(options.files), options.heat_maps, options.source, options.num_workers
        )
        write_table(options.output, table)
        refused = int(table["refused"].notna().sum())
        print(f"{options.output}: {len(table)} rows; {refused} files refused. Research use only: not a medical device.")


def read_files_and_tables(sources: list[Path]) -> pd.DataFrame:
    """Return file, image_id, breast_id and patient_id of every image once, missing where they are not known.

    Raises ValueError or OSError where there is none, where a source is not there, or two images have one name.
    """
    is_table = [source.suffix.lower() in TABLES for source in sources]
    found = find_files([source for source, table in zip(sources, is_table, strict=True) if not table]).files
    parts = []  # tables first, which know more of a file than its folder does
    for source in (source for source, table in zip(sources, is_table, strict=True) if table):
        rows = read_images(source)
        parts.append(rows.assign(file=[str(source.parent / path) for path in rows["path"]]))
    parts.append(pd.DataFrame({"file": map(str, found), "image_id": map(str, found)}, dtype="string"))
    table = pd.concat(parts, ignore_index=True).drop_duplicates("file", ignore_index=True)
    if table.empty:
        raise ValueError(f"{', '.join(map(str, sources))}: no image found; give images, folders, or a table")
    if (repeated := table["image_id"].duplicated()).any():
        raise ValueError(f"image {table['image_id'][repeated].iloc[0]!r} is the name of several files; rename them")
    return table.reindex(columns=["file", *IDENTIFIERS]).astype("string")


def predict(
    run: Path,
    table: pd.DataFrame,
    maps: Path | None = None,
    source: str | None = None,
    num_workers: int = 0,
) -> pd.DataFrame:
    """Return what the command writes, of a table as `read_files_and_tables` makes it; see the module.

    Raises ValueError where the run cannot predict, or `maps`, a folder for heat maps, cannot be drawn.
    """
    settings, classes = open_run(run)
    settings.dataloader_num_workers = num_workers
    if isinstance(settings, DetectionSettings):
        if maps is not None:
            raise ValueError("--heat_maps: a detector has boxes instead; leave the option out")
        rows, refused, masks = predict_boxes(run, table, settings)
    else:
        assert isinstance(settings, FinetuneSettings)
        numbered, refused, masks = predict_classes(run, table, settings, classes, maps, source)
        rows = by_class_name(numbered, classes)
    file = table.set_index("image_id")["file"]
    about = pd.DataFrame.from_dict(masks, "index", columns=["mask_confidence", "mask_warning"])
    rows = rows.join(about, on="image_id") if len(about) else rows.assign(mask_confidence=np.nan, mask_warning=None)
    unusable = table[table["image_id"].isin(list(refused))].drop(columns="file").assign(level="image")
    rows = pd.concat([rows, unusable.assign(refused=unusable["image_id"].map(refused))], ignore_index=True)
    rows.insert(1, "file", rows["image_id"].map(file))
    return rows.assign(refused=rows.get("refused", pd.Series(None, rows.index, "string")))


def open_run(run: Path) -> tuple[RunSettings, list[str]]:
    """Return the settings of a finished run, and its classes. Raises ValueError, naming the remedy, where there is
    none, or it kept no model."""
    if (result := read_json(run / RESULT_FILE)) is None:
        raise ValueError(
            f"{run}: no {RESULT_FILE}; give the output_dir of a finished run of training.finetune or training.detect"
        )
    kind: type[RunSettings] = DetectionSettings if "detector" in result else FinetuneSettings
    known = {each.name for each in fields(kind)}
    settings = kind(**{name: value for name, value in result["settings"].items() if name in known})
    if not (run / MODEL_FOLDER).is_dir():
        option = "--num_train_epochs 0" if kind is DetectionSettings else "--save_model False"
        raise ValueError(
            f"{run}: kept no model, as it was run with {option}; run it again without, into another folder"
        )
    return settings, result.get("classes", [])


def predict_classes(
    run: Path,
    table: pd.DataFrame,
    settings: FinetuneSettings,
    classes: list[str],
    maps: Path | None = None,
    source: str | None = None,
) -> tuple[pd.DataFrame, dict[str, str], dict[str, tuple[float, str]]]:
    """Return rows as of `Predictor.predict`, why images were refused, and the confidence of the masks of the others.

    `table`: as of `read_files_and_tables`, and `label` (int) where it is known.
    """
    backbone, head, _ = open_classifier(run / MODEL_FOLDER, source)
    if maps is not None:
        check_drawable(backbone, head, "--heat_maps")
        names = paths_below([Path(file) for file in table["file"]])
        drawn = {file: maps / f"{name}.png" for file, name in zip(table["file"], names, strict=True)}
        if there := next(filter(Path.exists, drawn.values()), None):
            raise FileExistsError(f"--heat_maps: {there} exists; give another folder, or remove it first")
    backbone, predictor = backbone.to(find_device("auto")), Predictor.open(run / MODEL_FOLDER, head)
    tiling = head.tiling if isinstance(head, MultipleInstanceHead) else None
    shards: list[SliceFeatures] = []
    probabilities: list[np.ndarray] = []
    refused: dict[str, str] = {}
    masks: dict[str, tuple[float, str]] = {}
    for start in show_progress(
        range(0, len(table), IMAGES_AT_ONCE), "predict", unit_scale=IMAGES_AT_ONCE, disable=None
    ):
        rows = table[start : start + IMAGES_AT_ONCE]
        (whole,) = encode_images(backbone, rows["file"].tolist(), encoding_of(settings))
        names = rows["image_id"].tolist()
        refused |= {names[position]: reason for position, reason in whole.refused.items()}
        masks |= {names[position]: mask for position, mask in whole.masks.items()}
        if not whole.features:
            continue
        slices, tiles = as_features(whole, rows), None
        if tiling is not None:
            (of_tiles,) = encode_images(backbone, slices.table["file"].tolist(), encoding_of(settings, tiling))
            tiles = as_features(of_tiles, slices.table)
        shards.append(slices)
        probabilities.append(predictor.of_images(slices, tiles))
    for name, reason in refused.items():
        logger.warning("left out: %s", reason if name in reason else f"{name}: {reason}")
    if not shards:
        raise ValueError(f"none of {len(table)} images can be used; the first: {next(iter(refused.values()))}")
    known = pd.concat([each.table for each in shards], ignore_index=True)
    everything = SliceFeatures([each for shard in shards for each in shard.rows], known, refused)
    rows = predictor.levels(everything, np.concatenate(probabilities))
    if maps is not None:
        for file in show_progress(known["file"], "heat maps", disable=None):
            image, of_file = map_file(file, None, backbone, head, tuple(classes))
            draw_heat_maps(image, of_file, Path(file).name, drawn[file])
    return rows, refused, masks


def as_features(shard: Encoded, rows: pd.DataFrame) -> SliceFeatures:
    """Return the images of a shard that could be read, in the order of `rows`."""
    used = sorted(shard.features)
    values = [np.stack([feature for _, feature in shard.features[position]]) for position in used]
    return SliceFeatures(values, rows.iloc[used].reset_index(drop=True), {})


def by_class_name(rows: pd.DataFrame, classes: list[str]) -> pd.DataFrame:
    """Return predictions with the names of the classes in place of their numbers."""
    calibrated = [f"{CALIBRATED}{number}" for number in range(len(classes))]
    names = {column: f"p_{name}" for column, name in zip(calibrated, classes, strict=True)}
    names |= {f"p_{number}": f"uncalibrated_{name}" for number, name in enumerate(classes)}
    best = np.array(classes)[rows[calibrated].to_numpy().argmax(axis=1)]
    named = rows[["level", *IDENTIFIERS, *names]].rename(columns=names)
    named.insert(1 + len(IDENTIFIERS), "class", best)
    return named


def predict_boxes(
    run: Path, table: pd.DataFrame, settings: DetectionSettings
) -> tuple[pd.DataFrame, dict[str, str], dict[str, tuple[float, str]]]:
    """Return as `predict_classes`, a row a box and below the highest score of each image, breast and patient."""
    detector: Any
    detector, processor = load_detector(run / MODEL_FOLDER)
    nothing = np.empty((0, 4)), np.empty(0, int)
    images = [BoxedImage(row.image_id, row.patient_id, row.file, *nothing) for row in table.itertuples()]
    found, refused = find_lesions(detector.to(find_device("auto")), images, LesionImageRenderer(processor), settings)
    if not found:
        raise ValueError(f"none of {len(table)} images can be used; the first: {next(iter(refused.values()))}")
    boxes = prediction_table(found, settings.hit, settings.hit_iou).drop(columns=["hit", "patient_id"])
    boxes = boxes.merge(table.drop(columns="file"), on="image_id")
    parts = [boxes.assign(level="box")]
    for level, column in {"image": "image_id", **GROUPS}.items():
        best = boxes.groupby(column)["score"].max()
        names = boxes.drop_duplicates(column).dropna(subset=column).set_index(column, drop=False)
        kept = IDENTIFIERS[IDENTIFIERS.index(column) :]
        parts.append(names[kept].assign(level=level, score=best.reindex(names.index)).reset_index(drop=True))
    rows = pd.concat(parts, ignore_index=True)
    first = ["level", *IDENTIFIERS, "score"]
    return rows[[*first, *(name for name in rows if name not in first)]], refused, {f.image_id: f.mask for f in found}


def write_table(output: Path, table: pd.DataFrame) -> None:
    """Write a table as Parquet or CSV, by the suffix, atomically."""
    with atomic_file(output) as temporary:
        if output.suffix.lower() == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)


if __name__ == "__main__":
    main()
