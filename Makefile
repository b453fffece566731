.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
unexport MPLBACKEND  # kernels draw into the notebook
export UV_SYSTEM_CERTS ?= true

help:  ## what can be made
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "venv is missing (on Debian: apt-get install python3-venv)"; exit 1; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

setup: $(STAMP)  ## the environment only (.venv)

run: $(STAMP)  ## every notebook headless, then the headline table
	@$(BIN)/cfol-nb run

test: $(STAMP)  ## ruff, pytest, nbval; trained runs go to a folder of their own (TEST_RUNS: one that is kept)
	@$(BIN)/ruff check .
	@set -e; runs=$${TEST_RUNS:-$$(mktemp -d)}; trap '[ "$$TEST_RUNS" ] || rm -rf "$$runs"' EXIT; export CFOL_NB_RUNS="$$runs"; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal; \
	$(BIN)/python -m pytest --nbval --nbval-current-env notebooks

lab: $(STAMP)  ## JupyterLab
	@$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --KernelManager.transport_encryption=auto notebooks

report: $(STAMP)  ## the executed notebooks as a small site in site/
	@$(BIN)/cfol-nb report

docs: $(STAMP)  ## the documentation as a site in site/docs (needs the extra `docs`)
	@$(BIN)/python -c 'import material, mkdocstrings_handlers.python' 2>/dev/null || { echo "the site needs the extra docs: $(BIN)/uv pip install --python $(BIN)/python -e .[docs]"; exit 1; }
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q && echo "site/docs/index.html"

bench: $(STAMP)  ## speed as ratios in one run, and how often intervals hold, kept in results/
	@for b in sampler step autoattack notebooks coverage; do $(BIN)/python benchmarks/$$b.py || exit 1; done

store: $(STAMP)  ## renew the stored runs in notebooks/
	@$(BIN)/cfol-nb run --store

.PHONY: help setup run test lab report docs bench store
