"""The report holds in one file what the run's folder holds, escaped, and leaves out what is not there."""

import html
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import rich.console

from rlhf_jax.data import Ledger
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.report import write_report
from rlhf_jax.evaluation.report.charts import Line, line_chart, smoothed, thinned, ticks
from rlhf_jax.evaluation.report.compare import Answers, Compared, write_comparison
from rlhf_jax.evaluation.report.curves import before, ppo
from rlhf_jax.evaluation.report.curves import points as points_of
from rlhf_jax.evaluation.report.html import Figures, duration, short, text
from rlhf_jax.recipe.tables import figures_table

pytestmark = pytest.mark.demo

SUMMARY: dict[str, Any] = {
    "pretrain.heldout_bits_per_byte": 1.874,
    "pretrain.bigram_bits_per_byte": 2.613,
    "pretrain.heldout_response_nll": 3.541,
    "pretrain.development_response_nll": 3.541,
    "pretrain.gold_mean": 1.132,
    "pretrain.distinct_share": 0.988,
    "sft.heldout_response_nll": 2.706,
    "sft.win_rate_vs_pretrained": 0.871,
    "sft.win_rate_vs_pretrained_interval": [0.833, 0.904],
    "sft.distinct_share": 0.957,
    "sft.gold_mean": 3.424,
    "pretrain.topic_share": 0.113,
    "pretrain.finished_share": 0.041,
    "pretrain.known_share": 0.322,
    "pretrain.sensible_share": 0.007,
    "pretrain.sensible_fluent_share": 0.004,
    "sft.topic_share": 0.437,
    "sft.finished_share": 0.886,
    "sft.known_share": 0.504,
    "sft.sensible_share": 0.214,
    "sft.concise_share": 0.642,
    "sft.sensible_fluent_share": 0.163,
    "reward.heldout_accuracy": 0.861,
    "reward.labeller_agreement": 0.731,
    "ppo.win_rate_vs_sft": 0.816,
    "ppo.win_rate_vs_sft_interval": [0.771, 0.857],
    "ppo.kl_nats": 4.27,
    "ppo.distinct_share": 0.892,
    "ppo.distinct_share_of_sft": 0.932,
    "ppo.gold_mean": 5.032,
    "ppo.topic_share": 0.618,
    "ppo.finished_share": 0.991,
    "ppo.known_share": 0.907,
    "ppo.sensible_share": 0.553,
    "ppo.concise_share": 0.835,
    "ppo.sensible_fluent_share": 0.442,
    "docstrings.gold_mean": 5.913,
    "docstrings.finished_share": 0.972,
    "docstrings.known_share": 0.951,
    "docstrings.topic_share": 0.663,
    "docstrings.sensible_share": 0.601,
    "docstrings.concise_share": 0.661,
    "docstrings.sensible_fluent_share": 0.551,
    "docstrings.topic_share_of_others": 0.058,
    "ppo.first_ratio_error": 2.4e-7,
    "ppo.first_kl": 0.0,
    "wall_seconds": 452.3,
    "seed": 0,
    "stage_seconds": {
        "pretrain": 118.4,
        "sft": 81.2,
        "comparisons": 44.9,
        "reward": 66.0,
        "ppo": 91.7,
        "evaluation": 11.6,
    },
}
# prompt | pretrained | SFT | PPO | docstring | their gold scores
_SAMPLES = """
use posix spawn (args)|the file is a string,|Use the posix of the code.|True if the posix spawn is used.||.9 3.8 5.9
bold (text)|~~  >>> re.sub(r'a',|Return the string.|Return the text in bold.|Format in bold.|-.5 2.9 6
is loopback|if the address|Return if loopback.|Test if it is a loopback.|Test if it is one.|3.1 6 6
<script>alert('x')</script>||Return <b>bold</b> & "quoted" code.|Run\u202e and \x00 alert.||-.75 3 5.2
get content maintype|. The default is None, and the value|Return the.|Return the content maintype of it.||1.1 4.5 6
set debuglevel (level)|0, 1, 2, 3, 4, 5, 6, 7, 8, 9,|Set the debugging.|Set the debuglevel to level.||-1.2 4 5.8
remove duplicates (items)|a list of the items in the|Remove the items.|Remove duplicates from the items.||1.6 4.5 6
total seconds|The time in seconds since the Epoch. The|Total seconds in it.|Return the total seconds.|Total.|2.4 6 6
http error 302 (req, fp, code)|302 error code. If|Return the error of the code and of the code.|Return it.||1.8 3.1 5.5
make archive (base name, format)|zip, tar, or the|Create a new archive.|Make an archive.|Create an archive.|1 4.5 6
normalize (self)|x.normalize() returns the|Return the normal form.|Normalize the number.|Strip trailing zeros.|3 5.5 6
"""


