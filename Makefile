# From a fresh machine with Python 3.11 or newer and make: everything else comes from pip's registry.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# make test CONSTRAINTS=constraints.txt installs the very versions that were tested
CONSTRAINTS ?=

# Tests side by side, each process with one thread and about a gigabyte; who is done takes half of what another has left.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Threads that wait must not spin: on a shared machine they would take the cores from those that work.
export OMP_WAIT_POLICY ?= passive

.PHONY: help demo test check exhaustive constraints

help:
	@echo "make demo    the whole way on scikit-learn's digits, into growkit-demo/"
	@echo "make test    the tests"
	@echo "make check   linter, formatter, types, contents of the wheel, benchmarks in small, growth on digits, torchrun and compiler"
	@echo "make exhaustive    all hostile files, options, deaths, clean exports and names of timm, of which make test draws some"
	@echo "make constraints    the versions in .venv, which the tests have passed with, into constraints.txt"

demo: .venv/demo.stamp
	$(BIN)/growkit demo --force

test: .venv/test.stamp
	$(PYTEST)

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m slow

exhaustive: .venv/dev.stamp
	$(PYTEST) -m exhaustive

# setuptools included, for torch needs it. Without what lies elsewhere than in pip's index, and without the builds' own labels, as in 2.14.1+cpu.
constraints: .venv/dev.stamp
	@$(BIN)/python -c 'import platform as p; print("# Tested together on Python", p.python_version(), p.system(), p.machine())' > $@.txt
	@$(BIN)/python -m pip freeze --all --exclude-editable | sed -e '/ @ /d' -e '/^pip==/d' -e 's/+[a-z0-9.]*$$//' >> $@.txt

# One stamp per extra, so that an environment is touched again only when pyproject.toml changes.
.venv/%.stamp: pyproject.toml
	@test -n "$(PYTHON)" || { echo "growkit needs Python 3.11 or newer; name it: make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "installing growkit[$*] into .venv; the first time takes minutes, for torch is large"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) --editable '.[$*]'
	@touch $@
