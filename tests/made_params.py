"""Parameters of networks that nobody trained, drawn without a compiler."""

import functools
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from rlhf_jax.arrays import Params, flattened, nested
from rlhf_jax.config import LoraConfig, ModelConfig
from rlhf_jax.lora import init_adapter
from rlhf_jax.pretrained import huggingface, peft
from rlhf_jax.pretrained.huggingface import parameter_shapes

_shapes = functools.cache(parameter_shapes)


@pytest.fixture(scope="module")
def shapes_traced_once() -> Iterator[None]:
    """The shapes of a network's parameters, which take a trace of it, are asked for once for each configuration."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (huggingface, peft):
            patch.setattr(module, "parameter_shapes", lambda model, scalar: dict(_shapes(model, scalar)))
        yield


def random_params(model: ModelConfig, scalar: bool = False, seed: int = 0) -> Params:
    """Random ones everywhere, norms and biases too, so that every one shows."""
    draws = np.random.default_rng(seed)
    shapes = _shapes(model, scalar)
    return nested({path: 0.3 * draws.standard_normal(shapes[path]).astype(np.float32) for path in sorted(shapes)})


def random_adapter(model: ModelConfig, lora: LoraConfig, *, trained: bool, seed: int = 0) -> Params:
    """An adapter, whose B is 0 before training."""
    draws = np.random.default_rng(seed)
    base = random_params(model)
    leaves = flattened(jax.eval_shape(lambda: init_adapter(base, lora, jax.random.key(0))))
    drawn = {path: 0.3 * draws.standard_normal(leaf.shape).astype(leaf.dtype) for path, leaf in leaves.items()}
    return nested({path: leaf if trained or path.endswith("lora_a") else 0 * leaf for path, leaf in drawn.items()})
