# Every target makes .venv first when it is missing or older than setup.cfg or constraints.txt.
# On Linux, PyPI's torch is the CUDA build; for the CPU one (far smaller), either put its wheel where pip looks or run
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make venv

SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# One thread a process: the tests run in two processes, and thread pools that fight over two cores are slower than none.
TEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow lint bench clean

help:
	@echo 'make demo       train, score and show a tiny BioD2C on real data (minutes, no network); results in out/demo'
	@echo 'make test       the fast tests'
	@echo 'make test-slow  the tests that take minutes'
	@echo 'make lint       ruff and mypy'
	@echo 'make bench      speed and memory, benchmarks/*.py'
	@echo 'make venv       only .venv, from constraints.txt'
	@echo 'make clean      remove what make made, but for .venv'

venv: $(INSTALLED)

$(INSTALLED): setup.cfg constraints.txt
	@echo '==> $(VENV): installing this package, editable, with the versions of constraints.txt'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt setuptools torch  # deepspeed's build asks for them
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[train,data,dicom,eval,app,generate,deepspeed,quantization,dev]'
	@touch $@

demo: venv
	@echo '==> demo: real images in, two training stages, questions answered and scored; results in out/demo'
	$(BIN)/biod2c demo

test: venv
	@echo '==> test: everything not marked slow'
	$(TEST) -m 'not slow' tests

test-slow: venv
	@echo '==> test-slow: everything marked slow'
	$(TEST) -m slow tests

# mypy finds a package by its folder's name, and this folder may have any name: it is shown the root through a link
# that is called biod2c.
lint: venv
	@echo '==> lint: ruff check, ruff format, mypy'
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@mkdir -p .mypy_cache/root && ln -sfn ../.. .mypy_cache/root/biod2c
	$(BIN)/mypy | sed 's|^\.mypy_cache/root/biod2c/||'

bench: venv
	@for benchmark in benchmarks/*.py; do echo "==> bench: $$benchmark"; $(BIN)/python $$benchmark; done

clean:
	@echo '==> clean: removing build products, caches and out/ ($(VENV) stays)'
	rm -rf build dist biod2c.egg-info out .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
