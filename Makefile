# The doors of the project; `make help` lists them.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup recipe test test-interop test-pods lint format lock clean

BIN := .venv/bin
# The Python that makes .venv; empty: the first of python3, python3.14 … python3.11 that is 3.11 or newer.
PYTHON ?=
# Extras to add to the development set, e.g. `make setup EXTRAS=cuda13`.
EXTRAS ?=
# What `make recipe` and `make test` pass on, e.g. `make recipe ARGS="--seed 1"`, `make test ARGS="tests/test_kl.py"`.
ARGS ?=

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS='	' read -r name what; do printf '  make %-13s %s\n' "$$name" "$$what"; done

setup: ## make .venv with everything that development needs (nothing is done when nothing changed)
	@PYTHON='$(PYTHON)' EXTRAS='$(EXTRAS)' sh .ci/setup

recipe: setup ## the whole recipe on the embedded default: pretrain, SFT, reward model, PPO
	@$(BIN)/python scripts/recipe.py $(ARGS)

# Two workers, each with whole files: 6 to 7 minutes on two cores.
test: setup ## the tests
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

test-interop: setup ## the tests against torch and transformers, in .venv-interop
	@sh .ci/setup-interop
	@.venv-interop/bin/python -m pytest -q tests_interop $(ARGS)

test-pods: setup ## the tests that compile for TPUs, which need none, in .venv-pods
	@sh .ci/setup-pods
	@.venv-pods/bin/python -m pytest -q tests_pods $(ARGS)

lint: setup ## ruff and mypy
	@failed=0; $(BIN)/ruff check . || failed=1; $(BIN)/ruff format --check . || failed=1; $(BIN)/mypy || failed=1; exit $$failed

format: setup ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: setup ## resolve requirements.lock anew from pyproject.toml
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate \
	  --no-emit-index-url --extra dev --extra notebook --extra tensorboard --extra hf --extra ui pyproject.toml --output-file requirements.lock

clean: ## remove .venv and every cache; runs/ stays
	@rm -rf .venv .venv-interop .venv-pods .pytest_cache .mypy_cache .ruff_cache .jax_cache build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
