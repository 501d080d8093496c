"""Settings are checked where they are made, and plain JSON becomes settings or one clear line."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from rlhf_jax.config import RunConfig, from_plain, to_plain
from rlhf_jax.errors import UserError
from tests.cases import case

pytestmark = pytest.mark.core


@dataclasses.dataclass(frozen=True)
class Optim:
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    batch: int = 8
    steps: int = 100
    data: tuple[str, ...] = ()
    clip: float | None = None
    optim: Optim = Optim(learning_rate=3e-3)


def test_there_and_back() -> None:
    config = Config(data=("a", "b"), clip=0.2, optim=Optim(betas=(0.8, 0.9)))
    assert from_plain(Config, to_plain(config), where="config.json") == config


def test_the_folder() -> None:
    assert Config(name="first").folder == Path("runs/first")
    assert Config(name="first", out="/tmp/x").folder == Path("/tmp/x")
    with pytest.raises(UserError, match="--name NAME"):
        _ = Config().folder


def test_what_is_not_given_is_the_default_of_the_stage() -> None:
    config = from_plain(Config, {"optim": {"schedule": "linear"}}, where="x.yaml")
    assert config.optim == Optim(learning_rate=3e-3, schedule="linear")


WRONG_SETTINGS = [
    ({"batch": 10, "devices": 2, "microbatches": 2}, "batch 10 is not divisible by .*; use --batch 8"),
    ({"batch": 3, "devices": 4}, "use --batch 4"),
    ({"batch": 0}, "batch: expected 1 or more, got 0"),
    ({"steps": -1}, "steps: expected 0 or more, got -1"),
    ({"name": "../../etc"}, "name: expected .*, got '../../etc'"),
    ({"name": "/etc"}, "name: expected .*, got '/etc'"),
]


def test_settings_that_cannot_be() -> None:
    for row in WRONG_SETTINGS:
        with case(row) as (fields, message), pytest.raises(UserError, match=message):
            Config(**fields)


def test_text_becomes_the_number_that_the_field_wants() -> None:
    # PyYAML reads 1e-3 as text.
    given = {"optim": {"learning_rate": "1e-3"}, "steps": "1e3", "seed": 7.0, "clip": "0.2", "data": "one.jsonl"}
    config = from_plain(Config, given, where="x.yaml")
    assert (config.optim.learning_rate, config.steps, config.seed, config.clip) == (1e-3, 1000, 7, 0.2)
    assert type(config.steps) is type(config.seed) is int
    assert config.data == ("one.jsonl",)


MISFITS = [
    (
        {"optim": {"learning_rat": 1}},
        "x.yaml: unknown field 'optim.learning_rat'; did you mean 'optim.learning_rate'",
    ),
    ({"zzz": 1}, "x.yaml: unknown field 'zzz'; known fields: base, batch, chat_template, clip"),
    ({"steps": "many"}, "x.yaml: field 'steps': expected a whole number, got 'many'"),
    ({"steps": 1.5}, "field 'steps': expected a whole number, got 1.5"),
    ({"steps": float("inf")}, "field 'steps': expected .*, got inf"),
    ({"steps": True}, "field 'steps': expected .*, got True"),
    ({"pmap": 1}, "field 'pmap': expected true or false, got 1"),
    ({"name": 3}, "field 'name': expected text, got 3"),
    ({"optim": 3}, "field 'optim': expected Optim, got 3"),
    ({"optim": {"schedule": "cosin"}}, "expected one of 'cosine', 'linear', got 'cosin'; did you mean 'cosine'"),
    ({"optim": {"betas": [0.9]}}, "field 'optim.betas'"),
    ({"data": ["a", 3]}, r"field 'data\[1\]': expected text, got 3"),
    ({"clip": "x"}, "field 'clip': expected .*, got 'x'"),
]


def test_what_does_not_fit_is_named() -> None:
    for row in MISFITS:
        with case(row) as (given, message), pytest.raises(UserError, match=message):
            from_plain(Config, given, where="x.yaml")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(UserError, match=r"x\.yaml: field 'batch' is missing"):
        from_plain(RunConfig, {"steps": 3}, where="x.yaml")
