"""Record of every data row that was kept, cut, dropped or held out, with the reason. No row goes without an entry."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.files import write_file

TOKENS_PER_BOOK = 67_000  # 50,000 words at 0.75 words a token


class Decision(NamedTuple):
    """A row that is not simply kept.

    where: "file:line". what: "cut", "dropped", "held out" or "remarked" (kept unchanged).
    """

    where: str
    what: str
    reason: str


class Ledger:
    """Row counts by file. Kept + cut + dropped + held out = rows read, once all are decided; `undecided` are the rest.

    `where` is "file:line"; embedded data names its source in the same way.
    """

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self._counts: dict[str, collections.Counter[str]] = {}

    def read(self, where: str) -> None:
        """Counts a row read, to be kept, cut or dropped later. Called by readers; optional for other sources."""
        self._count(where)["read"] += 1

    def keep(self, where: str, tokens: int = 0) -> None:
        """Records a row that is used in full."""
        counts = self._count(where)
        counts["kept"] += 1
        counts["tokens"] += tokens

    def cut(self, where: str, reason: str, tokens: int = 0) -> None:
        """Records a row of which only a part is used.

        Args:
          tokens: number of tokens in the part used.
        """
        counts = self._count(where)
        counts["cut"] += 1
        counts["tokens"] += tokens
        self.decisions.append(Decision(where, "cut", reason))

    def drop(self, where: str, reason: str) -> None:
        """Records a row that is not used."""
        self._count(where)["dropped"] += 1
        self.decisions.append(Decision(where, "dropped", reason))

    def hold_out(self, where: str, reason: str, kept_tokens: int | None = None) -> None:
        """Records a row that is evaluated on instead of trained on.

        Args:
          kept_tokens: number of tokens that `keep` has counted for this row before, which no longer count; None if the
            row was not counted yet.
        """
        counts = self._count(where)
        counts["held_out"] += 1
        if kept_tokens is not None:
            counts["kept"] -= 1
            counts["tokens"] -= kept_tokens
        self.decisions.append(Decision(where, "held out", reason))

    def remark(self, where: str, reason: str) -> None:
        """Records a note about a row that is used; the row itself is counted by `keep` or `cut`."""
        self._count(where)["remarked"] += 1
        self.decisions.append(Decision(where, "remarked", reason))

    @property
    def accepted(self) -> int:
        return self._sum("kept") + self._sum("cut")

    @property
    def rejected(self) -> int:
        return self._sum("dropped")

    @property
    def held_out(self) -> int:
        return self._sum("held_out")

    @property
    def total(self) -> int:
        """Rows seen: those counted by `read`, and those of sources that do not call it."""
        names = ("kept", "cut", "dropped", "held_out")
        return sum(max(c["read"], sum(c[name] for name in names)) for c in self._counts.values())

    @property
    def undecided(self) -> int:
        """Rows read but not accepted, rejected or held out yet; 0 once all rows are accounted for."""
        return self.total - self.accepted - self.rejected - self.held_out

    @property
    def tokens(self) -> int:
        return self._sum("tokens")

    def reasons(self) -> dict[str, dict[str, int]]:
        """Returns {"dropped": {reason: rows}, …}, most frequent first."""
        table: dict[str, collections.Counter[str]] = {}
        for decision in self.decisions:
            table.setdefault(decision.what, collections.Counter())[decision.reason] += 1
        return {what: dict(counter.most_common()) for what, counter in table.items()}

    def to_dict(self) -> dict[str, object]:
        """Returns plain JSON: totals, counts by file, counts by reason, and every row not simply kept."""
        names = ("read", "kept", "cut", "dropped", "held_out", "remarked", "tokens")
        return {
            "total": self.total,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "held_out": self.held_out,
            "undecided": self.undecided,
            "tokens": self.tokens,
            "books": self.tokens / TOKENS_PER_BOOK,
            "files": {file: {name: counts[name] for name in names} for file, counts in self._counts.items()},
            "reasons": self.reasons(),
            "rows": [decision._asdict() for decision in self.decisions],
        }

    def save(self, path: str | Path) -> None:
        """Writes `to_dict` as JSON, one decision per line so that grep finds a row."""
        content = self.to_dict()
        rows = ",\n".join(json.dumps(decision._asdict()) for decision in self.decisions)
        head = json.dumps({**content, "rows": []}, indent=1).removesuffix('"rows": []\n}')
        write_file(Path(path), f'{head}"rows": [\n{rows}\n]}}\n')

    def summary(self, parameters: int | None = None) -> str:
        """Human-readable summary: rows, tokens, books of 67,000 tokens, tokens per parameter, reasons.

        Args:
          parameters: number of parameters of the model that trains on the data.
        """
        tokens = f"{self.tokens:,} tokens, as many as in {_short(self.tokens / TOKENS_PER_BOOK, 1)} books"
        if parameters is not None:
            tokens += f", {_short(self.tokens / parameters, 2)} for each of {parameters:,} parameters"
        rows, *reasons = self.counts().split("\n")
        return "\n".join([rows, tokens, *reasons])

    def counts(self) -> str:
        """Human-readable counts: rows, and the rows of each reason with the first of them."""
        rows = f"{self.total:,} rows: {self._sum('kept'):,} kept, {self._sum('cut'):,} cut, {self.rejected:,} dropped"
        if self.held_out:
            rows += f", {self.held_out:,} held out"
        if self.undecided:
            rows += f", {self.undecided:,} undecided"
        first: dict[tuple[str, str], str] = {}
        for where, what, reason in self.decisions:
            first.setdefault((what, reason), where)
        lines = [rows]
        for what, reasons in self.reasons().items():
            for reason, count in reasons.items():
                where = first[what, reason]
                lines.append(f"  {what} {count:,}: {reason}" + (f" (first at {where})" if where else ""))
        return "\n".join(lines)

    def _count(self, where: str) -> collections.Counter[str]:
        source = where.rpartition(":")[0] or where
        return self._counts.setdefault(source, collections.Counter())

    def _sum(self, name: str) -> int:
        return sum(counts[name] for counts in self._counts.values())


def _short(value: float, decimals: int) -> str:
    """Formats a number with the given decimals, or with two significant digits if those would round it away."""
    return f"{value:,.{decimals}f}" if value >= 10**-decimals else f"{value:.2g}"
