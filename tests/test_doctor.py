"""`rlhf-jax doctor`: each deliberate bug is found by the check that is meant to, and healthy runs have no finding."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import logprobs, model
from rlhf_jax.cli.app import main
from rlhf_jax.config import EpisodeConfig, ModelConfig, OptimConfig, PreferenceConfig, to_plain
from rlhf_jax.data import encode, packing
from rlhf_jax.doctor import CHECKS, Patient, Result, diagnosis, examine, open_patient
from rlhf_jax.doctor.answers import shown_rows
from rlhf_jax.doctor.curves import CURVES
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained import convert
from rlhf_jax.pretrained.convert import export
from rlhf_jax.pretrained.source import open_source
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.stages import ppo as ppo_stage
from rlhf_jax.stages import pretrain as pretrain_stage
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.trainers import ppo, reward, sft
from tests.cases import case
from tests.made_runs import write_run
from tests.random_params import random_params

pytestmark = pytest.mark.runs

BYTES = Tokenizer.bytes()
# Learned positions, so that a mistake in them shows: rotary ones are relative.
MODEL = ModelConfig(vocab_size=BYTES.vocab_size, context=64, width=32, layers=1, heads=2, positions="learned")
WORDS = ("red", "blue", "green", "cat", "dog")
FAST: dict[str, Any] = {"schedule": "constant", "warmup_steps": 2}


def rows_of(path: Path, rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return (str(path),)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three stages, trained until they are well: an answer is a word of its prompt, with a dot or without."""
    root = tmp_path_factory.mktemp("runs")
    base = jax.tree.map(jnp.asarray, random_params(Transformer(MODEL)))
    write_run(root / "base", "pretrain", base, MODEL, BYTES)
    asked = [(f"{number} {word}:", f" {word}") for number in range(12) for word in WORDS]
    answers = [{"prompt": prompt, "completion": word + "?!"[at % 2]} for at, (prompt, word) in enumerate(asked)]
    pairs = [{"prompt": prompt, "chosen": f"{word}!", "rejected": f"{word}?"} for prompt, word in asked]
    rate = functools.partial(OptimConfig, **FAST)
    shared: dict[str, Any] = {"log_every": 2, "examples": 0}
    sft.run(
        sft.Config(
            init=str(root / "base"),
            out=str(root / "sft"),
            data=rows_of(root / "answers.jsonl", answers),
            batch=16,
            steps=120,
            buckets=(24,),
            heldout_fraction=0.2,
            optimizer=rate(learning_rate=1e-2),
            **shared,
        )
    )
    reward.run(
        reward.Config(
            init=str(root / "sft"),
            out=str(root / "reward"),
            data=rows_of(root / "pairs.jsonl", pairs),
            batch=16,
            steps=24,
            buckets=(24,),
            heldout_fraction=0.6,
            optimizer=rate(learning_rate=3e-3),
            **shared,
        )
    )
    ppo.run(
        ppo.Config(
            init=str(root / "sft"),
            reward=str(root / "reward"),
            out=str(root / "ppo"),
            data=rows_of(root / "prompts.jsonl", [{"prompt": prompt} for prompt, _ in asked]),
            batch=32,
            minibatches=2,
            steps=24,
            prompt_length=12,
            policy=rate(learning_rate=1e-3),
            critic=rate(learning_rate=3e-3),
            episode=EpisodeConfig(response_length=8),
            examples=0,
        )
    )
    return root


def findings(results: Sequence[Result]) -> dict[str, str]:
    return {result.check: f"{result.found}; {result.remedy}" for result in results if result.status == "finding"}


def checked(patient: Patient, *names: str) -> dict[str, str]:
    """The findings of some checks, all of which are made."""
    results = examine(patient, [check for check in CHECKS if check.name in names])
    assert {result.check for result in results} == set(names)
    assert [result for result in results if result.status == "left out"] == []
    return findings(results)


