"""`rlhf-jax feedback`: its commands from files or a labelling folder to figures and files."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from rlhf_jax.cli.app import main
from rlhf_jax.config import ModelConfig
from rlhf_jax.feedback.judged import item_row, judgement_row, read_items, read_judgements
from rlhf_jax.feedback.queue import Queue, Rules
from rlhf_jax.feedback.records import Judgement
from rlhf_jax.feedback.shown import Answer
from rlhf_jax.feedback.store import Store
from rlhf_jax.feedback.tasks import make_item
from rlhf_jax.model import Transformer
from rlhf_jax.pretrained import source
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.cases import case
from tests.random_params import initialized

pytestmark = pytest.mark.feedback

ITEMS = [make_item(f"p{n}", [" a", " bb", f" c{n}"]) for n in range(6)]
SAID = [
    Judgement(item.id, name, ranks, flags=(frozenset({"other"} if n % 2 else ()), frozenset(), frozenset()))
    for n, item in enumerate(ITEMS[:4])
    for name, ranks in (("ann", (1, 2, 3)), ("bob", (1, 3, 2) if n else (1, 2, 3)), ("cy", (1, 2, 2)))
]


def run(*arguments: str | Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["feedback", *map(str, arguments)])
    assert end.value.code == 0


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    items, said = tmp_path / "items.jsonl", tmp_path / "said.jsonl"
    items.write_text("".join(json.dumps(item_row(item)) + "\n" for item in ITEMS))
    said.write_text("".join(json.dumps(judgement_row(one)) + "\n" for one in SAID))
    return ["--items", str(items), "--judgements", str(said)]


def tiny(spec: str, *, stages: tuple[str, ...]) -> source.Source:
    """A model whose parameters are those of the seed that it is named by."""
    scalar = set(stages) == {"reward"}
    tokenizer = Tokenizer.bytes()
    config = ModelConfig(vocab_size=tokenizer.vocab_size, context=256, width=16, layers=1, heads=2)
    params = initialized(Transformer(config, scalar=scalar), jax.random.key(int(spec)))
    about: dict[str, Any] = {"where": spec, "spec": spec, "stage": "sft", "origin": None, "identify": lambda: ""}
    return source.Source(model=config, tokenizer=tokenizer, scalar=scalar, own=lambda: params, **about)


WITHOUT = """
import sys
for name in ("starlette", "uvicorn", "markdown_it"):
    sys.modules[name] = None
from rlhf_jax.cli.app import main
for flags in (["--no-serve"], []):
    try:
        main(["label", "labels", "--data", "items.jsonl", *flags])
    except SystemExit as end:
        print(end.code)
