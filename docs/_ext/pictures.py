"""Draws docs/pictures/*.svg: python docs/_ext/pictures.py

Colours are of episodes, not of meaning; each has its number too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "pictures"
COLOURS = ("#bcd7f0", "#f6d6a8", "#c9e4c5", "#eac6dd", "#d9d2ee", "#f3c1b8", "#c6e6e6", "#e6e0b0")
PADDING = "#ffffff"
CELL, ROW = 20, 26  # width of a token, height of a row, in pixels


class Drawing:
    """An SVG picture, built up shape by shape."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="sans-serif" font-size="13">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> None:
        """Write a line of text."""
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{text}</text>')

    def box(self, x: float, y: float, width: float, height: float, fill: str, label: str = "") -> None:
        """Draw a box with a label in its middle."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="#5b6470" rx="2"/>'
        )
        for number, line in enumerate(lines := label.split("\n") if label else []):
            self.text(x + width / 2, y + height / 2 + 4.5 + 16 * (number - (len(lines) - 1) / 2), line, anchor="middle")

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw a line through points with a head at the last one, which it reaches from the left or from above."""
        path = " ".join(f"{x},{y}" for x, y in points)
        (x0, _), (x, y) = points[-2:]
        head = f"{x - 7},{y - 4} {x},{y} {x - 7},{y + 4}" if x0 < x else f"{x - 4},{y - 7} {x},{y} {x + 4},{y - 7}"
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="#5b6470"/>')
        self.parts.append(f'<polygon points="{head}" fill="#5b6470"/>')

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text("\n".join([*self.parts, "</svg>", ""]), encoding="utf-8")


def first_fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Rows of episode numbers, each episode in the first row with room for it."""
    rows: list[list[int]] = []
    for episode, length in enumerate(lengths):
        fits = [row for row in rows if sum(lengths[e] for e in row) + length <= limit]
        if fits:
            fits[0].append(episode)
        else:
            rows.append([episode])
    return rows


def packing(folder: Path) -> None:
    """Padded rows beside packed ones."""
    lengths, limit = (5, 11, 4, 7, 12, 3, 6, 8), 14
    picture = Drawing(720, 300, "Padded and packed rows")
    for left, title, rows in (
        (20, "padded: one episode per row", [[e] for e in range(len(lengths))]),
        (400, "packed: the same episodes, end to end", first_fit(lengths, limit)),
    ):
        picture.text(left, 24, title, weight="bold")
        for number, row in enumerate(rows):
            y, x = 40 + ROW * number, left
            picture.box(x, y, CELL * limit, ROW - 4, PADDING)
            for episode in row:
                picture.box(x, y, CELL * lengths[episode], ROW - 4, COLOURS[episode], str(episode + 1))
                x += CELL * lengths[episode]
        share = sum(lengths) / (limit * len(rows))
        picture.text(left, 54 + ROW * len(rows), f"{len(rows)} rows, {share:.0%} of the computed tokens are real")
    picture.save(folder / "packing.svg")


def batching(folder: Path) -> None:
    """Sampling in batches beside sampling in slots."""
    lengths, slots = (4, 9, 3, 12, 5, 7, 4, 6), 3
    picture = Drawing(720, 290, "Sampling in batches and in slots")
    waves: list[list[tuple[int, int]]] = [[] for _ in range(slots)]
    end = 0
    for first in range(0, len(lengths), slots):
        wave = range(first, min(first + slots, len(lengths)))
        for slot, episode in enumerate(wave):
            waves[slot].append((end, episode))
        end += max(lengths[e] for e in wave)
    free, continuous = [0] * slots, [[] for _ in range(slots)]  # type: ignore[var-annotated]
    for episode, length in enumerate(lengths):
        slot = free.index(min(free))
        continuous[slot].append((free[slot], episode))
        free[slot] += length
    for top, title, plan, steps in (
        (0, "in batches: all wait for the longest", waves, end),
        (140, "in slots: the next prompt follows a row that has ended", continuous, max(free)),
    ):
        picture.text(60, top + 24, title, weight="bold")
        for slot, row in enumerate(plan):
            y = top + 36 + ROW * slot
            picture.text(50, y + 16, f"slot {slot + 1}", anchor="end")
            picture.box(60, y, CELL * steps, ROW - 4, PADDING)
            for start, episode in row:
                picture.box(60 + CELL * start, y, CELL * lengths[episode], ROW - 4, COLOURS[episode], str(episode + 1))
        picture.text(60, top + 50 + ROW * slots, f"{steps} steps of the model for 8 responses; time runs to the right")
    picture.save(folder / "batching.svg")


def recipe(folder: Path) -> None:
    """The four stages."""
    picture = Drawing(720, 330, "The recipe: pretraining, fine-tuning, reward model, PPO")
    data, model, people = "#ffffff", COLOURS[0], COLOURS[1]
    picture.box(20, 20, 130, 40, data, "text")
    picture.box(20, 110, 130, 40, data, "demonstrations")
    picture.box(20, 270, 130, 40, data, "prompts")
    picture.box(230, 20, 180, 40, model, "1  pretrained model")
    picture.box(230, 110, 180, 40, model, "2  fine-tuned model")
    picture.box(490, 110, 210, 40, people, "people rank its samples")
    picture.box(490, 190, 210, 40, model, "3.1  reward model r")
    picture.box(230, 270, 180, 40, model, "3.2  PPO")
    picture.box(570, 270, 130, 40, model, "aligned model")
    picture.arrow((150, 40), (230, 40))
    picture.arrow((150, 130), (230, 130))
    picture.arrow((150, 290), (230, 290))
    picture.arrow((320, 60), (320, 110))
    picture.arrow((320, 150), (320, 270))
    picture.arrow((410, 130), (490, 130))
    picture.arrow((595, 150), (595, 190))
    picture.arrow((490, 210), (385, 210), (385, 270))
    picture.arrow((410, 290), (570, 290))
    picture.text(425, 45, "−log p(next token)")
    picture.text(332, 174, "start, and reference")
    picture.text(600, 175, "−log σ(r_w − r_l)")
    picture.text(490, 282, "r − β·KL", anchor="middle")
    picture.save(folder / "recipe.svg")


def draw(folder: Path) -> None:
    """Draw all pictures into a folder."""
    for picture in (packing, batching, recipe):
        picture(folder)


if __name__ == "__main__":
    draw(FOLDER)
