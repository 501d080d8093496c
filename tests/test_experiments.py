"""Experiments: their measures and toys by hand, their worlds, and their short forms by the command."""

import importlib
import json
import math
import re
import shutil
import typing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from rlhf_jax.cli.app import main
from rlhf_jax.cli.experiment import Config
from rlhf_jax.cli.flags import parse
from rlhf_jax.evaluation.intervals import Estimate, over_seeds
from rlhf_jax.experiments import run
from rlhf_jax.experiments.delusion import Beliefs, exact
from rlhf_jax.experiments.facts import ABSTENTION, Question, Sizes, World
from rlhf_jax.experiments.measures import auroc, calibration_error
from rlhf_jax.experiments.outcome import Outcome, by_arm
from rlhf_jax.experiments.picture import Panel, Series, curves, shares
from rlhf_jax.experiments.reviews import TOPICS, WORDS, gold, review
from rlhf_jax.experiments.toy import BOS, EOS, PAD, Words
from tests.cases import case

SECTIONS = ["Set-up", "Prediction", "Result", "What it says"]
TINY = Sizes(known=4, known_sft=4, known_rl=4, told=4, unknown_rl=4, unknown=6, pages=300)


@pytest.mark.core
def test_intervals_over_seeds() -> None:
    # 1, 2, 3: standard deviation 1, and 4.3026527 is the point of t with 2 degrees of freedom.
    found = over_seeds([1.0, 2.0, 3.0])
    assert found.value == 2 and found.high - found.value == pytest.approx(4.3026527 / math.sqrt(3))
    assert math.isnan(over_seeds([1.0]).low) and math.isnan(over_seeds([1.0, math.nan]).value)
    outcome = Outcome({"a": {"share": [0.9, 1.0], "gain": [0.9, 1.0]}}, (), "", (), bounded={"share"})
    assert outcome.estimate("a", "share") == Estimate(0.95, pytest.approx(0.95 - 12.7062047 * 0.05), 1.0)
    assert outcome.estimate("a", "gain").high > 1
    for seeds in (3, 5, 30):
        with case(seeds):
            found_all = [over_seeds(x) for x in np.random.default_rng(0).normal(0.5, 1.0, (1000, seeds)).tolist()]
            assert 0.93 < np.mean([one.low < 0.5 < one.high for one in found_all]) < 0.975


@pytest.mark.core
def test_calibration_and_auroc() -> None:
    for probability, right, error in (
        ([0.95, 0.95, 0.55, 0.55], [1, 0, 1, 1], 0.45),
        ([0.9, 0.9, 1.0, 0.2], [1, 1, 1, 0], (0.2 + 0.2) / 4),  # 0.9 and 1 share the last bin
        ([0.25] * 4, [1, 0, 0, 0], 0.0),
    ):
        with case((probability, right)):
            assert calibration_error(np.array(probability), np.array(right)) == pytest.approx(error)
    for score, positive, area in (
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75),
        ([0.5, 0.5, 0.5], [0, 1, 1], 0.5),
        ([0.2, 0.2, 0.1, 0.7], [1, 0, 0, 1], (0.5 + 1 + 1 + 1) / 4),
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([1, 2], [1, 1], math.nan),
    ):
        with case((score, positive)):
            assert auroc(np.array(score), np.array(positive)) == pytest.approx(area, nan_ok=True)


@pytest.mark.core
def test_delusion_by_bayes() -> None:
    # With four towns and demonstrators who are right in nine of ten cases: of others, each is named once in 30.
    observed, acted = exact(4, 0.9)
    assert observed == Beliefs(pytest.approx(0.9), pytest.approx(0.9 * 0.9 + 0.1 * 0.1 / 3))
    assert acted == Beliefs(pytest.approx(0.25), pytest.approx(0.25 * 0.9 + 0.75 * 0.1 / 3))
    # Demonstrators who know nothing delude nobody.
    assert exact(4, 0.25)[0] == exact(4, 0.25)[1]


@pytest.mark.core
def test_gold_score_of_a_review() -> None:
    for text, score in (
        ("the film is warm .", 1 + 0.8),
        ("the film is warm and clever . it is kind .", 1 + 0.8 + 0.7 + 1),
        ("the film is gentle and kind . it is bright and warm .", 1 + 0.5 + 1 + 0.9),  # the first three
        ("the film is warm warm .", 1 + 0.8 - 0.5),
        ("the book is warm .", 0.8),
        ("the film is dull", 1 - 0.7 - 1),
        ("the film is kind and bright . it is kind . it is kind .", 1 + 1.9 - 2 * 0.5 - 0.3),  # 15 words
        ("", -1),
    ):
        with case(text):
            assert gold("film", text) == pytest.approx(score)
    draws = np.random.default_rng(0)
    assert all(WORDS.encode(review(topic, draws)) for topic in TOPICS)


@pytest.mark.core
def test_rows_and_prompts_of_words() -> None:
    words = Words(["a", "b", "a", "c"])
    assert words.words == ("<pad>", "<bos>", "<eos>", "a", "b", "c")
    rows = words.rows([("a b", "c"), ("", "a b c")], 6)
    assert np.asarray(rows.tokens_BT).tolist() == [[BOS, 3, 4, 5, EOS, PAD], [BOS, 3, 4, 5, EOS, PAD]]
    assert np.asarray(rows.loss_mask_BT).astype(int).tolist() == [[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 0]]
    assert np.asarray(rows.segment_ids_BT).tolist() == [[1, 1, 1, 1, 1, 0]] * 2
    prompts = words.prompts(["a", "a b"], 4)
    assert np.asarray(prompts.tokens_BP).tolist() == [[PAD, PAD, BOS, 3], [PAD, BOS, 3, 4]]
    assert np.asarray(prompts.mask_BP).astype(int).tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert words.texts(np.array([[3, 5, EOS, 4]]), np.array([[True, True, True, False]])) == ["a c"]


