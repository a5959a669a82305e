# One target per verb; CI runs the same ones. PYTHON names the interpreter the environment is made from.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest -m "not slow"
SOURCES := pyproject.toml constraints.txt

.PHONY: demo demo-small test test-postgres test-slow check audit bench bench-align clean

demo: $(VENV)/.installed-demo
	$(BIN)/gyro demo

demo-small: $(VENV)/.installed-demo
	$(BIN)/gyro demo --small

# Two halves at once, a core each: the losses, and everything else. The losses speak when both are done.
test: $(VENV)/.installed-check
	@losses=$$(mktemp); export OMP_NUM_THREADS=1; \
	$(PYTEST) tests/loss >$$losses 2>&1 & half=$$!; trap "kill $$half 2>/dev/null; rm -f $$losses" EXIT; \
	$(PYTEST) --ignore=tests/loss; status=$$?; \
	wait $$half || status=$$?; cat $$losses; exit $$status

# Whatever keeps something in a store, with every store in the PostgreSQL that GYRO_TEST_POSTGRES_URL names.
test-postgres: $(VENV)/.installed-check
	@recipes=$$(mktemp); export OMP_NUM_THREADS=1 GYRO_TEST_STORES=postgresql; \
	$(PYTEST) tests/recipe >$$recipes 2>&1 & half=$$!; trap "kill $$half 2>/dev/null; rm -f $$recipes" EXIT; \
	$(PYTEST) tests $(addprefix --ignore=tests/,loss measure model recipe train benchmarks); status=$$?; \
	wait $$half || status=$$?; cat $$recipes; exit $$status

test-slow: $(VENV)/.installed-check
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --recursive --severity-level medium src/gyrocompass/serve
	@$(MAKE) --no-print-directory audit

# Known faults of what is pinned. Where no server of advisories is reached that is said, and stops nobody.
audit: $(VENV)/.installed-check
	@said=$$($(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off \
		--timeout 10 2>&1) && { echo "$$said" | grep -i vulnerabilit; \
		echo "$$(echo "$$said" | grep -c 'could not be audited') of them are not known there"; exit 0; }; \
	if echo "$$said" | grep -q 'known vulnerabilit'; then echo "$$said"; exit 1; fi; \
	echo "pip-audit: not audited: $$(echo "$$said" | tail -n 1)"

bench: $(VENV)/.installed-check
	$(BIN)/python benchmarks/loss.py

bench-align: $(VENV)/.installed-check
	$(BIN)/python benchmarks/align.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(BIN)/python $(SOURCES)
	@echo "installing the pinned dependencies (torch is the large one) ..."
	$(PIP) --editable '.[mlflow,serve]'
	@touch $@

$(VENV)/.installed-check: $(BIN)/python $(SOURCES)
	@echo "installing the pinned dependencies, and what tests and checks need ..."
	$(PIP) --editable '.[check]'
	@touch $@ $(VENV)/.installed-demo

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
