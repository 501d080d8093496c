"""Eight CPU devices, quick compiling, strict settings, before jax is imported; pyproject.toml makes warnings errors."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.cli.startup import known_flags

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
# Compiling is most of the tests' time. Here and in the processes that they start it goes without LLVM's optimisations,
# with XLA's older emitter of loops, in one piece, and without line numbers in programs.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["XLA_FLAGS"] = " ".join(
    (
        *known_flags(("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")),
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    )
)

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# What a process compiles that a test starts, the next ones find on the disk. This one, which seldom compiles a program
# twice, would mostly write: set after the import, and xdist's workers, which inherit it, write what took long alone.
COMPILED = tempfile.mkdtemp(prefix="compiled_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED)
os.environ["XDG_CACHE_HOME"] = COMPILED
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


# The files that take longest, which start first: with two workers, each taking whole files, none ends long before the
# other.
LONGEST = (
    "test_reward_runs test_notebooks test_experiments test_chaos test_scripts test_doctor test_sources test_film "
    "test_distributed test_parallel test_episodes test_docs test_cache test_generate test_model test_preference "
    "test_compilations test_feedback_browser test_packing test_packed_rankings test_attention test_checkpoint "
    "test_plan test_losses test_fit test_environments test_embedded test_inference test_alarms "
    "test_feedback_reliability test_huggingface test_convert test_sharding test_optim test_evaluate test_readme"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; the Makefile tells xdist to keep this order."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """Exempts all that was imported from garbage collection, which would walk over it again and again as JAX traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_unconfigure() -> None:
    """Removes the compiled programs."""
    shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def run_notebook(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """run_notebook(path): a notebook with the outputs of a run.

    All start with the session and run beside the tests before theirs, with what these leave of the processor; where
    pytest has several workers, with the first test that asks.
    """
    root, folder = Path(__file__).parents[1], tmp_path_factory.mktemp("notebooks")
    command = ["nice", sys.executable, "-m", "tests.run_notebook"]
    running: dict[Path, subprocess.Popen[bytes]] = {}
    # Experiments in their short form.
    short = {**os.environ, "NOTEBOOK_SHORT": "1"}

    def start() -> None:
        # That of the film task needs a run of it: tests/test_film.py.
        for path in sorted({*root.glob("notebooks/*.ipynb")} - {root / "notebooks" / "film.ipynb"}):
            out = folder / path.name
            with open(out.with_suffix(".log"), "wb") as log:
                running[path] = subprocess.Popen(
                    [*command, str(path), str(out)], cwd=root, env=short, stdout=log, stderr=log
                )

    alone = "PYTEST_XDIST_WORKER" not in os.environ
    if alone and any(item.path.stem == "test_notebooks" for item in request.session.items):
        start()

    def finished(path: Path) -> Any:
        import nbformat

        if not running:
            start()
        out = folder / path.name
        assert running[path].wait() == 0, out.with_suffix(".log").read_text()
        return nbformat.read(out, as_version=4)

    yield finished
    for process in running.values():
        process.kill()
        process.wait()


@pytest.fixture
def strict_dtypes() -> Iterator[None]:
    """No implicit promotion; for the tests of losses: `pytestmark = pytest.mark.usefixtures("strict_dtypes")`."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def each_key_once() -> Iterator[None]:
    """A random key that is used twice is an error, for modules that draw: the check takes a seventh of their time."""
    jax.config.update("jax_debug_key_reuse", True)
    yield
    jax.config.update("jax_debug_key_reuse", False)


def one_by_one(function: Callable) -> Callable:
    """What vmap and pmap do over the leading axis of all arrays, without either."""

    def stacked(*arrays):
        results = [function(*row) for row in zip(*map(np.asarray, arrays))]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *results)

    return stacked


WAYS: dict[str, Callable[[Callable], Callable]] = {
    "plain": one_by_one,
    "jit": lambda function: one_by_one(jax.jit(function)),
    "vmap": lambda function: jax.jit(jax.vmap(function)),
    "pmap": jax.pmap,
}
