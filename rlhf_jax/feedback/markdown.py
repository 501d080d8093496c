"""Markdown as a tree of plain JSON, from which the page builds elements one by one; no HTML is written anywhere.

HTML in a text stays text, and nothing in a text is fetched or can be followed: a link shows its address, an image its
description and address.
"""

from __future__ import annotations

import functools
import html
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

LONGEST = 30_000
"""Characters; a longer text is shown as it was written."""
Tree = list[Any]  # texts and {"tag", "children"}

_TAGS = {
    "paragraph": "p",
    "bullet_list": "ul",
    "ordered_list": "ol",
    "list_item": "li",
    "hardbreak": "br",
    "softbreak": "br",
} | {name: name for name in ("blockquote", "hr", "table", "thead", "tbody", "tr", "th", "td", "strong", "em", "s")}


@functools.lru_cache(maxsize=512)
def markdown_tree(text: str) -> Tree | None:
    """Parse a text; None if it has no Markdown in it, so that its spaces and line breaks can be kept as they are."""
    if len(text) > LONGEST:
        return None
    root = SyntaxTreeNode(_parser().parse(text))
    if all(node.type in ("root", "paragraph", "inline", "text", "softbreak") for node in root.walk()):
        return None
    tree = _children(root)
    # A table drops cells beyond its header's. What would hide a letter is shown as it was written.
    return None if _letters(tree) < sum(map(str.isalpha, html.unescape(text))) else tree


@functools.cache
def _parser() -> MarkdownIt:
    # Definitions of references show nothing, so they stay text.
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("reference")


def _letters(tree: Tree) -> int:
    return sum(sum(map(str.isalpha, one)) if isinstance(one, str) else _letters(one["children"]) for one in tree)


def _children(node: SyntaxTreeNode) -> Tree:
    return [part for child in node.children for part in _parts(child)]


def _parts(node: SyntaxTreeNode) -> Tree:
    match node.type:
        case "text":
            return [node.content]
        case "inline":
            return _children(node)
        case "paragraph" if node.hidden:  # in a list without blank lines
            return _children(node)
        case "heading":  # the page's own headings end at the third level
            return [{"tag": f"h{min(int(node.tag[1]) + 3, 6)}", "children": _children(node)}]
        case "code_inline":
            return [{"tag": "code", "children": [node.content]}]
        case "fence" | "code_block":
            language = [{"tag": "em", "children": [node.info.strip()]}, "\n"] if node.info.strip() else []
            return [{"tag": "pre", "children": [*language, node.content.removesuffix("\n")]}]
        case "link":
            words, address = _children(node), _address(node, "href")
            return words if words == [address] else [*words, f" ({address})"]
        case "image":
            return [f"[image: {node.content} ({_address(node, 'src')})]"]
        case "ordered_list":
            return [{"tag": "ol", "start": node.attrs.get("start", 1), "children": _children(node)}]
    return [{"tag": _TAGS[node.type], "children": _children(node)}]


def _address(node: SyntaxTreeNode, attribute: str) -> str:
    return " ".join(str(node.attrs[name]) for name in (attribute, "title") if name in node.attrs)
