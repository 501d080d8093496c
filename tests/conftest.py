"""Eight CPU devices and strict settings, before jax is imported; warnings are errors by pyproject.toml."""

import os
from collections.abc import Callable, Iterator

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def strict_dtypes() -> Iterator[None]:
    """No implicit promotion; for the tests of losses: `pytestmark = pytest.mark.usefixtures("strict_dtypes")`."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """Less optimisation, for modules that compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def one_by_one(function: Callable) -> Callable:
    """What vmap and pmap do over the leading axis of all arrays, without either."""

    def stacked(*arrays):
        results = [function(*row) for row in zip(*map(np.asarray, arrays))]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *results)

    return stacked


WAYS = {
    "plain": one_by_one,
    "jit": lambda function: one_by_one(jax.jit(function)),
    "vmap": lambda function: jax.jit(jax.vmap(function)),
    "pmap": jax.pmap,
}


@pytest.fixture(params=WAYS.keys())
def way(request: pytest.FixtureRequest) -> Callable:
    """Each way to run a function of one case on a stack of at most 8 cases."""
    return WAYS[request.param]
