# Two commands on a fresh machine: `make report`, `make test`. Needs Python 3.11 or later, make, a network to the package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# As many test processes as cores, of one thread each: two threads in one process wait for each other more than they work.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')
# Whole files to a process, in order: browser tests go on from where the one before them left the page.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: report test lint lab app benchmarks clean

report: $(VENV)/installed
	$(BIN)/workbench report fashion-vit --sparsity 0.5 --criterion wanda --weight-bits 4 --output reports

test: $(VENV)/installed-dev
	@.ci/each "browser: $(BIN)/python tests/browser.py" "tests: $(TESTS)" \
		"notebooks: XDG_STATE_HOME=$$(mktemp -d) $(TESTS) --nbval-lax notebooks"

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

lab: $(VENV)/installed
	$(BIN)/workbench lab

app: $(VENV)/installed
	$(BIN)/workbench app

benchmarks: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) reports

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or later is needed, this is ' + sys.version)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# CUDA builds of torch bring their own Triton; where there is none, its interpreter runs our GPU kernels in the tests.
$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps triton==3.7.1 || echo "no Triton here: tests that interpret GPU kernels are left out"
	touch $@
