# Two commands for a newcomer: `make quickstart` and `make test`. Everything lives in .venv.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: quickstart test lint types check bench install

install: $(STAMP)

# uv where it is at hand (seconds), else venv and pip (a minute or two); the same pinned versions either way.
$(STAMP): pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
	  { test -x $(BIN)/python || uv venv --quiet --python $(PYTHON) .venv; } && \
	  uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[test]"; \
	else \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "leakbench needs Python 3.11 or newer; try: make PYTHON=python3.11")' && \
	  { test -x $(BIN)/python || $(PYTHON) -m venv .venv; } && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"; \
	fi
	@touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/leakbench run quick --workers $(WORKERS)
	$(BIN)/leakbench board runs/quick
	$(BIN)/leakbench site runs/quick --out runs/quick-site

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_gradients.py
	$(BIN)/python tests/benchmarks/bench_boundary.py
	$(BIN)/python tests/benchmarks/bench_labels.py
	$(BIN)/python tests/benchmarks/bench_measures.py
