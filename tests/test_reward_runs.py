"""PPO with reward functions: runs on one device and on eight, what they write, and how they resume."""

import dataclasses
import json
import re
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import EpisodeConfig, LoraConfig, ModelConfig, OptimConfig
from rlhf_jax.data import Message, Prompt, batch_at, encode_prompts, read_records, response_text
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.errors import UserError
from rlhf_jax.generate import Generation
from rlhf_jax.model import Transformer
from rlhf_jax.parallel.host_step import _Ahead, _Stepped
from rlhf_jax.pretrained.convert import value_network
from rlhf_jax.pretrained.source import open_source
from rlhf_jax.reward_functions.loading import make_terms
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.metrics import read_rows
from rlhf_jax.stages.ppo import Batch, Frozen, Networks, initial_state, make_sampling, make_update, rescaled
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.trainers import ppo, ppo_rewards, ppo_start
from tests.cases import case
from tests.made_params import random_params
from tests.made_runs import write_run

pytestmark = pytest.mark.runs

BYTES = Tokenizer.bytes()
MODEL = ModelConfig(vocab_size=BYTES.vocab_size, context=96, width=16, layers=1, heads=2)
# Two rows of eight are messages; those have no answer.
ROWS = [{"prompt": f"say {i}:", "answer": i} for i in range(6)]
ROWS += [{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in (6, 7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reward model and prompts."""
    root = tmp_path_factory.mktemp("rewards")
    write_run(root / "sft", "sft", random_params(MODEL), MODEL, BYTES)
    scores = {"score_mean": 0.5, "score_scale": 2.0}
    write_run(root / "judge", "reward", random_params(MODEL, True, 1), MODEL, BYTES, **scores)
    # Turns of this one end: the first feature of each token is 1, and the end's logit is read from it.
    brief = random_params(MODEL)
    brief["embedding"][:, 0] = 1.0
    brief["embedding"][BYTES.eos_id, 0] = 2.5
    brief["final_norm"]["scale"][0] = 1.0
    write_run(root / "brief", "sft", brief, MODEL, BYTES)
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


def config(folder: Path, out: str, **settings: Any) -> ppo.Config:
    given: dict[str, Any] = {
        "init": str(folder / "sft"),
        "data": (str(folder / "prompts.jsonl"),),
        "batch": 8,
        "steps": 2,
        "minibatches": 1,
        "kl_coef": 0.0,
        "prompt_length": 32,
        "episode": EpisodeConfig(response_length=6, missing_end="keep"),
    }
    return ppo.Config(out=str(folder / out), **(given | settings))


class Heard:
    """A reward function: the number of the prompt, and 100 times the length of the completion; keeps its calls."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.calls: list[list[tuple[Any, str, Any]]] = []
        self.fail_after = fail_after

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any]) -> list[float]:
        if len(self.calls) == self.fail_after:
            raise RuntimeError("enough")
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        self.calls.append(list(zip(prompts, texts, answer, strict=True)))
        return [number(prompt) + 100.0 * len(text) for prompt, text in zip(prompts, texts)]


def number(prompt: Any) -> int:
    return int(re.findall(r"\d", str(prompt))[-1])


def few(completions: Sequence[Any], **_: Any) -> list[float | None]:
    return [None, *(-1.0 for _ in completions[1:])]


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[Heard, Any]:
    """(function, run) of one device."""
    heard = Heard()
    return heard, ppo.run(config(folder, "alone"), reward_funcs=heard)


def test_a_function_alone_is_the_reward(alone: tuple[Heard, Any]) -> None:
    heard, done = alone
    rows = read_rows(done.run.metrics)
    assert len(rows) == len(heard.calls) == 2
    for row, call in zip(rows, heard.calls, strict=True):
        values = [number(prompt) + 100.0 * len(text) for prompt, text, _ in call]
        assert row["reward/Heard"] == pytest.approx(np.mean(values)) == row["score"]
        assert sorted(number(prompt) for prompt, _, _ in call) == list(range(8))
        for prompt, text, answer in call:
            assert "<|" not in text and "\ufffe" not in text
            assert (answer, isinstance(prompt, str)) == (
                (number(prompt), True) if number(prompt) < 6 else (None, False)
            )
    first = next(prompt for prompt, _, _ in heard.calls[0] if number(prompt) == 6)
    assert first == [{"role": "user", "content": "say 6"}]
    about = RunFolder.open(done.run.path, stages=("ppo",))
    assert (about.config["reward_function"], about.config["reward_weights"]) == ([f"{__name__}:Heard"], [1.0])
    assert "reward" not in about.inputs and {"reward_functions", "columns"} <= set(about.inputs)
    assert done.summary["first_score"] == rows[0]["score"]


def test_eight_devices_give_the_function_what_one_does(folder: Path, alone: tuple[Heard, Any]) -> None:
    ways: dict[str, dict[str, Any]] = {"jit": {"mesh": "data=4,fsdp=2"}, "pmap": {"devices": 8, "pmap": True}}
    calls = {"one": alone[0].calls[0]}
    metrics = {"one": read_rows(alone[1].run.metrics)[0]}
    for way, settings in ways.items():
        heard = Heard()
        done = ppo.run(config(folder, f"on_{way}", steps=1, **settings), reward_funcs=[heard])
        (calls[way],), (metrics[way],) = heard.calls, read_rows(done.run.metrics)
    # Under jit the samples are those of one device; pmap's devices have keys of their own.
    assert calls["jit"] == calls["one"] and metrics["jit"]["score"] == metrics["one"]["score"]
    assert [prompt for prompt, _, _ in calls["pmap"]] == [prompt for prompt, _, _ in calls["one"]]
    # The update's own log-probabilities of what was sampled: each response went back to its prompt.
    assert all(found["sampler_logp_error"] < 1e-5 for found in metrics.values())
    values = [number(prompt) + 100.0 * len(text) for prompt, text, _ in calls["pmap"]]
    assert metrics["pmap"]["score"] == metrics["pmap"]["reward/Heard"] == pytest.approx(np.mean(values))


def test_a_stopped_run_resumes_bit_for_bit_and_with_the_same_functions_only(folder: Path) -> None:
    both: dict[str, Any] = {"reward": str(folder / "judge"), "reward_weights": (2.0, 0.5, 1.0), "save_every": 1}

    def start(out: str, functions: Any, **settings: Any) -> Any:
        return ppo.run(config(folder, out, **({"steps": 3} | both | settings)), reward_funcs=functions)

    whole = start("whole", [Heard(), few])
    rows = read_rows(whole.run.metrics)
    for row in rows:
        assert row["reward/few"] == -1.0
        parts = 2 * row["reward/model"] + 0.5 * row["reward/Heard"] - 7 / 8
        assert row["score"] == pytest.approx(parts, rel=1e-5)
    with pytest.raises(
        UserError, match=r"'Heard': .*prompts.jsonl:\d: RuntimeError: enough \(.*test_reward_runs.py:\d+\)"
    ):
        start("cut", [Heard(fail_after=2), few])
    changes: list[Any] = [
        ([Heard()], {"reward_weights": (2.0, 0.5)}, "reward_function: expected .*few.* as in the earlier run"),
        ([Heard(), few], {"reward_weights": (2.0, 0.5, 2.0)}, "reward_weights: expected"),
        ([Heard(), renamed(lambda completions: [0.0] * len(completions))], {}, "inputs.reward_functions: expected"),
    ]
    for functions, settings, message in changes:
        with case(message), pytest.raises(UserError, match=message):
            start("cut", functions, **settings)
    again = Heard()
    cut = start("cut", [again, few], reward_timeout=0.0)
    assert len(again.calls) == 1
    timeless = [
        {k: v for k, v in row.items() if k in ("step", "score", "kl", "loss")} for row in read_rows(cut.run.metrics)
    ]
    assert timeless == [{k: row[k] for k in timeless[0]} for row in rows]
    jax.tree.map(np.testing.assert_array_equal, cut.run.load_params(), whole.run.load_params())


def ahead_by_hand(settings: ppo.Config, heard: Heard) -> tuple[Any, list[Any]]:
    """(last state, metrics) of iterations one after the other, each on responses of the policy before the last one."""
    settings, functions, terms = ppo_rewards.reward_functions(settings, heard)
    assert terms is not None
    source = open_source(settings.init, stages=("sft",))
    rows = encode_prompts(read_records(settings.data, "prompts", Ledger()), BYTES, max_tokens=32, ledger=Ledger())
    networks = Networks(source.network(), Transformer(source.model, scalar=True))
    policy, critic = ppo_start.starts(settings, source, None)
    frozen = Frozen(policy.params, None, jnp.float32(0), jnp.float32(1))
    ids: dict[str, Any] = {"eos_id": BYTES.stop_ids, "pad_id": BYTES.pad_id}
    sampling = jax.jit(make_sampling(networks, settings, **ids))
    update = jax.jit(make_update(networks, settings, **ids, terms=terms))
    values = ppo_rewards.rewards_of(functions, terms, rows, 60.0)
    host = ppo_rewards.host_step(lambda axis: sampling, values, rows, BYTES, settings.episode.response_length)

    def batch(step: int) -> Batch:
        numbered = ppo_rewards.NumberedRows(rows)
        prompts, row_B = batch_at(numbered, batch_size=settings.batch, seed=settings.seed, step=step)
        return Batch(prompts, None, row_B)

    state = initial_state(settings, policy.params, rescaled(critic.params, 0.0, 1.0))
    sampled, found = sampling(state, batch(0), frozen), []
    for step in range(settings.steps):
        of_next = sampling(dataclasses.replace(state, step=state.step + 1), batch(step + 1), frozen)
        state, metrics = update(state, host.fill(batch(step), sampled), frozen)
        sampled = of_next
        found.append(metrics)
    return state, found


def test_responses_may_be_sampled_a_step_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "rollout_lag": 1,
        "steps": 3,
        "save_every": 1,
        "kl_coef": 0.1,
        "policy": OptimConfig(learning_rate=0.03),
    }
    dispatched: list[int] = []
    late: list[int] = []

    def dispatch(self: Any, *given: Any) -> Any:
        dispatched.append(0)
        return _Stepped._dispatched(self, *given)

    class Waiting(Heard):
        """Answers once the responses of the next iteration are under way, which must not wait for it."""

        def __call__(self, *given: Any, **columns: Any) -> list[float]:
            end = time.monotonic() + 30
            while len(dispatched) < min(len(self.calls) + 2, 3):
                if time.monotonic() > end:
                    late.append(len(self.calls))
                    break
                time.sleep(0.01)
            return super().__call__(*given, **columns)

    heard, expected = Waiting(), Heard()
    with monkeypatch.context() as patched:
        patched.setattr(_Ahead, "_dispatched", dispatch)
        whole = ppo.run(config(folder, "ahead", **settings), reward_funcs=heard)
    assert late == [] and len(dispatched) == len(heard.calls) == 3
    state, found = ahead_by_hand(config(folder, "by_hand", **settings), expected)
    assert heard.calls == expected.calls
    rows = read_rows(whole.run.metrics)
    for row, other in zip(rows, found, strict=True):
        for name in ("kl", "loss", "score", "importance_weight", "sampler_logp_error"):
            assert row[name] == pytest.approx(float(other[name]), rel=1e-4, abs=1e-6)
    assert rows[0]["sampler_logp_error"] < 1e-5 and rows[0]["importance_weight"] == pytest.approx(1, abs=1e-5)
    assert all(row["sampler_logp_error"] > 1e-3 and row["first_ratio_error"] < 1e-5 for row in rows[1:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.run.load_params(), state.params)
    # What was sampled ahead is in the checkpoint: a run that ends goes on with it, and asks no function twice.
    with pytest.raises(UserError, match="RuntimeError: enough"):
        ppo.run(config(folder, "ahead_cut", **settings), reward_funcs=Heard(fail_after=2))
    again = Heard()
    cut = ppo.run(config(folder, "ahead_cut", **settings), reward_funcs=again)
    assert again.calls == heard.calls[2:]
    jax.tree.map(np.testing.assert_array_equal, cut.run.load_params(), whole.run.load_params())
    on_mesh = Heard()
    ppo.run(config(folder, "ahead_mesh", **settings, mesh="data=4,fsdp=2"), reward_funcs=on_mesh)
    assert on_mesh.calls == heard.calls


def renamed(function: Any) -> Any:
    """Another function under the name of `few`."""
    function.__module__, function.__qualname__ = few.__module__, few.__qualname__
    return function


def letters(text: str) -> float:
    return sum(map(ord, text)) % 97 / 97


class Various(Heard):
    """A reward that differs between the responses to a prompt; keeps its calls."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any]) -> list[float]:
        super().__call__(prompts, completions, answer)
        return [letters(text) for _, text, _ in self.calls[-1]]


def test_groups_of_responses_need_no_value_network(folder: Path) -> None:
    settings: dict[str, Any] = {
        "estimator": "grpo",
        "samples_per_prompt": 2,
        "policy_loss": "gspo",
        "kl_in": "loss",
        "kl_coef": 1.0,
        "minibatches": 2,
    }
    heard = Various()
    one = ppo.run(config(folder, "grpo", **settings), reward_funcs=heard)
    rows = read_rows(one.run.metrics)
    for row, call in zip(rows, heard.calls, strict=True):
        asked = [number(prompt) for prompt, _, _ in call]
        assert len(asked) == 8 and asked[::2] == asked[1::2] and len(set(asked)) == 4
        assert row["score"] == pytest.approx(np.mean([letters(text) for _, text, _ in call]))
        assert row["reward"] == row["score"] and (row["kl_coef"], row["policy_skipped"]) == (1.0, 0)
        assert row["first_ratio_error"] < 1e-5
        assert not {"value", "value_loss", "critic_grad_norm"} & set(row)
    assert abs(rows[1]["kl"]) > 1e-4  # which the reward would show
    assert set(one.run.load_params()) == {"policy"}
    source = open_source(str(one.run.path), stages=("ppo",))
    jax.tree.map(np.testing.assert_array_equal, source.params(), one.run.load_params()["policy"])
    with pytest.raises(UserError, match=r"expected a ppo run with a value network .*, got one without"):
        value_network(source)
    on_mesh = Various()
    mesh = ppo.run(config(folder, "grpo_mesh", **settings, mesh="data=2,fsdp=2"), reward_funcs=on_mesh)
    assert on_mesh.calls == heard.calls
    for row, other in zip(rows, read_rows(mesh.run.metrics), strict=True):
        for name in ("loss", "kl", "score", "policy_grad_norm"):
            assert other[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5)


class Played(Heard):
    """An environment: the prompt's number, and 100 times the length of the turn; done after `turns` of them."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self.turns = turns

    def __call__(self, state: Any, text: str) -> Any:  # type: ignore[override]
        turn = state.get("turn", 1)
        self.calls.append([(state["prompt"], text, state.get("answer"))])
        reward = number(state["prompt"]) + 100.0 * len(text)
        return {**state, "turn": turn + 1}, "and?", reward, turn == self.turns


def without_times(run: Any) -> list[dict[str, Any]]:
    timed = ("time", "seconds", "per_second", "peak_share", "Heard", "Played", "turns")
    return [{k: v for k, v in row.items() if not any(word in k for word in timed)} for row in read_rows(run.metrics)]


def test_an_environment_of_one_turn_is_a_reward_function(folder: Path, alone: tuple[Heard, Any]) -> None:
    for settings in ({"kl_coef": 0.1, "minibatches": 2}, {"estimator": "grpo", "samples_per_prompt": 2}):
        with case(settings):
            episode = EpisodeConfig(response_length=6, missing_end="subtract")
            both: dict[str, Any] = {
                "init": str(folder / "brief"),
                "episode": episode,
                "reward_weights": (0.5,),
                **settings,
            }
            name = str(settings.get("estimator", "gae"))
            one = ppo.run(config(folder, f"function_{name}", **both), reward_funcs=Heard())
            played = Played(1)
            two = ppo.run(config(folder, f"played_{name}", max_turns=1, **both), environment=played)
            rows = without_times(two.run)
            assert rows == without_times(one.run) and 0 < rows[0]["missing_end"] < 1
            jax.tree.map(np.testing.assert_array_equal, one.run.load_params(), two.run.load_params())
            assert all(row["turns"] == 1 for row in read_rows(two.run.metrics)) and len(played.calls) == 16
    about = RunFolder.open(two.run.path, stages=("ppo",))
    assert about.config["environment"] == f"{__name__}:Played" and {"environment", "columns"} <= set(about.inputs)


def test_eight_devices_play_what_one_does(folder: Path) -> None:
    ways: dict[str, dict[str, Any]] = {
        "one": {},
        "packed": {"episode": EpisodeConfig(response_length=56, missing_end="keep", pack=2)},
        "jit": {"mesh": "data=4,fsdp=2"},
        "pmap": {"devices": 8, "pmap": True},
    }
    shared: dict[str, Any] = {
        "init": str(folder / "brief"),
        "prompt_length": 36,
        "max_turns": 3,
        "turn_length": 4,
        "episode": EpisodeConfig(response_length=56, missing_end="keep"),
        "steps": 1,
        "reward": str(folder / "judge"),
    }
    calls, metrics = {}, {}
    for way, settings in ways.items():
        played = Played(2)
        done = ppo.run(config(folder, f"played_{way}", **(shared | settings)), environment=played)
        calls[way] = played.calls
        (metrics[way],) = read_rows(done.run.metrics)
    assert 1 < metrics["one"]["turns"] < 2 and metrics["one"]["turns"] == len(calls["one"]) / 8
    assert calls["jit"] == calls["one"] == calls["packed"] != calls["pmap"]
    for way, found in metrics.items():
        with case(way):
            assert found["sampler_logp_error"] < 1e-5 and found["first_ratio_error"] < 1e-5 and found["nonfinite"] == 0
            played_reward = sum(number(prompt) + 100.0 * len(text) for [(prompt, text, _)] in calls[way]) / 8
            assert found["reward/Played"] == pytest.approx(played_reward)
            assert found["score"] == pytest.approx(found["reward/Played"] + found["reward/model"], rel=1e-5)
            for name in ("loss", "value_loss", "kl", "entropy", "policy_grad_norm", "reward/model"):
                if way != "pmap":
                    assert found[name] == pytest.approx(metrics["one"][name], rel=1e-3, abs=1e-5)


def test_without_a_reward_model_the_value_network_is_the_policy_with_a_head_of_zeros(folder: Path) -> None:
    for lora in (LoraConfig(), LoraConfig(rank=2)):
        settings = config(folder, "unused", lora=lora)
        policy, value = ppo_start.starts(settings, open_source(str(folder / "sft"), stages=("sft",)), None)
        assert value.base is policy.base and not any(map(np.any, jax.tree.leaves(value.params["score"])))
        kept = {name: leaf for name, leaf in value.params.items() if name != "score"}
        jax.tree.map(np.testing.assert_array_equal, kept, {name: policy.params[name] for name in kept})
        assert set(policy.params) - set(kept) <= {"unembedding"}
    done = ppo.run(config(folder, "adapter", steps=1, lora=LoraConfig(rank=2)), reward_funcs=Heard())
    assert read_rows(done.run.metrics)[0]["first_ratio_error"] < 1e-5


def test_what_a_missing_end_costs_is_said_where_functions_are_part_of_the_reward(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick: dict[str, Any] = {"steps": 0, "examples": 0}
    judge = {"reward": str(folder / "judge"), **quick}
    episode = EpisodeConfig(response_length=6)
    for name, functions, settings in (
        ("f", [Heard()], {"steps": 0}),
        ("f_judge", [Heard()], judge),
        ("judge", [], judge),
    ):
        with case(name):
            ppo.run(config(folder, f"end_{name}", episode=episode, **settings), reward_funcs=functions)
            said = "a response without an end-of-text token gets -1 in place of its reward" in capsys.readouterr().err
            assert said == bool(functions)


def test_settings_that_do_not_fit_are_refused(folder: Path) -> None:
    cases: list[Any] = [
        (
            [],
            {},
            "reward: expected a reward model or a reward function, got nothing; use --reward FOLDER or --reward-f",
        ),
        ([], {"reward": "judge", "reward_weights": (1.0,)}, "reward_weights: expected none without a reward function"),
        ([few], {"reward_weights": (1.0, 2.0)}, "reward_weights: expected 1, one for each of few, got 2"),
        (
            ["runs/judge"],
            {},
            r"reward_funcs\[0\]: expected a function, got 'runs/judge'; a reward model is the setting",
        ),
        ([lambda completions, gold: []], {}, "parameter 'gold': .*; the fields are answer"),
        (
            [few],
            {"prompt_length": 90, "episode": EpisodeConfig(response_length=20)},
            r"90 \+ response_length 20 exceeds the context of 96 tokens; use --prompt-length 76 or less",
        ),
        (
            [few],
            {"episode": EpisodeConfig(response_length=90)},
            r"32 \+ response_length 90 exceeds the context of 96 tokens; use --episode.response-length 64 or less",
        ),
        ([], {"reward": "judge", "rollout_lag": 1}, "rollout_lag: expected 0 without reward functions"),
    ]
    for functions, settings, message in cases:
        with case(message), pytest.raises(UserError, match=message):
            ppo.run(config(folder, "refused", **settings), reward_funcs=functions)
    assert not (folder / "refused").exists()
    wrong: list[dict[str, Any]] = [
        {"reward_timeout": -1.0},
        {"reward_timeout": float("inf")},
        {"reward_weights": (float("nan"),)},
        {"rollout_lag": 2},
        {"importance_max": 0.5},
        {"environment": "a.py:f", "rollout_lag": 1},
        {"pmap": True, "rollout_lag": 1},
        {"reward_timeout": 0.0, "rollout_lag": 1},
    ]
    for settings in wrong:
        with case(settings), pytest.raises(UserError, match=f"^{next(iter(settings))}: expected"):
            config(folder, "refused", **settings)


def test_the_example_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[1] / "examples" / "ppo_with_your_reward.py"
    functions = runpy.run_path(str(example))
    completions = [" 5.", " 15", "no"]
    assert functions["exact"](["2 + 3 ="] * 3, completions, ["5"] * 3) == [1.0, 0.0, 0.0]
    assert functions["digits"](completions) == pytest.approx([1 / 3, 2 / 3, 0])
    assert functions["short"](completions) == [-0.03, -0.03, -0.02]
    out = folder / "sums"
    monkeypatch.setattr(sys, "argv", ["example", str(folder / "sft"), "--out", str(out), "--steps", "1"])
    runpy.run_path(str(example), run_name="__main__")
    assert "last_score" in capsys.readouterr().out
    (row,) = read_rows(out / "metrics.jsonl")
    total = row["reward/exact"] + 0.5 * row["reward/digits"] + 0.1 * row["reward/short"]
    assert row["score"] == pytest.approx(total, abs=1e-6) and row["reward/short"] < 0


def test_the_example_of_an_environment_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = Path(__file__).parents[1] / "examples" / "ppo_in_an_environment.py"
    waiter = runpy.run_path(str(example))["waiter"]
    state, lost = {"goal": {"size": "large"}}, "I do not understand."
    state, *reply = waiter(state, "Which size?")
    assert reply == ["large", -0.05, False]
    state, *reply = waiter(state, "What?")
    assert reply == [lost, -0.05, False] and waiter(state, "Why?")[1:] == (lost, -0.05, True)
    model = dataclasses.replace(MODEL, context=208)
    write_run(folder / "long", "sft", random_params(model), model, BYTES)
    monkeypatch.setattr(sys, "argv", ["x", str(folder / "long"), "--out", str(folder / "waiter"), "--steps", "1"])
    runpy.run_path(str(example), run_name="__main__")
    (row,) = read_rows(folder / "waiter" / "metrics.jsonl")
    assert row["turns"] >= 1 and row["score"] == row["reward/waiter"]


def test_an_ended_response_has_no_special_tokens_in_its_text() -> None:
    ids = BYTES.encode(" a, é")
    prompt = [*BYTES.start_ids, *BYTES.encode("say:")]
    cases = [(ids, " a, é"), ([*ids, BYTES.eos_id], " a, é"), ([BYTES.eos_id], ""), ([], "")]
    for response, text in cases:
        with case(response):
            assert response_text(prompt, response, BYTES) == text

    class Visible:
        """A tokenizer whose end of a turn, "!", is an ordinary token."""

        stop_ids = (ord("!"),)

        def decode(self, ids: Sequence[int]) -> str:
            return bytes(ids).decode()

    tokenizer: Any = Visible()
    assert response_text([97], [*b"!b!"], tokenizer) == "!b"


def test_between_sampling_and_update_ids_become_text_and_text_values() -> None:
    records = [Prompt("a:", "here:1"), Prompt("", "here:2", (Message("user", "b"),)), Prompt("c:", "here:3")]
    rows = encode_prompts(records, BYTES, max_tokens=32, ledger=Ledger())
    given: list[tuple[Any, ...]] = []

    def length(prompts: Any, completions: Any) -> list[float]:
        given.extend(zip(prompts, completions, strict=True))
        return [float(len(str(completion))) for completion in completions]

    terms = make_terms([length], (), model=False)
    unused: Any = None
    step = ppo_rewards.host_step(unused, ppo_rewards.rewards_of([length], terms, rows, 0.0), rows, BYTES, 5)
    responses = [[*BYTES.encode(" éx"), BYTES.eos_id], [*BYTES.encode(" hi"), BYTES.eos_id], BYTES.encode("long!")]
    mask = np.arange(5) < np.array([[len(ids)] for ids in responses])
    tokens = np.array([(ids + [65] * 5)[:5] for ids in responses], np.int32)
    sampled: Any = Generation(tokens, mask, np.zeros((3, 5), np.float32))
    places = np.array([2, 1, 0])
    batch = ppo.Batch(rows.batch(places), None, places.astype(np.int32))
    filled = step.fill(batch, sampled)
    message = [{"role": "user", "content": "b"}]
    assert given == [("c:", " éx"), (message, [{"role": "assistant", "content": "hi"}]), ("a:", "long!")]
    np.testing.assert_array_equal(filled.scored.value_BN[:, 0], [len(str(completion)) for _, completion in given])
    assert filled.row_B is None and filled.scored.sampled is sampled
    assert jax.tree.map(lambda x: (x.shape, x.dtype), filled) == jax.tree.map(
        lambda x: (x.shape, x.dtype), step.outline(batch)
    )


def test_the_other_fields_of_a_prompt_are_its_columns(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a", "answer": null, "more": {"x": [1]}}\n'
        '{"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}], "id": 2}\n'
    )
    first, second = read_records(tmp_path / "prompts.jsonl", "prompts", Ledger())
    assert first.columns == {"more": {"x": [1]}}  # a null is absent: the function gets None
    assert second.columns["id"] == 2 and second.turns == (Message("user", "b"),)
    assert first == Prompt("a") and hash(first) == hash(Prompt("a"))
