# Two commands: `make demo` and `make test`.  Both create the virtual environment themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check nightly sim bench clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("kwflow needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python -m workflows.demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -rsfE --durations=10 -n 4 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/python -m pytest -q tests/repo

SEEDS ?= 0-1000
sim: $(INSTALLED)
	$(BIN)/python -m tests.simulation $(SEEDS)

nightly: $(INSTALLED)
	$(BIN)/python -m pytest -q -m nightly --durations=10

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .kafka
