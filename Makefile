# `make demo` runs the main job, `make test` the tests. Both set up everything they need in .venv.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# More arguments for the installation of torch, e.g. an --index-url with builds for your device.
TORCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test quick-test check format bench docs clean

demo: $(VENV)/.lab
	$(BIN)/whatwhere compare text --preset quick --output runs/demo
	@echo "The report: runs/demo/report.html"

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

quick-test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

docs: demo
	cp runs/demo/loss_by_length.svg runs/demo/loss_by_length.png docs/

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache

# torch comes first and by itself, so that nothing else chooses a build of it.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "whatwhere needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_ARGS) torch
	@touch $@

$(VENV)/.lab: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[lab]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.lab