def samples() -> list[dict[str, Any]]:
    """What the recipe writes to samples.json."""
    out = []
    for line in _SAMPLES.strip().split("\n"):
        prompt, *answers, docstring, gold = line.replace("~", "\n").split("|")
        answered = dict(zip(("pretrain", "sft", "ppo"), answers, strict=True))
        scores = dict(zip(answered, map(float, gold.split()), strict=True))
        out.append({"prompt": f" {prompt} ->", **answered, "docstring": docstring or None, "gold": scores})
    return out


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested objects."""
    out: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = out
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return out


def make_folder(folder: Path) -> Path:
    """What a run of the default recipe leaves, in miniature but of its true size in rows."""
    rng = random.Random(0)

    def noisy(start: float, end: float, at: float, noise: float) -> float:
        return end + (start - end) * math.exp(-5 * at) + rng.gauss(0, noise)

    def rows(steps: int, every: int, eval_every: int, /, **curves: tuple[float, float, float]) -> list[dict[str, Any]]:
        out = []
        for step in range(every, steps + 1, every):
            row: dict[str, Any] = {"step": step, "time": 1e9 + step}
            for name, curve in curves.items():
                name = name.replace("eval_", "eval/")
                if not name.startswith("eval/") or step % eval_every == 0:
                    row[name] = noisy(curve[0], curve[1], step / steps, curve[2])
            out.append(row)
        return out

    speed = {"tokens_per_second": (8700.0, 8700.0, 250.0), "peak_share": (0.41, 0.41, 0.01)}
    runs = {
        "pretrain": rows(
            *(1600, 10, 200),
            loss=(6.9, 2.75, 0.09),
            eval_loss=(5.2, 2.91, 0.01),
            eval_bits_per_byte=(3.4, 1.87, 0),
            **speed,
        ),
        "sft": rows(550, 10, 50, loss=(3.6, 2.52, 0.08), eval_loss=(3.5, 2.70, 0.005), **speed),
        "reward": rows(300, 5, 50, accuracy=(0.5, 0.78, 0.03), eval_accuracy=(0.55, 0.86, 0.006), **speed),
        "ppo": rows(
            *(60, 1, 5),
            score=(-0.1, 1.35, 0.09),
            kl=(0.0, 4.3, 0.2),
            kl_coef=(0.05, 0.05, 0.0),
            entropy=(2.4, 1.7, 0.04),
            response_tokens=(11, 8.5, 0.3),
            missing_end=(0.06, 0.005, 0.004),
            policy_loss=(-0.01, -0.03, 0.006),
            value_loss=(0.6, 0.12, 0.02),
            clipped=(0.02, 0.09, 0.01),
            ppo_over_pretraining=(1.8, 1.1, 0.1),
            eval_gold=(3.4, 5.0, 0.05),
            eval_score_gap=(0.0, 0.2, 0.03),
            **speed,
        ),
    }
    runs["ppo"][3]["score"] = None
    for stage, lines in runs.items():
        run = folder / stage
        run.mkdir(parents=True)
        content = [json.dumps(row) for row in lines] + [json.dumps({"step": 7, "time": 1.0, "event": "recompiled"})]
        (run / "metrics.jsonl").write_text("\n".join(content) + "\n")
        ledger = Ledger()
        for i in range(400):
            ledger.keep(f"{('json/decoder.py', 'pydoc_data.topics', 'os.py')[i % 3]}:{i}", tokens=rng.randint(30, 3000))
        for i in range(9):
            ledger.drop(f"os.py:{9000 + i}", "longer than the context <of 128 tokens>" if i % 3 else "empty response")
        ledger.cut("os.py:9100", "cut to the first sentence", tokens=12)
        ledger.save(run / "ledger.json")
        config = {
            "format_version": 1,
            "stage": stage,
            "config": {"steps": 10, "seed": 0, "out": "", "kl_target": None, "optimizer": {"learning_rate": 3e-3}},
            "model": {"width": 128, "layers": 4, "heads": 4},
            "tokenizer": "ab12" * 16,
            "inputs": {"init": "cd34" * 16},
        }
        (run / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(SUMMARY | nested(SUMMARY)))
    (folder / "samples.json").write_text(json.dumps(samples()))
    return folder


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether every tag that opens closes in order."""

    VOID = frozenset({"meta", "link", "br"})
    SVG = frozenset({"path", "rect", "circle"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.SVG
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + "\n"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(make_folder(tmp_path_factory.mktemp("runs") / "recipe")).read_text(encoding="utf-8")


def test_one_file_that_needs_nothing_else(page: str) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page, re.IGNORECASE)
    for tag, attributes in Page(page).tags:
        assert tag not in {"script", "iframe", "object", "embed", "base", "img"}
        assert not {name for name in attributes if name.startswith("on") or name in {"src", "srcset", "action"}}
        assert attributes.get("href", "data:,") == "data:,"


def test_text_from_models_is_text(page: str) -> None:
    assert html.escape("<script>alert('x')</script>") in page
    assert "Return &lt;b&gt;bold&lt;/b&gt; &amp; &quot;quoted&quot; code." in page
    assert "&lt;of 128 tokens&gt;" in page
    assert "\x00" not in page and "\u202e" not in page
    assert text("a\ud800b") == "a?b"


def test_documented_prompts_come_first_and_the_rest_is_folded(page: str) -> None:
    assert page.index("Format in bold.") < page.index("True if the posix spawn is used.")
    assert page.index("1 more of 11 prompts") < page.index("Return it.") < page.index("Training curves")


def test_the_figures_are_those_of_the_summary(page: str) -> None:
    shown = Page(page).text
    figures = "81.6% 87.1% 86.1% 4.27 89.2% 1.87 2.61 5.03 61.8% 43.7%".split()
    for figure in [*figures, "77.1% to 85.7%"]:
        assert figure in shown, figure
    assert "After RLHF, answers beat those of SFT on 82% of test prompts" in shown
    assert "7 min 32 s" in shown


def test_cards_of_the_key_figures(page: str) -> None:
    cards = re.findall(r"<dt>(.*?)</dt><dd>(.*?)<small>(.*?)</small>", page)
    assert cards == [
        ("PPO wins over SFT", "81.6%", "95% interval 77.1% to 85.7%"),
        ("SFT wins over pretrained", "87.1%", "95% interval 83.3% to 90.4%"),
        ("Reward model’s accuracy", "86.1%", "of test pairs"),
        ("KL from SFT", "4.27", "nats per response"),
        ("Distinct answers, PPO", "89.2%", "93.2% of SFT’s share"),
        ("PPO’s answers about the function", "61.8%", "SFT’s 43.7%"),
        ("Gold score of PPO’s answers", "5.03", "of 7; SFT’s 3.42"),
        ("SFT’s nats per response token", "2.71", "on test demonstrations; the pretrained model’s 3.54"),
        ("Bits per byte of test text", "1.87", "token bigrams need 2.61"),
    ]


def test_what_each_stage_gained_stands_side_by_side(page: str) -> None:
    shown = re.sub(r"\s+", " ", Page(page).text)
    assert (
        "Pretrained SFT PPO Documentation Gold score, mean 1.13 3.42 5.03 5.91 One finished sentence 4.1% 88.6% 99.1% "
        "97.2% All words are words 32.2% 50.4% 90.7% 95.1% About the function 11.3% 43.7% 61.8% 66.3% Sensible: all "
        "three of them 0.7% 21.4% 55.3% 60.1% Sensible, and no word twice 0.4% 16.3% 44.2% 55.1% Three to eight words "
        "– 64.2% 83.5% 66.1% Distinct answers 98.8% 95.7% 89.2% – Nats per response token 3.54 2.71 – –"
    ) in shown


def test_pictures_and_tables_speak(page: str) -> None:
    tags = Page(page).tags
    pictures = [attributes["aria-label"] or "" for tag, attributes in tags if tag == "svg"]
    assert len(pictures) == 4 + 1 + 3 + 9 and all(pictures)
    assert any("PPO against SFT: 81.6% (77.1% to 85.7%)" in words for words in pictures)
    assert all("nan" not in words for words in pictures)
    tables = sum(tag == "table" for tag, _ in tags)
    assert tables == sum(tag == "caption" for tag, _ in tags) > 8
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")


def test_the_ledger_adds_up(page: str) -> None:
    shown = re.sub(r"\s+", " ", Page(page).text)
    assert "SFT 410 400 1 9 " in shown
    assert "SFT dropped longer than the context <of 128 tokens> 6" in shown


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "recipe")
    for missing in ("summary.json", "samples.json", "ppo", "sft/metrics.jsonl", "sft/ledger.json"):
        (folder / missing).rename(tmp_path / "elsewhere")
        Page(write_report(folder).read_text(encoding="utf-8"))
        (tmp_path / "elsewhere").rename(folder / missing)


