# Everything a new machine needs: `make demo` shows the whole system, `make test` runs what CI runs.
#
# Variables:
#   PYTHON           interpreter to build the environment with (3.11 or newer)
#   VENV             where the environment goes
#   TORCH_INDEX_URL  package index to take torch from; empty means pip's own. On a machine without a GPU, naming PyTorch's
#                    CPU index here saves several GB of CUDA packages.
#   ARGS             further flags of `manyhands demo`, e.g. make demo ARGS="--keep"

PYTHON ?= python3.11
VENV ?= .venv
TORCH_INDEX_URL ?=
ARGS ?=

PROTOS := $(sort $(shell find protos -name '*.proto'))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
export PYTHONDONTWRITEBYTECODE :=
export PATH := $(abspath $(BIN)):$(PATH)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test setup setup-dev lint types proto proto-check unit benchmarks clean

demo: setup ## The whole system on this machine, with three simulated robots
	@deploy/system_packages.sh demo
	@$(BIN)/manyhands demo $(ARGS)

test: setup-dev lint types proto-check ## Everything CI runs
	@deploy/system_packages.sh test
	$(BIN)/python -m pytest

setup: $(VENV)/.demo

setup-dev: $(VENV)/.dev

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing; install Python 3.11 or name another with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and alone: its index may be another one, and which build is taken decides gigabytes.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	$(PIP) install $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) -c constraints.txt torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[robot,serve,learn,sim]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install -c constraints.txt -e '.[robot,serve,learn,sim,trace,compare,dev]'
	@touch $@

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-dev
	$(BIN)/mypy

proto: setup-dev ## Regenerates the committed stubs
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. $(PROTOS)

proto-check: setup-dev ## Lint, breaking changes against the baseline, and whether the committed stubs are those of the protos
	cd protos && ../$(BIN)/buf lint
	cd protos && ../$(BIN)/buf breaking --against baseline.binpb
	$(BIN)/python deploy/check_stubs.py

unit: setup-dev ## The fast tests alone
	$(BIN)/python -m pytest tests/unit tests/contract

benchmarks: setup-dev ## Every benchmark; results go to docs/benchmarks
	set -e; for file in tests/benchmarks/bench_*.py; do $(BIN)/python -m tests.benchmarks.$$(basename $$file .py) --write; done

clean:
	rm -rf $(VENV) build demo-output
