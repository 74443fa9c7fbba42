# make demo        the main job on real images: train, look, export, predict
# make test        everything that CI checks; its parts: check, lint, notebooks, readme-code, pytest
# make bench       blocks beside its peers, in turn: two hours; ONLY=loader ROUNDS=5 for a part of it, QUICK=1 for a smoke run
# make export      notebooks -> blocks/ and README.md
# PYTHON=python3.12 names the Python that .venv is made with, 3.10 or newer

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

.PHONY: demo test bench export readme check lint notebooks readme-code pytest

demo: .venv/.demo
	$(BIN)/blocks demo

# in this order, also with -j; pytest comes last, so that the last line says how many passed
test: check lint notebooks readme-code pytest
.NOTPARALLEL:

bench: .venv/.dev
	$(BIN)/python benchmarks/run.py $(if $(ONLY),--only $(ONLY)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(QUICK),--quick) $(if $(PEERS),--peers $(PEERS))

export: .venv/.dev
	$(BIN)/python tools/nb.py export
	$(BIN)/python tools/nb.py readme

readme: .venv/.dev
	$(BIN)/python tools/nb.py readme

check: .venv/.dev
	$(BIN)/python tools/nb.py check

lint: .venv/.dev
	$(BIN)/ruff check --output-format concise .

notebooks: .venv/.dev
	$(BIN)/python tools/nb.py test

readme-code: .venv/.dev
	$(BIN)/python tools/readme_code.py

pytest: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile      # a file's tests in one process, so that what they share is made once

# The environment. A stamp says with which extras it was installed last; it is out of date when the dependencies may have changed.

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "blocks needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/.demo: setup.cfg pyproject.toml | .venv/bin/pip
	@echo 'Installing blocks and PyTorch into .venv: a few minutes, once'
	$(BIN)/pip install -q -e '.[demo]'
	@touch $@

.venv/.dev: setup.cfg pyproject.toml | .venv/bin/pip
	@echo 'Installing blocks, PyTorch and the tools for development into .venv: a few minutes, once'
	$(BIN)/pip install -q -e '.[dev]'
	@touch .venv/.demo $@