def test_healthy_runs_have_no_finding(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["sft", "reward", "ppo"]
    with pytest.raises(SystemExit) as end:
        main(["doctor", *(str(root / stage) for stage in stages), "--out", str(tmp_path / "found.json")])
    found, said = json.loads((tmp_path / "found.json").read_text(encoding="utf-8")), capsys.readouterr().out
    assert end.value.code == 0 and found["healthy"] and "\x1b[" not in said
    by_stage = {one["stage"]: one for one in found["runs"]}
    assert list(by_stage) == stages
    for stage, one in by_stage.items():
        with case(stage):
            assert [check for check in one["checks"] if check["status"] == "finding"] == [] and one["healthy"]
            left_out = {check["check"] for check in one["checks"] if check["status"] == "left out"}
            # No other judge watches the toy.
            assert left_out == ({"gold-flat", "over-optimisation"} if stage == "ppo" else set())
            assert one["data"].endswith(".jsonl")
            assert all(check["metric"] and check["healthy"] and check["found"] for check in one["checks"])
    assert "✓ gradients: gradients on 1 device and on 2 devices with 2 microbatches differ by" in said
    assert by_stage["sft"]["rows"][0] == "<bos>0 red:⟦ red?<eos>⟧" and "  <bos>0 red:⟦ red?<eos>⟧" in said


# The last rows of a run that was well until then: (rows, what they have in place of the healthy figures).
CURVE_BUGS: list[tuple[str, int, dict[str, Any], str]] = [
    ("kl-runaway", 4, {"kl": 60.0}, "kl is 60 nats a response, more than"),
    ("entropy-collapse", 1, {"entropy": 0.001}, "entropy is 0.001 nats a token, after 2.2 at the start"),
    ("one-answer", 4, {"same_answer": 0.9}, "same_answer is 0.9, after 0.1 at the start"),
    ("repetition", 4, {"repeated_pairs": 0.9}, "repeated_pairs is 0.9"),
    ("missing-ends", 4, {"missing_end": 0.7}, "missing_end 0.7 at the end"),
    ("missing-ends", 4, {"missing_end": 1.0}, "missing_end is 1, after 0.1"),
    ("length-hacking", 4, {"response_tokens": 8.0, "score": 2.0}, "response_tokens went from 4 to 8"),
    ("score-scale", 4, {"score": 50.0}, "score is 50 deviations"),
    ("over-optimisation", 24, {"eval/gold": 3.0, "score": 2.0}, "eval/gold fell from 5.54 to 3 while score rose"),
    ("gold-flat", 35, {"eval/gold": 4.0}, "score 0.338, then 1.26; eval/gold 4, then 4"),
    ("gold-flat", 40, {"eval/gold": 5.0}, "eval/gold 5, then 5"),
    ("skipped-steps", 1, {"policy_skipped": 0.5}, "policy_skipped 0.5, first at step 40"),
    ("skipped-steps", 1, {"nonfinite": 0.1}, "nonfinite 0.1, first at step 40"),
    ("first-iteration", 40, {"first_ratio_error": 0.02}, "first_ratio_error 0.02, kl 0"),
    ("first-iteration", 40, {"kl": 0.4}, "first_ratio_error 0, kl 0.4"),
    ("policy-moves", 40, {"kl": 0.0}, "kl 0 nats a response in the last quarter"),
    ("score-follows", 40, {"score": 0.1}, "score 0.100, then 0.100, at a kl of 1.77 nats"),
    ("score-start", 40, {"score": -3.0}, "score -3.00 deviations at step 1"),
    ("clipping", 40, {"clipped": 0.4}, "clipped 0.4 on average"),
]


def curve(step: int) -> dict[str, Any]:
    """A row of a healthy run of PPO, the kl and the score of which rise, as those of a judge do."""
    up = (step - 1) / 39
    row = {"step": step, "kl": 2 * up, "score": 0.2 + 1.2 * up, "entropy": 2.2 - up, "same_answer": 0.1}
    row |= {"repeated_pairs": 0.02, "missing_end": 0.1, "response_tokens": 4.0, "policy_skipped": 0.0}
    row |= {"critic_skipped": 0.0, "nonfinite": 0.0, "first_ratio_error": 0.0, "clipped": 0.01}
    return row | ({"eval/gold": 4.0 + 2 * min(2 * up, 1.0)} if step % 5 == 1 else {})


def with_metrics(patient: Patient, rows: Sequence[dict[str, Any]]) -> Patient:
    return dataclasses.replace(patient, metrics=rows)


def test_each_bug_in_the_curves_is_found_by_its_check(root: Path) -> None:
    patient = open_patient(str(root / "ppo"))
    assert findings(examine(with_metrics(patient, [curve(step) for step in range(1, 41)]), CURVES)) == {}
    for name, count, changed, said in CURVE_BUGS:
        with case((name, changed)):
            rows = [curve(step) for step in range(1, 41)]
            for row in rows[-count:]:
                row |= {key: value for key, value in changed.items() if not key.startswith("eval/") or key in row}
            found = findings(examine(with_metrics(patient, rows), CURVES))
            assert name in found and said in found[name], found
            # What else there is follows from it: a score that stays is one that the judge does not follow, …
            assert len(found) <= 3, found


def test_each_bug_in_the_curves_of_the_other_stages_is_found(root: Path) -> None:
    answers, judge = (open_patient(str(root / stage)) for stage in ("sft", "reward"))
    done = [row | {"step": 2} for row in answers.metrics[:2]]
    worse = [row | ({"eval/loss": 9.0} if "eval/loss" in row else {}) for row in answers.metrics]
    rising = [row | {"loss": 1.0 + row["step"]} for row in answers.metrics]
    late = [row | ({"eval/loss": 3.0} if "eval/loss" in row and row["step"] > 60 else {}) for row in answers.metrics]
    guesses = [row | {"loss": 0.693, "accuracy": 0.5} for row in judge.metrics]
    by_heart = [
        row | {"accuracy": 0.99} | ({"eval/accuracy": 0.6} if "eval/accuracy" in row else {}) for row in judge.metrics
    ]
    # Preference optimization, whose first row is of equal models.
    about = {"stage": "preference", "config": to_plain(PreferenceConfig(name="x", steps=24))}
    chosen = dataclasses.replace(answers, stage="preference", run=RunFolder(root, about))
    pairs: list[dict[str, Any]] = [{"step": at, "loss": 0.7 - at / 99, "margin": at / 9 - 1 / 9} for at in range(1, 25)]
    pairs = [row | {"chosen_logp": -20.0 - row["step"] / 9, "skipped": 0.0} for row in pairs]
    assert findings(examine(with_metrics(chosen, pairs), CURVES)) == {}
    fallen = [row | {"chosen_logp": -20.0 * row["step"]} for row in pairs]
    for patient, rows, name, said in (
        (chosen, [row | {"margin": 0.5} for row in pairs], "first-iteration", "margin 0.5"),
        (chosen, fallen, "chosen-falls", "chosen_logp -70.0, then -430.0 nats"),
        (answers, done, "warm-up", "2 optimizer steps, 2 of them or more are warm-up"),
        (judge, judge.metrics[:2], "warm-up", "2 optimizer steps, 2 of them"),
        (answers, worse, "over-fit", "nothing was gained"),
        (answers, late, "over-fit", "of the gain is lost again; later stages take step 120"),
        (answers, rising, "loss-falls", "loss 15.067, then"),
        (answers, [row | {"skipped": 0.5} for row in answers.metrics], "skipped-steps", "skipped 0.5, first at step 1"),
        (judge, guesses, "reward-learns", "loss 0.693 nats a pair"),
        (judge, by_heart, "reward-over-fits", "accuracy 0.99 in training, 0.60 held out"),
    ):
        with case(name):
            found = findings(examine(with_metrics(patient, rows), CURVES))
            assert list(found) == [name] and said in found[name], found


def columns_as_positions(segment_ids_BT: Any) -> Any:
    return jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32), segment_ids_BT.shape)


