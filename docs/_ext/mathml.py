"""Equations as MathML, which browsers draw themselves: no script, no font, nothing to fetch."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

# Browsers leave no space between the name of a function and an argument without parentheses.
APPLIED = re.compile(r"(<mo>&ApplyFunction;</mo>)(?!\s*<mo[^>]*>\()")
# The converter reads the argument of \frac as one number: \frac12 would be 12 over what follows.
BARE_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)")


def convert(tex: str, *, block: bool) -> str:
    """MathML of an equation in TeX."""
    found = tex2mathml(BARE_FRACTION.sub(r"\\frac{\1}{\2}", tex), as_block=block)
    return APPLIED.sub(r'\1<mspace width="0.17em"></mspace>', found)


def inline(self: Any, node: nodes.math) -> None:
    """Write an equation within a line."""
    self.body.append(convert(node.astext(), block=False))
    raise nodes.SkipNode


def block(self: Any, node: nodes.math_block) -> None:
    """Write an equation on a line of its own."""
    self.body.append(f'<div class="math">{convert(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
