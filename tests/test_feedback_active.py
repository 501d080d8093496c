"""Active choice: disagreement by hand, a greedy choice equal to a plain loop, heads at the optimum of our own loss."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import active_choice
from benchmarks.active_choice import Pairs, Split, labels_needed
from rlhf_jax.feedback.active import Beliefs, Heads, choose, preference_probabilities
from rlhf_jax.losses import pairwise_loss
from tests.cases import case

pytestmark = pytest.mark.feedback


def test_disagreement_by_hand() -> None:
    probability = np.array([[0.9, 0.5, 1.0], [0.1, 0.5, 0.5]])
    beliefs = Beliefs.of_members(probability)
    np.testing.assert_allclose(beliefs.disagreement, [0.16, 0.0, 0.0625])
    np.testing.assert_allclose(beliefs.noise, [0.25, 0.25, 0.1875])
    assert choose(beliefs, 3).tolist() == [0, 2, 1]
    np.testing.assert_allclose(
        preference_probabilities(np.array([2.0, -900.0]), np.array([1.0, 900.0])), [1 / (1 + np.exp(-1)), 0.0]
    )
    with pytest.raises(ValueError, match="shapes differ"):
        preference_probabilities(np.zeros(2), np.zeros(3))


def test_an_answer_is_asked_once() -> None:
    # Pairs 0 and 1 are one question, of variance 0.16, and 0.16 - 0.16² / (0.16 + 0.25) = 0.098 once the other is
    # answered; 2 is independent, of variance 0.35² = 0.12.
    probability = np.array([[0.9, 0.9, 0.85], [0.9, 0.9, 0.15], [0.1, 0.1, 0.85], [0.1, 0.1, 0.15]])
    assert choose(Beliefs.of_members(probability), 3).tolist() == [0, 2, 1]


def test_a_response_is_asked_about_once_while_there_are_others() -> None:
    # Disagreement falls from pair to pair; the members move independently, so that no answer says anything of others.
    deviation = np.diag([0.5, 0.4, 0.3, 0.2, 0.1])
    beliefs = Beliefs(np.full(5, 0.5), deviation)
    responses = np.array([[0, 1], [1, 2], [3, 4], [4, 0], [5, 6]])
    assert choose(beliefs, 5).tolist() == [0, 1, 2, 3, 4]
    assert choose(beliefs, 5, responses=responses).tolist() == [0, 2, 4, 1, 3]
    assert choose(beliefs, 4, responses=responses, used=np.array([3, 6])).tolist() == [0, 1, 2, 3]
    assert choose(beliefs, 2, responses=responses, used=np.array([0, 1]), candidates=2).tolist() == [2, 4]


def test_the_choice_is_that_of_a_plain_loop() -> None:
    for targeted in [False, True]:
        with case(targeted):
            random = np.random.default_rng(0)
            beliefs = Beliefs.of_members(random.random((6, 40)))
            targets = beliefs.take(np.arange(15)) if targeted else None
            everything = beliefs.deviation.T @ beliefs.deviation
            wanted: list[int] = []
            for _ in range(10):
                worth = []
                for n in range(40):
                    v = everything[n, n]
                    of_targets = np.sum(everything[n, :15] ** 2) / (v + beliefs.noise[n])
                    worth.append(-1.0 if n in wanted else of_targets if targeted else v / beliefs.noise[n])
                best = int(np.argmax(worth))
                wanted.append(best)
                column = everything[:, best].copy()
                everything -= np.outer(column, column) / (everything[best, best] + beliefs.noise[best])
            assert choose(beliefs, 10, targets=targets).tolist() == wanted
            assert choose(beliefs, 1, targets=targets, candidates=5).tolist() == wanted[:1]
            with pytest.raises(ValueError, match="count: expected 0 to 40, the number of pairs, got 41"):
                choose(beliefs, 41)


def test_heads_are_at_the_optimum_of_the_pairwise_loss() -> None:
    random = np.random.default_rng(1)
    gap = random.standard_normal((50, 4))
    heads = Heads.fit(gap, precision=0.3)

    def loss(head: jax.Array) -> jax.Array:
        score = jnp.asarray(gap, jnp.float32) @ head
        return jnp.sum(pairwise_loss(score, jnp.zeros_like(score))) + 0.15 * jnp.sum(jnp.square(head))

    head = jnp.asarray(heads.mean, jnp.float32)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(head), np.zeros(4), atol=1e-4)
    np.testing.assert_allclose(jax.jit(jax.hessian(loss))(head), heads.root @ heads.root.T, rtol=1e-4, atol=1e-4)
    again = Heads.fit(gap, precision=0.3, start=np.full(4, 30.0))
    np.testing.assert_allclose(again.mean, heads.mean, atol=1e-7)


def test_beliefs_of_all_heads_are_those_of_many_drawn() -> None:
    random = np.random.default_rng(2)
    gap = random.standard_normal((400, 3))
    gap *= np.sign(gap @ [1.0, -0.5, 0.2] + random.logistic(size=400))[:, None]
    heads = Heads.fit(gap, precision=1.0)
    asked = random.standard_normal((5, 3))
    exact = heads.beliefs(asked)
    scores = heads.draw(20_000, np.random.default_rng(0)) @ asked.T
    drawn = Beliefs.of_members(preference_probabilities(scores, np.zeros_like(scores)))
    np.testing.assert_allclose(exact.mean, drawn.mean, atol=0.01)
    np.testing.assert_allclose(exact.deviation.T @ exact.deviation, drawn.deviation.T @ drawn.deviation, atol=3e-4)


def test_labels_needed_for_a_target() -> None:
    assert labels_needed([10, 20, 30], [0.5, 0.6, 0.8], 0.7) == pytest.approx(25.0)
    assert labels_needed([10, 20], [0.5, 0.6], 0.5) == 10.0
    assert labels_needed([10, 20], [0.5, 0.6], 0.7) is None


def test_no_held_out_text_is_learned_from() -> None:
    random = np.random.default_rng(0)
    chosen, rejected = random.integers(0, 100, (2, 500))
    pairs = Pairs([str(n) for n in range(100)], chosen, rejected, random.random(100))
    split = Split.of(pairs, 0.3, random)
    learned = {*chosen[split.pool], *rejected[split.pool]}
    held = {*chosen[split.heldout], *rejected[split.heldout], *split.by_mean[0], *split.by_mean[1]}
    assert not learned & held and len(split.pool) > 150 and len(split.heldout) > 20
    assert np.all(pairs.mean[split.by_mean[0]] > pairs.mean[split.by_mean[1]])


def test_the_experiment_runs_from_a_file_to_its_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = np.random.default_rng(0).permutation([f"{a}{b}{c}" for a, b, c in itertools.product("abc", repeat=3)])
    texts = [f"{one} {two}" for one, two in itertools.combinations(words[:20], 2)]
    worth = {text: float(sum(ord(letter) for letter in text)) for text in texts}
    rows = []
    for one, two in np.random.default_rng(1).choice(texts, (600, 2)):
        if worth[one] != worth[two]:
            chosen, rejected = (one, two) if worth[one] > worth[two] else (two, one)
            about = {"mean_chosen": worth[chosen], "mean_rejected": worth[rejected]}
            rows.append({"prompt": "", "chosen": chosen, "rejected": rejected, **about})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "--data",
        "data.jsonl",
        "--out",
        "out",
        "--labels",
        "60",
        "--first",
        "10",
        "--batch",
        "10",
        "--seeds",
        "2",
    ]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.chdir(tmp_path)
        active_choice.main(arguments)
    assert end.value.code == 0
    found = json.loads((tmp_path / "out" / "curve.json").read_text())["summary"]
    assert found["labels"] == [10, 20, 30, 40, 50, 60] and (tmp_path / "out" / "curve.png").stat().st_size > 1000
    for measure in ("by_mean", "heldout"):
        curves = {name: found[measure][name]["curve"] for name in active_choice.STRATEGIES}
        assert len({curve[0] for curve in curves.values()}) == 1 and len({tuple(c) for c in curves.values()}) == 3
        assert all(curve[-1] > curve[0] > 0.5 for curve in curves.values())
        assert found[measure]["random"]["labels_for_target"] <= 60
    assert "targeted: reaches random choice's" in capsys.readouterr().out
