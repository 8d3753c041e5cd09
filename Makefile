# Two commands need nothing but Python 3.11 or newer and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
KERNEL := native/CMakeLists.txt $(wildcard src/pathline/native/*.cpp src/pathline/native/*.hpp)

.PHONY: help demo test test-slow check docs bench clean

help:
	@echo "make demo    fit a density to real data, in runs/demo (minutes)"
	@echo "make test    run the tests"
	@echo "make check   lint, format and types    make docs   the documentation, in build/docs"
	@echo "make bench   the benchmarks            make clean  remove what make made"

# PyTorch first, by its pinned version: the constraint picks the CPU build. Then Pathline with its
# kernel, built anew where a source of it changed.
$(VENV)/base: pyproject.toml constraints.txt $(KERNEL)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) --editable ".[test,dev,docs]"
	touch $@

demo: $(VENV)/base
	$(BIN)/pathline reproduce ot-flow-electricity --out runs/demo --overwrite

test: $(VENV)/dev
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not gpu" --doctest-modules src tests

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -q -m slow tests

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/dev
	SMOKE=1 $(BIN)/sphinx-build -W -q docs build/docs

bench: $(VENV)/dev
	$(PIP) --editable ".[bench]"
	$(BIN)/python benchmarks/flow_step.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/training_curves.py --method ours nsf --summary
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/control.py
	$(BIN)/python benchmarks/games.py
	$(BIN)/python benchmarks/networks.py

clean:
	rm -rf $(VENV) build dist runs src/pathline/native/*.so
	find native -mindepth 1 ! -name CMakeLists.txt -delete