"""


def test_the_page_says_what_is_missing_to_serve_it(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    command = [sys.executable, "-c", WITHOUT]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout == "0\n2\n" and ended.stderr.count("labels: 1 items") == 2  # adding items needs none of them
    assert re.search(r"^error: uvicorn is not installed; run: pip install '?markdown-it-py.*\n\Z", ended.stderr, re.M)


def test_agreement_and_export(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("agreement", *files, "--out", tmp_path / "found.json", "--resamples", "50")
    said = capsys.readouterr().out
    # ann and bob differ on 3 of 12 pairs, and with cy, who ties one of three, nobody does.
    assert "12 judgements of 4 items by 3 labellers" in said and "agreement  0.893" in said and "0.726" in said
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["pairs"]["agreement"]["value"] == pytest.approx(25 / 28)
    assert set(found["reliability"]["labellers"]) == {"ann", "bob", "cy"}
    assert set(found["reliability"]["flags"]) == {"other"}
    for consensus, ranks in (("majority", [1, 2, 2]), ("reliability", [1, 2, 3])):
        run("export", *files, "--out", tmp_path / "out", "--consensus", consensus)
        rows = [json.loads(line) for line in (tmp_path / "out" / "rankings.jsonl").read_text().splitlines()]
        assert len(rows) == 4 and ranks in [row["ranks"] for row in rows]


def test_a_model_judges_into_the_labelling_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source, "open_source", tiny)
    with contextlib.closing(Store(tmp_path / "labels")) as store:
        store.add_items(ITEMS)
        store.record(SAID)
    for judged in (6, 0):  # what it has judged is not asked again
        run("ai", "--labels", tmp_path / "labels", "--judge", "0", "--name", "tiny")
        assert f"ai:tiny: {judged} items judged" in capsys.readouterr().out
    with contextlib.closing(Store(tmp_path / "labels", read_only=True)) as store:
        assert sum(one.labeller == "ai:tiny" for one in store.judgements()) == 6
    with pytest.raises(SystemExit) as end:
        main(["feedback", "export", "--labels", str(tmp_path / "labels"), "--out", str(tmp_path / "out"), "--models"])
    assert end.value.code == 2 and "expected 100 or more pairs that people ordered too" in capsys.readouterr().err


def test_models_judge_files_and_disagree(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source, "open_source", tiny)
    run("ai", *files, "--judge", "1", "--out", tmp_path / "ai.jsonl")
    assert {one.labeller for one in read_judgements([tmp_path / "ai.jsonl"])} == {"ai:1"}
    run("active", *files, "--run", "1", "--run", "2", "--count", "1", "--out", tmp_path / "next.jsonl")
    (chosen,) = read_items([tmp_path / "next.jsonl"])
    assert chosen in ITEMS[4:]  # the others were judged
    assert "1 of 2 items; 0 too long to read" in capsys.readouterr().out


def test_labels_decide_what_is_asked_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source, "open_source", tiny)
    folder = tmp_path / "labels"
    items = [make_item(f"p{n}", [f"answer {n * n}", f"no {n}"]) for n in range(12)]
    items.append(make_item("x" * 300, ["a", "b"]))
    asked: list[str] = []
    with contextlib.closing(Store(folder)) as store:
        store.add_items(items)
    for turn in range(2):
        choose: list[str | Path] = ["active", "--labels", folder, "--features", "3", "--count", "4"]
        run(*choose, "--out", tmp_path / "next.jsonl")
        run(*choose)
        assert f"4 of {13 - len(asked)} items; 1 too long to read" in capsys.readouterr().out
        wanted = [item.id for item in read_items([tmp_path / "next.jsonl"])]
        assert not set(wanted) & set(asked)
        with contextlib.closing(Store(folder)) as store:
            queue, ann = Queue(store, Rules()), store.add_labeller("ann")
            for number in range(4):
                assignment = queue.assign(ann)
                assert assignment is not None
                asked.append(assignment.item.id)
                queue.judge(ann, f"{turn} {number}", Answer(asked[-1], (1, 2)))
        assert asked[-4:] == wanted
    # The order of the file is not what was asked, nor what is asked without labels.
    with contextlib.closing(Store(tmp_path / "new")) as store:
        store.add_items(item for item in items if item.id not in asked[:4])
    run("active", "--labels", tmp_path / "new", "--features", "3", "--count", "4")
    with contextlib.closing(Store(tmp_path / "new", read_only=True)) as store:
        assert [item.id for item in store.items()][:4] != asked[4:]
    assert asked != [item.id for item in items][:8]


MISTAKES = [
    (["agreements"], "unknown command 'agreements'; did you mean agreement?"),
    (["agreement", "--labels", "x", "--page", "y"], "page: expected none with --labels, as the folder knows its page"),
    (["agreement"], "labels: expected either --labels FOLDER or --items FILE"),
    (["active", "--items", "x", "--out", "y", "--run", "z"], "run: expected two or more reward models"),
    (["active", "--items", "x", "--out", "y"], "features: expected either --features MODEL or --run FOLDER"),
    (["active", "--items", "x", "--features", "z"], "out: expected a file for the items"),
    (["ai", "--items", "x", "--judge", "y"], "out: expected a file for the judgements"),
    (["export", "--labels", "/nowhere", "--out", "x"], "got no labels.sqlite in it"),
]


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for row in MISTAKES:
        with case(row) as (arguments, message):
            with pytest.raises(SystemExit) as end:
                main(["feedback", *arguments])
            said = capsys.readouterr()
            assert end.value.code == 2 and message in said.err and said.err.count("\n") == 1
