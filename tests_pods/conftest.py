"""Tests with the TPU compiler and no TPU; `make test-pods` installs it. The settings are those of tests/."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
