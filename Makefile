# `make demo` runs the main job, `make test` the tests. Both set up everything they need in .venv.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# More arguments for the installation of torch, e.g. an --index-url with builds for your device.
TORCH_ARGS ?=

BIN := $(VENV)/bin
# A worker that is done takes over tests that wait behind another's long one.
SHARE = -n $(WORKERS) --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-oldest quick-test check check-kernels format bench docs notebook figure clean

demo: $(VENV)/.lab
	$(BIN)/whatwhere compare text --preset quick --output runs/demo
	@echo "The report: runs/demo/report.html"

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARE)

# The models again with the oldest transformers that is supported, in an environment of its own.
OLDEST := $(VENV)-oldest
OLD_TRANSFORMERS := 5.17.0

test-oldest: $(OLDEST)/.done
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(SHARE) -m "not slow" tests/models

quick-test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARE) -m "not slow"

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The Triton kernels compiled for devices that are not here, against the record.
check-kernels: $(VENV)/.dev
	$(BIN)/python benchmarks/compile_check.py --brief --workers $(WORKERS)

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

# The documentation site, in site/. Every warning is an error: a link or an anchor that leads nowhere, a page that is
# in no menu, a docstring whose parameters are not those of its function. The variable keeps the theme from
# announcing its successor; with --quiet warnings would not be counted.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "The site: site/index.html"

# The notebook's cells anew, on the demo's models.
notebook: demo $(VENV)/.docs
	PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/python -m nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False docs/diagnose_notebook.ipynb

# The demo's figure, as README and docs show it.
figure: demo
	cp runs/demo/loss_by_length.svg runs/demo/loss_by_length.png docs/

clean:
	rm -rf $(VENV) $(OLDEST) build dist site .cache .pytest_cache .ruff_cache .mypy_cache

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

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[docs]'
	@touch $@

# Pins of what comes with transformers are those of another version.
$(OLDEST)/.done: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	grep -viE '^(transformers|tokenizers|huggingface_hub|hf-xet|httpx2|httpcore2)==' constraints.txt > $(OLDEST)/pins.txt
	echo transformers==$(OLD_TRANSFORMERS) >> $(OLDEST)/pins.txt
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet -c $(OLDEST)/pins.txt $(TORCH_ARGS) torch
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet -c $(OLDEST)/pins.txt \
		--editable '.[models]' accelerate peft pytest pytest-xdist
	@touch $@
