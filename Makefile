# Every target does its own set-up: on a fresh clone `make test` or `make demo` is all there is to type.
# Settings of pip (an index, a proxy) come from its own configuration and environment variables.

PYTHON      ?= python3
DEMO_ARGS   ?=
PYTEST_ARGS ?=
FUZZ_ARGS   ?=

VENV     := .venv
BIN      := $(VENV)/bin
PIP      := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
PACKAGES := compression storage jobs
PINS     := pyproject.toml constraints.txt setup.py compression/kernels/quantize.c storage/symbol_kernel.c

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # two pips in one environment would trip over each other
.PHONY: help demo test test-all check lint format types contracts wheel clean faults crashes ray-matrix soak scale fuzz

help:
	@echo "make demo       train, prune, quantize and publish a small fleet on this machine"
	@echo "make test       run all tests but the long ones (PYTEST_ARGS='tests/storage -x')"
	@echo "make test-all   run all tests, as CI does"
	@echo "make faults     every fault of the store, one run each          (3 min)"
	@echo "make crashes    a crash at every operation of the store        (1 hour)"
	@echo "make ray-matrix workers, nodes, drivers and heads die           (6 min)"
	@echo "make soak       200 models while everything dies and throttles (13 min)"
	@echo "make fuzz       guided by coverage, everything that is parsed  (40 min; FUZZ_ARGS='uri --minutes 1')"
	@echo "make scale      100, 1,000 and 10,000 models, no-op steps       (4 min)"
	@echo "make check      lint + types + contracts"
	@echo "make format     let ruff rewrite the sources"
	@echo "make wheel      build dist/fleetpress-*.whl"
	@echo "make clean      remove everything that was made here, the environment too"

demo: $(VENV)/.demo
	$(BIN)/fleetpress demo $(DEMO_ARGS)

# Two workers, whole files to each (tests/conftest.py); PYTEST_ARGS='-n 0' is one process, for a debugger.
# Hundreds of processes load the sources: they are compiled once, whatever the shell says.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/.test
	$(BIN)/pytest -n 2 -m "not long" $(PYTEST_ARGS)

test-all: override PYTEST_ARGS += -m ""
test-all: test

# The longest proofs; make test-all runs a selection of the first two.
faults: $(VENV)/.test
	$(BIN)/python benchmarks/faults/faults.py

crashes: $(VENV)/.test
	$(BIN)/python benchmarks/crashes/crashes.py

ray-matrix: $(VENV)/.test
	$(BIN)/python benchmarks/ray_matrix/matrix.py

soak: $(VENV)/.test
	$(BIN)/python benchmarks/ray_matrix/soak.py

fuzz: $(VENV)/.test
	$(PIP) -e '.[fuzz]'
	$(BIN)/python benchmarks/fuzz/fuzz.py $(FUZZ_ARGS)

scale: $(VENV)/.test
	$(BIN)/python benchmarks/fleet/scale.py

check: lint types contracts

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.lint $(VENV)/.demo .types/fleetpress
	MYPYPATH=.types $(BIN)/mypy $(PACKAGES:%=-p fleetpress.%)

contracts: $(VENV)/.lint $(VENV)/.demo
	$(BIN)/lint-imports

# setuptools packs whatever an earlier build left in build/, so that goes first.
wheel: $(VENV)/.test
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) .types build dist *.egg-info compression/kernels/*.so storage/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Type checkers do not follow an editable install; a folder in which `fleetpress` is a link to this one serves them.
.types/fleetpress:
	mkdir -p .types
	ln -sfn .. $@

# One stamp a set of dependencies. torch comes first and alone: what follows finds it there and looks for no other build.
$(VENV)/.torch: constraints.txt
	@echo "setting up $(VENV): once, some minutes, about 2 GB"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(PINS)
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(PINS)
	$(PIP) -e '.[test]'
	@touch $(VENV)/.demo $@

$(VENV)/.lint: $(VENV)/.torch $(PINS)
	$(PIP) -e '.[lint]'
	@touch $@