def test_any_key_may_be_missing(tmp_path: Path) -> None:
    for key in SUMMARY:
        for value in ({}, {key: None}, {key: "what"}):
            (tmp_path / "summary.json").write_text(json.dumps({k: v for k, v in SUMMARY.items() if k != key} | value))
            shown = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
            assert "None" not in shown and "what" not in shown.replace("what is preferred", ""), (key, value)


def test_an_empty_folder_and_a_damaged_file(tmp_path: Path) -> None:
    assert write_report(tmp_path) == tmp_path / "report.html"
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: unreadable"):
        write_report(tmp_path)


def test_a_users_table_has_no_targets_of_ours(page: str, tmp_path: Path) -> None:
    worse = SUMMARY | {"ppo.win_rate_vs_sft": 0.41, "ppo.first_kl": 0.1, "wall_seconds": 9000.0}
    (tmp_path / "summary.json").write_text(json.dumps(nested(worse)))
    for shown in (Page(page).text, Page(write_report(tmp_path).read_text(encoding="utf-8")).text):
        assert not re.search("(?i)✗|✓|missed|verdict|targets of", shown)


def test_ppo_has_panels_from_iteration_0() -> None:
    rows = [{"step": 0, "eval/gold": 2.0}, {"step": 1, "score": -0.5, "kl": 0.0}, {"step": 2, "score": 1.0, "kl": 3.0}]
    labels = re.findall('aria-label="([^"]*)"', ppo([*rows, {"step": 3, "eval/gold": 2.5}]))
    assert labels == [
        "Score: score from -0.5 to 1",
        "Gold score, held out: gold score from 2 to 2.5",
        "KL to the reference: KL to the reference from 0 to 3",
    ]
    assert before(rows, "score") == [(0.0, -0.5), (1.0, 1.0)] and points_of(rows, "eval/gold") == [(0.0, 2.0)]
    terms = ppo([{"step": 1, "score": 1.0, "reward/model": 0.5, "reward/commas": -1.0}])
    assert 'aria-label="Terms of the reward: model from 0.5 to 0.5; commas from -1 to -1"' in terms


