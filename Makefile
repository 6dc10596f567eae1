# make serve   set everything up, fetch the default model and serve it on 127.0.0.1:8000
# make test    set everything up and run the tests, some at a time (ARGS=-n0: one after another)
# make check   lint and types
# make sanitize  the native kernels' tests on an extension built with ASan and UBSan (GCC)
# make neon      the ARM kernels against the portable ones, cross-compiled and emulated
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# pip compiles these, where it finds a C++ compiler.
NATIVE := CMakeLists.txt $(wildcard csrc/*)

.PHONY: serve test check sanitize neon install dev clean
serve: install
	$(BIN)/tokenloom serve $(ARGS)

test: dev
	$(BIN)/tokenloom models pull
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal $(ARGS)

check: dev
	$(BIN)/ruff check src tests benchmarks examples deploy
	$(BIN)/ruff format --check src tests benchmarks examples deploy
	$(BIN)/mypy

# The sanitizers' runtimes must be the first libraries of the process, and C++'s own with them, whose exceptions
# they watch. tests/sanitized.py loads the extension in place of the installed one. Python itself leaks: that is
# not looked at.
SANITIZERS = $(foreach name,libasan.so libubsan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$(name)))
sanitize: dev
	$(BIN)/python -m pip install --quiet cmake ninja nanobind
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DTOKENLOOM_SANITIZE=ON -DCMAKE_CXX_COMPILER="$(CXX)" \
		-DCMAKE_MAKE_PROGRAM="$(abspath $(BIN)/ninja)" -DPython_EXECUTABLE="$(abspath $(BIN)/python)" \
		-Dnanobind_ROOT="$$($(BIN)/python -m nanobind --cmake_dir)"
	$(BIN)/cmake --build build/sanitize
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		PYTHONPATH=tests $(BIN)/python -m pytest --capture=sys -p sanitized tests/kernels tests/models/test_fused.py \
		tests/models/test_fused_adapters.py $(ARGS)

# Needs Debian's g++-aarch64-linux-gnu and qemu-user. Flags as in CMakeLists.txt.
ARM := aarch64-linux-gnu-g++ -std=c++17 -O3 -Wall -Wextra -Wno-psabi -DTOKENLOOM_ARM
neon:
	mkdir -p build/neon
	$(ARM) -march=armv8.2-a+dotprod+fp16 -c csrc/isa_neon.cpp -o build/neon/isa_neon.o
	$(ARM) -static -pthread -o build/neon/check $(addprefix csrc/,check_isas.cpp dispatch.cpp layers.cpp team.cpp \
		isa_portable.cpp) build/neon/isa_neon.o
	qemu-aarch64 -cpu max build/neon/check

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
