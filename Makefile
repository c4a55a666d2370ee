# Every target makes its own environment from PYTHON (3.11 or newer) and fills it with pinned versions.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MINOR := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
CONSTRAINTS := $(wildcard requirements/constraints-$(MINOR).txt)
# Named after the Python it holds: another PYTHON makes the environment anew.
STAMP := $(VENV)/installed-$(MINOR)

TESTS ?= tests
WORKERS ?= auto
DEMO ?= --log-dir logs --overwrite
BENCH ?=
ROUNDS ?=
SIMULATION ?=
PIP := PIP_REQUIRE_VIRTUALENV=1 PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet \
  $(addprefix --constraint ,$(CONSTRAINTS))

.PHONY: demo test test-all check format bench bench-gpu install clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/fedjax-core demo $(DEMO)

# Programs are compiled without optimisation; FEDJAX_CORE_TEST_OPTIMIZE=1 compiles them as users do.
test: $(STAMP)
	$(BIN)/pytest -q -n $(WORKERS) --maxprocesses=4 --dist loadgroup -m "not slow" $(TESTS)

test-all: $(STAMP)
	FEDJAX_CORE_TEST_OPTIMIZE=1 $(BIN)/pytest -q -n $(WORKERS) --maxprocesses=4 --dist loadgroup $(TESTS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/federated_core.py
	$(BIN)/python benchmarks/rate_distortion.py
	$(BIN)/python benchmarks/mnist_fedavg.py $(BENCH)
	$(BIN)/python benchmarks/accuracy_vs_bits.py
	$(BIN)/python benchmarks/real_updates.py
	$(BIN)/python benchmarks/rounds.py $(ROUNDS)
	$(BIN)/python benchmarks/simulation.py $(SIMULATION)

# PYTHON has the library with a JAX that finds the GPU, and FedJAX, Haiku and PyTorch beside it.
bench-gpu:
	JAX_PLATFORMS=cuda $(PYTHON) benchmarks/rounds.py --peers-here --peers fedjax,pytorch \
	  --lanes 1,4,16,64,256 --no-check --output benchmarks/results/rounds_gpu.json

install: $(STAMP)

# setuptools comes first: the editable build then uses it, and needs no environment of its own.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1); set PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python$(MINOR) || $(PYTHON) -m venv --clear $(VENV)
	rm -f $(VENV)/installed-*
	$(PIP) "setuptools>=77"
	$(PIP) --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-newest build dist fedjax_core.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find algorithms benchmarks compression fedjax_core tests -name __pycache__ -type d -prune -exec rm -rf {} +