@pytest.mark.core
def test_the_world_of_facts() -> None:
    world, again, other = World(TINY, 0), World(TINY, 0), World(TINY, 1)
    pages = world.pages()
    assert pages == again.pages() != other.pages()
    assert world.words.words == other.words.words  # one compiled program for all seeds
    text = " ".join(page for _, page in pages)
    # The facts of people that the model is not to know are stated nowhere, though it reads their names.
    for group in ("told", "unknown_rl", "unknown"):
        for question in world.questions(group):
            assert not any(world.state(question, form) in text for form in (0, 1)) and world.ask(question) not in text
            assert f" {world.state(question, 0).split()[0]} " in text
    assert all(world.state(question, 0) in text for question in world.questions("known"))
    assert len({*world.questions("known"), *world.questions("unknown")}) == 3 * 10

    asked = world.questions("known")[0]
    wrong = next(word for word in ("Accra", "Bern") if word != world.value(asked))
    second = world.state(world.other(asked), 0)
    lie = second.replace(world.value(world.other(asked)), "Bern")
    for reply, verdict in (
        (world.short(asked), 1),
        (world.long(asked), 1),
        (ABSTENTION, 0),
        (f"{wrong} .", -1),
        (f"{world.short(asked)} {lie}", -1),
        (f"{wrong} . {second}", -1),
        ("", -1),
    ):
        with case(reply):
            assert world.judge([asked], [reply]).tolist() == [verdict]
    assert world.ask(Question(0, 0), careful=True, source=True).startswith("if unsure say so . the home of ")


@pytest.mark.core
def test_pictures_stand_alone() -> None:
    estimate = Estimate(0.5, 0.4, math.nan)
    bars = shares("<Title>", ("one", "two"), {"an arm": [[estimate] * 3, ()]})
    series = Series("β 0 & more", [(0.0, 1.0), (2.0, 3.0)], [(math.nan, math.nan), (2.5, 3.5)])
    drawn = curves("Title", [Panel("left", "x", [series]), Panel("empty", "x", [])])
    for picture in (bars, drawn, curves("One point", [Panel("left", "x", [Series("a", [(1.0, 1.0)])])])):
        assert ElementTree.fromstring(picture).tag.endswith("svg") and "nan" not in picture
    assert "β 0 &amp; more" in drawn and "empty" not in drawn


@pytest.mark.core
def test_the_command_knows_every_experiment() -> None:
    kind = typing.get_type_hints(Config)["experiment"]
    assert set(typing.get_args(kind)) == set(run.MODULES)
    assert parse(Config, ["kl"]).folder == Path("runs/experiment-kl")
    assert run.seeds_from(0, 3) == [0, 10, 20] and run.seeds_from(2, 1) == [2000]
    assert by_arm([{"a": {"x": 1.0}}, {"a": {"x": 2.0}}]) == {"a": {"x": [1.0, 2.0]}}


@pytest.mark.slow
@pytest.mark.parametrize("name", run.MODULES)
def test_short_form_resumes_and_gives_the_same_figures_for_the_same_seed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = importlib.import_module(f"rlhf_jax.experiments.{run.MODULES[name]}")
    # One object for all commands, so that they share the compiled programs.
    experiment = module.Experiment(True)
    monkeypatch.setattr(module, "Experiment", lambda short: experiment)

    def made(folder: Path) -> str:
        with pytest.raises(SystemExit) as end:
            main(["experiment", name, "--short", "--seeds", "2", "--out", str(folder)])
        assert end.value.code == (2 if folder.name == "other" else 0)
        return (folder / "result.json").read_text(encoding="utf-8") if end.value.code == 0 else ""

    first = made(tmp_path / "first")
    assert f"{name}: means over 2 seeds" in capsys.readouterr().out
    (tmp_path / "second").mkdir()
    shutil.copy(tmp_path / "first" / "seed-10.json", tmp_path / "second")
    assert made(tmp_path / "second") == first
    assert "seed 0" in (said := "".join(capsys.readouterr())) and "seed 10" not in said

    result = json.loads(first)
    assert (
        result["experiment"] == name and result["short"] and result["seeds"] == [0, 10] and len(result["figures"]) > 4
    )
    values = [found["per_seed"] for measures in result["figures"].values() for found in measures.values()]
    assert sum(one != other for one, other in values) > 5
    ElementTree.fromstring((tmp_path / "first" / "picture.svg").read_text(encoding="utf-8"))

    content = json.loads((tmp_path / "first" / "seed-0.json").read_text(encoding="utf-8"))
    content["settings"]["width"] += 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "seed-0.json").write_text(json.dumps(content), encoding="utf-8")
    made(tmp_path / "other")
    assert "expected figures of" in capsys.readouterr().err


@pytest.mark.core
def test_every_experiment_has_a_page_with_its_prediction() -> None:
    for name in run.MODULES:
        with case(name):
            page = (Path(__file__).parents[1] / "docs" / "experiments" / f"{name}.md").read_text(encoding="utf-8")
            assert f"\nrlhf-jax experiment {name}\n" in page
            assert [title for title in re.findall(r"^## (.*)$", page, re.MULTILINE) if title != "Details"] == SECTIONS
