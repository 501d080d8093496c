"""Eight CPU devices and strict settings, before jax is imported; warnings are errors by pyproject.toml."""

import os
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def strict_dtypes() -> Iterator[None]:
    """No implicit promotion; for the tests of losses: `pytestmark = pytest.mark.usefixtures("strict_dtypes")`."""
    with jax.numpy_dtype_promotion("strict"):
        yield
