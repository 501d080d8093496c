"""The names that others call: where they are, and with which arguments."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_jax
from tests.cases import case

pytestmark = pytest.mark.core

# name -> (module, parameters as a caller writes them; a default is a promise too)
SIGNATURES = {
    "masked_mean": ("masked", "(x, mask, axis_name=None, *, count=None)"),
    "masked_whiten": ("masked", "(x, mask, axis_name=None, *, keep_mean=False, epsilon=1e-08)"),
    "next_token_loss": ("losses", "(logits, targets)"),
    "ranking_loss": ("losses", "(scores, ranks, mask)"),
    "pairwise_loss": ("losses", "(chosen, rejected)"),
    "clipped_surrogate": ("losses", "(log_ratio, advantage, *, clip)"),
    "clipped_value_loss": ("losses", "(value, old_value, target, *, clip)"),
    "kl_penalized_reward": ("returns", "(logp, ref_logp, score, mask, *, kl_coef)"),
    "generalized_advantages": ("returns", "(reward, value, mask, *, gamma, lam)"),
    "kl_estimate": ("kl", "(logp, ref_logp, *, estimator='k1')"),
    "extract_dialogues": ("data", "(text)"),
}


def test_signatures_are_those_that_others_call() -> None:
    for name in SIGNATURES:
        with case(name):
            module, wanted = SIGNATURES[name]
            function = inspect.unwrap(getattr(importlib.import_module(f"rlhf_jax.{module}"), name))
            bare = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
            assert str(inspect.Signature(bare)) == wanted


def test_the_model_and_the_sampler_are_where_they_are_called() -> None:
    from rlhf_jax.config import ModelConfig
    from rlhf_jax.generate import Generation, generate
    from rlhf_jax.model import Transformer

    assert list(inspect.signature(Transformer.__call__).parameters)[:3] == ["self", "tokens_BT", "mask"]
    assert Transformer(ModelConfig()).config == ModelConfig()
    assert callable(generate)
    assert Generation._fields == ("tokens", "mask", "logp")


def test_every_public_name_is_the_one_of_its_module_and_known_to_type_checkers() -> None:
    tree = ast.parse(Path(rlhf_jax.__file__).read_text(encoding="utf-8"))
    typed = {
        name.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("rlhf_jax.")
        for name in node.names
    }
    assert sorted(typed) == sorted(rlhf_jax.__all__)
    for name, module in typed.items():
        assert getattr(rlhf_jax, name) is getattr(importlib.import_module(str(module)), name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = rlhf_jax.no_such_name
    assert set(rlhf_jax.__all__) <= set(dir(rlhf_jax))


def test_importing_the_package_imports_nothing_heavy() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import rlhf_jax, sys; print({'jax', 'flax', 'orbax', 'numpy'} & set(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert said.stdout.strip() == "set()", said.stdout
