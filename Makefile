# From a fresh checkout, with only python3 (3.11 or newer) and make:  make quickstart  |  make test  |  make lint
# Another interpreter:  PYTHON=python3.12 make test

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())')
INSTALLED := $(VENV)/installed-$(VERSION)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint format clean

help:  ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  \1\t/' | expand -t 14

install: $(INSTALLED)  ## Make .venv with the package and its pinned dependencies

# The stamp carries the interpreter's version: another PYTHON makes .venv anew.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "onerec_jax needs Python 3.11 or newer, $(PYTHON) is $(VERSION); try PYTHON=python3.12 make" >&2; exit 2; }
	@ls $(VENV)/installed-* 2>/dev/null | grep -qxF $@ || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV) (Python $(VERSION)) ..." >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

quickstart: $(INSTALLED)  ## Simulate, tokenize, pretrain, evaluate and recommend on this machine
	$(BIN)/onerec run quickstart

# The eight devices of tests/mesh8 need a process of their own; it also runs where the other tests fail.
test: $(INSTALLED)  ## Run all tests, on CPU
	@status=0; export JAX_PLATFORMS=cpu; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25 tests --ignore tests/mesh8 || status=1; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations 25 tests/mesh8 || status=1; \
	exit $$status

lint: $(INSTALLED)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED)  ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv and caches; datasets/ and runs/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
