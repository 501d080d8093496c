# The doors of the project; `make help` lists them.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup recipe lab test docs test-interop test-pods test-lowest test-newest test-wheel lint format lock clean

# The environment that setup makes and all others use, e.g. `make test VENV=.venv-3.13 PYTHON=python3.13`.
VENV ?= .venv
BIN := $(VENV)/bin
# The Python that makes the environment; empty: the first of python3, python3.14 … python3.11 that is 3.11 or newer.
PYTHON ?=
# Extras to add to the development set, e.g. `make setup EXTRAS=cuda13`.
EXTRAS ?=
# Bytecode is kept, also where the environment forbids it: without it each program, and the tests start many, compiles
# all that it imports, which takes 4 s.
export PYTHONDONTWRITEBYTECODE :=
# What `make recipe` and `make test` pass on, e.g. `make recipe ARGS="--seed 1"`, `make test ARGS="-m core"`.
ARGS ?=

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS='	' read -r name what; do printf '  make %-13s %s\n' "$$name" "$$what"; done

setup: ## make .venv with everything that development needs (does nothing when nothing changed)
	@VENV='$(VENV)' PYTHON='$(PYTHON)' EXTRAS='$(EXTRAS)' sh .ci/setup

recipe: setup ## the whole recipe on the embedded default: pretrain, SFT, reward model, PPO
	@$(BIN)/rlhf-jax recipe $(ARGS)

lab: setup ## the notebooks in JupyterLab, which opens in the browser
	@$(BIN)/jupyter lab --notebook-dir=notebooks $(ARGS)

# Two workers, each with whole files.
test: setup ## the tests; ARGS="-m core" for the part to run while working, also speed, runs, pods, demo, pretrained, feedback, slow
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Strict: a link, a reference or a name that is not there fails, and so does a page that no other links to.
docs: setup ## the documentation site into build/docs, in .venv-docs; a browser opens build/docs/index.html
	@sh .ci/setup-docs
	@.venv-docs/bin/python -m sphinx --builder html --fail-on-warning --keep-going --nitpicky --quiet docs build/docs
	@echo "docs: build/docs/index.html"

test-interop: setup ## the tests against torch and transformers, in .venv-interop
	@sh .ci/setup-interop
	@.venv-interop/bin/python -m pytest -q tests_interop $(ARGS)

test-pods: setup ## the tests that compile for TPUs, which need none, in .venv-pods
	@sh .ci/setup-pods
	@.venv-pods/bin/python -m pytest -q tests_pods $(ARGS)

test-lowest: ## the tests of the method with the oldest packages that pyproject.toml allows, in .venv-lowest
	@RESOLUTION=lowest-direct VENV=.venv-lowest PYTHON='$(PYTHON)' sh .ci/setup
	@.venv-lowest/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "core or speed or runs or pods or demo" $(ARGS)

test-newest: ## the tests of the method with the newest packages that it allows, in .venv-newest
	@RESOLUTION=highest VENV=.venv-newest PYTHON='$(PYTHON)' sh .ci/setup
	@.venv-newest/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "core or speed or runs or pods or demo" $(ARGS)

test-wheel: setup ## the wheel, installed into a fresh environment outside the checkout, runs the recipe
	@VENV='$(VENV)' sh .ci/wheel

lint: setup ## ruff, mypy, the order of imports, white space: every hook of .pre-commit-config.yaml on every file
	@$(BIN)/pre-commit run --all-files

format: setup ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: setup ## resolve requirements.lock and requirements-docs.lock anew from pyproject.toml
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate \
	  --no-emit-index-url --extra dev --extra notebook --extra tensorboard --extra hf --extra ui pyproject.toml --output-file requirements.lock
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  --extra docs --constraint requirements.lock pyproject.toml | grep -vxFf requirements.lock >requirements-docs.lock

clean: ## remove the environments and every cache; runs/ stays
	@rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .jax_cache build dist docs/notebooks *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
