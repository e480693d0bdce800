"""Every data set that can be learned and evaluated on, by name; `datasets.load_dataset` knows the names, too."""
# MERGED: Makes `datasets.load_dataset("vindr_mammo", "density", data_dir=...)` find the builder.
#
# `datasets` 4 and newer load no scripts, and offer no public way to add a builder. Its table of packaged builders is
# private; where a later version has none, the names are not known to `load_dataset`, and `BenchmarkBuilder` serves.
#
# Before it asks a builder, `load_dataset` lists every file of the folder, for RSNA's 54,706 some 100 s each time. Naming
# one file spares it: `data_files="train.csv"`; what is read stays the same. `BenchmarkBuilder` does not list them.
#

import logging
from collections.abc import Iterable

import modeling_mammodino
from dataset_scripts.benchmarks import bcs_dbt as bcs_dbt_index
from dataset_scripts.benchmarks import cbis_ddsm, cdd_cesm, cmmd, rsna, vindr_mammo
from dataset_scripts.benchmarks import custom_csv as custom_csv
from dataset_scripts.benchmarks import phantom as phantom_index

from .index import Benchmark

logger = logging.getLogger(__name__)

BUILDER = "dataset_scripts.benchmarks.builder"  # imported when it is asked for


def register(names: Iterable[str]) -> bool:
    """Whether `load_dataset` knows the names now; names that it knew already stay what they were."""
    try:
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as known

        for name in names:
            known.setdefault(name, (BUILDER, modeling_mammodino.__version__))
    except (ImportError, AttributeError, TypeError):
        logger.info("this version of datasets lets load_dataset know no names of ours; use BenchmarkBuilder")
        return False
    return True


_MODULES = (rsna, vindr_mammo, cbis_ddsm, cmmd, cdd_cesm, bcs_dbt_index, phantom_index)
BENCHMARKS: dict[str, Benchmark] = {module.BENCHMARK.name: module.BENCHMARK for module in _MODULES}


def get_benchmark(name: str) -> Benchmark:
    """The data set of a name; `table` is a custom CSV data set (`custom_csv`). Raises ValueError listing the names."""
    known = BENCHMARKS | {custom_csv.BENCHMARK.name: custom_csv.BENCHMARK}
    if name not in known:
        raise ValueError(f"data set {name!r}: must be one of {', '.join(known)}")
    return known[name]


register([*BENCHMARKS, custom_csv.BENCHMARK.name])
