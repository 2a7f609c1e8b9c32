# Everything a newcomer needs. `make help` lists the targets.
SHELL := /bin/sh
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# The torch release Dibit is tested with; TORCH="torch==X" chooses another one.
TORCH ?= torch==2.13.0
# Further processes for the tests; those that start Ray clusters stay in one of them. 0: all tests in one process.
JOBS ?= 0
BIN := $(VENV)/bin
# Ray reports anonymous usage to its makers unless told otherwise; opting in is the user's choice.
export RAY_USAGE_STATS_ENABLED ?= 0
# Ray runs workers at niceness 15; an engine on the CPU would then wait for whatever else the machine does.
export RAY_worker_niceness ?= 0

.PHONY: help install serve chat test check format bench clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed  ## Create .venv and install Dibit with everything needed to serve, test and develop

# One stamp file stands for a finished installation; a changed pyproject.toml or torch release makes it again.
$(VENV)/installed: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Dibit needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}. Try: make install PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { echo "Could not create $(VENV). On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[serve,dev]"
	@touch $@

serve: install  ## Install, then serve the example model on http://127.0.0.1:8000 (Ctrl-C stops it)
	$(BIN)/serve run serve_config.yaml

chat: install  ## Talk to a running server
	$(BIN)/dibit chat

test: install check  ## Install, then run the linters and all tests
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadscope

check: install  ## Lint, type-check, and hold the borders between the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## Measure serving on this machine; results land in benchmarks/results/
	$(BIN)/python -m benchmarks.overhead

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
