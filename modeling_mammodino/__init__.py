"""MammoDINO: a vision foundation model for mammography and tomosynthesis. For research use only.

Importing the package registers its classes with transformers' Auto classes.
"""

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

# from its module: the top-level name is a dummy on transformers 5.17 without torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from .configuration_mammodino import MammoDinoConfig
from .image_io import InvalidImageError
from .image_processing_mammodino import MammoDinoImageProcessor
from .modeling_mammodino import MammoDinoBackbone, MammoDinoForImageClassification, MammoDinoModel, pool_tokens

__version__ = "0.1.0"

AutoConfig.register("mammodino", MammoDinoConfig, exist_ok=True)
AutoModel.register(MammoDinoConfig, MammoDinoModel, exist_ok=True)
AutoBackbone.register(MammoDinoConfig, MammoDinoBackbone, exist_ok=True)
AutoModelForImageClassification.register(MammoDinoConfig, MammoDinoForImageClassification, exist_ok=True)
AutoImageProcessor.register(MammoDinoConfig, image_processor_classes={"pil": MammoDinoImageProcessor}, exist_ok=True)
# a pipeline looks for a video processor, too, and asks about remote code unless it is known that there is none
VIDEO_PROCESSOR_MAPPING.register(MammoDinoConfig, {}, exist_ok=True)  # type: ignore[arg-type]

# save_pretrained then copies the source beside the weights, so that the folder opens where this package is missing
MammoDinoConfig.register_for_auto_class()
MammoDinoModel.register_for_auto_class("AutoModel")
MammoDinoBackbone.register_for_auto_class("AutoBackbone")
MammoDinoForImageClassification.register_for_auto_class("AutoModelForImageClassification")
MammoDinoImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = [
    "InvalidImageError",
    "MammoDinoBackbone",
    "MammoDinoConfig",
    "MammoDinoForImageClassification",
    "MammoDinoImageProcessor",
    "MammoDinoModel",
    "pool_tokens",
]