def compared(name: str, **changes: Any) -> Compared:
    """A finished PPO run of two iterations."""
    rows = [{"step": step, "score": step - 1.0, "kl": 2.0 * step - 2, "response_tokens": 5.0} for step in (1, 2)]
    settings = {"name": name, "kl_coef": 0.1, "policy": {"learning_rate": 1e-4}}
    return Compared(**{"name": name, "stage": "ppo", "settings": settings, "summary": {}, "rows": rows} | changes)


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    judges = [
        {"prompt": "Hi", "preferred": "Yes.", "other": "No.", "preferred_score": 1.5, "other_score": -0.25},
        {"prompt": "Ho", "preferred": "<i>", "other": "b", "preferred_score": 0.0, "other_score": 1.0},
    ]
    beta = {"name": "b", "kl_coef": 0.4, "policy": {"learning_rate": 1e-4}, "clip": 0.2}
    runs = [
        compared("a", summary={"last_kl": 2.0}, warnings=["it <over-fits>"]),
        compared("b", settings=beta, summary={"last_kl": 3.5}),
        compared("c", stage="sft", settings={"steps": 30}, summary=None, rows=[{"step": 7, "loss": 1.0}]),
        compared("j", stage="reward", rows=[], samples=judges),
        compared("k", stage="reward", rows=[], samples=judges[:1]),
    ]
    answers = Answers(
        prompts=["Hi", "Q: Why?\nA:", "long"],
        texts={"a": ["x", "<b>", "x"], "b": ["xyz", "", "w"]},
        tokens={"a": [1, 2, 3], "b": [3, 3, 5]},
        scores={"a": [1.0, 0.5, 0.0], "b": [2.0, 0.5, None]},
        about="3 prompts.",
    )
    write_comparison(tmp_path / "c.html", runs, answers, {"recipe": {"ppo.kl_nats": 4.25, "ppo": {"kl_nats": 4.25}}})
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    shown = re.sub(r"\s+", " ", Page(page).text)
    for expected in (
        "Warnings a : it <over-fits> c : not finished: 7 steps done of 30",
        "PPO Setting a b kl_coef 0.1 0.4 clip – 0.2",  # the name differs by itself, the learning rate does not
        "a 2.0 2 33% 2.00 0.50 – b 3.7 1 100% 2.00 1.25 75%",
        "b against a 75.0% (26.0% to 100.0%)",
        "Hi x score 1.00 xyz ★ score 2.00 Q: Why? A: <b> score 0.50 nothing score 0.50 long x score 0.00 w",
        "Hi Yes. No. +1.75 +1.75 Ho <i> b -1.00 –",
        "last kl 2 3.5",
        "ppo.kl nats 4.25",
    ):
        assert expected in shown, expected
    assert "<b></td>" not in page and "&lt;b&gt;" in page and 'class="none">nothing' in page
    labels = re.findall('aria-label="([^"]*)"', page)
    assert (
        "Score: a from 0 to 1; b from 0 to 1" in labels
        and "KL to the reference: a from 0 to 2; b from 0 to 2" in labels
    )
    assert "SFT: loss in training: c from 1 to 1" in labels
    write_comparison(tmp_path / "c.html", runs[2:3], None, {})
    assert "Answers" not in Page((tmp_path / "c.html").read_text(encoding="utf-8")).text


