# Two commands: `make demo` and `make test`. Both need only python3 >= 3.10; everything else goes into .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# touched after an install; a newer pyproject.toml or kernel installs again
STAMP  := $(VENV)/.installed

.PHONY: demo test test-all lint types asan pytest pytest-all bench install clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/fxpress demo --out demo.fxp

# the order matters: pytest's closing line is the last thing printed
test: lint types pytest

test-all: lint types asan pytest-all

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A type checker cannot follow the editable install's mapping of folders, so it reads an installed copy.
# `build` goes first: setuptools would carry deleted files over from it.
types: $(STAMP)
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --target build/installed .
	cd build/installed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache --package fxpress

# The kernels once more, with AddressSanitizer and UBSan, under the same tests. Leaks are not looked for: Python has its own.
# What gcc's do not see is the masked loads and stores of AVX-512; there the comparisons with the reference must do.
ASAN := build/asan
asan: $(STAMP)
	rm -rf $(ASAN)
	FXPRESS_KERNEL_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1" \
		$(BIN)/python setup.py --quiet build_ext --build-lib $(ASAN) --build-temp $(ASAN)/objects
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		FXPRESS_KERNEL_LIBRARY=$(CURDIR)/$(ASAN)/fxpress/runtime/kernels/libfxpress_kernels.so \
		$(BIN)/python -m pytest --capture=sys -m "not slow" tests/runtime/kernels

pytest: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

pytest-all: $(STAMP)
	$(BIN)/python -m pytest

# short forms of the benchmarks; the whole ones are described in each file
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m fxpress.tools.bench.coverage --quick
	$(BIN)/python -m fxpress.tools.bench.graph_speed --quick
	$(BIN)/python -m fxpress.tools.bench.pruned_latency --quick
	$(BIN)/python -m fxpress.tools.bench.pq --quick
	$(BIN)/python -m fxpress.tools.bench.binary --quick

install: $(STAMP)

$(STAMP): pyproject.toml setup.py $(wildcard runtime/kernels/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "fxpress needs Python 3.10 or newer; set PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf build dist demo.fxp .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info $(VENV)
	rm -f runtime/kernels/*.so runtime/kernels/*.dylib
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
