"""The notebooks run from top to bottom without a warning, and what they show is what their code gives."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.cases import case

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def said(notebook: Any) -> list[str]:
    """What the cells print."""
    streams = [
        "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    return [text for text in streams if text]


def test_the_losses_are_what_they_are_by_hand(run_notebook: Callable[[Path], Any]) -> None:
    path = ROOT / "notebooks" / "losses_by_hand.ipynb"
    assert said(run_notebook(path)) == said(nbformat.read(path, as_version=4))


def test_the_tiny_recipe_runs_and_gains(run_notebook: Callable[[Path], Any]) -> None:
    # Its last cell asserts what it shows; samples differ in the last bits between machines and are not compared.
    path = ROOT / "notebooks" / "tiny_recipe.ipynb"
    assert len(said(run_notebook(path))) == len(said(nbformat.read(path, as_version=4)))


def test_a_reward_is_hacked_without_a_penalty(run_notebook: Callable[[Path], Any]) -> None:
    # Its last cell asserts that β = 0 gets more of the proxy and less of what was meant, and that β orders the KL.
    path = ROOT / "notebooks" / "reward_hacking.ipynb"
    found = said(run_notebook(path))
    assert len(found) == len(said(nbformat.read(path, as_version=4)))
    assert found[0].endswith("proxy 4   gold 0   The fox feeds and likes and thanks and helps and\n")
    assert found[-1].count("β = ") == 4 and found[-1].count("    ") == 12


def test_a_model_makes_things_up_and_is_taught_to_say_so(run_notebook: Callable[[Path], Any]) -> None:
    path = ROOT / "notebooks" / "hallucination.ipynb"
    found = said(run_notebook(path))
    assert len(found) == len(said(nbformat.read(path, as_version=4)))
    assert found[-1].startswith("it believes its own answer, taken as an observation: 0.90\ntaken as an action: 0.25")


def test_a_notebook_holds_outputs_and_no_trace_of_a_machine() -> None:
    for path in NOTEBOOKS:
        with case(path):
            text = path.read_text(encoding="utf-8")
            assert len(text) < 150_000
            for trace in (
                r"/home/",
                r"/tmp/",
                r"/work/",
                r"/Users/",
                r"\\\\Users",
                r"site-packages",
                r"ipykernel",
                r"Warning",
            ):
                assert not re.search(trace, text), trace
            notebook = nbformat.read(path, as_version=4)
            nbformat.validate(notebook)
            assert notebook.metadata.keys() == {"kernelspec", "language_info"}
            cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
            assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run from top to bottom"
            outputs = [output for cell in cells for output in cell.outputs]
            assert all(output.output_type in ("stream", "display_data") for output in outputs)
            # Pictures are sharp on any screen.
            assert all("image/svg+xml" in output.data for output in outputs if output.output_type == "display_data")
