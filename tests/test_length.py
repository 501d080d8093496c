"""Batch and steps from epochs and rows, the warm-up, and the warnings at the end of a stage."""

import re
from typing import Any

import pytest

from rlhf_jax.config import OptimConfig, RewardConfig, SFTConfig
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.warnings import reward_warnings, sft_warnings
from rlhf_jax.runs.length import run_length
from rlhf_jax.trainers.inputs import wants_embedded
from tests.cases import case

pytestmark = pytest.mark.core

LENGTHS: list[tuple[int, dict[str, Any], tuple[int, int]]] = [
    (60, {}, (4, 15)),  # 32, 16 and 8 would make fewer than 16 steps
    (512, {}, (32, 16)),
    (511, {}, (16, 32)),
    (128, {}, (8, 16)),
    (3, {}, (3, 1)),
    (60, {"epochs": 3}, (4, 45)),
    (10, {"batch": 4}, (4, 3)),  # 2.5 steps, rounded up
    (10, {"batch": 4, "epochs": 2.0}, (4, 5)),
    (30, {"batch": 1, "epochs": 0.1}, (1, 3)),  # 0.1 × 30 is 3.0000000000000004 in floating point
    (60, {"epochs": 0}, (4, 0)),
    (60, {"steps": 7}, (4, 7)),
    (60, {"batch": 32}, (32, 2)),
    (60, {"batch": 64, "steps": 9}, (4, 9)),
    (60, {"devices": 8}, (8, 8)),
    (60, {"devices": 3, "microbatches": 2}, (6, 10)),
    (3, {"devices": 4, "batch": 4}, (4, 1)),  # a row each is the least, though one is there twice
]


def test_an_epoch_is_every_row_once() -> None:
    for row in LENGTHS:
        with case(row) as (rows, settings, (batch, steps)):
            for config in (SFTConfig(**settings), RewardConfig(**settings)):
                length = run_length(config, rows, epochs=1.0, what="rows")
                assert (length.batch, length.steps, length.epochs) == (batch, steps, steps * batch / rows)
            said = "".join(f"{line}\n" for line in length.lines)
            assert ("warning: batch 64 is more than the 60 rows to train on; using --batch 4\n" in said) == (
                settings.get("batch") == 64
            )
            assert f"{rows} rows, batch {batch}: {steps} steps, " in said
    assert run_length(SFTConfig(), 60, epochs=3.0, what="rows").steps == 45


def test_lengths_that_cannot_be() -> None:
    for settings, message in (
        ({"epochs": 2, "steps": 3}, "epochs: expected epochs or steps, got 2 epochs and 3 steps; use one of the two"),
        ({"epochs": 0, "steps": 0}, "use one of the two"),
        ({"epochs": -1}, "epochs: expected 0 or more"),
        ({"epochs": float("inf")}, "epochs: expected 0 or more and less than inf, got inf"),
        ({"epochs": float("nan")}, "epochs: expected 0 or more"),
        ({"steps": -1}, "steps: expected 0 or more, got -1"),
        ({"batch": 0}, "batch: expected 1 or more, got 0"),
    ):
        for config in (SFTConfig, RewardConfig):
            with case(settings), pytest.raises(UserError, match=re.escape(message)):
                config(**settings)


def test_the_warm_up_is_a_fraction_or_a_number_of_steps() -> None:
    for settings, steps, warmup in (
        ({}, 1000, 50),
        ({}, 2, 1),
        ({}, 0, 0),
        ({"warmup_fraction": 0.0}, 1000, 0),
        ({"warmup_fraction": 0.1}, 30, 3),
        ({"warmup_steps": 10}, 1, 10),
        ({"warmup_steps": 0}, 1000, 0),
    ):
        with case((settings, steps)):
            assert OptimConfig(**settings).warmup(steps) == warmup  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected warmup_steps or warmup_fraction, got 10 and"):
        OptimConfig(warmup_steps=10, warmup_fraction=0.1)


def test_what_a_reward_model_is_doubted_for() -> None:
    for arguments, doubts in (
        ((0.9, (0.8, 0.95), 60, 100), []),
        ((0.667, (0.21, 0.94), 3, 15), ["accuracy 0.67 may be chance (95% interval 0.21 to 0.94, 3 prompts)"]),
        ((0.3, (0.2, 0.4), 90, 15), ["accuracy 0.30 is worse than chance (95% interval 0.20 to 0.40"]),
        ((None, None, 0, 15), ["nothing was held out"]),
        ((0.5, (0.4, 0.6), 60, 0), ["may be chance", "it was not trained"]),
    ):
        with case(arguments):
            accuracy, interval, prompts, steps = arguments
            found = reward_warnings(accuracy, interval, prompts, steps=steps)  # type: ignore[arg-type]
            assert len(found) == bool(doubts) and all(doubt in found[0] for doubt in doubts)


def test_over_fitting_is_a_rise_of_the_held_out_loss_alone() -> None:
    def curve(*points: tuple[int, float, float]) -> list[dict[str, Any]]:
        rows = [{"step": step, "loss": loss, "eval/loss": held} for step, loss, held in points]
        return [{"step": 1, "loss": 5.0}, *rows]

    for rows, before, release, said in (
        (curve((10, 2.0, 3.0), (20, 1.5, 2.5), (30, 1.4, 2.51)), 5.0, "best", None),  # within 1%
        (
            curve((10, 2.0, 3.0), (20, 1.5, 2.5), (30, 1.2, 3.8)),
            5.0,
            "best",
            "over-fits; later .* of step 20; .*epochs",
        ),
        (
            curve((10, 2.0, 3.0), (20, 1.5, 2.5), (30, 1.2, 3.8)),
            5.0,
            "last",
            "over-fits; later .* of step 30$",
        ),
        (
            curve((10, 2.0, 3.0), (20, 2.6, 3.8)),
            5.0,
            "best",
            "from 3.000 after step 10, .* it diverges; .*learning-rate",
        ),
        (curve((10, 2.0, 3.0), (20, 1.5, 3.5)), 2.5, "best", "3.000 at best, 2.500 before training"),
        (curve(), 5.0, "best", None),
    ):
        with case((rows, before, release)):
            found = sft_warnings(rows, before, release=release)
            assert len(found) == (said is not None)
            for text in found:
                assert said is not None and re.search(said, text), text


def test_data_is_named() -> None:
    assert wants_embedded("data", ("embedded",), "text") and not wants_embedded("data", ("./embedded", "b"), "text")
    with pytest.raises(
        UserError, match=r"^pretraining_data: expected files of text, got nothing; use --pretraining-data"
    ):
        wants_embedded("pretraining_data", (), "text")
    with pytest.raises(UserError, match="expected files or embedded, got a and embedded"):
        wants_embedded("data", ("a", "embedded"), "text")
