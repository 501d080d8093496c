"""Markdown for the page: what becomes an element, what stays text, and that nothing of a text is hidden."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra ui is not installed")

from rlhf_jax.feedback.markdown import LONGEST, markdown_tree
from tests.cases import case

pytestmark = pytest.mark.feedback

PAYLOADS = json.loads((Path(__file__).parent / "script_payloads.json").read_text(encoding="utf-8"))


def html(tree: Any) -> str:
    if isinstance(tree, str):
        return tree
    if isinstance(tree, list):
        return "".join(map(html, tree))
    start = f" start={tree['start']}" if "start" in tree else ""
    return f"<{tree['tag']}{start}>{html(tree['children'])}</{tree['tag']}>"


TREES = [
    ("plain  text\n  with spaces\n\nand *one star", None),
    ("a & b < c, __dunder is not closed", None),
    ("", None),
    ("# A\n## B", "<h4>A</h4><h5>B</h5>"),
    ("*a* **b** ~~c~~\nd", "<p><em>a</em> <strong>b</strong> <s>c</s><br></br>d</p>"),
    ("3. a\n4. b", "<ol start=3><li>a</li><li>b</li></ol>"),
    ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
    ("```py\nx <b>\n```", "<pre><em>py</em>\nx <b></pre>"),
    ("`<i>` <b>x</b>", "<p><code><i></code> <b>x</b></p>"),
    ("[w](http://a.b 'title') *x*", "<p>w (http://a.b title) <em>x</em></p>"),
    ("<http://a.b>", "<p>http://a.b</p>"),
    ("![w](http://a.b)", "<p>[image: w (http://a.b)]</p>"),
    ("[w](javascript:alert(1)) *x*", "<p>[w](javascript:alert(1)) <em>x</em></p>"),
    ("[1]: http://a.b\n\n*x*", "<p>[1]: http://a.b</p><p><em>x</em></p>"),
    ("> q\n\n---", "<blockquote><p>q</p></blockquote><hr></hr>"),
    ("|a|\n|-|\n|b|", "<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>b</td></tr></tbody></table>"),
    ("|a|\n|-|\n|b|beyond the header|", None),
    ("*x* " + "y" * LONGEST, None),
]


def test_trees() -> None:
    for row in TREES:
        with case(row) as (text, expected):
            tree = markdown_tree(text)
            assert (None if tree is None else html(tree)) == expected


def test_html_is_text() -> None:
    """No payload makes another element than those of the Markdown around it."""
    for text in PAYLOADS:
        with case(text):
            tree = markdown_tree(f"**x** {text}")
            assert tree is None or {one["tag"] for one in tree} <= {"p", "pre", "h4"}
            assert tree is None or "hacked" in html(tree) or "evil" in html(tree) or "covered" in html(tree)
