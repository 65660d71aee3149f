# Paredown: make demo, make test, make lint, make bench, make docs.
#
# Everything runs in ./.venv, which the first target that needs it builds. The packages come from pip's own settings;
# on Linux with plain PyPI, spare yourself several GB of CUDA libraries by naming PyTorch's index of CPU builds:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help install demo test lint fix bench docs clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Torch goes first and alone: asked for by another package, a newer build could come instead of the pinned one.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11; name a newer one with make PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time)" >&2
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) --editable '.[dev]'
	@touch $@

install: $(STAMP)

demo: $(STAMP) ## Take half the experts out of a trained mixture-of-experts model, with proof and report
	$(BIN)/paredown run testbed:moe --method dern --keep 0.5 --out demo-output --force
	@echo
	@echo "The smaller model is in demo-output; open demo-output/paredown/report.html in a browser."

test: $(STAMP) ## Run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP) ## Check style, types and that the generated pages are current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/build_docs.py --check

fix: $(STAMP) ## Mend what can be mended without thought
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure again what benchmarks/results holds
	$(BIN)/python -m benchmarks.run all

docs: $(STAMP) ## Write the README's catalogue, docs/methods and docs/cli.md from the code
	$(BIN)/python tools/build_docs.py

clean: ## Remove what was built here, the environment included
	rm -rf $(VENV) demo-output build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
