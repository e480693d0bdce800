"""The settings of one fine-tuning run: typed, from the command line or Python, checked before any work.

Fields carry the names of `transformers.TrainingArguments` where it has one. The paper publishes none of the values;
the defaults are our choice.
"""

import shlex
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import HfArgumentParser

from dataset_scripts.benchmarks.index import TASKS
from training.evaluation.backbones.registry import BACKBONES
from training.evaluation.metrics import METRICS
from training.settings import check_values, setting

MODES = ("frozen", "full", "lora")
LEARNING_RATES = {"full": 5e-5, "lora": 5e-4}  # where learning_rate is 0


@dataclass
class FinetuneSettings:
    dataset: str = setting("", "A benchmark of dataset_scripts.benchmarks, such as vindr_mammo or phantom.")
    data_dir: str = setting("", "Its folder as downloaded; of one's own table the table.")
    task: str = setting("", "What is predicted.", choices=TASKS)
    definition: str = setting("", "What counts as positive, where the data set defines it in several ways.")
    backbone: str = setting("mammodino", "Kind of encoder.", choices=tuple(BACKBONES))
    source: str = setting("", "Its folder, file or Hub id; empty: the kind's published weights.")
    mode: str = setting(
        "frozen", "frozen: linear probe on cached features; full: all weights learn; lora: low-rank.", choices=MODES
    )
    output_dir: str = setting("", "Where result.json, predictions.parquet and the model go.")
    cache_dir: str = setting("", "Features of frozen encoders, shared by runs that name it; empty: in output_dir.")
    seed: int = setting(0, "Seed of splits, heads, order, augmentation and bootstrap.", low=0)
    validation_fraction: float = setting(0.15, "Training patients held out for early stopping.", low=0.01, high=0.5)
    test_fraction: float = setting(0.2, "Patients tested, where the data set has no official test.", low=0.01, high=0.9)
    allow_missing: bool = setting(False, "Images whose file is not there are left out and counted.")
    slices_per_volume: int = setting(4, "Evenly spaced slices of a volume, each with its label; 0: all.", low=0)
    class_imbalance: str = setting(
        "class_weights",
        "Classes weigh the same in the loss, or in the drawing of images (frozen: in the loss), or as they are.",
        choices=("class_weights", "sampler", "none"),
    )
    metric_for_best_model: str = setting("auc", "Of the validation part: stops, and chooses.", choices=tuple(METRICS))
    early_stopping_patience: int = setting(5, "Epochs without a better validation score, then it ends.", low=1)
    num_train_epochs: int = setting(30, "Epochs at most.", low=1)
    per_device_train_batch_size: int = setting(16, "Images a forward.", low=1)
    per_device_eval_batch_size: int = setting(32, "Images a forward that learns nothing.", low=1)
    gradient_accumulation_steps: int = setting(1, "Forwards a step.", low=1)
    learning_rate: float = setting(0.0, "Peak; 0: 5e-5 for full, 5e-4 for lora.", low=0)
    weight_decay: float = setting(0.05, "AdamW's, of matrices.", low=0)
    warmup_fraction: float = setting(0.1, "Share of the steps in which the learning rate rises.", low=0, high=0.9)
    max_grad_norm: float = setting(1.0, "Clipping of the gradient.", low=0)
    augment: bool = setting(True, "Training images are flipped, turned, scaled and shifted at random.")
    lora_rank: int = setting(8, "Rank of the adapters.", low=1)
    lora_alpha: int = setting(16, "Their scale, over the rank.", low=1)
    lora_dropout: float = setting(0.0, "Dropout before them.", low=0, high=0.9)
    bf16: bool = setting(False, "bfloat16 autocast.")
    dataloader_num_workers: int = setting(4, "Processes that read and render; 0: this one.", low=0)
    num_resamples: int = setting(1000, "Bootstrap resamples of the test patients.", low=1)
    save_model: bool = setting(True, "Keep the model in output_dir/model; of a frozen encoder the head alone.")

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("dataset", "data_dir", "task", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name}: must be given, as --{name} ...")
        if not self.source and BACKBONES[self.backbone].hub_id is None and self.backbone != "untrained":
            raise ValueError(f"source: backbone {self.backbone} has no published weights; give --source FOLDER")

    def what_is_computed(self) -> dict[str, Any]:
        """The fields that a result depends on; the others say where and how fast."""
        return {name: value for name, value in asdict(self).items() if name not in WHERE_AND_HOW_FAST}

    def command(self) -> str:
        """The command line that repeats the run."""
        arguments = [f"--{f.name} {shlex.quote(str(getattr(self, f.name)))}" for f in fields(self) if _is_set(self, f)]
        return " ".join(["python -m training.finetune", *arguments])


WHERE_AND_HOW_FAST = {"data_dir", "output_dir", "cache_dir", "dataloader_num_workers"}


def _is_set(settings: FinetuneSettings, field: Any) -> bool:
    return getattr(settings, field.name) != field.default or field.name in ("backbone", "mode", "seed")


def parse_settings(arguments: list[str]) -> FinetuneSettings:
    """From `--name value ...`. Raises ValueError naming the field and what it may be."""
    usage = "python -m training.finetune --dataset NAME --data_dir DIR --task TASK --output_dir DIR [--name value ...]"
    parser = HfArgumentParser(FinetuneSettings, prog="finetune", usage=usage)
    return parser.parse_args_into_dataclasses(args=arguments)[0]
