"""Record of every data row that was kept, cut or dropped, with the reason. No row disappears without an entry."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import NamedTuple

TOKENS_PER_BOOK = 67_000  # 50,000 words at 0.75 words a token


class Decision(NamedTuple):
    """A row that is not simply kept.

    where: "file:line". what: "cut", "dropped" or "remarked" (kept unchanged).
    """

    where: str
    what: str
    reason: str


class Ledger:
    """Row counts by file. Kept + cut + dropped = rows read, once every row is decided; `undecided` counts the rest.

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
    def total(self) -> int:
        """Rows seen: those counted by `read`, and those of sources that do not call it."""
        return sum(max(c["read"], c["kept"] + c["cut"] + c["dropped"]) for c in self._counts.values())

    @property
    def undecided(self) -> int:
        """Rows read but neither accepted nor rejected yet; 0 once all rows are accounted for."""
        return self.total - self.accepted - self.rejected

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
        """Returns plain JSON: totals, counts by file, counts by reason, and every row cut, dropped or remarked on."""
        names = ("read", "kept", "cut", "dropped", "remarked", "tokens")
        return {
            "total": self.total,
            "accepted": self.accepted,
            "rejected": self.rejected,
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
        partial = Path(f"{path}.partial")
        partial.write_text(f'{head}"rows": [\n{rows}\n]}}\n', encoding="utf-8")
        partial.replace(path)

    def summary(self, parameters: int | None = None) -> str:
        """Human-readable summary: rows, tokens, books of 67,000 tokens, tokens per parameter, reasons.

        Args:
          parameters: number of parameters of the model that trains on the data.
        """
        rows = f"{self.total:,} rows: {self._sum('kept'):,} kept, {self._sum('cut'):,} cut, {self.rejected:,} dropped"
        if self.undecided:
            rows += f", {self.undecided:,} undecided"
        tokens = f"{self.tokens:,} tokens, as many as in {_short(self.tokens / TOKENS_PER_BOOK, 1)} books"
        if parameters is not None:
            tokens += f", {_short(self.tokens / parameters, 2)} for each of {parameters:,} parameters"
        lines = [rows, tokens]
        for what, reasons in self.reasons().items():
            lines += [f"  {what} {count:,}: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)

    def _count(self, where: str) -> collections.Counter[str]:
        source = where.rpartition(":")[0] or where
        return self._counts.setdefault(source, collections.Counter())

    def _sum(self, name: str) -> int:
        return sum(counts[name] for counts in self._counts.values())


def _short(value: float, decimals: int) -> str:
    """Formats a number with the given decimals, or with two significant digits if those would round it away."""
    return f"{value:,.{decimals}f}" if value >= 10**-decimals else f"{value:.2g}"
