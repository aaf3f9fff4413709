# Each target does its own set-up; `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CONFIG ?= configs/quickstart.yaml

.DEFAULT_GOAL := help
.PHONY: help install train test test-full check format bench tensorboard clean

help:  ## List these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

install: $(INSTALLED)  ## Create .venv with everything pinned (the other targets do this by themselves)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sparsek-dist needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: $(INSTALLED)  ## Train a small SPARSEK language model on this machine: CONFIG=configs/quickstart.yaml ARGS='train.steps=200'
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/local.sh $(CONFIG) $(ARGS)

test: $(INSTALLED)  ## Run the test suite (CPU, no network; some 18 minutes on 2 cores)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu and not slow' $(ARGS)

test-full: $(INSTALLED)  ## Run the test suite with the slow tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu' $(ARGS)

check: $(INSTALLED)  ## Lint, types, import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)  ## Format the code and mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## Time SPARSEK attention against dense attention on this machine
	$(BIN)/python benchmarks/attention_cpu.py $(ARGS)

tensorboard: $(INSTALLED)  ## Watch all runs at http://127.0.0.1:6006
	$(BIN)/tensorboard --logdir runs --host 127.0.0.1

clean:  ## Remove caches (runs/ stays)
	rm -rf .cache .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
