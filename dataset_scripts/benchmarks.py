"""Every data set that can be learned and judged on, by name."""

from . import bcs_dbt_index, cbis_ddsm, cdd_cesm, cmmd, rsna, vindr_mammo
from .benchmark_index import Benchmark

_MODULES = (rsna, vindr_mammo, cbis_ddsm, cmmd, cdd_cesm, bcs_dbt_index)
BENCHMARKS: dict[str, Benchmark] = {module.BENCHMARK.name: module.BENCHMARK for module in _MODULES}


def get_benchmark(name: str) -> Benchmark:
    """The data set of a name. Raises ValueError listing the names."""
    if name not in BENCHMARKS:
        raise ValueError(f"data set {name!r}: must be one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
