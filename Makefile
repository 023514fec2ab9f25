# Everything runs in .venv, which the first target that needs it makes from pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# Python compiles what is imported when it is first imported: the most part never is.
PIP := $(BIN)/python -m pip install --quiet --no-compile
# Else every process would compile again all that it imports, twice as long as it takes to run.
unexport PYTHONDONTWRITEBYTECODE
# Two files of tests at a time, with one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
CXX_FILES = $(shell git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')

.PHONY: help install demo test sweep lint format gpu clean

help:
	@echo "make demo     train the demo recipe and write its report (about two minutes)"
	@echo "make test     run the tests"
	@echo "make sweep    run every case of the tests that go through many (about half an hour)"
	@echo "make lint     ruff, clang-format and mypy"
	@echo "make gpu      on a machine with a GPU: build for it, test, benchmark, sanitize"
	@echo "make install  only build and install into .venv"

install: $(INSTALLED)

# The extension builds against the torch it will run with, so torch is installed first and the build is not
# isolated. What the build needs is read from pyproject.toml.
define BUILD_REQUIREMENTS
try: import tomllib
except ImportError: from pip._vendor import tomli as tomllib
print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))
endef
export BUILD_REQUIREMENTS

$(INSTALLED): pyproject.toml setup.py $(wildcard csrc/*.* csrc/device/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(BIN)/python -c "$$BUILD_REQUIREMENTS" > .venv/build-requirements.txt
	$(PIP) --requirement .venv/build-requirements.txt
	$(PIP) --no-build-isolation --editable '.[test,lint]'
	touch $@

demo: install
	$(BIN)/mtfast run demo
	@echo "The report: runs/demo/report.html"

test: install
	$(PYTEST)

sweep: install
	MTFAST_TEST_SWEEP=full $(PYTEST) -m sweep

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# With .venv's Python where its torch has CUDA, else with PYTHON: a machine with a GPU may come with all it takes.
gpu:
	python=$(BIN)/python; \
	$$python -c "import sys, torch; sys.exit(torch.version.cuda is None)" 2> /dev/null || python="$(PYTHON)"; \
	$$python -m benchmarks gpu $(ARGS)

clean:
	rm -rf .venv build *.egg-info mtfast/*.so
