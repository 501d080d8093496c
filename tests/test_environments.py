"""Episodes of several turns: what is sampled, masked, rewarded and refused, against naive loops and by hand."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import EpisodeConfig, ModelConfig
from rlhf_jax.data import Message, Prompt, chat_ids, encode_prompts, observation_ids
from rlhf_jax.data.encode import dialogue_row
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.environments import calculator, customer
from rlhf_jax.environments.calculator import compute
from rlhf_jax.environments.calling import Caller
from rlhf_jax.environments.episodes import Table
from rlhf_jax.environments.play import play
from rlhf_jax.errors import UserError
from rlhf_jax.generate import Generation
from rlhf_jax.model import Transformer
from rlhf_jax.packing import pack_episodes, unpack
from rlhf_jax.reward_functions.loading import make_terms
from rlhf_jax.stages import ppo
from rlhf_jax.stages.ppo import Frozen, Networks
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.trainers.ppo_environment import environment_step, with_environment
from tests import tiny_tokenizers
from tests.cases import case
from tests.random_params import random_params

pytestmark = pytest.mark.core

BYTES = Tokenizer.bytes()
EOS, PAD = BYTES.eos_id, BYTES.pad_id


def prompt_rows(records: Sequence[Prompt], width: int = 56) -> Any:
    return encode_prompts(records, BYTES, max_tokens=width, ledger=Ledger())


def generation(turns: Sequence[Sequence[int]], width: int) -> Generation:
    """Turns as the sampler gives them; the log-probability of the token at column c is -c / 10."""
    tokens, mask = np.full((len(turns), width), PAD, np.int32), np.zeros((len(turns), width), bool)
    for row, ids in enumerate(turns):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    arrays: list[Any] = [tokens, mask, np.where(mask, -np.arange(width) / 10, 0.0).astype(np.float32)]
    return Generation(*arrays)


def echo(state: Any, text: str) -> tuple[Any, str, float, bool]:
    """Counts the turns, echoes, twice for number 3, rewards by the turn, and is done once told to stop."""
    turn = state.get("turn", 0) + 1
    return (
        {**state, "turn": turn},
        f"<{text}>" * (1 + state["number"] // 3),
        10.0 * turn + state["number"],
        text == "stop",
    )


def test_an_episode_by_hand() -> None:
    records = [Prompt(f"{letter}:", columns={"number": n}) for n, letter in enumerate("abcd")]
    table = Table(Caller(echo, "echo", records, 0.0), prompt_rows(records, 6), BYTES, 14, 4, 3)
    episodes = table.start([0, 1, 2, 3])
    # Row 1 is cut at the limit of a turn; behind the observation of row 3 no further turn fits, 4 + 10 + 4 > 14.
    table.take(episodes, generation([[*b"x", EOS], [*b"long"], [*b"no", EOS], [*b"abc", EOS]], 4), 0)
    assert [episode.is_over for episode in episodes] == [False, True, False, True]
    so_far = table.so_far(episodes)
    assert so_far.tokens_BP.shape == (4, 6 + 14 - 4)
    rows = [so_far.tokens_BP[row][so_far.mask_BP[row]].tolist() for row in range(4)]
    start = list(BYTES.start_ids)
    assert rows == [
        [*start, *b"a:x", EOS, *b"<x>"],
        [*start, *b"b:"],
        [*start, *b"c:no", EOS, *b"<no>"],
        [*start, *b"d:"],
    ]
    # What is sampled for episodes that are over is not read.
    table.take(episodes, generation([[*b"y", EOS], [1, 2], [*b"z", EOS], [3]], 4), 1)
    assert [episode.is_over for episode in episodes] == [False, True, True, True]  # 7 + 3 + 4 fit, 9 + 3 + 4 do not
    table.take(episodes, generation([[EOS], [1, 2], [1], [3]], 4), 2)
    sampled, total, turns = table.arrays(episodes, 2.0)
    row = [*b"x", EOS, *b"<x>", *b"y", EOS, *b"<y>", EOS]
    np.testing.assert_array_equal(sampled.tokens[0], [*row, PAD, PAD, PAD])
    own = ["11000110001...", "1111..........", "111000011.....", "1111.........."]
    np.testing.assert_array_equal(sampled.mask, [[sign == "1" for sign in row] for row in own])
    np.testing.assert_array_equal(turns.mask_BR, [[sign != "." for sign in row] for row in own])
    np.testing.assert_allclose(sampled.logp[0], [0, -0.1, 0, 0, 0, 0, -0.1] + [0] * 7, rtol=1e-6)
    reward = np.zeros((4, 14))
    reward[0, 1], reward[0, 6], reward[2, 2] = 2 * 10, 2 * 20, 2 * 12
    np.testing.assert_array_equal(turns.reward_BR, reward)
    np.testing.assert_array_equal(total[:, 0], [10 + 20 + 30, 11, 12 + 22, 13])
    assert turns.count_B.tolist() == [3, 1, 2, 1] and turns.ended_B.tolist() == [False] * 4
    ended = table.start([2, 2])
    table.take(ended, generation([[*b"sto", EOS], [*b"stop"]], 4), 0)
    assert [episode.ended for episode in ended] == [False, False]  # neither says stop and ends
    wide = Table(Caller(echo, "echo", records, 0.0), prompt_rows(records, 6), BYTES, 40, 6, 1)
    ended = wide.start([2, 2, 2])
    wide.take(ended, generation([[*b"stop", EOS], [*b"sto", EOS], [*b"stop"]], 6), 0)
    assert [episode.ended for episode in ended] == [True, False, False] and all(one.is_over for one in ended)
    assert [one.ids for one in ended] == [[*b"stop", EOS], [*b"sto", EOS], [*b"stop"]]  # one turn, nothing observed
    assert ended[0].state == {"prompt": "c:", "number": 2, "turn": 1} and records[2].columns == {"number": 2}


# A model whose answers end: the first feature of every token is 1, and the end's logit is read from it.
SHAPE = ModelConfig(vocab_size=BYTES.vocab_size, context=96, width=16, layers=1, heads=2, tied=False)
NETWORKS = Networks(Transformer(SHAPE), Transformer(SHAPE, scalar=True))
R, TURN, TURNS = 40, 6, 3
BETA = 0.3
RECORDS = [Prompt(f"{n}?", columns={"number": n}) for n in range(6)]
# One of a dialogue's turn, one of three.
RECORDS += [Prompt("", turns=(Message("user", "say 6"),), columns={"number": 6})]
RECORDS += [
    Prompt("", turns=(Message("user", "a"), Message("assistant", "b"), Message("user", "7")), columns={"number": 7})
]


@functools.cache
def parameters() -> dict[str, Any]:
    networks = {"policy": NETWORKS.policy, "reference": NETWORKS.policy, "critic": NETWORKS.scorer}
    params = {name: random_params(network, n) for n, (name, network) in enumerate(networks.items())}
    for name in ("policy", "reference"):
        params[name]["embedding"][:, 0] = 4.0
        params[name]["unembedding"][0, EOS] += 1.2
    return params


class Short:
    """Rewards by length, answers in one or two letters, and is done at times; keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, int, str]] = []

    def __call__(self, state: Any, text: str) -> tuple[Any, Any, float, bool]:
        turn, number = state.get("turn", 0), state["number"]
        self.heard.append((number, turn, text))
        done = turn == 1 and number % 2 == 0
        return {"turn": turn + 1, "number": number}, "ok"[: number % 2 + 1], len(text) + number / 8, done