def test_the_headline_follows_the_interval(tmp_path: Path) -> None:
    for rate, interval, words in (
        (0.6, [0.51, 0.69], "answers beat"),
        (0.52, [0.47, 0.57], "changed little"),
        (0.4, [0.36, 0.44], "worse"),
    ):
        summary = {"ppo.win_rate_vs_sft": rate, "ppo.win_rate_vs_sft_interval": interval}
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        shown = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
        assert words in shown and "repeats itself" not in shown, rate
        repeating = {"ppo.distinct_share": 0.2, "sft.distinct_share": 0.9}
        (tmp_path / "summary.json").write_text(json.dumps(summary | repeating))
        assert "repeats itself" in Page(write_report(tmp_path).read_text(encoding="utf-8")).text, rate


def test_the_recipes_table_has_the_summarys_figures() -> None:
    shown = {"sft.topic_share_shown": 0.512, "ppo.topic_share_shown": 0.634}
    shown |= {
        f"{stage}.{name}_shown": share - less
        for name, less in (("sensible_share", 0.0), ("sensible_fluent_share", 0.01))
        for stage, share in zip(("pretrain", "sft", "ppo"), (0.01, 0.3, 0.6))
    }
    console = rich.console.Console(width=200)
    with console.capture() as captured:
        console.print(figures_table(SUMMARY | shown, "what came out"))
    said = re.sub(r"[ │]+", " ", captured.get())
    for row in (
        "PPO against SFT, win rate 0.816 [0.771, 0.857] \n",
        "about the function, SFT to PPO 0.44 to 0.62 at temperature 0.7: 0.51 to 0.63",
        "sensible: that, finished, all words 0.01 to 0.21 to 0.55 at temperature 0.7: 0.01 to 0.30 to 0.60",
        "and no word twice 0.00 to 0.16 to 0.44 at temperature 0.7: 0.00 to 0.29 to 0.59",
        "docstrings themselves, the same three 0.66, 0.60, 0.55 of other functions: about it 0.06",
        "distinct answers, PPO and SFT 0.892 and 0.957 \n",
        "minutes 7.5 \n",
    ):
        assert row in said, row


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
    assert ticks(-3.0, 41.0, 5) == [0.0, 10.0, 20.0, 30.0, 40.0]
    assert ticks(1.9e-4, 4.2e-4, 5) == pytest.approx([2e-4, 2.5e-4, 3e-4, 3.5e-4, 4e-4])


def test_curves_are_thinned_and_smoothed_to_means() -> None:
    line = [(float(i), 2.0 * i) for i in range(1000)]
    assert thinned(line, 300)[:2] == [(1.5, 3.0), (5.5, 11.0)] and len(thinned(line, 300)) == 250
    assert [y for _, y in smoothed(line)][:950] == pytest.approx([y for _, y in line][:950])
    assert smoothed([(0.0, 0.0), (1.0, 3.0), (2.0, 0.0)]) == [(0.0, 0.0), (1.0, 1.0), (2.0, 1.5)]


def test_a_curve_of_one_point_or_level_is_drawn() -> None:
    assert line_chart([Line("a", "sft", [])], title="none") == ""
    for points in ([(5.0, 0.0)], [(1.0, 3.0), (2.0, 3.0)], [(1.0, -2e-8), (2.0, 4e7)]):
        assert 'aria-label="t: a from' in line_chart([Line("a", "sft", points)], title="t")


def test_numbers_for_people() -> None:
    assert [short(v) for v in (0.0, 12.0, 1234.5, 0.0512, -1.5)] == ["0", "12", "1,234", "0.0512", "-1.5"]
    assert [short(v) for v in (3.2e-7, 4e12)] == ["3.2e-7", "4.0e12"]
    assert [duration(v) for v in (9.6, 452.3, 7500)] == ["10 s", "7 min 32 s", "2 h 5 min"]
    assert Figures({"a": {"b": True}}).number("a.b") is None
