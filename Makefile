# Everything a newcomer needs: `make demo` and `make test` create what is missing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export FLWR_TELEMETRY_ENABLED ?= 0
export FLWR_DISABLE_UPDATE_CHECK ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow test-hosts lint bench install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/shoal run experiment=quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not hosts" -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not hosts" -n 2 --dist loadfile

test-hosts: $(STAMP)
	$(BIN)/python -m pytest -m hosts -rs tests/hosts

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks.cohort
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.grid
	$(BIN)/python -m benchmarks.lowrank
	$(BIN)/python -m benchmarks.private
	$(BIN)/python -m benchmarks.secagg
	$(BIN)/python -m benchmarks.asynchronous
	$(BIN)/python -m benchmarks.gradient_coding
	$(BIN)/python -m benchmarks.robust
	$(BIN)/python -m benchmarks.engines
	$(BIN)/shoal sweep experiment=private_lowrank_comparison

clean:
	rm -rf $(VENV) build dist *.egg-info outputs