def played(environment: Any, **settings: Any) -> tuple[ppo.Config, Any, ppo.Batch, Any]:
    """(config, terms, the update's batch, frozen networks) of one iteration of 8 prompts."""
    given: dict[str, Any] = {
        "batch": 8,
        "minibatches": 1,
        "environment": "tests:short",
        "max_turns": TURNS,
        "turn_length": TURN,
        "reward_weights": (0.5,),
        "prompt_length": 56,
        "episode": EpisodeConfig(response_length=R, missing_end="subtract", missing_end_score=-1.5, gamma=0.9),
    }
    config = ppo.Config(**(given | settings))
    params = parameters()
    frozen = Frozen(params["reference"], None, jnp.float32(0), jnp.float32(1))
    state = ppo.initial_state(config, params["policy"], params["critic"] if config.value_network else None)
    ids: dict[str, Any] = {"eos_id": BYTES.stop_ids, "pad_id": PAD}
    program: Any = jax.jit(ppo.make_sampling(NETWORKS, config, **ids))
    terms = make_terms([environment], config.reward_weights, model=False)
    rows = prompt_rows(RECORDS)
    step = environment_step(lambda axis: program, environment, config, terms, rows, BYTES)
    places = np.arange(8 // config.samples_per_prompt)
    batch = ppo.Batch(rows.batch(places), None, places.astype(np.int32))
    assert step.continued is not None and step.further is not None
    shapes = []

    def again(batch: ppo.Batch) -> Any:
        shapes.append(jax.tree.map(lambda x: (x.shape, x.dtype), batch))
        return program(state, batch, frozen)

    episodes = step.continued(batch, program(state, batch, frozen), again)
    filled = step.fill(batch, episodes)
    for found, wanted in ((shapes[0], step.further(batch)), (filled, step.outline(batch))):
        wanted = jax.tree.map(lambda x: (x.shape, x.dtype), wanted)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == wanted if found is filled else found == wanted
    assert program._cache_size() == 2  # one for the first turn, one for all others
    return config, terms, filled, frozen


APPLY = {
    name: jax.jit(lambda params, ids, network=network: network.apply({"params": params}, ids))
    for name, network in NETWORKS._asdict().items()
}


def forward(network: str, params: Any, ids: list[int]) -> np.ndarray:
    row = np.array([ids + [0] * (96 - len(ids))])
    return np.asarray(APPLY[network](params, row), np.float64)[0, : len(ids)]


def test_an_episode_is_what_a_naive_loop_makes_of_its_tokens() -> None:
    short, params = Short(), parameters()
    config, terms, filled, frozen = played(short)
    scored: Any = filled.scored
    rollout = ppo.make_rollout(NETWORKS, config.episode, eos_id=BYTES.stop_ids, pad_id=PAD, terms=terms)
    trained = {"policy": params["policy"], "critic": params["critic"]}
    out, metrics = jax.device_get(
        jax.jit(rollout)(trained, frozen, filled.prompts, jax.random.key(0), jnp.float32(BETA), scored)
    )
    said: dict[tuple[int, int], str] = {(number, turn): text for number, turn, text in short.heard}
    advantages, kls, ends, heard = [], [], [], 0
    for b in range(8):
        prompt = np.asarray(filled.prompts.tokens_BP[b])[np.asarray(filled.prompts.mask_BP[b])].tolist()
        tail = scored.sampled.tokens[b][scored.turns.mask_BR[b]].tolist()
        # The tokens again, from what the environment has heard and from its rules alone.
        again: list[int] = []
        own, last, reward_at = [], [], {}
        for turn in range(int(scored.turns.count_B[b])):
            heard += 1
            length = next(n for n in range(1, TURN + 1) if tail[len(again) + n - 1] == EOS or n == TURN)
            ids = tail[len(again) : len(again) + length]
            text = BYTES.decode(ids[:-1] if ids[-1] == EOS else ids)
            assert said[b, turn] == (text if b < 6 else text.removeprefix(" "))
            again += ids
            own += [True] * length
            last.append(len(again) - 1)
            reward_at[len(again) - 1] = 0.5 * (len(said[b, turn]) + b / 8)
            ended = turn == 1 and b % 2 == 0 and ids[-1] == EOS
            if turn + 1 < scored.turns.count_B[b]:
                observed = "ok"[: b % 2 + 1]
                seen = [*(observed if b < 6 else f"\n\nHuman: {observed}\n\nAssistant:").encode()]
                again += seen
                own += [False] * len(seen)
        assert again == tail and own == scored.sampled.mask[b][: len(tail)].tolist()
        assert not scored.sampled.mask[b][len(tail) :].any() and bool(scored.turns.ended_B[b]) == ended
        # Every token of the policy by a full forward pass over the same tokens.
        whole, n = prompt + tail, len(tail)
        at = [t for t in range(n) if own[t]]
        logp = {}
        for name in ("policy", "reference"):
            logits = forward("policy", params[name], whole)
            rows = [logits[len(prompt) + t - 1] for t in at]
            logp[name] = [row[tail[t]] - np.log(np.exp(row).sum()) for row, t in zip(rows, at, strict=True)]
        values = forward("scorer", params["critic"], whole)
        value = [values[len(prompt) + t - 1] for t in at]
        if not ended:
            reward_at[last[-1]] -= 1.5
        reward = [
            reward_at.get(t, 0.0) - BETA * (p - q)
            for t, p, q in zip(at, logp["policy"], logp["reference"], strict=True)
        ]
        after, advantage = 0.0, [0.0] * len(at)
        for i in reversed(range(len(at))):
            delta = reward[i] + 0.9 * (value[i + 1] if i + 1 < len(at) else 0.0) - value[i]
            advantage[i] = after = delta + 0.9 * 0.95 * after
        for found, wanted in (
            (scored.sampled.logp, logp["policy"]), (out.logp_BR, logp["policy"]),
            (out.ref_logp_BR, logp["reference"]), (out.value_BR, value),
            (out.target_BR, [a + v for a, v in zip(advantage, value, strict=True)]),
        ):  # fmt: skip
            np.testing.assert_allclose(np.asarray(found)[b][at], wanted, atol=3e-5)
        np.testing.assert_allclose(out.score_B[b], sum(reward_at.values()), atol=3e-5)
        advantages.append((at, advantage))
        kls.append(sum(logp["policy"]) - sum(logp["reference"]))
        ends.append(ended)
    assert heard == len(short.heard) and 0 < sum(ends) < 8 and set(scored.turns.count_B.tolist()) == {1, 2, 3}
    flat = np.concatenate([advantage for _, advantage in advantages])
    for b, (at, advantage) in enumerate(advantages):
        np.testing.assert_allclose(out.advantage_BR[b][at], (np.array(advantage) - flat.mean()) / flat.std(), atol=2e-4)
        assert np.count_nonzero(out.advantage_BR[b]) == len(at)
    np.testing.assert_allclose(metrics["kl"], np.mean(kls), atol=3e-5)
    np.testing.assert_allclose(metrics["turns"], np.mean(scored.turns.count_B))
    np.testing.assert_allclose(metrics["missing_end"], 1 - np.mean(ends))
    np.testing.assert_allclose(metrics["response_tokens"], np.mean(scored.sampled.mask.sum(axis=1)))


def test_what_is_observed_has_no_loss() -> None:
    params = parameters()
    plain: dict[str, Any] = {"episode": EpisodeConfig(response_length=R)}
    config, terms, filled, frozen = played(
        Short(), estimator="grpo", samples_per_prompt=2, kl_in="loss", kl_coef=0.1, **plain
    )
    trained = {"policy": params["policy"]}
    rollout = ppo.make_rollout(
        NETWORKS, config.episode, eos_id=BYTES.stop_ids, pad_id=PAD, terms=terms, estimator="grpo", samples=2
    )
    episodes, _ = jax.jit(rollout)(trained, frozen, filled.prompts, jax.random.key(0), jnp.float32(0), filled.scored)
    scored: Any = filled.scored
    own, real = np.asarray(episodes.response_mask_BR), scored.turns.mask_BR
    assert (real & ~own).any() and not np.asarray(episodes.advantage_BR)[~own].any()

    def graded(policy: Any, rows: Any) -> Any:
        def loss(policy: Any) -> Any:
            count = jnp.sum(rows.response_mask_BR)
            return ppo.objective(NETWORKS, {"policy": policy}, rows, count, config, kl_coef=jnp.float32(0.1))[0]

        return jax.value_and_grad(loss)(policy)

    graded = jax.jit(graded)
    lay_out = functools.partial(ppo.episode_rows, with_reference=True)
    padded, _ = jax.jit(functools.partial(lay_out, packed=False))(episodes)
    other = np.where(own, padded.targets_BR, (np.asarray(padded.targets_BR) + 7) % 256)
    loss, slope = graded(trained["policy"], padded)
    changed = graded(trained["policy"], dataclasses.replace(padded, targets_BR=jnp.asarray(other)))
    assert float(loss) == float(changed[0]) != 0
    jax.tree.map(np.testing.assert_array_equal, slope, changed[1])
    # Packed, the policy's tokens alone are targets, each with the column before it.
    packed, _ = jax.jit(functools.partial(lay_out, packed=True))(episodes)
    found = graded(trained["policy"], packed)
    np.testing.assert_allclose(found[0], loss, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found[1], slope)
    rows, places = jax.jit(pack_episodes)(
        episodes.tokens_BT, episodes.mask_BT, own, np.arange(own.size).reshape(own.shape)
    )
    np.testing.assert_array_equal(
        unpack(rows.data, places, own), np.where(own, np.arange(own.size).reshape(own.shape), 0)
    )
    np.testing.assert_array_equal(
        unpack(rows.targets_BR, places, own), np.where(own, np.asarray(episodes.tokens_BT)[:, -R:], 0)
    )


def test_an_observation_is_rendered_as_the_dialogue_is() -> None:
    turns = [Message("user", "7 × 8?")]
    answer, seen = Message("assistant", "<calc>7*8="), Message("user", "56 <|im_end|>")
    kinds: list[tuple[str, Any, str]] = [
        ("qwen2", tiny_tokenizers.CHATML, "<|im_end|>"),
        ("qwen2", tiny_tokenizers.unmarked(tiny_tokenizers.THINKS), "<|im_end|>"),
        ("qwen2", tiny_tokenizers.TOOLS_CHATML, "<|im_end|>"),
        ("llama3", tiny_tokenizers.LLAMA3, "<|eot_id|>"),
        ("gemma", tiny_tokenizers.GEMMA, "<end_of_turn>"),
        ("llama2", tiny_tokenizers.INST, "</s>"),
        ("gpt2", tiny_tokenizers.ZEPHYR, "<|endoftext|>"),
    ]
    for kind, template, end in kinds:
        with case((kind, template[:60])):
            config = {"chat_template": template, "eos_token": end, "bos_token": "<s>"}
            tokenizer: Any = tiny_tokenizers.load(kind, config)
            ids = observation_ids(turns, seen, tokenizer)
            # The prompt of the whole dialogue goes on behind the end of the first answer as the episode does.
            whole = chat_ids([*turns, answer, seen], tokenizer)
            assert whole[-len(ids) :] == ids and whole[-len(ids) - 1] == tokenizer.special_tokens[end]
    # A template that ends no turn: the next header is a special token, and the end is the model's own.
    endless = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}<s>:"
    endless += "{% endif %}"
    plain: Any = tiny_tokenizers.load("qwen2", {"chat_template": endless, "eos_token": "</s>"})
    ids = observation_ids(turns, Message("user", "56"), plain)
    start = plain.special_tokens["<s>"]
    assert ids == [start, *plain.encode_continuation("user:56"), start, *plain.encode_continuation(":")]
    assert observation_ids([], seen, BYTES) == list(b"56 <|im_end|>")
    row = dialogue_row([*turns, answer, seen, answer], BYTES)[0]
    ids = [*chat_ids(turns, BYTES), *b" <calc>7*8=", EOS, *observation_ids(turns, seen, BYTES), *b" <calc>7*8=", EOS]
    assert ids == row
    tool = Message("tool", "56")
    hermes: Any = tiny_tokenizers.load(
        "qwen2", {"chat_template": tiny_tokenizers.TOOLS_CHATML, "eos_token": "<|im_end|>"}
    )
    assert "<tool_response>\n56\n</tool_response>" in hermes.decode(observation_ids(turns, tool, hermes))
    gemma: Any = tiny_tokenizers.load("gemma", {"chat_template": tiny_tokenizers.GEMMA, "eos_token": "<end_of_turn>"})
    for tokenizer, message in ((BYTES, "without a chat template, got tools"), (gemma, "Roles must alternate")):
        with case(message), pytest.raises(UserError, match=message):
            observation_ids(turns, Message("tool" if tokenizer is BYTES else "assistant", "56"), tokenizer)


