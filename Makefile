# make demo    set up an environment in .venv and compare attention mechanisms on real data
# make test    the fast tests             make test-all  the slow ones too
# make test-timm   those that need timm, in an environment of its own, .venv-timm
# make check   all that must be green: linter, types, documentation, guards, tests
# make bench   the benchmarks of a CPU    make docs      the site, in site/
# make clean   remove what the others made, but for .venv
#
# PYTHON=python3.12       the Python to build .venv from (3.11 or later); its torch is reused if it
#                         has one of 2.11 or later
# TORCH_INDEX=URL         the package index to take torch from, such as PyTorch's own for CPUs
# CONSTRAINTS=            any versions of the dependencies, not those of constraints.txt
# PYTEST_OPTIONS=...      more options for pytest: --device cuda, --seed N, -k NAME

PYTHON ?= python3
TORCH_INDEX ?=
CONSTRAINTS ?= constraints.txt
PYTEST_OPTIONS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := demo
VENV := .venv
BIN := $(VENV)/bin
# Each stamp says that an extra is installed; the native library belongs to the first.
BASE := $(VENV)/.regard-base
DEV := $(VENV)/.regard-dev
DOCS := $(VENV)/.regard-docs
TIMM_VENV := .venv-timm
TIMM := $(TIMM_VENV)/.regard-timm
SOURCES := pyproject.toml setup.py constraints.txt \
	$(wildcard $(addsuffix *.[ch],$(addprefix src/regard/,*/ */*/ */*/*/))) src/regard/native/table.py

ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
HAS_TORCH := import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))
# The release of torchvision that belongs to a torch 2.N is 0.(N + 15).
ITS_VISION := import torch; print(f"0.{int(torch.__version__.split(chr(46))[1]) + 15}.*")
PIP := $(BIN)/python -m pip --disable-pip-version-check install
# The constraints, without a line for torch where there is one already.
PINS := $(VENV)/constraints.txt
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Without the plugins that a reused environment may bring.
PYTEST := $(ONE_THREAD) PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(BIN)/python -m pytest \
	-p xdist -p hypothesispytest

.PHONY: demo test test-all test-timm check lint types guards bench docs clean

demo: $(BASE)
	$(BIN)/regard compare co2 --out report.html

test: $(DEV)
	$(PYTEST) -n 2 $(PYTEST_OPTIONS)

test-all: $(DEV)
	$(PYTEST) -n 2 -m "" $(PYTEST_OPTIONS)

# timm needs torchvision, which transformers would find and use, although its operators do not load
# beside a torch for CPUs: so both are kept out of .venv, whose packages the second one sees.
test-timm: $(TIMM)
	$(ONE_THREAD) PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(TIMM_VENV)/bin/python tests/with_timm.py \
		tests/adapt/test_timm.py tests/models/test_halonet.py -q $(PYTEST_OPTIONS)

$(TIMM): $(DEV)
	$(BIN)/python -m venv --without-pip $(TIMM_VENV)
	@$(TIMM_VENV)/bin/python -c 'import pathlib, site, sys; \
		pathlib.Path(site.getsitepackages()[0], "main.pth").write_text( \
		f"import site; site.addsitedir({sys.argv[1]!r})\n")' \
		"$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"
	$(BIN)/python -m pip --disable-pip-version-check --python $(TIMM_VENV)/bin/python install \
		--quiet --no-deps 'timm>=1.0' "torchvision==$$($(BIN)/python -c '$(ITS_VISION)')"
	@touch $@

# One after the other, whatever -j says; the guards are among the tests, which come last.
check:
	$(MAKE) lint
	$(MAKE) types
	$(MAKE) docs
	$(MAKE) test

lint: $(DEV)
	$(BIN)/python -m ruff check .

types: $(DEV)
	$(BIN)/python -m pyright

guards: $(DEV)
	$(PYTEST) tests/guards $(PYTEST_OPTIONS)

bench: $(DEV)
	@for script in $(filter-out %gpu.py,$(wildcard benchmarks/*.py)); do \
		echo "== $$script"; $(ONE_THREAD) $(BIN)/python $$script; \
	done

docs: $(DOCS)
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "the site is in site/"

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c '$(ENOUGH)' || { \
		echo "regard needs Python 3.11 or later: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up $(VENV)"
	@if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then system=--system-site-packages; fi; \
	$(PYTHON) -m venv $${system:-} $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment (on Debian: python3-venv)"; exit 1; }
# The torch of another virtual environment is none of its system's: the new one is shown the way.
	@if ! $(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null && $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
		$(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
			>"$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/torch_found.pth"; \
	fi

$(BASE): $(SOURCES) | $(BIN)/python
	@if $(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null; then \
		echo "using the torch that is there"; \
		grep -v '^torch==' $(or $(CONSTRAINTS),/dev/null) >$(PINS) || true; \
	else \
		cat $(or $(CONSTRAINTS),/dev/null) >$(PINS); \
		echo "installing torch: a download of about 200 MB for CPUs, up to 3 GB with CUDA (PyPI's" \
			"default on Linux); TORCH_INDEX=URL takes it from another index"; \
		$(PIP) -c $(PINS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch>=2.11'; \
	fi
	$(PIP) --quiet -c $(PINS) -e .
	@touch $@

$(DEV): $(BASE)
	$(PIP) --quiet -c $(PINS) -e '.[dev]'
	@touch $@

$(DOCS): $(BASE)
	$(PIP) --quiet -c $(PINS) -e '.[docs]'
	@touch $@

clean:
	rm -rf build dist site report.html *.egg-info src/*.egg-info benchmarks/out
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f src/regard/native/_kernels.so $(VENV)/.regard-*
