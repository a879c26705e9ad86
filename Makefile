# The two commands a user needs: `make run` and `make test`. Each sets up what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Where torch comes from. Plain PyPI gives CUDA builds on Linux; for the CPU build:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PYTEST_ARGS ?=
# Processes that run tests, each a file at a time; most of a test's time is one core's.
WORKERS ?= 2
BENCH_ARGS ?=
CHAOS_ARGS ?=
BENCHMARKS := layer classify generate overlap scale profile floor bare
# Threads that wait sleep, so that processes on few cores do not spin against each other.
export OMP_WAIT_POLICY := passive

.PHONY: run test setup check format stubs bench chaos clean

run: .venv/run
	$(BIN)/expertmesh demo models/agnews --file examples/headlines.txt --generator models/tinytext

test: .venv/dev
	$(BIN)/python -m pytest --cov --cov-report= -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
	$(BIN)/coverage report --fail-under=90

setup: .venv/dev

.venv/python:
	$(PYTHON) -m venv .venv
	touch $@

.venv/run: .venv/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev: .venv/run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code
	$(BIN)/python protos/check_fresh.py

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	cd protos && ../$(BIN)/buf format --write

stubs: .venv/dev
	protos/generate.sh $(BIN)/python

bench: $(BENCHMARKS:%=bench-%)

bench-%: .venv/dev
	$(BIN)/python -m benchmarks.$* $(BENCH_ARGS)

chaos: .venv/dev
	$(BIN)/python -m tests.chaos mixed $(CHAOS_ARGS)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