def replies(reply: Any, state: Any, text: str) -> Any:
    return (1, "", 0.0, False) if text == "a" else reply


def test_a_reply_that_is_none_names_its_row_and_turn() -> None:
    records = [
        Prompt("a", "p.jsonl:1"), Prompt("b", "p.jsonl:2"), Prompt("", "p.jsonl:3", (Message("user", "c"),)),
    ]  # fmt: skip
    bad: list[tuple[Any, str]] = [
        (None, r"expected \(state, observation, reward, done\), got None"),
        ((1, "x", 0.0), "expected .state, observation, reward, done"),
        ((1, "x", float("nan"), False), "expected a finite number as reward, got nan"),
        ((1, "x", float("inf"), True), "expected a finite number as reward, got inf"),
        ((1, "x", 1e39, True), "expected a finite number as reward"),
        ((1, "x", "1", False), "expected a finite number as reward, got '1'"),
        ((1, "x", [1.0], False), "expected a finite number as reward"),
        ((1, "x", 0.0, None), "expected True or False for done, got None"),
        ((1, "x", 0.0, 1), "expected True or False for done, got 1"),
        ((1, None, 0.0, False), "expected a text as observation, since the prompt is a text, got None"),
        (
            (1, {"role": "tool", "content": "x"}, 0.0, False),
            "expected a text as observation, since the prompt is a text, got {",
        ),
    ]
    for reply, message in bad:
        caller = Caller(functools.partial(replies, reply), "f", records)
        with case(reply), pytest.raises(UserError, match=rf"environment 'f': p.jsonl:2: turn 3: {message}"):
            caller([0, 1], [0, 0], ["a", "b"], 2)
    for observation in (
        None,
        3,
        {"role": "assistant", "content": "x"},
        {"role": "tool", "content": 5},
        {"content": "x"},
    ):
        caller = Caller(functools.partial(replies, (0, observation, 0.0, False)), "f", records)
        with case(observation), pytest.raises(UserError, match=r"p.jsonl:3: turn 1: expected a text or a message"):
            caller([2], [0], ["c"], 0)

    def fails(state: Any, text: str) -> Any:
        if text == "b":
            raise KeyError("price")
        return state, np.str_("seen"), np.float32(2), np.bool_(False)

    with pytest.raises(
        UserError,
        match=r"environment 'f': p.jsonl:2: turn 1: KeyError: 'price' \(.*test_environments.py:\d+\), for the text 'b'",
    ):
        Caller(fails, "f", records)([0, 1, 0], [0, 0, 0], ["a", "b", "a"], 0)
    (reply,) = Caller(fails, "f", records)([0], [5], ["a"], 0)
    assert reply == (5, Message("user", "seen"), 2.0, False)
    (done,) = Caller(lambda state, text: (None, None, True, True), "f", records, 0.0)([2], [5], ["a"], 0)
    assert done == (None, Message("user", ""), 1.0, True)

    def slow(state: Any, text: str) -> Any:
        if text == "b":
            time.sleep(1.0)
        return state, "", 0.0, True

    with pytest.raises(
        UserError, match=r"p.jsonl:2: turn 1: expected replies to 2 texts within 0.1 s, got 1; make it f"
    ):
        Caller(slow, "f", records, 0.1)([0, 1], [0, 0], ["a", "b"], 0)
    # Each episode has a state of its own.
    nested = Caller(fails, "f", [Prompt("a", columns={"list": [1]})])
    nested.start(0)["list"].append(2)
    assert nested.start(0) == {"prompt": "a", "list": [1]}
    assert Caller(fails, "f", records).start(2) == {"prompt": [{"role": "user", "content": "c"}]}


