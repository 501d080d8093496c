"""Preference optimization: settings, rows, the loss of a prompt, and runs from comparisons to a policy."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses
from rlhf_jax.config import METHODS, LoraConfig, ModelConfig, OptimConfig
from rlhf_jax.data import Comparison, Ledger, Message, Ranking, encode_rankings
from rlhf_jax.data.preferences import preference_rows
from rlhf_jax.errors import UserError
from rlhf_jax.inference import load
from rlhf_jax.pretrained.source import LANGUAGE, open_source
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.metrics import read_rows
from rlhf_jax.stages.preference import Config, kl_baseline, preference_losses
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.trainers import one_network, preference
from tests.cases import case
from tests.made_params import random_params
from tests.made_runs import write_run

BYTES = Tokenizer.bytes()
MODEL = ModelConfig(vocab_size=BYTES.vocab_size, context=48, width=16, layers=1, heads=2)


@pytest.mark.core
def test_each_method_names_its_loss_and_what_it_reads() -> None:
    for name, method in METHODS.items():
        with case(name):
            assert callable(getattr(losses, method.loss))
            assert set(method.settings) <= {field.name for field in dataclasses.fields(Config)}
            assert Config(method=name).coefficients == method.settings
            assert Config(method=name).likelihood_weight == method.sft_coef
    given = Config(method="simpo", beta=3.0, sft_coef=0.5)
    assert (given.coefficients, given.likelihood_weight) == ({"beta": 3.0, "margin": 1.0}, 0.5)


@pytest.mark.core
def test_settings_that_a_method_does_not_read_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "ipo", "label_smoothing": 0.1}, "label_smoothing: expected none with method ipo, .*: dpo, robust"),
        ({"margin": 1.0}, "margin: expected none with method dpo, which does not read it, got 1.0; .*: simpo"),
        ({"method": "simpo", "reference": "runs/a"}, "reference: expected none with method simpo, which has none"),
        ({"alpha": 0.3}, "alpha: expected none without divergence alpha, got 0.3"),
        ({"divergence": "alpha", "alpha": 0.0}, "alpha: expected more than 0, got 0.0"),
        ({"beta": 0.0}, "beta: expected more than 0, got 0.0"),
        ({"method": "kto", "desirable_weight": -1.0}, "desirable_weight: expected 0 or more, got -1.0"),
        ({"method": "exo", "label_smoothing": 0.0}, "label_smoothing: expected more than 0, got 0.0"),
        ({"method": "robust", "label_smoothing": 0.5}, "label_smoothing: expected less than 0.5, got 0.5"),
        ({"sft_coef": -1.0}, "sft_coef: expected 0 or more, got -1.0"),
    ]
    for settings, message in cases:
        with case(settings), pytest.raises(UserError, match=message):
            Config(**settings)


@pytest.mark.core
def test_only_the_models_own_tokens_carry_loss() -> None:
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    rest = (Message("assistant", "d"), Message("user", "e"), Message("assistant", "f"))
    other = (Message("assistant", "g"),)
    records = [
        Comparison("hi", " yes", " no", where="here:1", ended=(True, False)),
        Ranking("hi", (" a", " b", " cd"), (2, 1, 1), where="here:2"),
        Comparison("", "d", "g", where="here:3", turns=turns, rests=(rest, other), ended=(True, False)),
    ]
    rankings = encode_rankings(records, BYTES, max_tokens=200, ledger=Ledger())
    rows = preference_rows(rankings, BYTES)

    def learned(place: int) -> list[str]:
        pairs = zip(rankings.rows[place][0], rows.masks[place], strict=True)
        return [
            "".join("$" if i == BYTES.eos_id else chr(i) for i, own in zip(ids, mask, strict=True) if own)
            for ids, mask in pairs
        ]

    assert learned(0) == [" yes$", " no"]
    assert learned(1) == [" a$", " b$", " cd$"]
    assert learned(2) == [" d$ f$", " g"]  # of the user's turn between, and of the turns before, nothing
    batch = rows.batch(np.array([1, 0]), among=np.array([0, 1, 2]))
    assert batch.unrelated is None
    assert batch.ranking.tokens_BKT.shape == batch.loss_mask_BKT.shape == (2, 3, rows.row_length(np.array([2])))
    np.testing.assert_array_equal(batch.loss_mask_BKT.sum(axis=2), [[3, 3, 4], [5, 3, 0]])
    assert (batch.loss_mask_BKT <= batch.ranking.mask_BKT).all()


@pytest.mark.core
def test_the_baseline_pairs_each_prompt_with_a_response_to_another() -> None:
    texts = [("a", " 1", " 2"), ("a", " 3", " 4"), ("b", " 5", " 6"), ("c" * 20, " 7", " " + "8" * 20)]
    records = [Comparison(*row, where=f"here:{n}") for n, row in enumerate(texts)]
    limit = 1 + 20 + 21 + 1
    rankings = encode_rankings(records, BYTES, max_tokens=limit, ledger=Ledger())
    rows = preference_rows(rankings, BYTES, unrelated=True)
    found = [bytes(i for i in ids if i < 256).decode() for ids, _ in rows.unrelated]
    # The chosen one of the next other prompt for even rows, the rejected one for odd ones.
    assert found == ["a 5", "a 6", "b 7", "c" * 20 + " 2"]
    targets = [[ids[at] for at, own in enumerate(mask) if own] for ids, mask in rows.unrelated]
    assert [ids[-1] for ids in targets] == [BYTES.eos_id] * 4 and [len(ids) for ids in targets] == [3] * 4
    batch = rows.batch(np.array([3, 0]))
    assert batch.unrelated is not None and batch.unrelated.tokens_BT.shape == (2, batch.ranking.tokens_BKT.shape[2])
    alone = preference_rows(dataclasses.replace(rankings, rows=rankings.rows[:2], sources=rankings.sources[:2]), BYTES)
    assert alone.unrelated == ()
    same = dataclasses.replace(rankings, rows=rankings.rows[:2], sources=rankings.sources[:2])
    none = preference_rows(same, BYTES, unrelated=True)
    assert list(none.unrelated) == [([], []), ([], [])]  # one prompt alone
    empty = none.batch(np.array([0, 1])).unrelated
    assert empty is not None and not np.any(empty.loss_mask_BT)
    # z is the mean of what exists, and not negative.
    exists = np.array([True, True, False])
    for log_ratio, z in (([1.0, 2.0, np.nan], 1.5), ([-1.0, -2.0, 9.0], 0.0)):
        assert kl_baseline(jnp.array(log_ratio), exists) == pytest.approx(z)


@pytest.mark.core
def test_the_loss_of_a_prompt_is_the_mean_over_its_ordered_pairs() -> None:
    draws = np.random.default_rng(0)
    logp, ref_logp = -draws.gamma(5.0, 1.0, (2, 3, 4)).astype(np.float32)
    tokens = draws.integers(1, 6, (3, 4))
    ranks = np.array([[1, 2, 2, 3], [2, 1, 0, 0], [1, 1, 0, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]], bool)
    pairs = [[(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)], [(1, 0)], []]

    @jax.jit
    def every(logp: jax.Array, ref_logp: jax.Array) -> dict[str, Any]:
        return {
            name: preference_losses(
                *(logp, ref_logp if method.reference else None, tokens, ranks, mask),
                Config(method=name, sft_coef=0.5),
                jnp.float32(0.3) if method.unpaired else None,
            )
            for name, method in METHODS.items()
        }

    dirty = np.where(mask, logp, np.nan)  # of a missing response
    for name, (loss, metrics) in every(dirty, ref_logp).items():
        method = METHODS[name]
        number = (logp - ref_logp if method.reference else logp) / (tokens if method.per_token else 1)
        function = getattr(losses, method.loss)
        for row, expected_pairs in enumerate(pairs):
            found, right, margin = [], [], []
            for w, other in expected_pairs:
                win, lose = jnp.float32(number[row, w]), jnp.float32(number[row, other])
                if method.unpaired:
                    good = function(win, jnp.array(True), jnp.float32(0.3), **method.settings)
                    one = (good + function(lose, jnp.array(False), jnp.float32(0.3), **method.settings)) / 2
                else:
                    one = function(win, lose, **method.settings)
                found.append(float(one) - 0.5 * logp[row, w] / tokens[row, w])
                right.append(win > lose)
                margin.append(method.settings["beta"] * (win - lose))
            with case((name, row)):
                assert float(loss[row]) == pytest.approx(np.mean(found) if found else 0.0, rel=2e-5)
                assert float(metrics["accuracy"][row]) == pytest.approx(np.mean(right) if right else 0.0)
                assert float(metrics["margin"][row]) == pytest.approx(np.mean(margin) if margin else 0.0, rel=2e-5)
    np.testing.assert_allclose(metrics["chosen_logp"][1], logp[1, 1], rtol=1e-6)
    np.testing.assert_allclose(metrics["rejected_logp"][1], logp[1, 0], rtol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, and comparisons whose chosen answer is the same letters."""
    root = tmp_path_factory.mktemp("preferences")
    write_run(root / "sft", "sft", random_params(MODEL), MODEL, BYTES)
    rows: list[dict[str, Any]] = [{"prompt": f"{n}:", "chosen": " ab", "rejected": " cde"} for n in range(10)]
    rows.append({"prompt": "r:", "responses": [" ab", " x", " cde"], "ranks": [1, 2, 3]})
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def config(folder: Path, out: str, **settings: Any) -> Config:
    given: dict[str, Any] = {
        "init": str(folder / "sft"),
        "data": (str(folder / "pairs.jsonl"),),
        "heldout_fraction": 0.2,
        "batch": 8,
        "steps": 12,
        "log_every": 1,
        "optimizer": OptimConfig(learning_rate=3e-3, warmup_steps=0, warmup_fraction=0.05, schedule="constant"),
    }
    return Config(out=str(folder / out), **(given | settings))


