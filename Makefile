# Needs make and Python >= 3.11, nothing else: the first target that needs it creates .venv and installs into it.

PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed
TORCH := $(shell grep '^torch==' constraints.txt)

# `make` gives each pytest worker one thread: two workers with two threads each are slower on two cores.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$(PY)" -m pytest -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format bench wheel clean install check-python FORCE

help:  ## Show this help
	@echo "usage: make TARGET [VARIABLE=value ...]"
	@echo
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */\1|/' | awk -F'|' '{ printf "  %-10s %s\n", $$1, $$2 }'
	@echo
	@echo "Variables:"
	@echo "  PYTHON     the Python (>= 3.11) that .venv is made with; default python3"
	@echo "  ARGS       further arguments: make test ARGS='-k cache', make demo ARGS=--help"
	@echo "  DATA SRC TGT TEST OUT"
	@echo "             the demo on real text, from the files {train,val,TEST}.{SRC,TGT}[.gz] of the folder DATA, into"
	@echo "             the folder OUT: make demo DATA=folder SRC=en TGT=de TEST=test_2016_flickr"

demo: $(STAMP)  ## Train, score, translate, save and reload a small model (DATA= for real text)
	"$(PY)" -m sparseq demo \
	  $(if $(DATA),--data "$(DATA)") $(if $(SRC),--source "$(SRC)") $(if $(TGT),--target "$(TGT)") \
	  $(if $(TEST),--test "$(TEST)") $(if $(OUT),--output "$(OUT)") $(ARGS)

test: $(STAMP)  ## Run the tests that are not marked slow
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP)  ## Run all tests
	$(PYTEST) $(ARGS)

lint: $(STAMP)  ## Check style (ruff) and types (mypy)
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m mypy sparseq benchmarks $(wildcard scripts)

format: $(STAMP)  ## Format the code and mend what ruff can mend
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .

bench: $(STAMP)  ## Measure the import time against transformers' MarianMTModel
	"$(PY)" benchmarks/import_time.py $(ARGS)

wheel: $(STAMP)  ## Build the source distribution and the wheel into dist/
	"$(PY)" -m build --no-isolation

clean:  ## Remove builds and caches (.venv and outputs stay)
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find sparseq scripts benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

install: $(STAMP)  ## Create .venv and install everything (the other targets do this by themselves)

# The stamp holds the folder it was made in: a moved or copied clone installs again, since paths are baked into .venv.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

# torch goes first and alone, by its exact pin, so that no other package's wish can bring in a different build.
$(STAMP): pyproject.toml constraints.txt | check-python
	@test -d .venv || { echo "Creating .venv with $(PYTHON) ..."; \
	  "$(PYTHON)" -m venv .venv || { rm -rf .venv; echo "make: '$(PYTHON) -m venv .venv' failed; see above" >&2; exit 1; }; }
	@echo "Installing Sparseq and what it needs into .venv (torch first: a large download the first time) ..."
	@{ "$(PY)" -m pip install "$(TORCH)" && "$(PY)" -m pip install -c constraints.txt -e ".[all,dev]"; } || { \
	  echo "make: the installation failed; see above." >&2; \
	  echo "make: it needs the Python package index, and a Python that $(TORCH) is published for; .venv has" >&2; \
	  "$(PY)" --version >&2; exit 1; }
	@printf '%s\n' "$(CURDIR)" > $(STAMP)

# Runs before every target that needs .venv, and says what is missing before anything is downloaded.
check-python:
	@if test -e .venv; then \
	  "$(PY)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && "$(PY)" -c 'import pip' >/dev/null 2>&1 || { \
	    echo "make: .venv is broken: its Python does not start, is older than 3.11, or has no pip." >&2; \
	    echo "make: remove it and try again: rm -rf .venv" >&2; exit 1; }; \
	else \
	  command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	    echo "make: no Python found as '$(PYTHON)'. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: Sparseq needs Python 3.11 or newer, but '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1)." >&2; \
	    echo "make: name a newer one: make PYTHON=python3.12" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: '$(PYTHON)' lacks the modules venv and ensurepip, which create .venv." >&2; \
	    echo "make: on Debian and Ubuntu: apt install python3-venv; elsewhere install a full Python, or set PYTHON=" >&2; exit 1; }; \
	fi

FORCE:
