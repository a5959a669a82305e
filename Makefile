# One target per verb; CI runs the same ones. PYTHON names the interpreter the environment is made from.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml constraints.txt

.PHONY: demo demo-small test test-slow check bench bench-align clean

demo: $(VENV)/.installed-demo
	$(BIN)/gyro demo

demo-small: $(VENV)/.installed-demo
	$(BIN)/gyro demo --small

test: $(VENV)/.installed-check
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed-check
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-check
	$(BIN)/python benchmarks/loss.py

bench-align: $(VENV)/.installed-check
	$(BIN)/python benchmarks/align.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(BIN)/python $(SOURCES)
	@echo "installing the pinned dependencies (torch is the large one) ..."
	$(PIP) --editable '.[mlflow]'
	@touch $@

$(VENV)/.installed-check: $(BIN)/python $(SOURCES)
	@echo "installing the pinned dependencies, and what tests and checks need ..."
	$(PIP) --editable '.[check]'
	@touch $@ $(VENV)/.installed-demo

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
