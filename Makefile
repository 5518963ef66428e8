# Two commands on a fresh machine: `make report`, `make test`. Needs Python 3.11 or later, make, a network to the package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: report test lint lab app benchmarks clean

report: $(VENV)/installed
	$(BIN)/workbench report fashion-vit --sparsity 0.5 --criterion wanda --weight-bits 4 --output reports

test: $(VENV)/installed-dev
	$(BIN)/python tests/browser.py
	$(BIN)/python -m pytest
	XDG_STATE_HOME=$$(mktemp -d) $(BIN)/python -m pytest --nbval-lax notebooks

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
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

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
