# From a fresh machine with Python 3.11 or newer and make: everything else comes from pip's registry.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

# Threads that wait must not spin: on a shared machine they would take the cores from those that work.
export OMP_WAIT_POLICY ?= passive

.PHONY: help demo test check

help:
	@echo "make demo    the whole way on scikit-learn's digits, into growkit-demo/"
	@echo "make test    the tests"
	@echo "make check   linter, formatter, types, contents of the wheel, benchmarks in small, growth on digits, torchrun and compiler"

demo: .venv/demo.stamp
	$(BIN)/growkit demo --force

test: .venv/test.stamp
	$(BIN)/pytest

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m slow

# One stamp per extra, so that an environment is touched again only when pyproject.toml changes.
.venv/%.stamp: pyproject.toml
	@test -n "$(PYTHON)" || { echo "growkit needs Python 3.11 or newer; name it: make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "installing growkit[$*] into .venv; the first time takes minutes, for torch is large"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@
