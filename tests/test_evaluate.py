"""`rlhf-jax evaluate` and `rlhf_jax.evaluation.evaluate`: what they sample, score, compare and write."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.cli.app import main
from rlhf_jax.config import ModelConfig
from rlhf_jax.data import Comparison, Ledger, Message, Prompt, Ranking, chat_ids
from rlhf_jax.data.dialogues import prompt_row
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import evaluate, reward_accuracy
from rlhf_jax.evaluation.answers import Answer, Language, _logp_and_entropy, read_answers, sample_answers
from rlhf_jax.evaluation.arms import Arm, best_arm
from rlhf_jax.evaluation.compare_models import short_names
from rlhf_jax.evaluation.evaluation_tables import fit_lines
from rlhf_jax.evaluation.frontier import best_of_curve, policies_curve, steps_to
from rlhf_jax.evaluation.intervals import wilson
from rlhf_jax.evaluation.overoptimisation import fit_gold
from rlhf_jax.feedback.evaluated import items_of_answers
from rlhf_jax.feedback.records import Judgement
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained.convert import export
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.cases import case
from tests.made_params import random_params
from tests.made_runs import random_source, write_run
from tests.test_data_tools import ASK, CALLS, RESULT, WEATHER
from tests.test_report import Page

pytestmark = pytest.mark.slow

BYTES = Tokenizer.bytes()
MODEL = ModelConfig(vocab_size=BYTES.vocab_size, context=64, width=16, layers=1, heads=2)
HI = [{"role": "user", "content": "hi"}]
# Their lengths are in one bucket, which is compiled once.
PROMPTS: list[Any] = [
    {"prompt": "a text that goes on:", "goal": 1},
    {"prompt": HI, "goal": 2},
    {"question": "why?", "goal": 3},
    {"prompt": "a text that goes on:", "goal": 4},
    {"prompt": "x" * 60},
    {"prompt": "日本の言葉は", "goal": 5},
]
SMALL: dict[str, Any] = {"max_new_tokens": 8, "batch": 4}


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "sft", "sft", random_params(MODEL), MODEL, BYTES)
    both = {"policy": random_params(MODEL, seed=2), "critic": random_params(MODEL, True)}
    write_run(root / "ppo", "ppo", both, MODEL, BYTES)
    write_run(root / "judge", "reward", random_params(MODEL, True, 1), MODEL, BYTES, score_mean=0.5, score_scale=2.0)
    write_rows(root / "prompts.jsonl", PROMPTS)
    write_rows(root / "text.jsonl", [{"text": "some text"}, {"text": "ein Wort: überall"}])
    return root


@functools.partial(jax.jit, static_argnames="scalar")
def outputs(ids: jax.Array, *, scalar: bool) -> jax.Array:
    params = jax.tree.map(jnp.asarray, random_params(MODEL, scalar, 1 if scalar else 0))
    return Transformer(MODEL, scalar=scalar).apply({"params": params}, ids)[0]


def output_of(ids: list[int], *, scalar: bool = False) -> np.ndarray:
    """The network's outputs at some ids; the later ones, always as many, do not change them."""
    padded = np.array([ids + [0] * (64 - len(ids))])
    return np.asarray(outputs(padded, scalar=scalar), np.float64)[: len(ids)]


def count_a(completions: list[Any], goal: list[int]) -> list[float | None]:
    texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in completions]
    return [None if g == 5 else float(text.count("a")) for text, g in zip(texts, goal, strict=True)]


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Any]:
    return evaluate(
        [root / "sft", root / "ppo"],
        root / "prompts.jsonl",
        reward=root / "judge",
        reward_funcs=count_a,
        reference=root / "sft",
        text=root / "text.jsonl",
        samples=2,
        best_of=3,
        out=root / "out",
        **SMALL,
    )


