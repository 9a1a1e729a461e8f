# Everything runs from a fresh clone with nothing but python3 (3.11 or newer).
#   make quickstart   see a small model think in parallel, measure it, train one     (about 5 minutes)
#   make test         all CPU tests
#   make coverage     the tests of structure/ and inference/; fails below 95 % of lines and branches
#   make lint         formatting, types and the import rules
#   make bench        the benchmarks that run on a CPU
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
CONSTRAINTS := requirements/constraints-cpu.txt
# The tests run small tensors: one thread each is faster than many threads fighting for the cores.
export OMP_NUM_THREADS ?= 1

# Further pytest options of `make test`, and what `make coverage` measures.
TEST_ARGS ?=
COVERED := structure inference

.PHONY: quickstart test coverage lint format bench clean

# Installed again only when what is to be installed changes.
$(STAMP): setup.py $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	touch $(STAMP)

quickstart: $(STAMP)
	OMP_NUM_THREADS=2 $(BIN)/python examples/quickstart/run.py

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests $(TEST_ARGS)

# The two parts where a branch that no test takes would be a wrong answer.
coverage: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(COVERED:%=tests/unit/%) $(COVERED:%=--cov=megatron_multiverse.%) \
		--cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=95

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_preprocess.py

clean:
	rm -rf $(VENV) runs build *.egg-info
