"""The labelling page in a real browser: by keyboard, by drag and by touch, through reloads and a dying server."""

import contextlib
import json
import re
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from rlhf_jax.config import ModelConfig, OptimConfig
from rlhf_jax.data import Ledger, read_records
from rlhf_jax.data.records import Demonstration
from rlhf_jax.feedback.records import Judgement
from rlhf_jax.feedback.store import Store
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.tokenizers.bpe import Tokenizer
from rlhf_jax.trainers import reward
from tests.label_servers import ForkedServer
from tests.made_params import random_params
from tests.made_runs import write_run

pytestmark = pytest.mark.feedback

CHROMIUM = Path("/usr/bin/chromium")
if not CHROMIUM.exists():
    pytest.skip(f"no Chromium at {CHROMIUM}; to get it: apt-get install chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("starlette", reason="the extra ui is not installed")

ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking "
    "--disable-component-update --disable-default-apps --disable-sync --no-first-run"
).split()
MARKDOWN = """# Plan

1. **Bold** and `code`
2. [a link](https://example.org/x) ![an image](https://example.org/i.png)

```python
print("<b>1</b>")
```

| a | b |
|---|---|
| 1 | 2 |
"""
PAYLOADS = json.loads((Path(__file__).parent / "script_payloads.json").read_text(encoding="utf-8"))
LETTERS = "ABCDEFGHI"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        with contextlib.closing(playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)) as opened:
            yield opened


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page on a wide window; whatever it says on its console, and whatever it asks of others, is an error."""
    with contextlib.closing(browser.new_context(viewport={"width": 1360, "height": 900})) as context:
        yield watched(context.new_page())


def watched(page: Any) -> Any:
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: page.complaints.append(f"dialog {dialog.message}"))
    page.on(
        "request", lambda request: urlsplit(request.url).hostname != "localhost" and page.complaints.append(request.url)
    )
    return page


@contextlib.contextmanager
def served(folder: Path, rows: list[dict[str, Any]], *flags: str) -> Iterator[ForkedServer]:
    """`rlhf-jax label` on some rows."""
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    server = ForkedServer(folder / "labels", "--data", str(data), *flags)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def judgements(folder: Path) -> list[Judgement]:
    with contextlib.closing(Store(folder / "labels", read_only=True)) as store:
        return store.judgements()


def own_order(folder: Path, shown: list[str]) -> list[int]:
    """For each response of the item that has these, where it stands on the page."""
    with contextlib.closing(Store(folder / "labels", read_only=True)) as store:
        (item,) = [item for item in store.items() if sorted(r.strip() for r in item.responses) == sorted(shown)]
        return [shown.index(response.strip()) for response in item.responses]


def shown(page: Any) -> list[str]:
    return [text.strip() for text in page.locator(".answer .said").all_inner_texts()]


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def ranking(page: Any) -> str:
    """Such as "A CD", the tiers from the best."""
    return " ".join("".join(t.locator(".chip").all_inner_texts()) for t in page.locator(".tier").all())


def next_item(page: Any, before: list[str]) -> None:
    page.wait_for_function("old => document.querySelector('.answer .said')?.innerText.trim() !== old", arg=before[0])


def scroll_through(page: Any) -> None:
    """Down to the end, a step at a time."""
    at = -1
    while at != (at := page.evaluate("scrollBy(0, 150), scrollY")):
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def drag(page: Any, chip: str, target: str) -> None:
    start, end = page.locator(f"#chip-{LETTERS.index(chip)}").bounding_box(), None
    page.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
    page.mouse.down()
    page.mouse.move(start["x"] - 20, start["y"] - 5, steps=2)  # the gaps grow once a drag begins
    end = page.locator(f'[data-drop="{target}"]').bounding_box()
    page.mouse.move(end["x"] + end["width"] / 2, end["y"] + end["height"] / 2, steps=4)
    page.mouse.up()


ROWS: list[dict[str, Any]] = [
    {"prompt": f"Prompt {n}:", "responses": [f" {word} answer to {n}." for word in ("Red", "Blue", "Green", "Grey")]}
    for n in range(4)
]


def test_from_the_first_key_to_a_reward_model(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tmp_path, ROWS) as server:
        page.goto(server.links["me"])
        page.wait_for_selector(".answer")
        assert "token" not in page.url and page.evaluate("document.cookie") == ""

        # By keyboard: rate, flag, rank with a tie, change one's mind.
        first = shown(page)
        press(page, "6", "q", "j", "2", "w", "y", "j", "5", "j", "1", "c", "a", "=", "d", "b")
        assert ranking(page) == "C AD B"
        press(page, "Backspace", "b", "<")
        assert ranking(page) == "C ABD"
        press(page, "<")
        assert ranking(page) == "C B AD"
        assert page.locator("#status").inner_text() == "B: rank 2 of 3. All ranked."

        # Reloaded in the middle, at once: nothing is lost.
        page.reload()
        page.wait_for_selector(".tier")
        assert shown(page) == first and ranking(page) == "C B AD"
        assert page.locator(".rating input:checked").evaluate_all("all => all.map((one) => one.value)") == list("6251")
        flags = page.locator(".flags input:checked").evaluate_all("all => all.map((one) => one.value)")
        assert flags == ["fails_instruction", "hallucination", "bad_advice"]
        press(page, "Enter")
        next_item(page, first)
        (stored,) = judgements(tmp_path)
        places = own_order(tmp_path, first)
        assert stored.ranks == tuple((3, 2, 1, 3)[place] for place in places)
        assert stored.ratings == tuple((6, 2, 5, 1)[place] for place in places)
        assert stored.flags == tuple(
            frozenset(({"fails_instruction"}, {"hallucination", "bad_advice"}, set(), set())[place]) for place in places
        )

        # Undone, another draft waiting; then sent as it was.
        second = shown(page)
        press(page, "3", "d")
        press(page, "z")
        next_item(page, second)
        assert shown(page) == first and ranking(page) == "C B AD" and judgements(tmp_path) == []
        press(page, "Enter")
        next_item(page, first)
        assert shown(page) == second and ranking(page) == "D"
        assert page.locator("#answer-0 .rating input:checked").input_value() == "3"

        # By drag: before, behind, into a tie, back to the tray.
        drag(page, "A", "gap 0")
        drag(page, "B", "gap 2")
        drag(page, "C", "tier 0")
        assert ranking(page) == "AC D B"
        drag(page, "D", "tray")
        assert ranking(page) == "AC B" and page.locator("#submit").is_disabled()
        drag(page, "D", "gap 1")
        drag(page, "A", "gap 3")
        assert ranking(page) == "C D B A"
        page.locator("#answer-2 .rating label", has_text="7").click()
        page.locator("#answer-3 .flags label", has_text="Harmful").click()
        page.reload()
        page.wait_for_selector(".tier")
        assert ranking(page) == "C D B A" and page.locator("#answer-3 .flags input:checked").input_value() == "harmful"
        page.locator("#submit").click()
        next_item(page, second)
        assert judgements(tmp_path)[-1].ranks == tuple((4, 3, 1, 2)[place] for place in own_order(tmp_path, second))

        # By ratings, then a skip, and the end.
        third = shown(page)
        press(page, "4", "j", "7", "j", "4", "j", "1", "o")
        assert ranking(page) == "B AC D"
        press(page, "Enter")
        next_item(page, third)
        press(page, "s")
        page.get_by_label("Something else").fill("the answers are all alike")
        press(page, "Enter")
        page.get_by_role("heading", name="Nothing more to judge").wait_for()
        said = judgements(tmp_path)
        assert said[-1].skip == "the answers are all alike" and said[-1].ranks == () and len(said) == 4
        assert page.complaints == []

        # The admin exports, and a reward model trains on it.
        page.goto(server.links["admin page"])
        page.wait_for_selector("#cards div")
        assert "3 of 4" in page.locator("#cards").inner_text() or "3" in page.locator("#cards dd").first.inner_text()
        with page.expect_download() as download:
            page.get_by_role("link", name="Export").click()
        assert page.complaints == []
        archive = tmp_path / "labels.zip"
        download.value.save_as(archive)
    zipfile.ZipFile(archive).extractall(tmp_path / "export")
    exported = tmp_path / "export" / "rankings" / "rankings.jsonl"
    assert len(exported.read_text().splitlines()) == 3
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.bytes()
    model = ModelConfig(vocab_size=tokenizer.vocab_size, context=64, width=16, layers=1, heads=2)
    write_run(Path("runs/base"), "pretrain", random_params(model), model, tokenizer)
    finished = reward.run(
        reward.Config(
            name="judge",
            init="runs/base",
            data=(str(exported),),
            heldout=(str(exported),),
            batch=3,
            steps=30,
            optimizer=OptimConfig(learning_rate=1e-2),
            buckets=(32,),
        )
    )
    # Six pairs an item, one of them tied in two items.
    assert finished.summary["prompts"] == 3 and finished.summary["heldout_pairs"] == 16
    assert finished.summary["heldout_accuracy"] > 0.7 and RunFolder.open("runs/judge", stages=("reward",)).finished


def test_two_answers_by_one_key(page: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "chosen": f" good {n}", "rejected": f" bad {n}"} for n in range(5)]
    with served(tmp_path, rows) as server:
        page.goto(server.links["me"])
        page.wait_for_selector(".answer")
        for number, key in enumerate(("a", "b", "=")):
            before = shown(page)
            page.keyboard.down(key)
            page.keyboard.down(key)  # held down: a repetition is no answer
            page.keyboard.up(key)
            next_item(page, before)
            said = judgements(tmp_path)
            assert len(said) == number + 1
            ranks = [said[-1].ranks[own_order(tmp_path, before).index(place)] for place in range(2)]
            assert ranks == ([1, 2], [2, 1], [1, 1])[number]
        before = shown(page)
        press(page, "j", "7", "u")
        page.get_by_role("button", name="A is better").dblclick()  # one decision, not another on the next item
        next_item(page, before)
        assert len(judgements(tmp_path)) == 4
        (last,) = judgements(tmp_path)[-1:]
        assert sorted(last.ratings, key=str) == [7, None] and sum(map(len, last.flags)) == 1
        assert page.complaints == []


def test_scripts_in_prompts_and_answers_stay_text(browser: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": text, "responses": [f"{text} one", f"{text} two"]} for text in PAYLOADS[:25]
    ]
    rows += [
        {"prompt": [{"role": "user", "content": text}], "responses": [f"{text} one", f"{text} two"]}
        for text in PAYLOADS[25:]
    ]
    flags = ("--labellers-per-item", "2", "--labeller", "ann", "--labeller", "bob")
    with served(tmp_path, rows, *flags) as server:
        for name, key in (("ann", "a"), ("bob", "b")):
            with contextlib.closing(browser.new_context()) as context:
                page = watched(context.new_page())
                page.goto(server.links[name])
                page.wait_for_selector(".answer")
                for number in range(50 if name == "ann" else 6):
                    # One payload has Markdown in it: backticks.
                    marked = page.locator(".said *").evaluate_all(
                        "all => all.map((one) => [one.tagName, one.attributes.length])"
                    )
                    assert sorted(marked) == (
                        sorted([["CODE", 0], ["CODE", 0], ["P", 0]] * 3) if "` `" in PAYLOADS[number] else []
                    )
                    if marked:
                        press(page, "m")
                    texts = page.locator(".said").evaluate_all(
                        "all => all.map((one) => [one.textContent, one.children.length])"
                    )
                    assert texts[0] == [PAYLOADS[number].strip("\n"), 0] and all(count == 0 for _, count in texts)
                    assert sorted(text for text, _ in texts[1:]) == [
                        f"{PAYLOADS[number]} one",
                        f"{PAYLOADS[number]} two",
                    ]
                    before = shown(page)
                    press(page, key)
                    if number < 49:
                        next_item(page, before)
                if name == "ann":
                    page.get_by_role("heading", name="Nothing more to judge").wait_for()
                assert page.evaluate("window.hacked") is None and page.complaints == []
                assert urlsplit(page.url).path == "/"
        with contextlib.closing(browser.new_context()) as context:
            page = watched(context.new_page())
            page.goto(server.links["admin page"])
            page.wait_for_selector("#disagreements > *")
            for case in page.locator(".case summary").all():
                case.click()
            assert page.evaluate("window.hacked") is None and page.complaints == []
            assert page.locator(".case .said *").count() == 0


def test_no_decision_before_all_answers_were_on_screen(browser: Any, tmp_path: Path) -> None:
    long = "\n".join(f"line {n}" for n in range(120))
    rows = [{"prompt": f"p{n}", "chosen": f"{long} good {n}", "rejected": f"short {n}"} for n in range(3)]
    keys = ("ArrowDown", "ArrowUp", "ArrowLeft", "ArrowRight", "PageDown", "PageUp", " ", "Shift+ArrowDown")
    options = {"viewport": {"width": 400, "height": 700}, "has_touch": True}
    with served(tmp_path, rows) as server, contextlib.closing(browser.new_context(**options)) as context:
        page = watched(context.new_page())
        page.goto(server.links["me"])
        page.wait_for_selector(".answer")
        for decide in (
            *(lambda key=key: press(page, key) for key in (*keys, "a", "b", "=")),
            lambda: page.locator("#left").tap(force=True),
            lambda: page.locator("#tie").click(force=True),
        ):
            decide()
            page.evaluate("scrollTo(0, 0)")
            said = page.locator("#unseen").inner_text()
            assert re.fullmatch("To decide, scroll through (A, B|B) from the first line to the last.", said), said
            assert judgements(tmp_path) == []
        press(page, *["ArrowDown"] * 4)  # scrolls, and does nothing else
        page.wait_for_function("() => scrollY > 100")
        scroll_through(page)
        assert page.locator("#unseen").is_hidden()
        press(page, "ArrowDown", "ArrowLeft")
        # A rating that was clicked stays what it is while arrows scroll on.
        page.locator("#answer-1 .rating label", has_text="4").click()
        at = page.evaluate("scrollY")
        press(page, "ArrowUp", "ArrowUp")
        page.wait_for_function("at => scrollY < at", arg=at)
        assert page.locator("#answer-1 .rating input:checked").input_value() == "4"
        page.reload()  # what was seen is in the draft
        page.wait_for_selector(".answer")
        assert page.locator("#unseen").is_hidden() and judgements(tmp_path) == []
        before = shown(page)
        page.locator("#left").tap()
        next_item(page, before)
        assert len(judgements(tmp_path)) == 1 and page.locator("#unseen").is_visible()
        assert "2 left for you, 1 done by you; 1 of 3 by all" in page.locator("#progress-words").inner_text()
        press(page, "s", "Enter")  # a skip is no judgement, and needs no reading
        page.wait_for_function("() => document.querySelector('#progress-words').innerText.startsWith('1 left')")
        assert "1 done by you; 1 of 3 by all" in page.locator("#progress-words").inner_text()
        assert page.complaints == []


def test_long_prompts_collapse_and_markdown_is_drawn(page: Any, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "old " * 900}, {"role": "assistant", "content": "ok"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "word " * 900, "responses": [MARKDOWN + "one", "plain  text\n  and *more"]},
        {"prompt": [*turns, {"role": "user", "content": "the question"}], "responses": ["x", "y"]},
    ]
    with served(tmp_path, rows) as server:
        page.goto(server.links["me"])
        page.wait_for_selector(".answer")
        assert page.locator("#turns").bounding_box()["height"] <= 242
        for deed in (
            lambda: page.get_by_role("button", name="Show all of the prompt").click(),
            lambda: press(page, "p"),
        ):
            deed()
            assert page.locator("#turns").bounding_box()["height"] > 400
            press(page, "p")
            assert page.locator("#turns").bounding_box()["height"] <= 242
        drawn = page.locator(".said.marked")
        assert drawn.count() == 1 and "and *more" in "".join(shown(page))
        for tag, text in (("h4", "Plan"), ("strong", "Bold"), ("code", "code"), ("td >> nth=1", "2")):
            assert drawn.locator(tag).inner_text() == text
        assert drawn.locator("pre").inner_text() == 'python\nprint("<b>1</b>")'
        assert "a link (https://example.org/x) [image: an image (https://example.org/i.png)]" in drawn.inner_text()
        assert drawn.locator("a, img, b").count() == 0
        page.get_by_label("Show the text as written").check()
        assert drawn.count() == 0 and MARKDOWN + "one" in page.locator(".said").all_text_contents()
        press(page, "m")
        assert drawn.count() == 1
        before = shown(page)
        scroll_through(page)
        press(page, "a")
        next_item(page, before)
        box, last = page.locator("#turns").bounding_box(), page.get_by_text("the question").bounding_box()
        assert box["height"] <= 242 and box["y"] < last["y"] < box["y"] + box["height"] - 20
        assert page.complaints == []


GUIDE = """
title: Which is kinder
instructions: "# Guide\\n<script>window.hacked=1</script> **Read** both."
question: Which answer is kinder?
flags: {rude: Rude}
scale: {points: 5, labels: {1: Bad, 5: Good}}
"""


def test_a_page_of_ones_own_with_answers_written(page: Any, tmp_path: Path) -> None:
    (tmp_path / "page.yaml").write_text(GUIDE)
    (tmp_path / "write.jsonl").write_text('{"prompt": "Say hi"}\n{"prompt": "Correct me", "response": "a typoo"}')
    flags = ("--page", str(tmp_path / "page.yaml"), "--demonstrations", str(tmp_path / "write.jsonl"))
    with served(tmp_path, [{"prompt": "Be kind", "responses": ["one", "two"]}], *flags) as server:
        page.goto(server.links["me"])
        page.get_by_role("heading", name="Guide").wait_for()
        assert "<script>" in page.locator("#guide-text").inner_text() and page.evaluate("() => window.hacked") is None
        press(page, "a")  # nothing is decided behind the instructions
        page.get_by_role("button", name="Close").click()
        assert page.get_by_role("heading", name="Which is kinder").is_visible() and judgements(tmp_path) == []
        assert page.locator("#dock-title").inner_text() == "Which answer is kinder?"
        page.set_viewport_size({"width": 360, "height": 740})
        assert page.locator("#dock-title").is_visible() and page.evaluate(AUDIT) == []
        page.set_viewport_size({"width": 1360, "height": 900})
        assert page.evaluate(AUDIT) == []
        press(page, "q", "7", "5", "j", "1")
        page.locator("#answer-0 summary").click()
        page.get_by_label("Comment on answer A").fill("as if")
        page.locator("#rationale-note summary").click()
        page.locator("#rationale").press_sequentially("a b = s z ?")  # letters, not keys of the page
        page.locator("#demonstration-title").click()
        first = shown(page)
        page.get_by_role("button", name="Start from B").click()
        page.locator("#demonstration").press_sequentially(" and more")
        assert page.evaluate(AUDIT) == []
        page.reload()  # the instructions are read; what was written is there
        page.wait_for_selector(".answer")
        assert page.locator("#guide-dialog").is_hidden() and page.get_by_text("Started from B.").is_visible()
        page.get_by_role("button", name="Start from A").click()  # asks before it replaces
        assert page.locator("#demonstration").input_value() == f"{first[1]} and more"
        scroll_through(page)
        page.locator("#left").click()
        page.get_by_text("Say hi").wait_for()
        assert page.locator("#answers-part").is_hidden() and page.locator("#submit").is_disabled()
        page.get_by_label("Write the answer").fill("Hi!")
        page.keyboard.press("Enter")
        page.keyboard.type("**You** there.")
        assert page.evaluate(AUDIT) == []
        page.locator("#submit").click()
        page.get_by_text("Correct me").wait_for()
        assert page.get_by_label("Correct the answer").input_value() == "a typoo"
        page.get_by_label("Correct the answer").fill("a typo")
        page.locator("#submit").click()
        page.get_by_role("heading", name="Nothing more to judge").wait_for()
        said = judgements(tmp_path)
        places = own_order(tmp_path, first)
        assert [one.demonstration for one in said] == [f"{first[1]} and more", "Hi!\n**You** there.", "a typo"]
        assert said[0].corrects == places.index(1) and said[0].rationale == "a b = s z ?"
        assert said[0].comments == tuple(("as if", "")[place] for place in places)
        assert said[0].ratings == tuple((5, 1)[place] for place in places) and sum(map(len, said[0].flags)) == 1
        assert said[1].ranks == () and (said[2].corrects, said[1].corrects) == (0, None)

        # The admin sees it, uploads, pauses, rejects and exports.
        page.goto(server.links["admin page"])
        page.get_by_text("Wrote: a typo").wait_for()
        assert page.evaluate(AUDIT) == []
        more = tmp_path / "more.jsonl"
        more.write_text('{"prompt": "Later", "responses": ["x", "y"]}')
        page.get_by_label("JSONL file").set_input_files(more)
        page.get_by_role("button", name="Upload").click()
        page.get_by_text("more.jsonl: 1 items, 1 of them new.").wait_for()
        more.write_text("{}")
        page.get_by_label("JSONL file").set_input_files(more)
        page.get_by_role("button", name="Upload").click()
        page.get_by_role("alert").filter(has_text="more.jsonl:1: field 'prompt'").wait_for()
        page.get_by_role("button", name="Reject", exact=True).first.click()
        assert page.evaluate(AUDIT) == []
        page.get_by_label("Reason").fill("still a typo")
        page.locator("#reject-form button.first").click()
        page.get_by_text("Wrote: a typo").wait_for(state="detached")
        page.get_by_role("button", name="Pause").click()
        page.get_by_role("button", name="Resume").wait_for()
        with page.expect_download() as download:
            page.get_by_role("link", name="Export").click()
        download.value.save_as(tmp_path / "labels.zip")
        page.goto(server.links["me"])
        page.get_by_role("heading", name="Your work is paused").wait_for()
        (line,) = {line for line in page.complaints if "status of 400" not in line} or {""}
        assert line == ""
    zipfile.ZipFile(tmp_path / "labels.zip").extractall(tmp_path / "export")
    read = read_records(tmp_path / "export" / "demonstrations" / "demonstrations.jsonl", "demonstrations", Ledger())
    assert {(one.prompt, one.completion) for one in read if isinstance(one, Demonstration)} == {
        ("Be kind", f"{first[1]} and more"),
        ("Say hi", " Hi!\n**You** there."),
    }
    assert json.loads((tmp_path / "export" / "page.json").read_text())["question"] == "Which answer is kinder?"


def test_a_server_that_dies_is_waited_for(page: Any, tmp_path: Path) -> None:
    with served(tmp_path, ROWS) as server:
        page.goto(server.links["me"])
        page.wait_for_selector(".answer")
        before = shown(page)
        server.kill()
        press(page, "a", "b", "c", "d", "Enter")
        page.get_by_role("alert").filter(has_text="does not answer").wait_for()
        server.start()
        next_item(page, before)
        assert page.locator("#trouble").is_hidden() and len(judgements(tmp_path)) == 1


# Contrast by WCAG 2.1 of all text against the nearest background, of what is not disabled; and names of all controls.
AUDIT = """() => {
  const faults = [];
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v <= 0.03928 * 255 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = rgb(getComputedStyle(one).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest(":disabled, .unseen, noscript")) continue;
    const [a, b] = [light(rgb(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faults.push(`contrast ${ratio.toFixed(2)}: ${element.outerHTML.slice(0, 80)}`);
  }
  for (const control of document.querySelectorAll("button, a, input, progress, [tabindex='0']")) {
    const names = [control.getAttribute("aria-label"), control.textContent.trim()];
    names.push(...[...(control.labels ?? [])].map((label) => label.textContent));
    if (!names.some(Boolean)) faults.push(`no name: ${control.outerHTML.slice(0, 80)}`);
    if (control.tabIndex > 0) faults.push(`tabindex ${control.tabIndex}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
  ids.filter((id, at) => ids.indexOf(id) !== at).forEach((id) => faults.push(`id twice: ${id}`));
  for (const landmark of ["body > header", "body > main", "h1"]) {
    if (document.querySelectorAll(landmark).length !== 1) faults.push(`landmark ${landmark}`);
  }
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) faults.push(`wider than the window: ${wide}`);
  return faults;
}"""


def test_readable_in_light_and_dark_wide_and_narrow(browser: Any, tmp_path: Path) -> None:
    long = {"prompt": "x" * 300, "responses": [f"{k} " + "long word " * 30 + "y" * 200 for k in range(9)]}
    windows = [(width, scheme) for width in (1360, 360) for scheme in ("light", "dark")]
    names = [f"p{number}" for number in range(len(windows))]
    flags = [word for name in names for word in ("--labeller", name)]
    with served(tmp_path, [long, *ROWS], "--labellers-per-item", "4", *flags) as server:
        for name, (width, scheme) in zip(names, windows, strict=True):
            options = {"viewport": {"width": width, "height": 740}, "color_scheme": scheme}
            with contextlib.closing(browser.new_context(**options)) as context:
                page = watched(context.new_page())
                page.goto(server.links[name])
                page.wait_for_selector(".answer")
                press(page, "3", "q", *"cab=d")
                assert page.evaluate(AUDIT) == []
                press(page, *"efghi")
                scroll_through(page)
                press(page, "Enter")
                page.locator("#answer-8").wait_for(state="detached")
                assert page.evaluate(AUDIT) == []
                press(page, "s")
                assert page.evaluate(AUDIT) == []
                press(page, "Escape", "?")
                assert page.evaluate(AUDIT) == []
                page.goto(server.links["admin page"])
                page.wait_for_selector("#disagreements > *")
                assert page.evaluate(AUDIT) == [] and page.complaints == []


def test_a_finger_drags_on_a_phone(browser: Any, tmp_path: Path) -> None:
    options = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with served(tmp_path, ROWS) as server, contextlib.closing(browser.new_context(**options)) as context:
        page = watched(context.new_page())
        page.goto(server.links["me"])
        page.wait_for_selector(".answer")
        for chip in "CA":
            page.locator(f"#chip-{LETTERS.index(chip)}").tap()
        assert ranking(page) == "C A"
        device = context.new_cdp_session(page)

        def touch(kind: str, x: float, y: float) -> None:
            points = [] if kind == "touchEnd" else [{"x": x, "y": y}]
            device.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        def middle(selector: str) -> tuple[float, float]:
            box = page.locator(selector).bounding_box()
            return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

        x, y = middle("#chip-3")
        touch("touchStart", x, y)
        touch("touchMove", x - 10, y - 10)
        goal = middle('[data-drop="tier 1"]')
        for step in range(1, 6):
            touch("touchMove", x + (goal[0] - x) * step / 5, y + (goal[1] - y) * step / 5)
        touch("touchEnd", *goal)
        assert ranking(page) == "C AD"
        page.locator("#chip-1").tap()
        scroll_through(page)
        page.locator("#submit").tap()
        deadline = time.monotonic() + 5
        while not judgements(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert sorted(judgements(tmp_path)[0].ranks) == [1, 2, 2, 3] and page.complaints == []


def test_by_tab_and_arrows_alone(page: Any, tmp_path: Path) -> None:
    """With single keys turned off, as a screen reader's user may want it, everything is still there."""
    with served(tmp_path, ROWS) as server:
        page.goto(server.links["me"])
        page.wait_for_selector(".answer")
        page.get_by_role("button", name="Keys").press("Enter")
        page.get_by_label("Single keys work").press("Space")
        page.get_by_role("button", name="Close").press("Enter")
        press(page, "a", "3", "z")
        assert ranking(page) == "" and page.locator(".rating input:checked").count() == 0
        page.get_by_role("group", name="Rating of answer A").get_by_label("4", exact=True).press("Space")
        page.get_by_role("group", name="Rating of answer A").get_by_label("4", exact=True).press("ArrowRight")
        assert page.locator(".rating input:checked").input_value() == "5"
        page.get_by_role("group", name="Flags of answer B").get_by_label("Harmful").press("Space")
        for name in ("B, not ranked", "A, not ranked", "D, not ranked", "C, not ranked"):
            page.get_by_role("button", name=name).press("Enter")
        page.get_by_role("button", name="D, rank 3 of 4").press("ArrowLeft")
        assert ranking(page) == "B AD C"
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "D, rank 2 of 3, tied"
        before = shown(page)
        page.get_by_role("button", name="Submit").press("Enter")
        next_item(page, before)
        assert len(judgements(tmp_path)) == 1 and page.complaints == []
