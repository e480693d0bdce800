"""Fixtures of the labeled data sets' tests."""

import pytest
from made_inputs import REAL_DATA


@pytest.fixture
def real(request):
    """Folder of the real metadata files of the data set that the test module is about, its BENCHMARK."""
    name = request.module.BENCHMARK.name
    if not (REAL_DATA / name).is_dir():
        pytest.skip(f"the real metadata files (shared/data/{name}) are not here")
    return REAL_DATA / name
