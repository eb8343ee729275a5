# Every target sets itself up: on a machine with python3 and make alone, `make quickstart` and `make test` just work.
# Overridable: PYTHON (the Python that .venv is made with), ARGS (more arguments for what a target runs).

SUPPORTED := 3.11 3.12 3.13
VENV_PYTHON := .venv/bin/python
STAMP := .venv/.installed

MINOR_VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
# Empty unless .venv is whole: a half-made one is made again.
VENV_VERSION := $(if $(wildcard $(STAMP)),$(shell $(VENV_PYTHON) $(MINOR_VERSION) 2>/dev/null))
# A whole .venv is kept whatever python3 is today; only a PYTHON given by hand replaces it.
PYTHON ?= $(if $(filter $(SUPPORTED),$(VENV_VERSION)),$(VENV_PYTHON),python3)
PYTHON_VERSION := $(shell $(PYTHON) $(MINOR_VERSION) 2>/dev/null)

NO_PYTHON = moe_jax needs Python 3.11, 3.12 or 3.13 but $(PYTHON) is $(or $(PYTHON_VERSION),not there): \
  install one of them and run `make $(or $(MAKECMDGOALS),test) PYTHON=python3.12`
NO_VENV = $(PYTHON) cannot make a virtual environment: install its venv module \
  (Debian, Ubuntu: apt install python$(PYTHON_VERSION)-venv) or uv, and run make again.
NO_INSTALL = The install did not finish; run make again to start it over. \
  (On Python 3.13 one dependency, editdistance, is compiled here and needs a C++ compiler; on 3.11 and 3.12 none is.)

.DEFAULT_GOAL := help
.PHONY: help quickstart test check format lock clean remake

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

quickstart: $(STAMP)  ## train a small expert model here; ARGS="--gin.TRAIN_STEPS=20" adds flags
	$(VENV_PYTHON) run.py --run_mode=train --gin_file=gin/experiments/quickstart.gin $(ARGS)

test: $(STAMP)  ## run every test; ARGS="tests/moe -k balance" narrows
	$(VENV_PYTHON) -m pytest $(ARGS)

check: $(STAMP)  ## lint, formatting, types
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy moe_jax tasks run.py

format: $(STAMP)  ## fix formatting, and what the linter can fix
	$(VENV_PYTHON) -m ruff check --fix-only
	$(VENV_PYTHON) -m ruff format

lock: $(STAMP)  ## pin pyproject.toml's dependencies into requirements.txt; ARGS=--upgrade takes the newest
	$(VENV_PYTHON) -m uv pip compile --quiet --universal --python-version $(firstword $(SUPPORTED)) --extra dev \
	  --no-annotate --custom-compile-command 'make lock' $(ARGS) pyproject.toml --output-file requirements.txt

clean:  ## remove .venv and all caches, not runs/
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build moe_jax.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an install that was cut short starts over. Bytecode is compiled here, once:
# where Python may not write it, importing TensorFlow takes three times as long, in every process.
$(STAMP): requirements.txt $(if $(filter-out $(VENV_VERSION),$(or $(PYTHON_VERSION),none)),remake)
	$(if $(filter $(SUPPORTED),$(PYTHON_VERSION)),,$(error $(NO_PYTHON)))
	@echo 'Setting up .venv with Python $(PYTHON_VERSION), once: a minute or two.'
	@rm -rf $(if $(filter $(PYTHON_VERSION),$(VENV_VERSION)),$(STAMP),.venv)
	@test -d .venv || $(PYTHON) -m venv .venv >/dev/null 2>&1 || \
	  { rm -rf .venv; uv venv --quiet --seed --python $(PYTHON) .venv 2>/dev/null; } || \
	  { rm -rf .venv; echo '$(NO_VENV)' >&2; exit 1; }
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --constraint requirements.txt uv
	@$(VENV_PYTHON) -m uv pip install --compile-bytecode --python $(VENV_PYTHON) --requirement requirements.txt || \
	  { echo '$(NO_INSTALL)' >&2; exit 1; }
	@touch $(STAMP)
