# Everything a fresh clone needs is Python 3.10 or newer and make. `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= logs
LOGDIR ?= $(OUTPUT)
SCREENSHOT ?= build/tensorboard.png
# One worker a core, one thread a worker; a file's tests stay together.
PYTEST_ARGS ?= -n auto --dist loadfile

BIN := $(VENV)/bin
STAMPS := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off

.DEFAULT_GOAL := help
.PHONY: help demo test loggers lint types wheel-check browser-check clean

help:
	@echo 'make demo           train on generated pictures and watch the layers in TensorBoard'
	@echo 'make test           the tests'
	@echo 'make loggers        install wandb and mlflow, so that their tests are not skipped'
	@echo 'make lint           ruff and mypy'
	@echo 'make wheel-check    build the wheel, install it by itself, read and type-check it'
	@echo 'make browser-check  open LOGDIR=$(LOGDIR) in TensorBoard in headless Chromium'
	@echo 'make clean          remove $(VENV) and what building left behind'

demo: $(STAMPS)/base
	$(BIN)/lit-deconv demo --output $(OUTPUT) $(DEMO_ARGS)

test: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

loggers: $(STAMPS)/loggers

lint: $(STAMPS)/dev types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A type checker finds lit_deconv.callbacks only where the folder lies inside the package, so it reads
# a copy laid out as it is installed. --preserve keeps mypy's cache valid from run to run.
types: $(STAMPS)/dev
	@rm -rf build/types && mkdir -p build/types
	@cp -Rp lit_deconv tests build/types/
	@cp -Rp callbacks configs build/types/lit_deconv/
	@if ls benchmarks/*.py >/dev/null 2>&1; then cp -Rp benchmarks build/types/; fi
	cd build/types && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) \
		--cache-dir $(abspath .mypy_cache) --explicit-package-bases .

wheel-check: $(STAMPS)/dev
	$(BIN)/python tests/wheel_check.py

browser-check: $(STAMPS)/browser
	@mkdir -p $(dir $(SCREENSHOT))
	$(BIN)/python tests/browser/check.py $(LOGDIR) --screenshot $(SCREENSHOT)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "lit-deconv needs Python 3.10 or newer; '$(PYTHON)' is not ($$($(PYTHON) --version 2>&1))." \
			"Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv"; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of dependencies: a second call finds it and installs nothing.
$(STAMPS)/base: pyproject.toml | $(BIN)/python
	@echo 'Installing lit-deconv and its dependencies into $(VENV) (torch is large; once only) ...'
	$(PIP_INSTALL) --editable .
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/test $(STAMPS)/dev $(STAMPS)/browser $(STAMPS)/loggers: $(STAMPS)/%: $(STAMPS)/base
	$(PIP_INSTALL) --editable '.[$*]'
	@touch $@
