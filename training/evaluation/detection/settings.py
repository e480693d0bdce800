"""The settings of one detection run: typed, from the command line or Python, checked before any work.

Fields carry the names of `transformers.TrainingArguments` where it has one. No value is published for MammoDINO: the
defaults are our choice, tried on small phantoms only.
"""

import shlex
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import HfArgumentParser

from training.settings import check_values, setting

from .metrics import HITS


@dataclass
class DetectionSettings:
    dataset: str = setting("", "A benchmark of dataset_scripts.benchmarks with boxes, such as vindr_mammo or phantom.")
    data_dir: str = setting("", "Its folder as downloaded; of one's own table the table.")
    encoder: str = setting("", "MammoDINO encoder under the detector, with its image processor: a folder or Hub id.")
    init: str = setting(
        "encoder",
        "Weights that the encoder starts from: its own, or random, for comparison.",
        choices=("encoder", "random"),
    )
    output_dir: str = setting("", "Where result.json, predictions, images and the detector go.")
    seed: int = setting(0, "Seed of splits, initial weights, order, augmentation and bootstrap.", low=0)
    validation_fraction: float = setting(0.15, "Training patients held out, where there is no such split.", 0.01, 0.5)
    test_fraction: float = setting(0.2, "Patients tested, where the data set has no official test.", 0.01, 0.9)
    allow_missing: bool = setting(False, "Images whose file is not there are left out and counted.")
    image_height: int = setting(0, "Canvas height in pixels; 0: the encoder's.", low=0)
    image_width: int = setting(0, "Canvas width in pixels; 0: the encoder's.", low=0)
    slices_per_volume: int = setting(4, "Evenly spaced slices learned of a volume without lesion.", low=1)
    lesion_slice_reach: int = setting(1, "Slices before and after a lesion's, in which its box is learned, too.", low=0)
    test_slices_per_volume: int = setting(0, "Evenly spaced slices looked at in a volume of the test; 0: all.", low=0)
    freeze_encoder: bool = setting(False, "The encoder's weights stay.")
    spatial_prior: bool = setting(True, "A small convolutional stem beside the encoder sees fine detail.")
    map_width: int = setting(256, "Channels of the detector, a multiple of 32.", low=32)
    decoder_layers: int = setting(3, "Decoder layers.", low=1)
    num_queries: int = setting(30, "Boxes predicted in an image.", low=1)
    cell_loss_weight: float = setting(20.0, "Weight of the loss of each cell of the map, in a lesion or not.", low=0)
    lesion_share: float = setting(0.5, "Share of training images with a lesion; 0: as they come.", 0, 0.99)
    num_train_epochs: int = setting(30, "Epochs; 0: the detector is evaluated untrained.", low=0)
    per_device_train_batch_size: int = setting(16, "Images a forward.", low=1)
    per_device_eval_batch_size: int = setting(32, "Images a forward that learns nothing.", low=1)
    gradient_accumulation_steps: int = setting(1, "Forwards a step.", low=1)
    learning_rate: float = setting(5e-4, "Peak learning rate.", low=0)
    encoder_learning_rate: float = setting(1e-4, "Of the encoder.", low=0)
    weight_decay: float = setting(1e-4, "AdamW's, of matrices.", low=0)
    warmup_fraction: float = setting(0.05, "Share of the steps in which learning rates rise.", low=0, high=0.9)
    max_grad_norm: float = setting(1.0, "Clipping of the gradient.", low=0)
    augment: bool = setting(True, "Training images are flipped, scaled, shifted and given other gammas at random.")
    hit: str = setting(
        "center",
        "When a box hits a lesion in FROC: its center lies in the lesion's box; their IoU is hit_iou or more; or the "
        "rule of the DBTex challenge.",
        choices=tuple(HITS),
    )
    hit_iou: float = setting(0.2, "Intersection over union of a hit, with --hit iou.", low=0.01, high=1)
    merge_iou: float = setting(0.3, "A box goes where a better one overlaps it by more, in 3-D.", low=0, high=1)
    bf16: bool = setting(False, "bfloat16 autocast.")
    dataloader_num_workers: int = setting(4, "Processes that read and render; 0: this one.", low=0)
    num_resamples: int = setting(1000, "Bootstrap resamples of the test patients.", low=1)

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("dataset", "data_dir", "encoder", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name}: must be given, as --{name} ...")
        if self.map_width % 32:
            raise ValueError(f"map_width={self.map_width}: must be a multiple of 32")

    def what_is_computed(self) -> dict[str, Any]:
        """The fields that a result depends on; the others say where and how fast."""
        return {name: value for name, value in asdict(self).items() if name not in WHERE_AND_HOW_FAST}

    def command(self) -> str:
        """The command line that repeats the run."""
        chosen = [each for each in fields(self) if getattr(self, each.name) != each.default or each.name == "seed"]
        arguments = [f"--{each.name} {shlex.quote(str(getattr(self, each.name)))}" for each in chosen]
        return " ".join(["python -m training.detect", *arguments])


WHERE_AND_HOW_FAST = {"data_dir", "output_dir", "dataloader_num_workers"}


def parse_settings(arguments: list[str]) -> DetectionSettings:
    """From `--name value ...`. Raises ValueError naming the field and what it may be."""
    usage = (
        "python -m training.detect --dataset NAME --data_dir DIR --encoder MODEL --output_dir DIR [--name value ...]"
    )
    parser = HfArgumentParser(DetectionSettings, prog="detect", usage=usage)
    return parser.parse_args_into_dataclasses(args=arguments)[0]
