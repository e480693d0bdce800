"""Every data set that can be learned and judged on, by name; `datasets.load_dataset` knows the names, too."""

from . import bcs_dbt_index, cbis_ddsm, cdd_cesm, cmmd, own_table, phantom_index, rsna, vindr_mammo
from .benchmark_index import Benchmark
from .benchmark_names import register

_MODULES = (rsna, vindr_mammo, cbis_ddsm, cmmd, cdd_cesm, bcs_dbt_index, phantom_index)
BENCHMARKS: dict[str, Benchmark] = {module.BENCHMARK.name: module.BENCHMARK for module in _MODULES}


def get_benchmark(name: str) -> Benchmark:
    """The data set of a name; `table` is a table of one's own (`own_table`). Raises ValueError listing the names."""
    known = BENCHMARKS | {own_table.BENCHMARK.name: own_table.BENCHMARK}
    if name not in known:
        raise ValueError(f"data set {name!r}: must be one of {', '.join(known)}")
    return known[name]


register([*BENCHMARKS, own_table.BENCHMARK.name])