def one_segment(rows: Any, *, length: int) -> Any:
    packed = PACK_ROWS(rows, length=length)
    return dataclasses.replace(packed, segment_ids=np.minimum(packed.segment_ids, 1))


def last_column(model: Any, params: Any, tokens_BT: Any, mask_BT: Any) -> Any:
    return model.apply({"params": params}, tokens_BT, mask_BT)[:, -1]


def before_the_last(model: Any, params: Any, rows: Any) -> Any:
    return logprobs.state_values(model, params, rows)


def mean_of_the_part(x: Any, mask: Any, axis_name: Any = None, *, count: Any = None) -> Any:
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def forgetful(buffer: Any, new: Any, place: Any) -> Any:
    """Writes to the cache what a neighbour has to be."""
    return WRITE(buffer, jnp.roll(new, 1, axis=1) if new.shape[2] == 1 else new, place)


def hotter(networks: Any, params: Any, frozen: Any, rows: Any, *, temperature: float) -> Any:
    return SCORE_ROWS(networks, params, frozen, rows, temperature=1.2 * temperature)


PACK_ROWS, WRITE, SCORE_ROWS = packing.pack_rows, model.write, ppo_stage.score_rows
# (run, place of a function, what it is in its place, checks that are made, the one that finds it, what it says).
CODE_BUGS: list[tuple[str, tuple[Any, str, Any], tuple[str, ...], str]] = [
    ("sft", (model, "positions_of", columns_as_positions), ("left-padding",), "log-probabilities differ by"),
    ("sft", (packing, "pack_rows", one_segment), ("packed-rows", "left-padding"), "log-probabilities of 8 rows in"),
    (
        "sft",
        (pretrain_stage, "masked_mean", mean_of_the_part),
        ("gradients",),
        "1 device and on 2 devices with 2 microbatches",
    ),
    ("sft", (model, "write", forgetful), ("cached-decoding", "kl-to-itself"), "model cache and full pass differ by"),
    ("sft", (ppo_stage, "score_rows", hotter), ("kl-to-itself",), "KL to itself 0 nats a response, |ratio"),
    ("reward", (logprobs, "last_token_scores", last_column), ("score-position",), "the last change scores by"),
    ("reward", (logprobs, "response_scores", before_the_last), ("score-position",), "PPO reads scores that differ by"),
]


