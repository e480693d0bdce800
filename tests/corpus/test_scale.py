"""What a corpus of millions of rows rests on: what planning, opening and the order of samples hold by the row, and what
they read, counted at a few thousand rows of the made-up archive of `performance.scale`."""

import gc
import pickle
import re
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from dataset_scripts.corpus import archive, build, plan, shards
from dataset_scripts.corpus.reader import FEATURES, MANIFEST, Corpus, encode_png, map_file, read_index
from modeling_mammodino import MammoDinoImageProcessor
from modeling_mammodino.tools import files as files_module
from performance.scale import MadeReader, made_header, made_walk
from training.pretraining.recipe import ViewsRecipe
from training.pretraining.views.sample import PretrainingViews

PATIENTS, ROWS_OF_A_PATIENT = (8, 24), 140
TASKS = 4


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[int, Any]:
    """Corpora of both sizes with what was counted at their making: lines parsed, and the peak of planning in bytes."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "walk", made_walk)
        patch.setattr(plan, "read_header", made_header)
        patch.setattr(shards, "VolumeReader", MadeReader)
        make_plan, parse, parsed = plan.MakePlan.__call__, files_module.json.loads, []
        peaks: list[int] = []

        def traced(*given: Any) -> None:
            tracemalloc.start()
            make_plan(*given)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

        patch.setattr(plan.MakePlan, "__call__", traced)
        patch.setattr(files_module.json, "loads", lambda *given: parsed.append(1) or parse(*given))
        for patients in PATIENTS:
            folder = tmp_path_factory.mktemp(f"of_{patients}")
            (folder / f"{patients}x45").mkdir()
            parsed.clear()
            build.build_corpus(
                [folder / f"{patients}x45"], folder / "corpus", (16, 16), MammoDinoImageProcessor(), "made", tasks=TASKS
            )
            found[patients] = folder / "corpus", len(parsed), peaks[-1]
    return found


def by_row(measure: Callable[[Path], np.ndarray], built: dict[int, Any]) -> np.ndarray:
    """What a row more costs."""
    few, many = (measure(built[patients][0]) for patients in PATIENTS)
    return (many - few) / ROWS_OF_A_PATIENT / (PATIENTS[1] - PATIENTS[0])


def held(make: Callable[[], Any]) -> np.ndarray:
    """Bytes that Python holds and blocks of memory that they are, and bytes of Arrow, after something was made."""
    make()  # imports and caches
    gc.collect()
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    made = make()
    gc.collect()
    statistics = tracemalloc.take_snapshot().statistics("filename")
    tracemalloc.stop()
    assert made is not None
    arrow = pa.total_allocated_bytes() - arrow
    return np.array([sum(each.size for each in statistics), sum(each.count for each in statistics), arrow])


def test_the_archive_is_read_a_fixed_number_of_times_and_a_plan_holds_some_hundred_bytes_a_file(built):
    """As many lines parsed by the file at either size and by any number of tasks: nothing is quadratic."""
    (_, few_lines, few_bytes), (_, many_lines, many_bytes) = (built[patients] for patients in PATIENTS)
    files = ROWS_OF_A_PATIENT * (PATIENTS[1] - PATIENTS[0])
    assert (many_lines - few_lines) / files < 6
    assert (many_bytes - few_bytes) / files < 700  # 1.4 million in 1 GB


@pytest.mark.parametrize("views_per_patient", [0, 4])
def test_no_structure_of_the_order_grows_by_python_objects_a_row(built, views_per_patient):
    """The bound on blocks leaves room for the hash of each patient."""
    recipe = ViewsRecipe(views_per_patient=views_per_patient)

    def tables(folder: Path) -> np.ndarray:
        return held(lambda: PretrainingViews(Corpus(folder), recipe, 16, seed=0, global_batch_size=8))

    size, blocks, arrow = by_row(tables, built)
    assert size < 40 and blocks < 2 / ROWS_OF_A_PATIENT and arrow < 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system which pages of a file were read")
def test_opening_reads_no_image(tmp_path):
    rng, number = np.random.default_rng(0), 48
    image = [{"bytes": encode_png(rng.integers(0, 255, (512, 512), np.uint8)), "path": None} for _ in range(number)]
    columns = {name: [None] * number for name in FEATURES} | {
        "image": image,
        "tissue": image,
        "volume_id": [str(n) for n in range(number)],
    }
    datasets.Dataset.from_dict(columns, features=FEATURES).save_to_disk(tmp_path / "corpus")
    (tmp_path / "corpus" / MANIFEST).write_text('{"image_processor": {}}')

    def resident() -> int:
        maps = Path("/proc/self/smaps").read_text()
        return sum(int(each) for each in re.findall(rf"{tmp_path}\S*\.arrow\n.*?\nRss: +(\d+) kB", maps, re.S))

    (path,) = (tmp_path / "corpus").glob("*.arrow")
    shard = map_file(path)
    assert len(read_index(shard).slice_indices) == number
    opened = resident()
    assert np.frombuffer(shard, np.uint8).sum() > 0  # reads all
    assert 0 < opened < resident() / 10
    del shard
    corpus = Corpus(tmp_path / "corpus")
    assert resident() == 0 and corpus.image(number - 1)[0].shape == (512, 512) and resident() > 0
    data = pickle.dumps(corpus)  # for a worker that is spawned: the folder, and no byte of its files
    assert len(data) < 1000 and (pickle.loads(data).image(3)[0] == corpus.image(3)[0]).all()
