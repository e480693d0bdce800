"""Made-up breasts and encoders for tests, and where real files lie.

Not in conftest.py: several folders have one, so that `import conftest` in a worker process may find another.
"""

import os
from pathlib import Path

import cv2
import numpy as np
import torch

from modeling_mammodino import MammoDinoConfig, MammoDinoModel

REAL_DATA = Path(os.environ.get("MAMMODINO_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
HASH_KEY = "a key of the tests, long enough"


def draw_breast(height: int = 300, width: int = 200, seed: int = 0, side: str = "left") -> np.ndarray:
    """A half-ellipse of textured tissue on air, (height, width) uint16 of 12 bits."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    breast = ((y - height / 2) / (0.42 * height)) ** 2 + (x / (0.7 * width)) ** 2 < 1
    texture = cv2.GaussianBlur(rng.normal(size=(height, width)).astype(np.float32), (0, 0), 4)
    image = np.where(breast, 1800 + 4000 * texture, 20 + 5 * rng.normal(size=(height, width)))
    image = np.clip(image, 0, 4095).astype(np.uint16)
    return image if side == "left" else np.ascontiguousarray(image[:, ::-1])


TINY_ENCODER = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 112,
    "num_register_tokens": 3,
    "layerscale_value": 1.0,
}


def random_encoder(**changes) -> MammoDinoModel:
    torch.manual_seed(0)
    model = MammoDinoModel(MammoDinoConfig(**{**TINY_ENCODER, **changes})).eval()
    for parameter in model.parameters():  # tokens and biases away from their zero initial values
        torch.nn.init.normal_(parameter, std=0.05)
    return model
