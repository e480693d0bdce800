"""The settings of a fine-tuning or detection run: typed, from the command line or Python, checked before any work.

Fields carry the names of `transformers.TrainingArguments` where it has one. The paper publishes none of the values;
the defaults are our choice, those of detection tried on small phantoms only.
"""

import hashlib
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from dataset_scripts.benchmarks.labels import TABLE, table_file
from training.settings import SettingsParser, check_values, setting

from .backbones.registry import BACKBONES
from .detection.lesion_metrics import HITS
from .metrics import METRICS

LABEL_TABLE = "label_table"  # among what is computed: the hash of its content
MODES = ("frozen", "full", "lora")
HEADS = ("linear", "attention", "mil")
LEARNING_RATES = {"full": 5e-5, "lora": 5e-4}  # where learning_rate is 0


@dataclass
class RunSettings:
    """What fine-tuning and detection share."""

    PROGRAM: ClassVar[str]
    REQUIRED: ClassVar[tuple[str, ...]]
    ALWAYS_SHOWN: ClassVar[tuple[str, ...]] = ("seed",)  # in the command line, also at their defaults
    PLACE_AND_SPEED: ClassVar[tuple[str, ...]] = (
        "labels", "data_dir", "output_dir", "cache_dir", "dataloader_num_workers", "gradient_checkpointing",
        "baselines", "external",
    )  # fmt: skip

    labels: str = setting("", "Own images: a label table, as docs/finetuning.md describes it. Or:")
    dataset: str = setting("", "A benchmark of dataset_scripts.benchmarks, such as vindr_mammo or phantom.")
    data_dir: str = setting("", "Its folder as downloaded.")
    output_dir: str = setting("", "Where result.json, predictions.parquet and the model go.")
    seed: int = setting(0, "Seed of splits, initial weights, order, augmentation and bootstrap.", low=0)
    validation_fraction: float = setting(0.15, "Training patients held out, where there is no such split.", 0.01, 0.5)
    test_fraction: float = setting(0.2, "Patients tested, where the data set has no official test.", 0.01, 0.9)
    allow_missing: bool = setting(False, "Images whose file is not there are left out and counted.")
    slices_per_volume: int = setting(4, "Evenly spaced slices of a volume, each with its label; 0: all.", low=0)
    num_train_epochs: int = setting(30, "Epochs at most.", low=1)
    per_device_train_batch_size: int = setting(16, "Images a forward.", low=1)
    per_device_eval_batch_size: int = setting(32, "Images a forward that learns nothing.", low=1)
    gradient_accumulation_steps: int = setting(1, "Forwards a step.", low=1)
    learning_rate: float = setting(0.0, "Peak; 0: 5e-5 for full, 5e-4 for lora.", low=0)
    weight_decay: float = setting(0.05, "AdamW's, of matrices.", low=0)
    warmup_fraction: float = setting(0.1, "Share of the steps in which the learning rate rises.", low=0, high=0.9)
    max_grad_norm: float = setting(1.0, "Clipping of the gradient.", low=0)
    layerwise_decay: float = setting(
        1.0, "Each layer of the encoder has the learning rate of the one above times this.", low=0.01, high=1
    )
    drop_path_rate: float = setting(0.0, "Stochastic depth of the encoder in training.", low=0, high=0.9)
    gradient_checkpointing: bool = setting(
        False, "The encoder's blocks are computed again in the backward, which saves memory."
    )
    augment: bool = setting(True, "Training images are flipped, turned, scaled and shifted at random.")
    bf16: bool = setting(False, "bfloat16 autocast.")
    dataloader_num_workers: int = setting(4, "Processes that read and render; 0: this one.", low=0)
    num_resamples: int = setting(1000, "Bootstrap resamples of the test patients.", low=1)

    def __post_init__(self) -> None:
        check_values(self)
        if self.labels:  # short for the data set `table`
            if self.dataset not in ("", TABLE) or self.data_dir not in ("", self.labels):
                raise ValueError(f"labels={self.labels}: give either labels, or dataset and data_dir")
            self.dataset, self.data_dir = TABLE, self.labels
        for name in ("dataset", "data_dir", *self.REQUIRED):
            if not getattr(self, name):
                other = ", or --labels TABLE.csv" if name in ("dataset", "data_dir") else ""
                raise ValueError(f"{name}: must be given, as --{name} ...{other}")

    def what_is_computed(self) -> dict[str, Any]:
        """Return what a result depends on, a label table's content among it; other fields say where and how fast."""
        computed = {name: value for name, value in asdict(self).items() if name not in self.PLACE_AND_SPEED}
        if self.dataset == TABLE and Path(self.data_dir).exists():
            computed[LABEL_TABLE] = hashlib.sha256(table_file(Path(self.data_dir)).read_bytes()).hexdigest()[:12]
        return computed

    def command(self) -> str:
        """Return the command line that repeats the run."""
        chosen = [f.name for f in fields(self) if getattr(self, f.name) != f.default or f.name in self.ALWAYS_SHOWN]
        chosen = [name for name in chosen if not (self.labels and name in ("dataset", "data_dir"))]
        arguments = [f"--{name} {shlex.quote(str(getattr(self, name)))}" for name in chosen]
        return " ".join([f"python -m training.{self.PROGRAM}", *arguments])

    @classmethod
    def parse(cls, arguments: list[str]) -> Self:
        """Read `--name value ...`. Raises ValueError naming the field and what it may be."""
        required = " ".join(f"--{name} {name.upper()}" for name in ("labels", *cls.REQUIRED))
        usage = f"python -m training.{cls.PROGRAM} {required} [--name value ...]"
        parser = SettingsParser(cls, prog=cls.PROGRAM, usage=usage)  # type: ignore[arg-type]
        return parser.parse_args_into_dataclasses(args=arguments)[0]


