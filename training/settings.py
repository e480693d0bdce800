"""Typed settings, and random numbers that depend on a seed and a counter alone.

Settings are dataclasses whose fields say what they mean and may be, for HfArgumentParser and for YAML.
"""

from dataclasses import field, fields
from typing import Any

import numpy as np
from transformers import HfArgumentParser

from modeling_mammodino.tools.command import CommandParser, user_model, user_path

MODELS = ("source", "encoder", "init_from")  # settings that name a checkpoint


class SettingsParser(CommandParser, HfArgumentParser):
    """The options that dataclasses of settings are. Raises ValueError for what it cannot take."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


class Range:
    """The numbers from `low` to `high`, inclusive, as argparse's `choices`: checked there and in YAML by `in`."""

    def __init__(self, low: float, high: float | None):
        self.low, self.high = low, high

    def __contains__(self, number: float) -> bool:
        return number >= self.low and (self.high is None or number <= self.high)

    def __iter__(self):  # argparse lists the choices in its help and errors
        yield self

    def __repr__(self) -> str:
        return f"{self.low} or more" if self.high is None else f"{self.low} to {self.high}"


def setting(
    default: Any, help: str, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """Return a dataclass field with its help text and the values it may take; a list is checked element by element."""
    metadata: dict[str, Any] = {"help": help}
    if choices:
        metadata["choices"] = choices
    elif low is not None:
        metadata["choices"] = Range(low, high)
    if default is None:  # bool | None, which HfArgumentParser gives no bare form: --name is --name true
        metadata |= {"nargs": "?", "const": True}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_values(section: Any) -> None:
    """Expand `~` in paths, and a run's folder to its encoder.

    Raise ValueError naming the first field whose value it may not take, and what it may be.
    """
    for each in fields(section):
        if str(getattr(section, each.name)).startswith("~"):
            setattr(section, each.name, str(user_path(getattr(section, each.name))))
        if each.name in MODELS and isinstance(getattr(section, each.name), str):
            setattr(section, each.name, user_model(getattr(section, each.name)))
        value, allowed = getattr(section, each.name), each.metadata.get("choices")
        if value is each.default is None:  # left open
            continue
        for element in value if isinstance(value, list) else [value]:
            kind = next(kind for kind in (bool, int, float, str) if kind.__name__ in str(each.type))
            if not isinstance(element, (int, float) if kind is float else kind):
                raise ValueError(f"{each.name}={value!r}: must be of type {kind.__name__}")
            if allowed and element not in allowed:
                raise ValueError(f"{each.name}={value!r}: must be {', '.join(map(str, allowed))}")


# streams of the counter-based generator, so that order, masks and views never share numbers
VIEWS_STREAM, ORDER_STREAM, MASK_STREAM, KIND_STREAM, PATIENT_STREAM, SOURCE_STREAM, CANVAS_STREAM = range(7)


def generator(seed: int, stream: int, counter: int) -> np.random.Generator:
    """Return numpy's Philox keyed by (seed, stream, counter): the same numbers in any process, worker or run."""
    return np.random.Generator(np.random.Philox(key=[seed, (stream << 56) + counter]))
