# Every habit of this project; `make` alone lists them.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup run test test-slow test-all test-latest coverage lint types format check docs docs-check fuzz mutants shots bench build clean

help:  ## List these habits
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo '  ARGS="…" is passed on:  make run ARGS="show model=mistral7b method=qlora4 hw=h100x3"'
	@echo '  PYTHON=… names one of Python 3.11 to 3.13 for the first install:  make run PYTHON=python3.12'
	@echo '  TORCH_INDEX=… is where PyTorch comes from, if not chosen by what is here:  make run TORCH_INDEX=https://download.pytorch.org/whl/cu126'

setup: $(VENV)/.dev  ## Install everything for development into .venv

run: $(VENV)/.run  ## Fine-tune the demo model here; installs what that needs first
	@$(BIN)/python -m runner $(ARGS)

PYTEST := -m pytest -n logical --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev  ## Run the fast tests, a worker per core: about ten minutes on two cores
	@$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev  ## Run the slow tests: longer trainings, sweeps, whole pods
	@$(BIN)/python $(PYTEST) -m slow $(ARGS)

test-all: test test-slow  ## Run every test

test-latest:  ## Run the fast tests with the newest versions that pyproject.toml allows, in .venv-latest
	@LATEST=1 $(MAKE) --no-print-directory VENV=.venv-latest test

coverage: $(VENV)/.dev  ## Measure which lines the fast tests reach, worker processes included; ARGS=--slow: all tests
	@$(BIN)/python -m benchmarks coverage $(ARGS)

lint: $(VENV)/.dev  ## Check style and layout
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## Check types, strictly
	@$(BIN)/mypy

format: $(VENV)/.dev  ## Lay the code out and repair what can be repaired
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

check: lint types test-all docs-check  ## All that CI checks

docs: $(VENV)/.dev  ## Write the generated pages of docs/
	@$(BIN)/python -m docs.generate

docs-check: $(VENV)/.dev
	@$(BIN)/python -m docs.generate --check

fuzz: $(VENV)/.dev  ## Feed mutated documents to all that reads others' files, for FUZZ_SECONDS each (60)
	@FUZZ_SECONDS=$${FUZZ_SECONDS:-60} FUZZ_SEED=$${FUZZ_SEED:-$$(date +%s)} FUZZ_INPUTS=$${FUZZ_INPUTS:-1000000000} $(BIN)/python -m pytest -q tests/fuzz $(ARGS)

mutants: $(VENV)/.dev  ## Change the code that guards money and work, and see which changes the tests notice
	@$(BIN)/python -m benchmarks mutants $(ARGS)

shots: $(VENV)/.dev  ## Take pictures of every room of the web page into build/shots/
	@$(BIN)/python -m tests.ui.shots

bench: $(VENV)/.dev  ## Measure what the README claims
	@$(BIN)/python -m benchmarks $(ARGS)

build: $(VENV)/.dev  ## Build the wheel into dist/
	@$(BIN)/python -m build --wheel --no-isolation

clean:  ## Delete what can be made again, but neither .venv nor runs/
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python .ci/install.py train,demo
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@$(BIN)/python .ci/install.py train,demo,cloud,emulator,ui,eval,dev
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
		echo "Python 3.11 to 3.13 is needed; '$(PYTHON)' is $$( ($(PYTHON) --version) 2>/dev/null || echo 'not there')." >&2; \
		echo 'Name another one: make run PYTHON=python3.12. uv (https://docs.astral.sh/uv) brings one:' >&2; \
		echo '  uv python install 3.12 && make run PYTHON=$$(uv python find 3.12)' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
