"""The command `mammodino env`: versions and devices for a report; nothing of the user's paths, names or settings."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__
from .command import shipped_model

# what results, reading of files and the Hub depend on
PACKAGES = (
    *(
        "torch",
        "transformers",
        "huggingface-hub",
        "safetensors",
        "numpy",
        "pillow",
        "pydicom",
        "opencv-python-headless",
    ),
    *("pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pyjpegls", "imagecodecs", "pyarrow", "pandas"),
    *("accelerate", "datasets", "datatrove", "scikit-learn", "peft", "onnxruntime"),
)


def describe_environment() -> dict[str, str]:
    """Return versions and devices by name."""
    found = {
        "mammodino": f"{__version__}, {'checkout with' if shipped_model() else 'without'} the shipped encoder",
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor cores": str(os.cpu_count()),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        cards = (torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count()))
        found["GPU"] = ", ".join(f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards)
        found["CUDA"] = str(torch.version.cuda or torch.version.hip)
    else:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        found["GPU"] = accelerator.type if accelerator else "none"
    return found


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("env", help="print versions and devices, for a report", description=__doc__)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    for name, value in describe_environment().items():
        print(f"{name}: {value}")