def test_each_bug_in_the_code_is_found_by_its_check(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage, (module, name, broken), (expected, *others), said in CODE_BUGS:
        with case((name, expected)), monkeypatch.context() as patch:
            jax.clear_caches()  # else a program from before the bug would be used
            patch.setattr(module, name, broken)
            found = checked(open_patient(str(root / stage)), expected, *others)
            assert list(found) == [expected] and said in found[expected], found


def all_targets(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Any:
    return [*prompt_ids, *response_ids], [False] + [True] * (len(prompt_ids) + len(response_ids) - 1)


def without_end(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Any:
    return [*prompt_ids, *response_ids], [False] * len(prompt_ids) + [True] * (len(response_ids) - 1) + [False]


def special(self: Tokenizer, text: str) -> list[int]:
    parts = text.split("<|endoftext|>")
    return [id for at, part in enumerate(parts) for id in ([self.eos_id] if at else []) + list(part.encode())]


ROWS = ("eos-learned", "loss-mask", "special-from-text")


def test_each_bug_in_the_rows_is_found_by_its_check(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name, broken, expected, said in (
        (encode, "response_row", all_targets, "loss-mask", "0 of 60 rows have the answers as targets"),
        (
            encode,
            "response_row",
            without_end,
            "eos-learned",
            "0 of 60 answers end with a target that ends them, not so",
        ),
        (Tokenizer, "encode", special, "special-from-text", "not so '<|endoftext|>'"),
        (Tokenizer, "pad_id", BYTES.eos_id, "special-from-text", "padding has the id of an end token, 256"),
    ):
        with case(said), monkeypatch.context() as patch:
            patient = open_patient(str(root / "sft"))
            if name == "pad_id":
                patch.setattr(patient.tokenizer, name, broken)
            else:
                patch.setattr(owner, name, broken)
            found = checked(patient, *ROWS)
            assert list(found) == [expected] and said in found[expected], found
    # What the run wrote of its rows.
    shutil.copytree(root / "sft", tmp_path / "sft")
    patient = open_patient(str(tmp_path / "sft"), data=(str(root / "answers.jsonl"),))
    assert checked(patient, "rows-used") == {}
    for reasons, said in (
        (
            {"dropped": {"longer than 64 tokens": 40, "empty": 2}},
            "70% of the rows in ledger.json are dropped, most",
        ),
        (
            {"remarked": {"has the text of a special token, </s>, which": 9}},
            "15% of the rows in ledger.json are rem",
        ),
        ({"dropped": {"empty": 30}, "remarked": {"answers without loss: 2, which the": 60}}, ""),
    ):
        with case(reasons):
            (Path(patient.where) / "ledger.json").write_text(json.dumps({"total": 60, "reasons": reasons}))
            found = checked(patient, "rows-used")
            assert found == {} if not said else said in found["rows-used"], found
    # An answer that is marked as cut has no end to learn, and no other is wrong.
    cut = [{"prompt": "a:", "completion": " b", "ended": False}, {"prompt": "a:", "completion": " b"}]
    patient = open_patient(str(root / "sft"), data=rows_of(tmp_path / "cut.jsonl", cut))
    assert checked(patient, *ROWS) == {}
    none = open_patient(str(root / "sft"), data=rows_of(tmp_path / "cut.jsonl", cut[:1]))
    assert checked(none, *ROWS)["eos-learned"].startswith("all answers are marked as cut")
    line = shown_rows(patient)[0]
    assert line.plain == "<bos>a:⟦ b⟧" and [str(span.style) for span in line.spans][-2] == "bold green"


def test_each_sick_model_is_found_by_its_check(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = open_source(str(root / "reward"), stages=("reward",)).params()
    constant = {**judge, "score": jax.tree.map(jnp.zeros_like, judge["score"])}
    write_run(tmp_path / "constant", "reward", constant, MODEL, BYTES)
    base = jax.tree.map(np.asarray, open_source(str(root / "sft"), stages=("sft",)).params())
    base["embedding"] = np.where(np.arange(32) == 3, np.nan, base["embedding"])
    write_run(tmp_path / "nan", "sft", base, MODEL, BYTES)
    found = checked(open_patient(str(tmp_path / "nan")), "parameters")
    assert "parameter 'embedding': expected finite numbers" in found["parameters"]
    asked = [f"{number} {word}:" for number in range(12) for word in WORDS]
    longer = [{"prompt": prompt, "chosen": " a long one!", "rejected": " no?"} for prompt in asked]
    exchanged = [{"prompt": prompt, "chosen": " red?", "rejected": " red!"} for prompt in asked]
    accuracy = ("reward-accuracy", "reward-length", "reward-sees-prompt")
    answers = ("answers-end", "answers-differ")
    for folder, data, checks, expected, said in (
        (root / "base", asked_rows(root), answers, {"answers-end"}, "of the answers have no end within 8 tokens"),
        (root / "reward", longer, accuracy, {"reward-length"}, "1.000, the longer answer 1.000, on 60 held-out"),
        (root / "reward", exchanged, accuracy, {"reward-accuracy", "reward-length"}, "is worse than chance"),
        (tmp_path / "constant", exchanged, accuracy, {*accuracy}, "the score of an answer moves by 0.00"),
    ):
        with case(said):
            if folder.name == "base":
                copy = open_source(str(folder), stages=("pretrain",))
                write_run(tmp_path / "endless", "sft", copy.params(), MODEL, BYTES)
                folder = tmp_path / "endless"
            patient = open_patient(str(folder), data=rows_of(tmp_path / "data.jsonl", data))
            found = checked(patient, *checks)
            assert set(found) == expected and any(said in text for text in found.values()), found
    untrained = random_params(Transformer(MODEL, scalar=True), scale=3.0)
    monkeypatch.setattr(convert, "value_network", lambda source: dataclasses.replace(source, own=lambda: untrained))
    found = checked(open_patient(str(root / "ppo")), "value-network")
    assert "values explain -" in found["value-network"]


def asked_rows(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_finding_is_the_exit_status_and_what_cannot_be_checked_is_said(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cheap = [check for check in CHECKS if check.name in (*ROWS, "left-padding", "reward-accuracy", "over-fit")]
    monkeypatch.setattr(diagnosis, "CHECKS", cheap)
    # A run that has just started: metrics, and nothing else.
    run = RunFolder.create(
        tmp_path / "started", stage="sft", config={}, model=to_plain(MODEL), tokenizer=BYTES, inputs={}
    )
    losses = [{"step": step, "loss": 2.0 - step / 9, "eval/loss": loss} for step, loss in enumerate((3, 2, 3.2), 1)]
    rows_of(run.metrics, losses)
    published = dataclasses.replace(MODEL, positions="rotary")
    write_run(tmp_path / "rotary", "sft", random_params(Transformer(published)), published, BYTES)
    export(str(tmp_path / "rotary"), tmp_path / "published")
    for spec, status, said in (
        (str(run.path), 1, "✗ over-fit: held-out loss 2.000 at best, 3.200 at the end: 120% of the gain is lost again"),
        (str(run.path), 1, "– left-padding: the run is not finished: "),
        (str(run.path), 1, "try: fewer --epochs"),
        (str(tmp_path / "published"), 0, "✓ left-padding: log-probabilities differ by"),
        (f"hf:{tmp_path / 'published'}", 0, "– eos-learned: no demonstrations; give some with --data"),
        (str(root / "nothing"), 2, "expected the folder of a"),
        # A folder of runs stands for its runs.
        (str(root), 0, f"{root / 'reward'}: reward, on the held-out rows of {root / 'pairs.jsonl'}"),
    ):
        with case((spec, said)):
            with pytest.raises(SystemExit) as end:
                main(["doctor", spec, "--out", str(tmp_path / "found.json")])
            printed = capsys.readouterr()
            assert end.value.code == status and said in printed.out + printed.err, printed
            if status < 2:
                found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
                assert found["healthy"] == (status == 0) and found["runs"][0]["run"]


@pytest.mark.core
def test_the_page_has_every_check_and_its_range() -> None:
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "doctor.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert rows == [[f"`{check.name}`", check.metric, check.healthy, check.remedy] for check in CHECKS]
