# `make venv` is the only target that installs anything; the others need it and run it when it is missing or stale.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test test-slow test-gpu lint format bench clean

venv: $(STAMP)

# torch goes first, pinned: resolved together with the rest, pip may fetch several gigabytes of other releases.
# setuptools goes with it because the project itself is built without isolation (an isolated build ignores the pins).
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 10), "moonwalk_compile needs Python 3.10 or later"'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

demo: venv
	$(BIN)/moonwalk demo

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-slow: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow

test-gpu:  # in an environment of your own, with torch for CUDA
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q tests/test_gpu.py
	OMP_NUM_THREADS=1 MOONWALK_TEST_DEVICE=cuda $(PYTHON) -m pytest -q tests/test_never_wrong.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/python benchmarks/main_job.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
