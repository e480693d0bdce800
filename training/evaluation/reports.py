"""What every report shares: Markdown tables and intervals as text."""

import math
from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return a Markdown table as lines, a heading first. A `|` in a cell becomes `/`, which cannot end the cell."""
    lines = [list(columns), *rows]
    cells = [[str(cell).replace("|", "/") for cell in line] for line in lines]
    head, *body = ("| " + " | ".join(line) + " |" for line in cells)
    return [head, "|---" * len(columns) + "|", *body]


def format_interval(interval: Sequence[float | None], signed: bool = False) -> str:
    """Return `value [low, high]` to three digits; with `signed`, as a difference is written. An undefined number, None
    in JSON and NaN elsewhere, is a dash."""
    sign = "+" if signed else ""
    value, low, high = ("-" if number is None or math.isnan(number) else f"{number:{sign}.3f}" for number in interval)
    return f"{value} [{low}, {high}]"


def excludes_zero(interval: Sequence[float]) -> bool:
    """Tell whether an interval (value, low, high) of a difference lies on one side of zero."""
    return interval[1] > 0 or interval[2] < 0