@dataclass
class FinetuneSettings(RunSettings):
    """The settings of `python -m training.finetune`."""

    PROGRAM: ClassVar[str] = "finetune"
    REQUIRED: ClassVar[tuple[str, ...]] = ("task", "output_dir")
    ALWAYS_SHOWN: ClassVar[tuple[str, ...]] = ("backbone", "mode", "seed")

    task: str = setting("", "What is predicted: a column of the label table, or cancer, lesion, birads, ...")
    definition: str = setting("", "What counts as positive, where the data set defines it in several ways.")
    classes: str = setting(
        "", "Names of the classes with commas between, the worst last; images of others are left out."
    )
    backbone: str = setting("mammodino", "Kind of encoder.", choices=tuple(BACKBONES))
    source: str = setting("", "Its folder, file or Hub id; empty: the kind's published weights.")
    mode: str = setting(
        "frozen", "frozen: linear probe on cached features; full: all weights learn; lora: low-rank.", choices=MODES
    )
    head: str = setting(
        "linear",
        "linear: of slices, an image is their mean; frozen encoders also have attention: over the slices of an image, "
        "and mil: whole view beside tissue tiles, the largest view gives breast and patient.",
        choices=HEADS,
    )
    canvas_height: int = setting(2048, "Of mil: side in pixels of the square that the breast is fitted into.", low=1)
    tile_size: int = setting(518, "Of mil: side of a tile in pixels of it.", low=1)
    tile_overlap: float = setting(0.25, "Of mil: share of its side that a tile shares with the next.", 0, 0.9)
    min_tissue: float = setting(0.05, "Of mil: share of breast under which a tile is left out.", 0, 1)
    last_layers: int = setting(
        1, "Frozen: the class tokens of so many last layers side by side, beside the mean of the patch tokens.", low=1
    )
    cache_dir: str = setting("", "Features of frozen encoders, shared by runs that name it; empty: in output_dir.")
    class_imbalance: str = setting(
        "class_weights",
        "Classes weigh the same in the loss, or in the drawing of images (frozen: in the loss), or as they are.",
        choices=("class_weights", "sampler", "none"),
    )
    metric_for_best_model: str = setting("auc", "Of the validation part: stops, and chooses.", choices=tuple(METRICS))
    early_stopping_patience: int = setting(5, "Epochs without a better validation score, then it ends.", low=1)
    lora_rank: int = setting(8, "Rank of the adapters.", low=1)
    lora_alpha: int = setting(16, "Their scale, over the rank.", low=1)
    lora_dropout: float = setting(0.0, "Dropout before them.", low=0, high=0.9)
    baselines: bool = setting(
        True, "Untrained and hand-crafted features in the trust sheet: read all images twice more."
    )
    external: str = setting(
        "",
        "Other data that the run is then tried on as it is: a label table, or DATASET=FOLDER; commas between several.",
    )
    save_model: bool = setting(True, "Keep the model in output_dir/model, for training.predict.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source and BACKBONES[self.backbone].hub_id is None and self.backbone != "untrained":
            raise ValueError(f"source: backbone {self.backbone} has no published weights; give --source FOLDER")
        if self.head != "linear" and self.mode != "frozen":
            raise ValueError(f"head={self.head}: learns on the features of a frozen encoder; give --mode frozen")
        if self.last_layers > 1 and self.mode != "frozen":
            raise ValueError(f"last_layers={self.last_layers}: are read of a frozen encoder; give --mode frozen")
        for name, off in (("layerwise_decay", 1), ("drop_path_rate", 0), ("gradient_checkpointing", False)):
            if (value := getattr(self, name)) != off and self.mode == "frozen":
                raise ValueError(f"{name}={value}: of a frozen encoder nothing is trained; give --mode full or lora")
            if value != off and not BACKBONES[self.backbone].is_transformer:
                raise ValueError(f"{name}={value}: backbone {self.backbone} is no transformer")


@dataclass
class DetectionSettings(RunSettings):
    """The settings of `python -m training.detect`."""

    PROGRAM: ClassVar[str] = "detect"
    REQUIRED: ClassVar[tuple[str, ...]] = ("encoder", "output_dir")

    encoder: str = setting("", "MammoDINO encoder under the detector, with its image processor: a folder or Hub id.")
    init: str = setting(
        "encoder",
        "Weights that the encoder starts from: its own, or random, for comparison.",
        choices=("encoder", "random"),
    )
    image_height: int = setting(0, "Canvas height in pixels; 0: the encoder's.", low=0)
    image_width: int = setting(0, "Canvas width in pixels; 0: the encoder's.", low=0)
    slices_per_volume: int = setting(4, "Evenly spaced slices learned of a volume without lesion.", low=1)
    lesion_slice_reach: int = setting(1, "Slices before and after a lesion's, in which its box is learned, too.", low=0)
    test_slices_per_volume: int = setting(0, "Evenly spaced slices tested of a volume; 0: all.", low=0)
    freeze_encoder: bool = setting(False, "The encoder's weights stay.")
    spatial_prior: bool = setting(True, "A small convolutional stem beside the encoder sees fine detail.")
    map_width: int = setting(256, "Channels of the detector, a multiple of 32.", low=32)
    decoder_layers: int = setting(3, "Decoder layers.", low=1)
    num_queries: int = setting(30, "Boxes predicted in an image.", low=1)
    cell_loss_weight: float = setting(20.0, "Weight of the loss of each cell of the map, in a lesion or not.", low=0)
    lesion_share: float = setting(0.5, "Share of training images with a lesion; 0: as they come.", 0, 0.99)
    num_train_epochs: int = setting(30, "Epochs; 0: the detector is evaluated untrained.", low=0)
    learning_rate: float = setting(5e-4, "Peak learning rate.", low=0)
    encoder_learning_rate: float = setting(1e-4, "Of the encoder.", low=0)
    weight_decay: float = setting(1e-4, "AdamW's, of matrices.", low=0)
    warmup_fraction: float = setting(0.05, "Share of the steps in which learning rates rise.", low=0, high=0.9)
    hit: str = setting(
        "center",
        "When a box hits a lesion in FROC: its center lies in the lesion's box; their IoU is hit_iou or more; or the "
        "rule of the DBTex challenge.",
        choices=tuple(HITS),
    )
    hit_iou: float = setting(0.2, "Intersection over union of a hit, with --hit iou.", low=0.01, high=1)
    merge_iou: float = setting(0.3, "A box is dropped where a better one overlaps it by more, in 3-D.", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.map_width % 32:
            raise ValueError(f"map_width={self.map_width}: must be a multiple of 32")