def test_settings_that_do_not_fit_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"estimator": "remax", "samples_per_prompt": 2}, "estimator: expected another one with an environment"),
        ({"reward_function": ("a.py:b",)}, "reward_function: expected none with an environment.*got a.py:b; call it"),
        ({"episode": EpisodeConfig(slots=4)}, "episode.slots: expected 0 with an environment, .* got 4"),
        ({"max_turns": 0}, "max_turns: expected 1 or more, got 0"),
        ({"turn_length": 0}, "turn_length: expected 1 or more, got 0"),
        ({"turn_length": 32}, "response_length: expected room .* up to 4 turns of 32 tokens, .* got 32"),
        ({"episode": EpisodeConfig(response_length=1)}, "response_length: expected room .* up to 4 turns of 1 tokens"),
    ]
    for settings, message in cases:
        with case(settings), pytest.raises(UserError, match=message):
            ppo.Config(environment="a.py:b", **settings)
    assert ppo.Config(environment="a.py:b").turn_tokens == 8 and ppo.Config(turn_length=3).turn_tokens == 32
    assert ppo.Config(environment="a.py:b", max_turns=1, turn_length=32).turn_tokens == 32
    outside: list[tuple[Any, Any, dict[str, Any], str]] = [
        (None, (), {"max_turns": 3}, "max_turns: expected none without an environment, got one; use --environment"),
        (None, (), {"turn_length": 3}, "turn_length: expected none without an environment"),
        ("calculator", (), {}, r"environment: expected a function \(state, text\) -> …, got 'calculator'"),
        (calculator, (), {"environment": "a.py:b"}, "environment: expected one, got a.py:b and rlhf_jax.environments"),
        (calculator, len, {}, "reward_funcs: expected none with an environment"),
        (
            None,
            (),
            {"environment": "rlhf_jax.environments:calc"},
            "environment rlhf_jax.environments:calc: expected a f",
        ),
        (
            calculator,
            (),
            {"reward_weights": (1.0, 2.0)},
            "reward_weights: expected 1, one for each of calculator, got 2",
        ),
    ]
    for environment, functions, settings, message in outside:
        with case(message), pytest.raises(UserError, match=message):
            with_environment(ppo.Config(**settings), environment, functions)
    config, found, terms = with_environment(
        ppo.Config(environment="rlhf_jax.environments:calculator(cost=0.1)", reward="runs/judge"), None, ()
    )
    assert found[0]({"answer": 1}, "<calc>1=") == ({"answer": 1}, "1", -0.1, False)
    assert terms == (("model", "calculator"), (1.0, 1.0)) and config.reward_weights == (1.0, 1.0)


