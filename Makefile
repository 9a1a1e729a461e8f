# Everything runs from a fresh clone with nothing but python3 (3.11 or newer).
#   make quickstart   see a small model think in parallel, measure it, train one     (about 4 minutes)
#   make test         all CPU tests
#   make coverage     the tests of structure/ and inference/; fails below 95 % of lines and branches
#   make test-mcore   all CPU tests with another megatron-core: MCORE=0.19.2 PYTHON=python3.12 (0.17 and later need 3.12)
#   make test-transformers   the tests of exported models with another transformers: TRANSFORMERS=4.57.1
#   make test-slurm   the batch scripts on a SLURM of one node, started for it
#   make lint         formatting, types, the import rules, shell scripts
#   make bench        the benchmarks that run on a CPU
#   make bench-gpu    those of the kernels, on a machine with a GPU, with the packages of PYTHON
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
CONSTRAINTS := requirements/constraints-cpu.txt
# The tests run small tensors: one thread each is faster than many threads fighting for the cores.
export OMP_NUM_THREADS ?= 1

# Each process of a test would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE
# Files in their order, which begins with the slowest: by default the files of few tests come last, and one of them that
# takes a minute keeps one process waiting for the other.
# As many processes as cores, up to where memory may end: with one more the tests take longer.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count(), 8))')
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Further pytest options of `make test`, and what `make coverage` measures.
TEST_ARGS ?=
COVERED := structure inference

# megatron-core of `make test-mcore`, in an environment of its own.
MCORE ?= 0.19.2
MCORE_VENV = .venv-mcore-$(MCORE)

# transformers of `make test-transformers`, in an environment of its own.
TRANSFORMERS ?= 4.57.1
TRANSFORMERS_VENV = .venv-transformers-$(TRANSFORMERS)

.PHONY: quickstart test test-mcore test-transformers test-slurm coverage lint format bench bench-gpu clean

# Installed again only when what is to be installed changes.
$(STAMP): setup.py $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart/run.py

test: $(STAMP)
	$(BIN)/python -m pytest -q $(SPREAD) tests $(TEST_ARGS)

# An environment for another Python has no pinned torch wheel: pip takes the constraint's version from the index.
test-mcore:
	test -x $(MCORE_VENV)/bin/python || $(PYTHON) -m venv $(MCORE_VENV)
	sed 's/^megatron-core==.*/megatron-core==$(MCORE)/' $(CONSTRAINTS) > $(MCORE_VENV)/constraints.txt
	$(MCORE_VENV)/bin/pip install --quiet -c $(MCORE_VENV)/constraints.txt -e '.[dev]'
	$(MCORE_VENV)/bin/python -m pytest -q $(SPREAD) tests $(TEST_ARGS)

# Another transformers wants another tokenizers and huggingface_hub, so pip chooses them.
test-transformers:
	test -x $(TRANSFORMERS_VENV)/bin/python || $(PYTHON) -m venv $(TRANSFORMERS_VENV)
	sed -E '/^(transformers|tokenizers|huggingface_hub|datasets)==/d' $(CONSTRAINTS) > $(TRANSFORMERS_VENV)/constraints.txt
	$(TRANSFORMERS_VENV)/bin/pip install --quiet -c $(TRANSFORMERS_VENV)/constraints.txt -e . \
		'transformers==$(TRANSFORMERS)' pytest pytest-timeout
	$(TRANSFORMERS_VENV)/bin/python -m pytest -q tests/unit/checkpoints/test_exports.py $(TEST_ARGS)

test-slurm: $(STAMP)
	$(BIN)/python -m pytest -q -x -m slurm tests/slurm $(TEST_ARGS)

# The two parts where a branch that no test takes would be a wrong answer.
coverage: $(STAMP)
	$(BIN)/python -m pytest -q $(SPREAD) $(COVERED:%=tests/unit/%) $(COVERED:%=--cov=megatron_multiverse.%) \
		--cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=95

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -n $(WORKERS)
	$(BIN)/lint-imports
	for file in $$(git ls-files '*.sh' '*.sbatch' .ci/run); do bash -n $$file || exit 1; done
	$(BIN)/shellcheck $$(git ls-files '*.sh' '*.sbatch' .ci/run)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench_preprocess

bench-gpu:
	for name in attention tree_decode structure_scan rope layer fp8_products draw plot; do \
		$(PYTHON) -m benchmarks.kernels.$$name || exit 1; \
	done

clean:
	rm -rf $(VENV) .venv-mcore-* .venv-transformers-* runs build *.egg-info
