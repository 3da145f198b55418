# Everything a fresh clone needs: `make quickstart`, `make test-quick`, `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test-quick test test-slow lint docs architectures consumers clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: .venv/installed
	$(BIN)/gradmap run recipes/quickstart.yaml

test-quick: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m 'not slow and not full'

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/benchmarks/*.py

docs: .venv/installed
	$(BIN)/python tests/tools/reference.py docs

architectures: .venv/installed
	$(BIN)/python tests/walk.py docs/architectures.md

consumers: .venv/installed
	$(BIN)/python tests/consumers_table.py docs

clean:
	rm -rf .venv .gradmap out build *.egg-info
