"""Tests against transformers itself; `make test-interop` installs it. The settings are those of tests/."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
