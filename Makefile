# Two commands for a newcomer: `make quickstart` and `make test`. Everything lives in .venv.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: quickstart results test lint types check bench install

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

# The rows in results/, for a machine without a GPU: hours on two cores. LEAKBENCH_DATA has to hold MNIST and CIFAR-10;
# what is in runs/ is resumed.
RUNS := quick labels localization breaking_sa images_quick defenses_quick
only = $(foreach name,$(2),--$(1) $(name))
IMAGES := dlg idlg inverting_gradients analytic r_gap mean_image random_image
DEFENSES := none "gaussian_noise(std=0.01)" "gaussian_noise(std=0.1)" "clip_l2(bound=1.0)" "topk(p=0.9)" "topk(p=0.99)" \
  sign "dp_sgd(noise_multiplier=0.1)" "dp_sgd(noise_multiplier=1.0)"
results: $(STAMP)
	$(BIN)/leakbench run quick --out runs/quick
	$(BIN)/leakbench run labels --out runs/labels
	$(BIN)/leakbench reproduce localization --quick --out runs/localization
	$(BIN)/leakbench reproduce breaking_sa --quick --out runs/breaking_sa
	$(BIN)/leakbench run images_quick --trials 4 --out runs/images_quick $(call only,attack,$(IMAGES))
	$(BIN)/leakbench utility defenses_quick --out runs/defenses_quick
	$(BIN)/leakbench run defenses_quick --out runs/defenses_quick $(call only,defense,$(DEFENSES))
	for run in $(RUNS); do $(BIN)/leakbench compact runs/$$run --out results/$$run || exit 2; done
	$(BIN)/leakbench verify $(RUNS:%=results/%) --seal
	$(BIN)/leakbench provenance results --into results/README.md
	$(BIN)/leakbench board results/labels results/images_quick results/breaking_sa --into README.md

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