def test_the_calculator_and_the_customer() -> None:
    for expression, result in (
        ("37*48", "1776"), (" (1 + 2)/3 ", "1"), ("1/3", "0.3333333333"), ("0.1+0.2", "0.3"), ("-3*-4", "12"),
        ("2**99", "error"), ("1/0", "error"), ("open('x')", "error"), ("", "error"), ("9" * 101, "error"),
        ("1e9999", "error"), ("1e308*1e308/3", "error"), ("*".join(["1e308"] * 16), "error"), ("True+1", "error"),
        ("3is 3", "error"), ("٣*2", "error"), ("(" * 60, "error"), ("1j", "error"),
    ):  # fmt: skip
        with case(expression):
            assert compute(expression) == result
    row = {"prompt": "37*48", "answer": "1776"}
    for text, observation, reward, done in (
        (" <calc>37*48=", "1776", 0, False),
        ("I call <calc> 37*48 </calc>\n", "1776", 0, False),
        ("<calc>37*48= so 1776", None, 1, True),
        ("It is 1,776.", None, 1, True),
        ("1775", None, 0, True),
        ("", None, 0, True),
    ):
        with case(text):
            assert calculator(row, text) == (row, observation, reward, done)
    assert calculator(row, "<calc>1+1=", role="tool", cost=0.5)[1:3] == ({"role": "tool", "content": "2"}, -0.5)
    with pytest.raises(UserError, match="field 'answer': expected the right number in the row, got none"):
        calculator({"prompt": "1"}, "2")
    order = {"goal": {"drink": "tea", "size": "large"}}
    for text, observation, value, done in (
        ("Which size?", "large", -0.05, False),
        ("What drink, and which SIZE?", "tea, large", -0.05, False),
        ("What drinks?", "I do not understand.", -0.05, False),
        ("A large tea.", None, 1, True),
        ("Large coffee", None, 0.5, True),
        ("steam", None, 0, True),
    ):
        with case(text):
            assert customer(order, text) == (order, observation, value, done)
    goals: list[Any] = [{}, None, "tea"]
    for goal in goals:
        with case(goal), pytest.raises(UserError, match="field 'goal': expected an object of what the user wants, got"):
            customer({"goal": goal}, "?")


def test_a_model_plays_episodes_alone() -> None:
    short, records = Short(), RECORDS[:5]
    rows = encode_prompts(records, BYTES, max_tokens=40, ledger=Ledger())
    table = Table(Caller(short, "short", rows.sources, 0.0), rows, BYTES, R, TURN, TURNS)
    params = parameters()["policy"]
    # Two batches, of which the second is filled up.
    episodes = play(NETWORKS.policy, params, table, range(5), jax.random.key(3), batch=4)
    assert len(short.heard) == sum(len(episode.said) for episode in episodes) > 5
    for number, episode in enumerate(episodes):
        heard = [text for row, _, text in short.heard if row == number]
        assert [text for text, _ in episode.said] == heard
        assert episode.reward == sum(len(text) + number / 8 for text in heard)
        whole = [*rows.rows[number], *episode.ids]
        logits = forward("policy", params, whole)
        for at, (own, logp) in enumerate(zip(episode.own, episode.logp, strict=True)):
            row = logits[len(rows.rows[number]) + at - 1]
            assert logp == pytest.approx(row[episode.ids[at]] - np.log(np.exp(row).sum()) if own else 0.0, abs=3e-5)
