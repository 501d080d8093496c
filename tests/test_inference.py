"""The front door in Python, and `rlhf-jax score`: what they say is what the stages train and see."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rlhf_jax
from rlhf_jax.cli.app import main
from rlhf_jax.config import ModelConfig
from rlhf_jax.data import (
    Demonstration,
    Ledger,
    Message,
    chat_ids,
    encode_demonstrations,
    encode_rankings,
    read_records,
)
from rlhf_jax.errors import UserError
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.convert import export
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.cases import case
from tests.made_params import random_params
from tests.made_runs import write_run

pytestmark = pytest.mark.core

BYTES = Tokenizer.bytes()
MODEL = ModelConfig(vocab_size=BYTES.vocab_size, context=64, width=16, layers=1, heads=2)
TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "sft", "sft", random_params(MODEL), MODEL, BYTES)
    scores = {"score_mean": 0.5, "score_scale": 2.0}
    write_run(root / "judge", "reward", random_params(MODEL, True, 1), MODEL, BYTES, **scores)
    return root


@functools.partial(jax.jit, static_argnames="scalar")
def outputs(ids: jax.Array, *, scalar: bool) -> jax.Array:
    params = jax.tree.map(jnp.asarray, random_params(MODEL, True, 1) if scalar else random_params(MODEL))
    return Transformer(MODEL, scalar=scalar).apply({"params": params}, ids)[0]


def at_last(ids: list[int], *, scalar: bool) -> np.ndarray:
    """The network's output at the last id; later ones, always the same number, do not change it."""
    return np.asarray(outputs(np.array([ids + [0] * (48 - len(ids))]), scalar=scalar))[len(ids) - 1]


def raw_score(ids: list[int]) -> float:
    return float(at_last(ids, scalar=True))


def test_scores_are_those_that_ppo_sees(runs: Path) -> None:
    judge = rlhf_jax.load(runs / "judge")
    bos, eos, encode = [*BYTES.start_ids], [BYTES.eos_id], BYTES.encode
    first = (raw_score([*bos, *encode("a:"), *encode(" b"), *eos]) - 0.5) / 2.0
    second = (raw_score([*bos, *encode("a:"), *encode(" a long one"), *eos]) - 0.5) / 2.0
    third = (raw_score([*chat_ids([Message("user", "hi")], BYTES), *encode(" ho"), *eos]) - 0.5) / 2.0
    cases: list[Any] = [
        (["a:", "a:"], [" b", " a long one"], [first, second]),
        ("a:", [" b", " a long one", " b"], [first, second, first]),  # one prompt for all
        ("a:", " b", [first]),
        (["a:", TALK], [" b", "ho"], [first, third]),
        (TALK, ["ho", "ho"], [third, third]),
        ([], [], []),
    ]
    for prompts, answers, expected in cases:
        with case((prompts, answers)):
            assert judge.score(prompts, answers) == pytest.approx(expected, abs=1e-5)
    refused: list[Any] = [
        (["a"], [" b", " c"], "answers: expected 1, one for each prompt, got 2"),
        ("a", [" b" * 40], r"answers\[0\]: expected prompt and answer to fit the model, got longer than 64 tokens"),
        (
            ["a", 7],
            [" b", " c"],
            r"answers\[1\]: field 'prompt': expected text or a list of messages, got the number 7",
        ),
        ("a", [None], r"answers\[0\]: field 'answer': expected text, got null"),
    ]
    for prompts, answers, message in refused:
        with case(message), pytest.raises(UserError, match=message):
            judge.score(prompts, answers)
    with pytest.raises(UserError, match="judge: expected a language model to generate with, got a reward model"):
        judge.generate("a")


