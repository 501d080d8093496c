"""What stages start from, and runs that train adapters: they move, resume, hand on, and share one backbone."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.config import EpisodeConfig, LoraConfig, ModelConfig, OptimConfig, PreferenceConfig
from rlhf_jax.data import Comparison, Demonstration, Ledger, Prompt, Text, encode_prompts
from rlhf_jax.doctor import open_patient
from rlhf_jax.doctor.policy import rolled
from rlhf_jax.errors import UserError
from rlhf_jax.lora import attach, is_adapter
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.convert import export, value_network
from rlhf_jax.pretrained.source import longest_answer, open_source, start_from
from rlhf_jax.runs import lifecycle
from rlhf_jax.runs.checkpoint import load_params
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.lifecycle import released_params
from rlhf_jax.runs.metrics import read_rows
from rlhf_jax.stages.ppo import Networks
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.trainers import ppo, ppo_start, preference, pretrain, reward, sft
from tests.cases import case
from tests.made_params import random_params
from tests.made_runs import random_source, write_run

pytestmark = [pytest.mark.pretrained, pytest.mark.usefixtures("each_key_once")]

LORA = LoraConfig(rank=2, alpha=4.0)
MODEL = ModelConfig(vocab_size=Tokenizer.bytes().vocab_size, context=48, width=16, layers=1, heads=2)
DEMONSTRATIONS = [Demonstration(f"say {word}", f" {word}!") for word in ("red", "blue", "green", "grey")]
PAIRS = [Comparison(d.prompt, d.completion, " no") for d in DEMONSTRATIONS]
PROMPTS = [Prompt(d.prompt) for d in DEMONSTRATIONS]


def settings(out: Path, **more: Any) -> dict[str, Any]:
    return {"out": str(out), "batch": 4, "steps": 2, "log_every": 1, "lora": LORA} | more


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model, and each other stage with adapters; the learning rates are such that two steps show."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "base", "pretrain", random_params(MODEL), MODEL, Tokenizer.bytes())
    sft.run(
        sft.Config(init=str(root / "base"), optimizer=OptimConfig(learning_rate=1e-2), **settings(root / "sft")),
        records=DEMONSTRATIONS,
        heldout=DEMONSTRATIONS,
    )
    reward.run(
        reward.Config(init=str(root / "sft"), **settings(root / "judge")), demonstrations=DEMONSTRATIONS, **ranked(root)
    )
    episode = EpisodeConfig(response_length=6)
    config = ppo.Config(
        init=str(root / "sft"),
        reward=str(root / "judge"),
        prompt_length=16,
        minibatches=2,
        episode=episode,
        **settings(root / "ppo"),
    )
    ppo.run(config, prompts=PROMPTS)
    return root


def ranked(root: Path) -> dict[str, Any]:
    from rlhf_jax.data import Ledger, encode_rankings

    tokenizer = RunFolder.open(root / "base", stages=("pretrain",)).tokenizer
    rows = encode_rankings(PAIRS, tokenizer, max_tokens=48, ledger=Ledger(), buckets=(32,))
    return {"rankings": rows, "heldout": rows}


def test_a_run_with_an_adapter_holds_the_adapter_alone(runs: Path) -> None:
    base = open_source(str(runs / "base"), stages=("pretrain",))
    tuned = open_source(str(runs / "sft"), stages=("sft",))
    adapter, whole, before = tuned.own(), tuned.params(), base.params()
    assert set(adapter) == {"block_0"}
    assert not tuned.dialogues  # its demonstrations are text
    assert str(jax.tree.structure(whole)) == str(jax.tree.structure(before))
    np.testing.assert_array_equal(whole["embedding"], before["embedding"])
    query = adapter["block_0"]["attention"]["query"]
    kernels = (tree["block_0"]["attention"]["query"]["kernel"] for tree in (whole, before))
    np.testing.assert_allclose(np.subtract(*kernels), 2.0 * query["lora_a"] @ query["lora_b"], atol=1e-6)
    assert np.abs(query["lora_b"]).max() > 0


def test_loss_of_the_merged_network_is_the_one_reported(runs: Path) -> None:
    again = sft.Config(init=str(runs / "sft"), out=str(runs / "again"), batch=4, steps=0)
    summary = sft.run(again, records=DEMONSTRATIONS, heldout=DEMONSTRATIONS).summary
    reported = json.loads((runs / "sft" / "summary.json").read_text())
    assert summary["heldout_response_nll"] == pytest.approx(reported["heldout_response_nll"], abs=1e-5)
    assert reported["heldout_response_nll"] < reported["heldout_response_nll_before"] - 1e-3


def test_all_four_networks_share_the_backbone(runs: Path) -> None:
    config = ppo.Config(init=str(runs / "sft"), reward=str(runs / "judge"), **settings(runs / "unused", minibatches=2))
    source = open_source(config.init, stages=("sft",))
    judge = open_source(config.reward, stages=("reward",))
    policy, scorer = ppo_start.starts(config, source, judge)
    assert policy.base is scorer.base
    assert set(policy.params) == {"block_0"}
    assert set(scorer.params) == {"block_0", "score"}
    adapters = sum(leaf.size for leaf in jax.tree.leaves((policy.params, scorer.params)))
    assert adapters < sum(leaf.size for leaf in jax.tree.leaves(policy.base)) / 2
    # Adapters of other settings stand beside networks of their own.
    other = ppo.Config(
        init=str(runs / "sft"),
        reward=str(runs / "judge"),
        **settings(runs / "unused", minibatches=2, lora=LoraConfig(rank=1)),
    )
    policy, scorer = ppo_start.starts(other, source, judge)
    assert policy.base is not scorer.base


def test_ppo_with_adapters_starts_from_the_sft_model_and_moves(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / "ppo" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "first_ratio_error" in row)
    assert first["first_ratio_error"] < 1e-5
    assert abs(first["kl"]) < 1e-5
    tuned, aligned = (open_source(str(runs / name), stages=(name,)) for name in ("sft", "ppo"))
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(tuned.own()), jax.tree.leaves(aligned.own()))]
    assert max(moved) > 0
    np.testing.assert_array_equal(aligned.params()["embedding"], tuned.params()["embedding"])


def test_scores_are_normalized_by_those_of_the_starting_policy_once(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Four pairs are too few for the reward model to record a scale of its own.
    judge = open_source(str(runs / "judge"), stages=("reward",))
    assert (judge.score_mean, judge.score_scale) == (None, None)
    config = ppo.Config(
        init=str(runs / "sft"),
        reward=str(runs / "judge"),
        episode=EpisodeConfig(response_length=6),
        prompt_length=16,
        **settings(runs / "ppo", minibatches=2),
    )
    source = open_source(config.init, stages=("sft",))
    policy, scorer = ppo_start.starts(config, source, judge)
    prompts = encode_prompts(PROMPTS, source.tokenizer, max_tokens=16, ledger=Ledger())

    def first(bias: float) -> np.ndarray:
        score = scorer.params["score"]
        moved = dataclasses.replace(scorer, params={**scorer.params, "score": {**score, "bias": score["bias"] + bias}})
        nets = Networks(source.network(), judge.network())
        return ppo_start.first_scores(config, nets, policy, moved, prompts, source.tokenizer)

    scores = first(0.0)
    assert scores.shape == (ppo_start.REFERENCE_RESPONSES,) and scores.std() > 0
    for bias in (-20.0, 3.0, 500.0):  # of published models
        np.testing.assert_allclose(first(bias), scores + bias, atol=1e-4)
    recorded = json.loads((runs / "ppo" / "scores.json").read_text())
    mean, scale = recorded["score_mean"], recorded["score_scale"]
    assert (recorded["measured_on_responses"], mean, scale) == (
        256,
        pytest.approx(scores.mean()),
        pytest.approx(scores.std()),
    )
    summary = json.loads((runs / "ppo" / "summary.json").read_text())
    assert (summary["score_mean"], summary["score_scale"]) == (mean, scale)
    # A run that resumes reads the file, whatever is recorded with the reward model by now.
    run = RunFolder.open(runs / "ppo", stages=("ppo",))
    own = dataclasses.replace(judge, score_mean=-20.0, score_scale=3.0)
    for model in (judge, own):
        assert ppo_start.normalization(run, model, lambda: pytest.fail("measured again")) == (mean, scale)
    fresh, other = (write_run(tmp_path / name, "ppo", policy.params, MODEL, Tokenizer.bytes()) for name in ("a", "b"))
    for model in (own, judge):
        assert ppo_start.normalization(other, model, lambda: pytest.fail("measured")) == (-20.0, 3.0)
    for equal in ([-20.0, -20.0], [np.nan, 1.0]):
        with (
            case(equal),
            pytest.raises(UserError, match="judge: score_scale: expected more than 0, as scores must dif"),
        ):
            ppo_start.normalization(fresh, judge, lambda equal=equal: np.array(equal))  # type: ignore[misc]
    capsys.readouterr()
    assert ppo_start.normalization(fresh, judge, lambda: np.array([-23, -17])) == (-20, 3)
    said = capsys.readouterr().err
    assert "judge has no mean and scale of its scores: 256 responses or more of the starting policy are sampled" in said
    assert ppo_start.normalization(fresh, judge, lambda: np.array([0, 1])) == (-20, 3)


def test_a_reward_model_goes_on_from_a_reward_model_or_a_policy(runs: Path, tmp_path: Path) -> None:
    judge = open_source(str(runs / "judge"), stages=("reward",))
    export(str(runs / "judge"), tmp_path / "judge")
    whole = judge.params()
    anything = ("pretrain", "sft", "ppo", "reward")

    def first(init: str, **changes: Any) -> tuple[Any, Any]:
        config = reward.Config(**(settings(runs / "unused", init=init) | changes))
        source = open_source(init, stages=anything)
        start = reward.first_parameters(config, source, Transformer(source.model, scalar=True))
        return start, attach(start.base, start.params, config.lora.scale)

    # The head and the adapter are the reward model's own, whatever is trained of it and wherever it is.
    own, _ = first(str(runs / "judge"))
    jax.tree.map(np.testing.assert_array_equal, own.params, judge.own())
    for init, lora in ((str(runs / "judge"), LoraConfig()), (f"hf:{tmp_path / 'judge'}", LORA)):
        start, found = first(init, lora=lora)
        assert (start.base is None) == (not lora.rank)
        np.testing.assert_allclose(found["score"]["kernel"], whole["score"]["kernel"], atol=1e-6)
        np.testing.assert_allclose(found["score"]["bias"], whole["score"]["bias"], atol=1e-6)
        np.testing.assert_allclose(found["embedding"], whole["embedding"], atol=1e-6)
    # A policy gives its backbone, and the head is fresh.
    policy = open_source(str(runs / "ppo"), stages=("ppo",))
    start, _ = first(str(runs / "ppo"))
    assert set(start.params) == {"block_0", "score"} and not np.any(start.params["score"]["bias"])
    jax.tree.map(np.testing.assert_array_equal, start.params["block_0"], policy.own()["block_0"])
    with pytest.raises(UserError, match="judge: expected a language model, got a score head"):
        open_source(f"hf:{tmp_path / 'judge'}", stages=("pretrain", "sft"))


def test_ppo_goes_on_from_ppo_with_another_reference(runs: Path, tmp_path: Path) -> None:
    source, tuned = (open_source(str(runs / name), stages=ppo_start.POLICIES) for name in ("ppo", "sft"))
    more = {"init": str(runs / "ppo"), "reward": str(runs / "judge"), "prompt_length": 16, "minibatches": 2}
    more |= {"reference": str(runs / "sft"), "episode": EpisodeConfig(response_length=6)}
    config = ppo.Config(**settings(tmp_path / "again", **more))
    policy, _ = ppo_start.starts(config, source, open_source(more["reward"], stages=("reward",)))
    reference = ppo_start.open_reference(config, source)
    jax.tree.map(np.testing.assert_array_equal, ppo_start.reference_params(reference, policy, LORA), tuned.own())
    # On another base, or with an adapter of another kind, the reference is whole beside the policy's adapter.
    whole = ppo_start.reference_params(reference, policy, LoraConfig(rank=1))
    jax.tree.map(np.testing.assert_array_equal, attach(policy.base, whole, LORA.scale), tuned.params())
    # In each form that a model has: a whole run, the policy itself, a published model, an adapter, given its base.
    export(str(runs / "sft"), tmp_path / "published")
    export(str(runs / "sft"), tmp_path / "adapter", adapter=True)
    for spec in (str(runs / "base"), str(runs / "ppo"), f"hf:{tmp_path / 'published'}",
                 f"peft:{tmp_path / 'adapter'}#{runs / 'base'}"):  # fmt: skip
        with case(spec):
            other = ppo_start.open_reference(dataclasses.replace(config, reference=spec), source)
            found = ppo_start.reference_params(other, policy, LORA)
            if set(found) == {"block_0"}:  # an adapter to the policy's backbone
                jax.tree.map(np.testing.assert_array_equal, found, other.own())
            else:
                jax.tree.map(np.testing.assert_array_equal, attach(policy.base, found, LORA.scale), other.params())
            assert (set(found) == {"block_0"}) == (spec == str(runs / "ppo") or spec.startswith("peft:"))
    with pytest.raises(UserError, match=r"judge: expected the folder of a sft or .* run, got one of reward"):
        ppo_start.open_reference(dataclasses.replace(config, reference=str(runs / "judge")), source)
    # Defaults may be written out, and how a network is computed is the policy's.
    same: dict[str, Any] = {"kv_heads": 2, "head_width": 8, "ffn_width": 48, "windows": (0,), "query_scale": 8**-0.5}
    same |= {"qkv_bias": False, "embedding_rows": MODEL.vocab_size, "remat": "full", "dropout": 0.1}
    for number, settings_ in enumerate((same, {"dtype": "bfloat16", "attention": "plain", "head_chunk": 4})):
        write_run(tmp_path / f"same{number}", "sft", random_params(MODEL), dataclasses.replace(MODEL, **settings_),
                  Tokenizer.bytes())  # fmt: skip
        ppo_start.open_reference(dataclasses.replace(config, reference=str(tmp_path / f"same{number}")), source)
        assert ppo_start.difference(source, open_source(str(tmp_path / f"same{number}"), stages=("sft",))) is None
    wider = dataclasses.replace(MODEL, width=32)
    write_run(tmp_path / "wider", "sft", random_params(wider), wider, Tokenizer.bytes())
    assert ppo_start.difference(source, open_source(str(tmp_path / "wider"), stages=("sft",))) == ("width", 16, 32)
    with pytest.raises(UserError, match=r"wider: width: expected 16 as in the initial policy .*, got 32"):
        preference.run(
            PreferenceConfig(**settings(tmp_path / "no", init=str(runs / "sft"), reference=str(tmp_path / "wider"))),
            records=PAIRS,
        )
    summary = ppo.run(config, prompts=PROMPTS).summary
    assert summary["first_ratio_error"] < 1e-5 < abs(summary["first_kl"])
    # The reference may be moved, and it may not become another.
    shutil.copytree(runs / "sft", tmp_path / "copy")
    assert ppo.run(dataclasses.replace(config, reference=str(tmp_path / "copy")), prompts=PROMPTS).summary == summary
    with pytest.raises(UserError, match=r"again: inputs.reference: expected .*, got "):
        ppo.run(dataclasses.replace(config, reference=str(runs / "ppo")), prompts=PROMPTS)


def test_a_larger_model_is_distilled_without_a_reward(runs: Path, tmp_path: Path) -> None:
    larger = dataclasses.replace(MODEL, width=32, layers=2)
    write_run(tmp_path / "teacher", "sft", random_params(larger), larger, Tokenizer.bytes())
    more = {"init": str(runs / "sft"), "reference": str(tmp_path / "teacher"), "batch": 32, "samples_per_prompt": 8}
    more |= {"steps": 24, "minibatches": 1, "prompt_length": 16, "estimator": "reinforce_pp", "kl_coef": 1.0}
    more |= {"policy": OptimConfig(learning_rate=0.03)}
    episode = EpisodeConfig(response_length=6, missing_end="keep", gamma=0.0)
    done = ppo.run(ppo.Config(**settings(tmp_path / "student", episode=episode, **more)), prompts=PROMPTS)
    rows = read_rows(done.run.metrics)
    assert np.mean([row["kl"] for row in rows[-8:]]) < 0.7 * rows[0]["kl"]
    assert all(row["score"] == 0 and row["reward"] == pytest.approx(-row["kl"], rel=1e-5) for row in rows)
    assert done.summary["first_ratio_error"] < 1e-5 and "reference" in done.run.inputs


def test_the_moving_average_of_adapters_is_that_of_their_products(runs: Path, tmp_path: Path) -> None:
    config = ppo.Config(
        init=str(runs / "sft"),
        reward=str(runs / "judge"),
        prompt_length=16,
        episode=EpisodeConfig(response_length=6),
        policy=OptimConfig(learning_rate=3e-2),
        ema_decay=0.75,
        **settings(tmp_path / "average", minibatches=2, save_every=1),
    )
    run = ppo.run(config, prompts=PROMPTS).run
    tuned, average = open_source(str(runs / "sft"), stages=("sft",)), open_source(str(run.path), stages=("ppo",))
    shutil.copytree(run.checkpoints / "00000001", tmp_path / "first" / "00000001")
    adapters = [tuned.own(), *(load_params(folder)["policy"] for folder in (tmp_path / "first", run.checkpoints))]
    base = open_source(str(runs / "base"), stages=("pretrain",)).params()
    found = average.own()
    assert set(found) == {"block_0"} and set(found["block_0"]["attention"]["query"]) == {"kernel"}
    for place in ("query", "value"):
        parts = [adapter["block_0"]["attention"][place] for adapter in adapters]
        kernel = np.asarray(base["block_0"]["attention"][place]["kernel"])
        start, first, second = (kernel + 2.0 * part["lora_a"] @ part["lora_b"] for part in parts)
        expected = 0.75 * (0.75 * start + 0.25 * first) + 0.25 * second
        np.testing.assert_allclose(found["block_0"]["attention"][place]["kernel"], expected, atol=1e-6)
        halves = [0.75 * (0.75 * parts[0][x] + 0.25 * parts[1][x]) + 0.25 * parts[2][x] for x in ("lora_a", "lora_b")]
        assert np.abs(kernel + 2.0 * halves[0] @ halves[1] - expected).max() > 1e-4
    np.testing.assert_allclose(average.params()["block_0"]["attention"]["query"]["kernel"],
                               found["block_0"]["attention"]["query"]["kernel"])  # fmt: skip
    # Also of stacked layers on a mesh, without a value network, and of some of the kernels.
    deep, lora = dataclasses.replace(MODEL, layers=2, scan_layers=True), LoraConfig(rank=1, targets=("query",))
    write_run(tmp_path / "deep", "sft", random_params(deep), deep, Tokenizer.bytes())
    more: dict[str, Any] = {"init": str(tmp_path / "deep"), "out": str(tmp_path / "on mesh"), "mesh": "fsdp=2"}
    more |= {"lora": lora, "estimator": "rloo", "samples_per_prompt": 2}
    on_mesh = ppo.run(dataclasses.replace(config, **more), prompts=PROMPTS).run
    kernel = random_params(deep)["blocks"]["attention"]["query"]["kernel"]
    shutil.copytree(on_mesh.checkpoints / "00000001", tmp_path / "again" / "00000001")
    first, second = (
        kernel + lora.scale * part["lora_a"] @ part["lora_b"]
        for folder in (tmp_path / "again", on_mesh.checkpoints)
        for part in [load_params(folder)["policy"]["blocks"]["attention"]["query"]]
    )
    found = released_params(on_mesh)["blocks"]["attention"]["query"]
    expected = 0.75 * (0.75 * kernel + 0.25 * first) + 0.25 * second
    np.testing.assert_allclose(found["kernel"], expected, atol=1e-6)
    assert set(found) == {"kernel"} and np.abs(expected - kernel).max() > 1e-4
    # It is no adapter: what goes on from it trains a new one on it, and it is exported whole.
    start = start_from(average, LORA, lambda: jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, start.base, average.params())
    assert is_adapter(start.params)
    with pytest.raises(UserError, match=r"average: expected the factors A and B of an adapter, got the moving average"):
        export(str(run.path), tmp_path / "adapter", adapter=True)
    export(str(run.path), tmp_path / "whole")
    whole = open_source(f"hf:{tmp_path / 'whole'}", stages=("sft",)).params()
    jax.tree.map(np.testing.assert_array_equal, whole, average.params())


def test_what_the_stages_have_written_can_be_exported(runs: Path, tmp_path: Path) -> None:
    assert "adapter of rank 2" in export(str(runs / "sft"), tmp_path / "adapter", adapter=True)
    found = open_source(f"peft:{tmp_path / 'adapter'}", stages=("sft",)).own()
    own = open_source(str(runs / "sft"), stages=("sft",)).own()
    jax.tree.map(np.testing.assert_array_equal, found, own)
    export(str(runs / "ppo"), tmp_path / "critic", critic=True)
    critic = RunFolder.open(runs / "ppo", stages=("ppo",)).load_params()["critic"]
    read = open_source(f"hf:{tmp_path / 'critic'}", stages=("reward",)).params()
    np.testing.assert_array_equal(read["score"]["kernel"], critic["score"]["kernel"])
    query = critic["block_0"]["attention"]["query"]
    base = open_source(str(runs / "base"), stages=("pretrain",)).params()["block_0"]["attention"]["query"]
    wanted = base["kernel"] + 2.0 * query["lora_a"] @ query["lora_b"]
    np.testing.assert_allclose(read["block_0"]["attention"]["query"]["kernel"], wanted, atol=1e-6)


def test_the_doctor_reads_a_value_network_that_is_an_adapter(runs: Path) -> None:
    patient = open_patient(str(runs / "ppo"))
    rollout = rolled(patient)
    assert rollout.no_values == "" and rollout.reference is not None
    episodes, _ = rollout.run(rollout.reference, 0.0)
    critic = value_network(open_source(str(runs / "ppo"), stages=("ppo",)))
    values = jax.jit(Transformer(critic.model, scalar=True).apply)
    mask = np.asarray(episodes.response_mask_BR)
    for row in range(2):
        tokens = np.asarray(episodes.tokens_BT)[row][np.asarray(episodes.mask_BT)[row]]
        said = int(mask[row].sum())
        # The value of the state before each token of the response.
        expected = np.asarray(values({"params": critic.params()}, tokens[None]))[0][len(tokens) - said - 1 : -1]
        np.testing.assert_allclose(np.asarray(episodes.value_BR)[row][mask[row]], expected, atol=1e-5)


def test_what_is_not_there_or_of_another_kind_is_named(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected the folder of a sft run, got one of reward"):
        open_source(str(runs / "judge"), stages=("sft",))
    with pytest.raises(UserError, match=r"nowhere: no such folder; expected one with a config.json"):
        open_source("hf:nowhere", stages=("pretrain",))
    with pytest.raises(UserError, match=r"base: expected a published model's folder, got a run's; .* leave out hf:$"):
        open_source(f"hf:{runs / 'base'}", stages=("pretrain",))
    for name, content, hint in (("config.json", '{"model_type": "llama"}', "hf:"), ("a.gguf", "GGUF", "gguf:")):
        (tmp_path / name).write_text(content)
        named = tmp_path if name == "config.json" else tmp_path / name
        with pytest.raises(UserError, match=f"expected a run's folder, got .* write {hint}{named}$"):
            open_source(str(named), stages=("pretrain",))
    with pytest.raises(UserError, match=r"^hf:: expected .*, got nothing after the colon"):
        open_source("hf:", stages=("pretrain",))
    moved = tmp_path / "moved"
    (runs / "base").rename(moved)
    try:
        with pytest.raises(UserError, match=r"base: expected the folder of .* run, got no such folder"):
            open_source(str(runs / "sft"), stages=("sft",))
    finally:
        moved.rename(runs / "base")
    with pytest.raises(UserError, match=r"lora.rank: expected a base model for the adapters, got no init"):
        pretrain.Config(out=str(tmp_path), lora=LORA)
    with pytest.raises(UserError, match=r"lora.rank: expected backbone init, got scratch"):
        reward.Config(out=str(tmp_path), lora=LORA, backbone="scratch")


def test_a_trainer_makes_its_update_for_the_axis_that_the_loop_names(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        """The loop was called, and is not run."""

    asked: list[Any] = []
    axes: list[str | None] = []

    def train(folder: Any, config: Any, make_state: Any, make_update: Any, batch_at: Any, **how: Any) -> None:
        asked[:] = [make_update, batch_at]
        raise Asked

    text = [Text("zq" * 40)]  # letters that no other text has
    mix = {"pretraining_coef": 1.0, "pretraining_batch": 4, "pretraining_row_length": 16}
    cases: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (pretrain, {"row_length": 16, "tokenizer": "bytes"}, {"texts": text, "heldout": []}),
        (sft, {}, {"records": DEMONSTRATIONS, "heldout": DEMONSTRATIONS[:1]}),
        (reward, {}, ranked(runs)),
        (
            ppo,
            {
                "reward": str(runs / "judge"),
                "prompt_length": 16,
                "minibatches": 2,
                "episode": EpisodeConfig(response_length=6),
            }
            | mix,
            {"prompts": PROMPTS, "texts": text},
        ),
    ]
    for trainer, changes, records in cases:
        monkeypatch.setattr(trainer if trainer is ppo else lifecycle, "train", train)
        monkeypatch.setattr(trainer, "make_update", lambda *_, axis_name=None, **how: axes.append(axis_name))
        config = trainer.Config(**settings(tmp_path / trainer.STAGE, init=str(runs / "sft"), **changes))
        with pytest.raises(Asked):
            trainer.run(config, **records)
        make_update, batch_at = asked
        axes.clear()
        make_update(None)
        make_update("data")
        assert axes == [None, "data"], trainer.STAGE
        if "texts" in records:
            batch = batch_at(0) if trainer is pretrain else batch_at(0).pretraining
            tokenizer = open_source(str(runs / "sft"), stages=("sft",)).tokenizer
            special = {*tokenizer.start_ids, tokenizer.eos_id, tokenizer.pad_id}
            kept = np.asarray(batch.tokens_BT)[np.asarray(batch.segment_ids_BT) > 0]
            assert set(kept.tolist()) - special == set(tokenizer.encode("zq")), trainer.STAGE


def test_answers_are_at_most_half_of_the_smallest_context() -> None:
    of = {context: random_source(dataclasses.replace(MODEL, context=context)) for context in (2, 64, 200, 4096)}
    for contexts, asked, longest in (
        ((4096,), None, 128),
        ((200, 4096), None, 100),
        ((4096, 64), None, 32),
        ((2,), None, 1),
        ((), None, 128),
        ((64,), 60, 60),
    ):
        with case((contexts, asked)):
            assert longest_answer([of[context] for context in contexts], asked) == longest
