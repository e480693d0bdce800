"""All data sets that can be learned and evaluated on, by name; `datasets.load_dataset` knows the names as well.

`datasets` offers no public way to add a builder: its table of packaged builders is private. Where a later version has
none, the names are not known to `load_dataset`, and `BenchmarkBuilder` serves.

Before it asks a builder, `load_dataset` lists every file of the folder, for RSNA's 54,706 some 100 s each time. Naming
one file avoids it: `data_files="train.csv"`; what is read stays the same. `BenchmarkBuilder` does not list them.
"""

import logging
from collections.abc import Iterable

import modeling_mammodino

from . import bcs_dbt, cbis_ddsm, cdd_cesm, cmmd, embed_open_data, labels, phantom, rsna, vindr_mammo
from .index import Benchmark

logger = logging.getLogger(__name__)

BUILDER = "dataset_scripts.benchmarks.builder"  # imported when it is asked for
BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (rsna, vindr_mammo, cbis_ddsm, cmmd, cdd_cesm, bcs_dbt, embed_open_data, phantom)
}


def get_benchmark(name: str) -> Benchmark:
    """Return the data set of a name; `table` is a label table. Raises ValueError listing the names."""
    known = BENCHMARKS | {labels.TABLE: labels.BENCHMARK}
    if name not in known:
        raise ValueError(f"data set {name!r}: must be one of {', '.join(known)}")
    return known[name]


def register(names: Iterable[str]) -> bool:
    """Make names known to `load_dataset`, and return whether it could be done; known ones stay what they were."""
    try:
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as known

        for name in names:
            known.setdefault(name, (BUILDER, modeling_mammodino.__version__))
    except (ImportError, AttributeError, TypeError):
        logger.info("this version of datasets cannot be given more names for load_dataset; use BenchmarkBuilder")
        return False
    return True


register([*BENCHMARKS, labels.TABLE])
