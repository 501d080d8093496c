"""Tests against transformers itself; `make test-interop` installs it. The settings are those of tests/."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# The models are made here or come with a package: nothing is looked up.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors in our own tests; those of torch and transformers are theirs."""
    config.addinivalue_line("filterwarnings", "default")
