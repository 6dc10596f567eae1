# make serve   set everything up, fetch the default model and serve it on 127.0.0.1:8000
# make test    set everything up and run the tests
# make check   lint and types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# pip compiles these, where it finds a C++ compiler.
NATIVE := CMakeLists.txt $(wildcard csrc/*)

.PHONY: serve test check install dev clean
serve: install
	$(BIN)/tokenloom serve $(ARGS)

test: dev
	$(BIN)/tokenloom models pull
	$(BIN)/python -m pytest $(ARGS)

check: dev
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# pip alone, with torch's range from pyproject.toml: where an index offers a CPU build, it is the one used.
$(VENV)/.installed: pyproject.toml $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