def test_a_greedy_response_is_what_the_model_says_next(runs: Path) -> None:
    model = rlhf_jax.load(str(runs / "sft"))
    ids = [*BYTES.start_ids, *BYTES.encode("say a")]
    start = len(ids)
    for _ in range(5):
        logits = at_last(ids, scalar=False)
        ids.append(int(np.argmax(np.where(np.arange(len(logits)) == BYTES.pad_id, -np.inf, logits))))
    greedy: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.0}
    assert BYTES.eos_id not in ids[start:]
    assert model.generate("say a", **greedy) == [BYTES.decode(ids[start:])]
    assert model.generate(["x", "say a", TALK], **greedy)[1] == BYTES.decode(ids[start:])
    drawn = [model.generate(["say a"] * 3, max_new_tokens=5, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 1
    assert model.generate([], max_new_tokens=5) == []
    refused: list[Any] = [
        (["a", "b" * 70], {}, r"prompts\[1\]: expected at most 32 tokens"),
        ("a", {"top_p": 0.0}, "top_p: expected above 0"),
        (["a", None], {}, r"prompts\[1\]: field 'prompt': expected text, got null"),
        ("a", {"max_new_tokens": 64}, "max_new_tokens: expected at most 63"),
    ]
    for prompts, settings, message in refused:
        with case(message), pytest.raises(UserError, match=message):
            model.generate(prompts, **({"max_new_tokens": 32} | settings))
    with pytest.raises(UserError, match="sft: expected a reward model to score with, got a language model"):
        model.score("a", "b")


def test_the_best_of_n_responses_is_kept(runs: Path) -> None:
    model, prompts = rlhf_jax.load(runs / "sft"), ["say a", TALK]
    settings: dict[str, Any] = {"max_new_tokens": 5, "seed": 3}
    drawn = model.generate(["say a"] * 3 + [TALK] * 3, temperature=1.0, **settings)
    given: list[Any] = []

    def reward(prompts: list[Any], answers: list[str]) -> list[float]:
        given.append((prompts, answers))
        return [0.0, 2.0, 1.0, 5.0, 5.0, 4.0]

    assert model.best_of_n(prompts, reward, n=3, **settings) == [drawn[1], drawn[3]]
    assert given == [(["say a"] * 3 + [TALK] * 3, drawn)]
    judge = rlhf_jax.load(runs / "judge")
    # An answer of five tokens without an end is scored without one.
    cut = [len(model.source.tokenizer.encode(answer)) >= 5 for answer in drawn[:3]]
    records = [Demonstration("say a", answer, ended=not is_cut) for answer, is_cut in zip(drawn, cut)]
    scores = judge.record_scores(records, Ledger())
    assert any(cut) and scores != judge.score("say a", drawn[:3])
    assert model.best_of_n("say a", judge, n=3, **settings) == [drawn[int(np.argmax(scores))]]
    for n, function, message in (
        (0, reward, "n: expected 1 or more responses to choose from, got 0"),
        (2, lambda prompts, answers: [1.0], r"reward: expected 4 numbers, one for each response, got .* \(1,\)$"),
        (2, lambda prompts, answers: [1.0, 2.0, np.nan, 0.0], r"got an array of shape \(4,\) with NaN"),
    ):
        with case(message), pytest.raises(UserError, match=message):
            model.best_of_n(prompts, function, n=n, **settings)


def test_a_published_folder_is_loaded_without_a_prefix(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sft", "judge"):
        export(str(runs / name), tmp_path / name)
    prompts, answers = ["a:", "a:"], [" b", " c"]
    assert rlhf_jax.load(tmp_path / "sft").generate(prompts, temperature=0.0, max_new_tokens=4) == rlhf_jax.load(
        runs / "sft"
    ).generate(prompts, temperature=0.0, max_new_tokens=4)
    expected = rlhf_jax.load(runs / "judge").score(prompts, answers)
    for spec in (tmp_path / "judge", f"hf:{tmp_path / 'judge'}"):
        assert rlhf_jax.load(spec).score(prompts, answers) == pytest.approx(expected, abs=1e-5)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"runs/typo: expected the folder of a .* run, got no such folder$"):
        rlhf_jax.load("runs/typo")
    with pytest.raises(UserError, match=r"none: expected the folder of a .* run, got no such folder"):
        rlhf_jax.load(tmp_path / "none")


def call(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as end:
        main(["score", *arguments])
    return end.value.code


def test_a_file_of_answers_is_scored(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [" b", " a long one"]
    low, high = sorted(texts, key=lambda text: rlhf_jax.load(runs / "judge").score("a:", text)[0])
    worse, better = rlhf_jax.load(runs / "judge").score("a:", [low, high])
    rows: list[Any] = [{"prompt": "a:", "chosen": high, "rejected": low}] * 2
    rows += [{"prompt": "a:", "chosen": low, "rejected": high}, {"prompt": "a", "chosen": "b", "rejected": "b"}]
    rows += [{"prompt": "a:", "chosen": " x" * 40, "rejected": low}]
    rows += [{"prompt": "a:", "responses": [low, high, low], "ranks": [2, 1, 2]}]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call(str(runs / "judge"), "--data", "pairs.jsonl", "--out", "scored.jsonl") == 0
    said = capsys.readouterr().err
    # By hand: 3 of 4 prompts; Wilson's interval of 3/4.
    assert (
        "the better response scores higher in 0.750 of 4 prompts (95% interval 0.301 to 0.954; 0.5 is chance)" in said
    )
    assert "1 rows left out: chosen equals rejected" in said
    assert "1 answers without a score: longer than 64 tokens" in said
    scored = [json.loads(line) for line in Path("scored.jsonl").read_text().splitlines()]
    assert scored[0] == {
        "where": "pairs.jsonl:1",
        **rows[0],
        "chosen_score": pytest.approx(better, abs=1e-5),
        "rejected_score": pytest.approx(worse, abs=1e-5),
    }
    assert scored[3]["chosen_score"] is None and scored[3]["rejected_score"] == pytest.approx(worse, abs=1e-5)
    assert scored[4]["scores"] == pytest.approx([worse, better, worse], abs=1e-5)
    assert call(str(runs / "judge"), "--data", "pairs.jsonl", "--out", "scored.jsonl") == 2
    assert "out: expected a file that does not exist yet, got scored.jsonl" in capsys.readouterr().err
    answers = [{"prompt": "a:", "completion": high}, {"messages": [*TALK, {"role": "assistant", "content": "ho"}]}]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    assert call(str(runs / "judge"), "--data", "answers.jsonl") == 0
    out, err = capsys.readouterr()
    found = [json.loads(line)["score"] for line in out.splitlines()]
    assert found == pytest.approx([better, *rlhf_jax.load(runs / "judge").score(TALK, "ho")], abs=1e-5)
    assert "prompts" not in err
    assert call(str(runs / "sft"), "--data", "answers.jsonl") == 2
    assert "sft: expected a reward model, got a language model" in capsys.readouterr().err


def test_a_file_is_scored_on_the_rows_that_training_sees(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    judge = str(runs / "judge")

    def said(text: str) -> list[dict[str, str]]:
        """ "hi|ho" -> messages of the user and the assistant in turn."""
        return [{"role": ("user", "assistant")[at % 2], "content": part} for at, part in enumerate(text.split("|"))]

    rows: list[tuple[str, dict[str, Any]]] = [
        ("demonstrations", {"prompt": "a:", "completion": " b", "ended": False, "chosen": None, "responses": None}),
        ("demonstrations", {"messages": said("h|a|i|b"), "ranks": None, "rejected": None}),
        ("rankings", {"prompt": "a:", "chosen": " b", "rejected": " c", "ended_rejected": False}),
        ("rankings", {"prompt": "a:", "responses": [" b", " c"], "ranks": [1, 2], "ended": [False, True]}),
        ("rankings", {"chosen": said("h|a|i|b"), "rejected": said("h|c"), "ended_chosen": False}),
        ("rankings", {"chosen": said("h|a|i|b"), "rejected": said("h|c|j|d"), "ended_rejected": False}),
    ]
    for kind, row in rows:
        with case(row):
            Path("data.jsonl").write_text(json.dumps(row) + "\n")
            records: Any = read_records("data.jsonl", kind, Ledger())  # type: ignore[call-overload]
            if kind == "rankings":
                wanted = [
                    list(ids) for ids in encode_rankings(records, BYTES, max_tokens=64, ledger=Ledger()).rows[0][0]
                ]
            else:
                wanted = [list(encode_demonstrations(records, BYTES, max_tokens=64, ledger=Ledger()).rows[0][0])]
            assert call(judge, "--data", "data.jsonl") == 0
            found = json.loads(capsys.readouterr().out)
            scores = found.get("scores") or [v for name, v in found.items() if name.endswith("score")]
            assert scores == pytest.approx([(raw_score(ids) - 0.5) / 2.0 for ids in wanted], abs=1e-5)
            assert found["prompt"] == getattr(
                records[0], "prompt", "\n\nHuman: h\n\nAssistant: a\n\nHuman: i\n\nAssistant:"
            )
    Path("there.jsonl").touch()
    assert call("no-such-run", "--data", "data.jsonl", "--out", "there.jsonl") == 2
    assert "out: expected a file that does not exist yet" in capsys.readouterr().err


def test_a_weight_that_is_not_finite_is_named_and_makes_no_text(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = jax.tree.map(np.array, random_params(MODEL))
    broken["block_0"]["ffn"]["up"]["kernel"][2, 3] = np.nan
    judge = jax.tree.map(np.array, random_params(MODEL, True, 1))
    judge["embedding"][7, 0] = np.inf
    write_run(tmp_path / "nan", "sft", broken, MODEL, BYTES)
    write_run(tmp_path / "released", "sft", random_params(MODEL), MODEL, BYTES, released=broken)
    write_run(tmp_path / "judge", "reward", judge, MODEL, BYTES)
    published = tmp_path / "published"
    export(str(runs / "sft"), published)
    tensors = load_file(published / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], -np.inf)
    save_file(tensors, published / "model.safetensors")
    kernel = "parameter 'block_0.ffn.up.kernel': expected finite numbers, got nan at [2, 3]"
    for where, use, said in (
        ("nan", lambda model: model.generate(["a"]), kernel),
        ("released", lambda model: model.generate(["a"]), kernel),
        (
            "judge",
            lambda model: model.score(["a"], ["b"]),
            "parameter 'embedding': expected finite numbers, got inf at",
        ),
        (
            "published",
            lambda model: model.generate(["a"]),
            "tensor 'model.norm.weight': expected finite numbers, got -in",
        ),
    ):
        with case(where), pytest.raises(UserError) as end:
            use(rlhf_jax.load(tmp_path / where))
        assert said in str(end.value) and where in str(end.value)
    with pytest.raises(SystemExit) as exited:
        main(["generate", str(tmp_path / "nan"), "--prompt", "a", "--max-new-tokens", "8"])
    errors = capsys.readouterr()
    assert exited.value.code == 2 and kernel in errors.err and errors.err.count("\n") == 1 and not errors.out