@pytest.fixture(scope="module")
def learnt(folder: Path) -> Any:
    """A run by KTO, whose update has all parts."""
    return preference.run(config(folder, "kto", method="kto"))


@pytest.mark.runs
def test_chosen_answers_become_more_likely_and_the_margin_rises(folder: Path, learnt: Any) -> None:
    others = [preference.run(config(folder, name, method=name)) for name in ("dpo", "orpo")]
    for done in (learnt, *others):
        name, rows = done.run.path.name, read_rows(done.run.metrics)
        with case(name):
            first, last = rows[0], rows[-1]
            assert last["loss"] < 0.9 * first["loss"] and last["accuracy"] == 1.0
            assert last["chosen_logp"] > first["chosen_logp"] + 1.0
            assert last["margin"] > first["margin"] + 0.05
            assert last["chosen_logp"] - last["rejected_logp"] > first["chosen_logp"] - first["rejected_logp"] + 1.0
            assert done.summary["heldout_accuracy"] == rows[-1]["eval/accuracy"] == 1.0
            assert done.summary["heldout_prompts"] == 2 and done.summary["heldout_loss"] < first["loss"]
            # With a reference model, both are the same policy at first.
            assert (first["margin"] == 0.0) == (name != "orpo")
    assert read_rows(learnt.run.metrics)[0]["kl_baseline"] == 0.0
    assert read_rows(learnt.run.metrics)[-1]["kl_baseline"] >= 0.0
    assert learnt.run.config["beta"] == 0.1 and learnt.run.config["desirable_weight"] == 1.0


