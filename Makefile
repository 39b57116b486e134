# Everything runs from .venv, which is made on first use from constraints.txt. A bare `make` lists the targets.

PYTHON ?= python3.11
JOBS ?= 1
ROW ?=
RUN ?=
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

# DVC starts the stages through PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install repro tune test test-all check format smoke dashboards results clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with the pinned dependencies (the other targets do it when it is needed)

# An interrupted or failed install leaves no stamp, so the next call goes on with it.
$(INSTALLED): constraints.txt pyproject.toml
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv || { \
		echo "Python 3.11 with venv is needed; '$(PYTHON)' did not do. Name another: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@echo "Installing the pinned dependencies into .venv (once; a few minutes) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[pipeline,cluster,dev]'
	@touch $@

repro: $(INSTALLED) ## Run the whole graph: dvc repro with one Ray head for all stages; JOBS=4: side by side
	@$(BIN)/python -m pipelines.repro --jobs $(JOBS)

tune: $(INSTALLED) ## Search for better settings of a run, as params.yaml's tune: says: RUN=name
	@test -n "$(RUN)" || { echo "Name a run of params.yaml's tune:, as in: make tune RUN=vae" >&2; exit 1; }
	@$(BIN)/python -m pipelines.repro tuning/dvc.yaml:tune@$(RUN)
	@$(BIN)/python -m pipelines.tune $(RUN) --adopt

test: $(INSTALLED) ## Run the test suite but for the slow tests; PYTEST_ARGS='-k flow' narrows it
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-all: $(INSTALLED) ## Run every test, the slow ones too
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

check: $(INSTALLED) ## Formatting, lint, types and import floors
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports

format: $(INSTALLED) ## Put the code in the house format
	@$(BIN)/ruff check --fix --silent . || true
	@$(BIN)/ruff format .

smoke: $(INSTALLED) ## A tiny dvc repro in a temporary folder
	@$(BIN)/python -m pipelines.smoke

dashboards: $(INSTALLED) ## MLflow's and Ray's dashboards, on this machine only
	@$(BIN)/python -m pipelines.dashboards

results: $(INSTALLED) ## Measure quality rows into docs/results.md: ROW=name; without ROW, list them
	@$(BIN)/python -m benchmarks.results $(ROW)

clean: ## Remove caches and unfinished state; keeps .venv, data, models, DVC's cache and MLflow's history
	@[ ! -d .dgm ] || find .dgm -mindepth 1 -maxdepth 1 ! -name spool -exec rm -rf {} +
	@rm -rf .pytest_cache .ruff_cache .import_linter_cache .benchmarks dvc_plots
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
