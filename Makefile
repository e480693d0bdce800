# Each target makes the environment that it needs. Python 3.11 or 3.12; PYTHON=python3.12 picks another.
PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
BIN := $(VENV)/bin

.PHONY: docs wheel demo benchmark-demo release space test test-fast test-oldest test-transformers lint format clean

# torch first and from the constraints, so that nothing pulls another build in
$(VENV)/ready: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# simulates a corpus, pretrains on it, compares, and leaves runs/demo/report.md
demo: $(VENV)/ready
	$(BIN)/python -m training.demo --output runs/demo

# every task and baseline on the phantom under one head: table, radar plot, detector; baselines at small random weights
benchmark-demo: $(VENV)/ready
	$(BIN)/python -m training.demo --benchmark --output runs/benchmark_demo

# the shipped encoder of a run on your data (RUN=FOLDER): model_cards/mammodino-small again, and in dist/ an archive with
# full precision and heads
release: $(VENV)/ready
	$(BIN)/python -m training.release $(RUN) model_cards/mammodino-small --archive dist/mammodino-small.tar.gz

# dist/space: the page with all that it needs, as a Hub Space takes it (space/README.md)
space:
	rm -rf dist/space
	mkdir -p dist/space/model_cards dist/space/dataset_scripts
	cp space/app.py space/README.md space/requirements.txt dist/space
	cp -r modeling_mammodino dist/space
	cp -r dataset_scripts/__init__.py dataset_scripts/phantom dist/space/dataset_scripts
	cp -rL model_cards/mammodino-small dist/space/model_cards
	find dist/space -name __pycache__ -prune -exec rm -r {} +

# two workers of one thread each: more threads than cores wait for each other; a file is one worker's, so that what its
# tests share is made once, and files stay in their order, for those with few tests, which would come last, are the longest
test test-fast test-oldest: export OMP_NUM_THREADS = 1
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/ready
	$(PYTEST) $(TESTS)

# without what starts processes or takes over five seconds: under three minutes on two cores
test-fast: $(VENV)/ready
	$(PYTEST) -m "not slow" $(TESTS)

# the oldest transformers that setup.cfg allows, and a hub client of its time, before those of the environment
OLDEST := transformers==5.17.0 huggingface_hub==1.33.0
$(VENV)-oldest/ready: $(VENV)/ready
	mkdir -p $(VENV)-oldest
	grep -viE '^(transformers|huggingface[-_]hub)==' constraints.txt > $(VENV)-oldest/constraints.txt
	$(BIN)/python -m pip install --quiet --upgrade --target $(VENV)-oldest --constraint $(VENV)-oldest/constraints.txt $(OLDEST)
	touch $@

test-oldest: $(VENV)-oldest/ready
	PYTHONPATH=$(abspath $(VENV)-oldest) $(PYTEST) $(TESTS)

# transformers' own common tests, from the source distribution of the installed version, on our classes
SUITE := $(VENV)/transformers_suite
$(SUITE)/ready: $(VENV)/ready
	mkdir -p $(SUITE)/source
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --dest $(SUITE) \
		transformers==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("transformers"))')
	tar xf $(SUITE)/transformers-*.tar.gz --directory $(SUITE)/source --strip-components 1
	touch $@

test-transformers: $(SUITE)/ready
	cp -r tests/transformers_suite/stand_ins/. $(SUITE)/source
	TRANSFORMERS_SOURCE=$(abspath $(SUITE))/source RUN_SLOW=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -o addopts="-q -rf" -W ignore tests/transformers_suite

# the site, in build/site; a broken link or reference stops it
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# what is uploaded, checked as the index checks it; the wheel is built of the source archive, so nothing old gets in
wheel: $(VENV)/ready
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/mammodino-*.whl dist/mammodino-*.tar.gz

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VENV)-oldest runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
