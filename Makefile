# Everything a fresh machine needs is Python 3.11 or later and make.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/stretto race stdlib-gpt

# PYTEST adds options: make test PYTEST="-m ''" runs the slow tests too.
test: .venv/ready-test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST)

lint: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first, so that nothing else can pull another build of it.
.venv/ready: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"stretto needs Python 3.11 or later; this is {sys.version}"'
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/ready-test: .venv/ready
	$(PIP) --editable '.[test]'
	touch $@

clean:
	rm -rf .venv
