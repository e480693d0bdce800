"""Every data set that can be learned and judged on, by name."""

from . import own_table, phantom_index
from .benchmark_index import Benchmark

BENCHMARKS: dict[str, Benchmark] = {module.BENCHMARK.name: module.BENCHMARK for module in (phantom_index,)}


def get_benchmark(name: str) -> Benchmark:
    """The data set of a name; `table` is a table of one's own (`own_table`). Raises ValueError listing the names."""
    known = BENCHMARKS | {own_table.NAME: own_table.BENCHMARK}
    if name not in known:
        raise ValueError(f"data set {name!r}: must be one of {', '.join(known)}")
    return known[name]