def answered(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def test_scores_are_those_that_ppo_sees(root: Path, found: dict[str, Any]) -> None:
    rows = answered(root / "out")
    assert [row["where"].rpartition(":")[2] for row in rows] == ["1", "2", "3", "6"]
    assert rows[1]["prompt"] == HI and found["scorers"] == ["judge", "count_a"]
    turns = {1: (Message("user", "hi"),), 2: (Message("user", "why?"),)}
    for at, row in enumerate(rows):
        for name, several in row["answers"].items():
            assert len(several) == (1 if "best" in name else 2)
            for answer in several:
                asked = chat_ids(turns[at], BYTES) if at in turns else [*BYTES.start_ids, *BYTES.encode(row["prompt"])]
                text = f" {answer['answer']}" if at in turns else answer["answer"]
                ids = [*asked, *BYTES.encode(text), *([BYTES.eos_id] if answer["ended"] else [])]
                with case((at, name, answer)):
                    expected = (output_of(ids, scalar=True)[-1] - 0.5) / 2.0
                    assert answer["scores"]["judge"] == pytest.approx(expected, abs=1e-5)
                    count = None if at == 3 else float(answer["answer"].count("a"))
                    assert answer["scores"]["count_a"] == count
    sft, ppo, best, _ = found["models"]
    means = [np.mean([answer["scores"]["judge"] for answer in row["answers"]["sft"]]) for row in rows]
    assert sft["scores"]["judge"]["value"] == pytest.approx(np.mean(means))
    assert sft["scores"]["judge"]["low"] < np.mean(means) < sft["scores"]["judge"]["high"]
    assert found["notes"] == [
        "count_a: 1 prompts are left out, as an answer has no score",
        "1 rows are left out: the same prompt as in an earlier row",
        f"1 rows are left out: longer than 56 tokens, the context of {root / 'sft'} less max_new_tokens",
    ]
    assert (sft["kl"]["value"], sft["kl"]["standard_error"]) == (0.0, 0.0) and ppo["kl"]["value"] != 0
    assert best["kl"] is None and best["kl_to_own_model"] == pytest.approx(math.log(3) - 2 / 3)
    assert best["name"] == "sft, best of 3" and best["answers"] == 4
    decided = json.loads((root / "out" / "ledger.json").read_text())
    assert [
        (row["where"].rpartition(":")[2], row["reason"]) for row in decided["rows"] if row["what"] == "dropped"
    ] == [
        ("4", "the same prompt as in an earlier row"),
        ("5", f"longer than 56 tokens, the context of {root / 'sft'} less max_new_tokens"),
    ]


def test_perplexity_is_over_the_tokens_of_the_texts(found: dict[str, Any]) -> None:
    nats, count = 0.0, 0
    for text in ("some text", "ein Wort: überall"):
        ids = [*BYTES.start_ids, *BYTES.encode(text), BYTES.eos_id]
        logits = output_of(ids)[:-1]
        nats += float(np.sum(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(ids) - 1), ids[1:]]))
        count += len(ids) - 1
    text = found["models"][0]["text"]
    assert (text["tokens"], text["bytes"]) == (count, len("some text") + len("ein Wort: überall".encode()))
    assert text["nats_per_token"] == pytest.approx(nats / count, rel=1e-5)
    assert text["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert text["bits_per_byte"] == pytest.approx(nats / math.log(2) / text["bytes"], rel=1e-5)


def test_kl_and_entropy_are_of_the_response_alone() -> None:
    prompt, response, temperature = [*BYTES.start_ids, *BYTES.encode("ab")], BYTES.encode("xyz"), 0.5
    logits = output_of([*prompt, *response])[len(prompt) - 1 : -1] / temperature
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    garbage = 77  # in masked slots
    tokens = np.array([[garbage, garbage, *prompt, *response, garbage]])
    mask = np.array([[False] * 2 + [True] * (len(prompt) + 3) + [False]])
    params = jax.tree.map(jnp.asarray, random_params(MODEL))
    total, entropy = _logp_and_entropy(Transformer(MODEL), params, tokens, mask, mask[:, -4:], temperature=temperature)
    assert float(total[0]) == pytest.approx(logp[np.arange(3), response].sum(), abs=1e-4)
    assert float(entropy[0]) == pytest.approx(-(np.exp(logp) * logp).sum(axis=1).mean(), abs=1e-4)


def test_an_answer_depends_on_its_prompt_and_the_seed_alone() -> None:
    language = Language.of(random_source(MODEL))
    prompts = [Prompt("a text that goes on:"), Prompt("another such text:"), Prompt("one more of them is:")]

    def sampled(which: list[int], **changes: Any) -> dict[int, list[str]]:
        settings: dict[str, Any] = {"samples": 3, "max_new_tokens": 8, "temperature": 1.0, "batch": 4} | changes
        found = sample_answers(language, [prompts[at] for at in which], which, **settings)
        return {which[at]: [answer.text for answer in answers] for at, answers in found}

    first = sampled([0, 1, 2])
    assert len({text for texts in first.values() for text in texts}) == 9
    assert sampled([2, 0]) == {at: first[at] for at in (0, 2)}
    more = sampled([0, 1, 2], samples=5)  # two rounds of three, of which the last answer is a repetition
    assert {at: texts[:3] for at, texts in more.items()} == first
    assert all(len(texts) == len(set(texts)) == 5 for texts in more.values())
    prompts[1] = prompts[0]  # another place, other numbers
    assert sampled([0, 1, 2])[0] != sampled([0, 1, 2])[1]
    assert sampled([0, 1, 2], seed=1) != first


def test_the_same_seed_writes_the_same_files(root: Path, found: dict[str, Any], tmp_path: Path) -> None:
    again = evaluate(
        [root / "sft", root / "ppo"],
        root / "prompts.jsonl",
        reward=root / "judge",
        reward_funcs=count_a,
        reference=root / "ppo" / ".." / "sft",
        text=root / "text.jsonl",
        samples=2,
        best_of=3,
        out=tmp_path / "out",
        **SMALL,
    )
    left_out = {"settings": None, "reference": None}  # their paths
    assert again | left_out == found | left_out
    assert answered(tmp_path / "out") == answered(root / "out")
    # A published folder is the run that it was exported from.
    export(str(root / "ppo"), tmp_path / "published")
    folder = tmp_path / "hf"
    evaluate(tmp_path / "published", root / "prompts.jsonl", samples=5, out=folder, **SMALL)
    texts = [[answer["answer"] for answer in row["answers"]["published"][:2]] for row in answered(folder)]
    assert texts == [[answer["answer"] for answer in row["answers"]["ppo"]] for row in answered(root / "out")]


def test_another_tokenizer_than_the_references_has_no_kl(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(reference: Any, other: Any) -> None:
        raise UserError(f"{Path(other.where).name}: its tokenizer is not that of {Path(reference.where).name}")

    monkeypatch.setattr("rlhf_jax.evaluation.compare_models.same_tokenizer", refuse)
    models = {"models": root / "sft", "prompts": root / "prompts.jsonl", "reference": root / "ppo"}
    found = evaluate(**models, samples=5, out=tmp_path / "out", **SMALL)
    assert found["notes"][0] == "no KL to the reference: sft: its tokenizer is not that of ppo"
    (sft,) = found["models"]
    assert sft["kl"] is None and sft["entropy"]["value"] > 0 and found["policies"] is None


def made_files(folder: Path) -> tuple[str, str]:
    """Files of answers to four prompts; those of the second are longer, and have more x's on three of them."""
    ours = [("p", "x xx"), ("q", "x"), ("r", ""), ("s", "a b a b")]
    theirs = [("p", "xx xxx x"), ("q", "xx, more"), ("r", "x and more"), ("s", "a b c d")]
    names = ("answer", "completion", "response", "output")
    first = [{"prompt": prompt, name: text} for name, (prompt, text) in zip(names, ours, strict=True)]
    second = [{"prompt": prompt, "answer": text, "ended": prompt != "s"} for prompt, text in reversed(theirs)]
    return write_rows(folder / "ours.jsonl", first), write_rows(folder / "theirs.jsonl", second)


def x_count(prompts: list[str], completions: list[str], **columns: Any) -> list[int]:
    return [text.count("x") for text in completions]


def test_files_of_answers_are_compared_by_hand(tmp_path: Path) -> None:
    found = evaluate(made_files(tmp_path), reward_funcs=[x_count], out=tmp_path / "out")
    (rate,) = found["win_rates"]
    assert (rate["first"], rate["second"], rate["scorer"]) == ("theirs.jsonl", "ours.jsonl", "x_count")
    low, high = wilson(0.875, 4)
    assert rate["rate"] == {"value": 0.875, "low": low, "high": high} and rate["ties"] == 0.25
    assert rate["longer"] == 0.875 and rate["score_difference"]["value"] == (3 + 1 + 1 + 0) / 4
    first, second = found["models"]
    assert (first["missing_end"], second["missing_end"]) == (None, 0.25)
    assert (first["empty"], first["characters"], first["words"]) == (0.25, (4 + 1 + 0 + 7) / 4, (2 + 1 + 0 + 4) / 4)
    assert first["distinct_1"] == 4 / 7 and first["distinct_2"] == 3 / 4  # x xx a b; x-xx a-b b-a
    assert first["kl"] is None and first["entropy"] is None and first["tokens"] is None
    assert [row["prompt"] for row in answered(tmp_path / "out")] == ["p", "q", "r", "s"]


def test_best_of_n_from_a_file_of_several_answers(tmp_path: Path) -> None:
    texts = ["x", "xxx", "x", "", "xx"]  # the first is its own, the best of the others has 3
    file = write_rows(tmp_path / "many.jsonl", [{"prompt": p, "answer": text} for text in texts for p in "pq"])
    other = write_rows(tmp_path / "one.jsonl", [{"prompt": p, "answer": "xx"} for p in "pq"])
    found = evaluate([other, file], reward_funcs=x_count, best_of=4, out=tmp_path / "out")
    assert [model["name"] for model in found["models"]] == ["one.jsonl", "many.jsonl", "many.jsonl, best of 4"]
    assert [model["scores"]["x_count"]["value"] for model in found["models"]] == [2.0, 1.0, 3.0]
    assert found["notes"] == [
        "one.jsonl: no best of 4, which takes 5 answers to each prompt with those of its own, got 1"
    ]
    (curve,) = found["best_of_n"]
    assert curve["n"] == [1, 2, 3, 4] and curve["prompts"] == 2
    # Of xxx x - xx: the mean 6/4; of the six pairs the better has 3 3 3 1 2 2; of the four triples 3 3 3 2; 3.
    assert curve["scores"]["x_count"] == pytest.approx([1.5, 14 / 6, 11 / 4, 3.0])
    gain, d = np.array(curve["scores"]["x_count"]) - 1.5, np.sqrt(curve["kl"])
    assert curve["fits"]["x_count"]["alpha"]["value"] == pytest.approx(fit_gold("best-of-n", d, gain).alpha.value)
    assert curve["kl"][3] == pytest.approx(math.log(4) - 3 / 4)


def arm(name: str, kl: float | None, **scores: Any) -> Arm:
    shape = np.shape(next(iter(scores.values())))
    answers = [[Answer("text", kl=kl)] * shape[1] for _ in range(shape[0])]
    return Arm(name, f"runs/{name}", "model", answers, {key: np.array(value) for key, value in scores.items()})


def test_gold_scores_turn_with_the_distance_from_the_start() -> None:
    # Gold is d (2 - 0.8 log d) above the start's 10 to every prompt, but for prompts' own offsets; proxy is 3 d.
    offsets, arms = np.linspace(-1, 1, 8)[:, None], []
    for kl in (9.0, 0.25, 4.0):
        d = math.sqrt(kl)
        arms.append(arm(f"kl{kl:g}", kl, proxy=3 * d + offsets, gold=10 + d * (2 - 0.8 * math.log(d)) + offsets))
    start = arm("sft", 0.0, proxy=offsets, gold=10 + offsets)
    found: Any = policies_curve([start, *arms, best_arm(arms[0], "proxy")], start, seed=0)
    assert found["models"] == ["sft", "kl0.25", "kl4", "kl9"] and found["kl"] == [0.0, 0.25, 4.0, 9.0]
    fit = found["fits"]["gold"]
    assert (fit["form"], fit["turned"]) == ("rl", False)
    assert [fit[name]["value"] for name in ("alpha", "beta", "turn")] == pytest.approx([2.0, 0.8, math.exp(1.5)])
    assert found["fits"]["proxy"]["turn"]["value"] is None or found["fits"]["proxy"]["turn"]["value"] > 1e3
    assert policies_curve([start, arms[0]], start, seed=0) is None
    # Prompts without a score of each are left out.
    arms[1].scores["gold"][0] = math.nan
    assert policies_curve([start, *arms], start, seed=0)["fits"]["gold"]["units"] == 7  # type: ignore[index]
    assert [steps_to(n) for n in (2, 5, 64)] == [[1, 2], [1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]]
    pool = arm("sft", 0.0, proxy=[[1.0, 2.0, 3.0], [math.nan, 1.0, 2.0]], gold=[[5.0, 9.0, 1.0], [7.0, 1.0, 1.0]])
    curve: Any = best_of_curve(pool, "proxy", seed=0)
    assert curve["prompts"] == 1 and curve["scores"]["gold"] == pytest.approx([5.0, (9 + 1 + 1) / 3, 1.0])
    assert best_arm(pool, "proxy").scores["gold"].tolist() == [[1.0], [1.0]]


def test_a_reward_model_on_comparisons_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = (Message("user", "hi"),)
    records: list[Any] = [
        Comparison("p", " long answer", " no", "c:1"),
        Comparison("\n\nHuman: hi\n\nAssistant:", " a", " bb", "c:2", turns),
        Ranking("p", (" a", " bb", " ccc"), (1, 2, 2), "c:3"),
        Comparison("p", " x" * 40, " y", "c:4"),
    ]
    scores = np.array([[2.0, -1.0, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 3.0]], np.float32)
    monkeypatch.setattr(reward_accuracy, "scores_of", lambda *_, **__: scores)
    ledger = Ledger()
    found: Any = reward_accuracy.reward_accuracy(random_source(MODEL, scalar=True), records, ledger)
    # Right; a tie; one of the two ordered pairs of the ranking. Three prompts count once each.
    assert found["accuracy"]["value"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert (found["prompts"], found["pairs"]) == (3, 4)
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == wilson(2 / 3, 3)
    assert found["longer_wins"] == pytest.approx((1 + 0 + 0) / 3)
    margins = [3.0, 0.0, 1.0, -2.0]
    assert sum(one.pairs for one in found["by_margin"]) == 4
    assert found["by_margin"][0].predicted == 0.5 and found["by_margin"][0].observed == 0.5
    assert found["by_margin"][1].predicted == pytest.approx(1 / (1 + math.exp(-margins[2])))
    assert [(one.low, one.high) for one in found["by_length"]] == [(-2.0, -2.0), (-1.0, -1.0), (9.0, 9.0)]
    assert ledger.reasons()["dropped"] == {"longer than 64 tokens": 1}
    assert reward_accuracy.reward_accuracy(random_source(MODEL, scalar=True), records[3:], Ledger()) is None


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_the_command_prints_tables_and_writes_a_report(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "220")
    Path("quality.py").write_text("def score(prompts, completions):\n    return [len(c) for c in completions]\n")
    files = made_files(tmp_path)
    pairs = [{"prompt": "p", "chosen": " <script>x</script>", "rejected": " no"}] * 9
    write_rows(tmp_path / "pairs.jsonl", [*pairs, {"prompt": "p", "chosen": " y", "rejected": " y"}])
    rows = [{"prompt": "p<b>", "answer": "<script>x</script>"}, {"prompt": HI, "answer": ""}]
    rows.append({"prompt": "long", "answer": "x" * 64})
    write_rows(tmp_path / "third.jsonl", rows)
    flags = ["--reward-function", "quality.py:score", "--reward", root / "judge", "--comparisons", "pairs.jsonl"]
    code, out, err = call(capsys, *files, *flags, "--out", "both")
    assert code == 0, err
    for words in (
        r"score by score +3\.00 \(.*\) +8\.25 \(",
        r"score +theirs\.jsonl +ours\.jsonl +0\.875 \({:.3f} to {:.3f}\)".format(*wilson(0.875, 4)),
        rf"{root / 'judge'} +[01]\.000 \([\d.]+ to [\d.]+\) +1\.000",
        r"\n.*theirs\.jsonl and ours\.jsonl cannot be told apart: 87\.5% of 4 prompts by score",
        r"report: both/report\.html",
    ):
        with case((words, out)):
            assert re.search(words, out)
    assert {path.name for path in Path("both").iterdir()} == {
        *("evaluation.json", "answers.jsonl", "report.html", "ledger.json")
    }
    assert json.loads(Path("both/evaluation.json").read_text())["reward_models"][0]["pairs"] == 9
    code, _, err = call(capsys, *files, *flags, "--out", "both")
    assert code == 2 and "out: expected a folder without an evaluation, got both/evaluation.json" in err
    Path("run").mkdir()
    Path("run/config.json").write_text("{}")
    code, _, err = call(capsys, *files, *flags, "--out", "run")
    assert code == 2 and "out: expected a folder of its own, got one with config.json, a run's" in err
    code, out, err = call(capsys, "third.jsonl", *flags[:4], "--out", "one")
    assert code == 0 and "Evaluation of third.jsonl" in out
    assert "note: 1 answers have no score by a reward model: longer than 64 tokens" in err
    assert "note: judge: 1 prompts are left out, as an answer has no score" in err
    source = Path("one/report.html").read_text(encoding="utf-8")
    shown = Page(source).text
    assert "<script" not in source and "<script>x</script>" in shown and "user: hi" in shown and "nothing" in shown
    code, out, err = call(capsys, "--reward", root / "judge", "--comparisons", "pairs.jsonl", "--out", "judge")
    assert code == 0 and "longer wins" in out and "self-BLEU" not in out and not Path("judge/answers.jsonl").exists()
    assert "By margin" in Page(Path("judge/report.html").read_text(encoding="utf-8")).text


def test_people_compare_answers_to_dialogues_with_tools() -> None:
    asked = {"prompt": [ASK, CALLS, RESULT], "tools": [WEATHER]}
    answers = {name: [{"answer": name, "ended": True}] for name in ("a", "b")}
    (item,) = items_of_answers([{"where": "f:1", **asked, "answers": answers}], ["a", "b"])
    assert item.responses == ("a", "b") and [turn.role for turn in item.turns] == ["tools", "user", "assistant", "tool"]
    found = prompt_row(item.turns)
    assert found["tools"] == [WEATHER] and [found["prompt"][0], found["prompt"][2]] == [ASK, RESULT]
    assert found["prompt"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Ulm"}


def test_people_compare_the_answers_blind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours, theirs = made_files(tmp_path)
    # The baseline comes first in the alphabet, and so in the rates of the labelling page, which are turned round.
    flags = [ours, theirs, "--people", "labels", "--out", "both"]
    code, out, err = call(capsys, *flags, "--no-serve")
    assert code == 0 and "labels: 4 prompts to compare, 4 of them new" in err and "nobody has judged yet" in err
    assert json.loads(Path("both/evaluation.json").read_text())["people"] is None

    def serve(config: Any, store: Any) -> None:
        assert (config.folder, config.port) == ("labels", 9000)
        items = {item.prompt: item for item in store.items()}
        assert all(item.sources == ("ours.jsonl", "theirs.jsonl") for item in items.values())
        assert items["s"].ended == (True, False) and items["r"].responses == ("", "x and more")
        bad, none = frozenset({"hallucination"}), frozenset[str]()
        for labeller, prompt, ranks, marks in (
            *(("ann", "p", (2, 1), (bad, none)), ("ann", "q", (2, 1), (none, none)), ("bob", "p", (2, 1), ())),
            *(("ann", "r", (1, 2), (none, none)), ("ai:judge", "s", (1, 2), ())),
        ):
            store.record([Judgement(items[prompt].id, labeller, ranks, flags=marks)])

    monkeypatch.setattr("rlhf_jax.cli.labelling.serve", serve)
    code, out, err = call(capsys, *flags, "--port", 9000)
    assert code == 0, err
    people = json.loads(Path("both/evaluation.json").read_text())["people"]
    assert (people["items"], people["of"], people["judgements"], people["labellers"]) == (3, 4, 4, 2)
    (pair,) = people["win_rates"]
    assert (pair["first"], pair["second"], pair["ties"]) == ("theirs.jsonl", "ours.jsonl", 0.0)
    low, high = wilson(2 / 3, 3)  # wins p and q, loses r
    assert pair["win_rate"] == {
        "value": pytest.approx(2 / 3),
        "low": pytest.approx(low),
        "high": pytest.approx(high),
        "items": 3,
    }
    flagged = pair["flags"]["hallucination"]
    assert (flagged["first"]["value"], flagged["second"]["value"]) == (0.0, pytest.approx(1 / 3))
    assert flagged["win_rate"]["value"] == 1.0 and pair["flags"]["harmful"]["win_rate"] is None
    assert "theirs.jsonl and ours.jsonl cannot be told apart: 66.7% of 3 prompts by people" in out
    shown = Page(Path("both/report.html").read_text(encoding="utf-8")).text
    assert "By people, blind" in shown and "4 judgements of 3 of 4 prompts by 2 people" in shown
    code, out, err = call(capsys, *flags, "--no-serve")  # again: nothing is asked or lost
    assert code == 0 and json.loads(Path("both/evaluation.json").read_text())["people"] == people
    for arguments, message in (
        ([*flags, "--seed", 1], "seed: expected 0, as in both/evaluation.json, got 1; repeat its command"),
        ([ours, "--people", "labels", "--out", "one"], "people: expected 2 to 9 models to compare"),
        (
            [ours, theirs, "--people", "ours.jsonl", "--out", "two"],
            "ours.jsonl: expected a labelling folder, got a file",
        ),
        ([ours, theirs, "--no-serve"], "serve: expected --people FOLDER with --no-serve"),
        (
            ["runs/a", "--text", "t.jsonl", "--people", "labels"],
            "people: expected prompts whose answers people compare",
        ),
    ):
        with case(arguments):
            code, _, err = call(capsys, *arguments)
            assert code == 2 and message in err


def test_the_report_has_every_part(root: Path, found: dict[str, Any]) -> None:
    shown = Page((root / "out" / "report.html").read_text(encoding="utf-8")).text
    for words in (
        *("Win rates", "At equal length", "held-out bits per byte", "KL to the reference", "self-BLEU, same prompt"),
        *("best-of-n, sft", "Score by judge", "d(α − βd)", "All settings", "1 prompts are left out"),
    ):
        assert words in shown, words


def test_bad_input_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours, _ = made_files(tmp_path)
    sft, prompts, judge = str(root / "sft"), str(root / "prompts.jsonl"), str(root / "judge")
    write_rows(tmp_path / "few.jsonl", [{"prompt": p, "answer": "x"} for p in "pq"])
    write_rows(tmp_path / "ragged.jsonl", [{"prompt": p, "answer": "x"} for p in "pqrspq"])
    write_rows(tmp_path / "none.jsonl", [{"prompt": "p", "chosen": "x"}])
    write_rows(tmp_path / "null.jsonl", [{"prompt": "p", "answer": None}])
    write_rows(tmp_path / "number.jsonl", [{"prompt": "p", "answer": 7}])
    write_rows(tmp_path / "both.jsonl", [{"prompt": "p", "answer": "x", "output": "y"}])
    write_rows(tmp_path / "ends.jsonl", [{"prompt": "p", "answer": "x", "ended": "no"}])
    write_rows(tmp_path / "long.jsonl", [{"prompt": "p" * 64}])
    write_rows(tmp_path / "empty.jsonl", [])
    cases: list[Any] = [
        ({}, "models: expected models to compare or --comparisons, got neither"),
        ({"models": sft}, "prompts: expected prompts that the models answer, or --text, got neither"),
        ({"models": [sft, sft], "prompts": prompts}, "models: expected each once, got .*sft twice"),
        ({"comparisons": "c.jsonl"}, "reward: expected a reward model to check on the comparisons, got none"),
        ({"comparisons": "c.jsonl", "reward": judge, "text": "t"}, "models: expected models with text, got none"),
        ({"models": sft, "prompts": prompts, "samples": 0}, "samples: expected 1 or more, got 0"),
        ({"models": sft, "prompts": prompts, "best_of": 1}, "best_of: expected 2 to 1024, or 0 for none, got 1"),
        ({"models": sft, "prompts": prompts, "best_of": 4}, "best_of: expected a scorer to choose by, got none"),
        (
            {"models": sft, "prompts": prompts, "temperature": 0, "samples": 2},
            "expected above 0 with samples, as greedy",
        ),
        (
            {"models": sft, "prompts": prompts, "temperature": 0, "reference": sft},
            "expected above 0 with reference, as",
        ),
        ({"models": sft, "prompts": prompts, "temperature": math.nan}, "temperature: expected 0 or more, got nan"),
        (
            {"models": sft, "prompts": prompts, "max_new_tokens": 64},
            "max_new_tokens: expected at most 63, to",
        ),
        ({"models": sft, "prompts": prompts, "out": ""}, "out: expected a folder, got nothing"),
        ({"models": sft, "prompts": "long.jsonl"}, "none among 1 rows; the first reason: longer than 56 tokens"),
        ({"models": judge, "prompts": prompts}, "judge: expected .*, got"),
        ({"models": sft, "prompts": prompts, "reward": sft}, "sft: expected .*, got"),
        ({"models": "runs/none", "prompts": prompts}, "runs/none: expected the folder of a .* run, got no such folder"),
        ({"models": "no.jsonl"}, "no.jsonl: cannot be read: No such file"),
        ({"models": "empty.jsonl"}, "empty.jsonl: expected one JSON object on each line, got a file without rows"),
        ({"models": [ours, "few.jsonl"]}, "few.jsonl: expected an answer to each of the 4 prompts, got none to"),
        ({"models": [ours, "ragged.jsonl"]}, r"expected 2 answers to each prompt, as to .*ours.jsonl:1, got 1 to"),
        ({"models": "none.jsonl"}, "none.jsonl:1: field 'answer': missing; the row's fields are 'prompt', 'chosen'"),
        ({"models": "null.jsonl"}, "null.jsonl:1: field 'answer': expected text, got null"),
        ({"models": "number.jsonl"}, "number.jsonl:1: field 'answer': expected text, got the number 7"),
        ({"models": "both.jsonl"}, "field '.*': expected one field with the answer; remove or rename one, got"),
        ({"models": "ends.jsonl"}, "ends.jsonl:1: field 'ended': expected true, or false"),
        ({"models": ours, "out": "few.jsonl"}, "out: expected a folder, got the file few.jsonl"),
        ({"models": ours, "reward_function": "no.py:f"}, "reward_function no.py:f: expected a Python file"),
        ({"models": ours, "reward_funcs": lambda completions: [1]}, r"expected a list of 4 numbers"),
    ]
    for settings, message in cases:
        with case(settings), pytest.raises(UserError, match=message):
            evaluate(**({"max_new_tokens": 8} | settings))
    assert not Path("evaluation/evaluation.json").exists()


def test_answers_are_read_in_the_forms_of_prompts(tmp_path: Path) -> None:
    talk = [*HI, {"role": "assistant", "content": "ho"}]
    rows: list[Any] = [
        {"prompt": "p", "answer": " text as it stands"},
        {"messages": talk},
        {"prompt": HI, "answer": "ho"},
        {"prompt": HI, "response": [{"role": "assistant", "content": "ho"}]},
        {"question": "hi", "answer": "ho", "id": 7},
        {"instruction": "hi", "input": "", "output": "ho", "ended": False},
        {"system": "Be brief.", "question": "hi", "answer": ""},
        {"prompt": " ", "answer": "x"},
    ]
    ledger = Ledger()
    found = read_answers(write_rows(tmp_path / "rows.jsonl", rows), ledger)
    turns = (Message("user", "hi"),)
    assert [answer.text for _, answer in found] == [" text as it stands", *["ho"] * 5, ""]
    assert [prompt.turns for prompt, _ in found[1:6]] == [turns] * 5
    assert found[6][0].turns == (Message("system", "Be brief."), *turns)
    assert [answer.ended for _, answer in found] == [None] * 5 + [False, None]
    assert found[4][0].columns == {"question": "hi", "id": 7}
    assert ledger.reasons() == {"dropped": {"empty prompt": 1}}


def test_a_turn_is_said_where_it_was_measured() -> None:
    one = {"value": 1.0, "low": 0.5, "high": 2.0}
    fit: dict[str, Any] = {"form": "rl", "alpha": one, "beta": one}
    cases: list[Any] = [
        ((2.0, 1.5, 2.5), True, "it turns at d = 2.00 (1.50 to 2.50), measured to 3.00"),
        ((2.0, 1.5, None), False, "it may turn at d = 2.00 (1.50 to ∞), which reaches beyond the 3.00 that were"),
        ((None, 1.5, None), False, "it does not turn (measured to d = 3.00)"),
    ]
    for values, turned, words in cases:
        with case(words):
            turn = dict(zip(("value", "low", "high"), values, strict=True))
            curve = {"start": "sft", "kl": [0.0, 9.0], "fits": {"judge": fit | {"turn": turn, "turned": turned}}}
            best = curve | {"model": "sft", "fits": {"judge": fit, "gold": None}}
            (line,) = fit_lines({"scorers": ["judge"], "best_of_n": [best], "policies": curve})
            assert line.startswith("judge, policies from sft: d(α − β log d) with α 1.00 (0.50 to 2.00) and β")
            assert words in line


def test_models_have_the_shortest_names_that_differ() -> None:
    cases: list[Any] = [
        (["runs/sft", "hf:models/big", "a.jsonl"], ["sft", "big", "a.jsonl"]),
        (["a/sft", "b/sft", "c/ppo/"], ["a/sft", "b/sft", "ppo"]),
    ]
    for specs, names in cases:
        with case(specs):
            assert short_names(specs) == names
    assert dataclasses.replace(arm("x", 1.0, s=[[1.0, 2.0]])).columns(1, 1).scores["s"].tolist() == [[2.0]]