@pytest.mark.runs
def test_a_run_on_a_mesh_with_adapters_is_that_of_one_device(folder: Path) -> None:
    # Gradients on eight devices and under pmap are compared in test_parallel.py.
    settings: dict[str, Any] = {"steps": 2, "lora": LoraConfig(rank=2)}
    ways: dict[str, dict[str, Any]] = {"one": {}, "mesh": {"mesh": "data=2,fsdp=2,tensor=2", "microbatches": 2}}
    one, mesh = (
        read_rows(preference.run(config(folder, f"lora_{way}", **settings, **given)).run.metrics)
        for way, given in ways.items()
    )
    assert one[1]["chosen_logp"] != one[0]["chosen_logp"] and one[0]["margin"] == 0.0
    for row, other in zip(one, mesh, strict=True):
        for name in ("loss", "margin", "chosen_logp", "grad_norm", "tokens"):
            assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-5), name
    assert mesh[-1]["eval/loss"] == pytest.approx(one[-1]["eval/loss"], rel=1e-5)
    source = open_source(str(folder / "lora_mesh"), stages=LANGUAGE)
    assert source.lora == LoraConfig(rank=2) and source.base is not None


@pytest.mark.runs
def test_a_stopped_run_resumes_bit_for_bit(folder: Path, learnt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = one_network.batch_at

    def stopping(*args: Any, step: int, **share: Any) -> Any:
        if step == 5:
            raise RuntimeError("enough")
        return read(*args, step=step, **share)

    settings: dict[str, Any] = {"method": "kto", "save_every": 2}
    with monkeypatch.context() as patch:
        patch.setattr(one_network, "batch_at", stopping)
        with pytest.raises(RuntimeError, match="enough"):
            preference.run(config(folder, "cut", **settings))
    assert not RunFolder.open(folder / "cut", stages=("preference",)).finished
    with pytest.raises(UserError, match=r"beta: expected 0\.1 as in the earlier run, got 0\.2"):
        preference.run(config(folder, "cut", **settings, beta=0.2))
    cut = preference.run(config(folder, "cut", **settings))
    jax.tree.map(np.testing.assert_array_equal, cut.run.load_params(), learnt.run.load_params())
    assert cut.summary == learnt.summary


@pytest.mark.runs
def test_the_run_is_a_policy_for_the_stages_that_follow(folder: Path, learnt: Any) -> None:
    source = open_source(str(learnt.run.path), stages=LANGUAGE)
    assert (source.stage, source.scalar, source.model) == ("preference", False, MODEL)
    jax.tree.map(np.testing.assert_array_equal, source.params(), learnt.run.load_params())
    assert len(load(str(learnt.run.path)).generate(["3:"], max_new_tokens=3, temperature=0)) == 1
    # Another reference model than the initial policy: the margin is that to it from the start.
    again = preference.run(
        config(folder, "again", init=str(learnt.run.path), reference=str(folder / "sft"), steps=1, method="dpo")
    )
    first = read_rows(again.run.metrics)[0]
    assert first["margin"] > 0.1 and first["accuracy"] == 1.0
    assert set(again.run.inputs) == {"init", "rankings", "heldout", "reference"}


@pytest.mark.runs
def test_what_it_cannot_train_on_is_refused(folder: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"init": ""}, "init: expected a fine-tuned model, got nothing; use --init FOLDER"),
        ({"data": ()}, "data: expected comparisons or rankings, got nothing; use --data FILE.jsonl"),
        ({"data": ("embedded",)}, "data: expected files of comparisons or rankings, got embedded"),
        ({"max_tokens": 3}, "data: none of 11 rankings is left to train on; 11 dropped"),
    ]
    for settings, message in cases:
        with case(settings), pytest.raises(UserError, match=message):
            preference.run(config(folder, "refused", **settings))
    assert not (folder / "refused").exists()
