"""What became of every row of the data: kept, cut or dropped, and why. Nothing disappears without a line here."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import NamedTuple

TOKENS_PER_BOOK = 67_000  # 50,000 words at 0.75 words a token


class Decision(NamedTuple):
    """One row that is not simply kept. where: "file:line". what: "cut", "dropped" or "remarked" (kept as it is)."""

    where: str
    what: str
    reason: str


class Ledger:
    """Counts rows by file. Kept + cut + dropped = rows read, once every row is decided; `undecided` says if not.

    `where` is "file:line"; embedded data names its source in the same way.
    """

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self._counts: dict[str, collections.Counter[str]] = {}

    def read(self, where: str) -> None:
        """A row was found; it must be kept, cut or dropped later. A reader calls it, other sources need not."""
        self._count(where)["read"] += 1

    def keep(self, where: str, tokens: int = 0) -> None:
        """The row is used whole."""
        counts = self._count(where)
        counts["kept"] += 1
        counts["tokens"] += tokens

    def cut(self, where: str, reason: str, tokens: int = 0) -> None:
        """Part of the row is used. tokens: of the part that is."""
        counts = self._count(where)
        counts["cut"] += 1
        counts["tokens"] += tokens
        self.decisions.append(Decision(where, "cut", reason))

    def drop(self, where: str, reason: str) -> None:
        """The row is not used."""
        self._count(where)["dropped"] += 1
        self.decisions.append(Decision(where, "dropped", reason))

    def remark(self, where: str, reason: str) -> None:
        """Something worth knowing about a row that is used; the row is counted by `keep` or `cut`."""
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
        """Rows seen: those a reader found, and those of sources that have none."""
        return sum(max(c["read"], c["kept"] + c["cut"] + c["dropped"]) for c in self._counts.values())

    @property
    def undecided(self) -> int:
        """Rows read and neither accepted nor rejected (yet); 0 when the books balance."""
        return self.total - self.accepted - self.rejected

    @property
    def tokens(self) -> int:
        return self._sum("tokens")

    def reasons(self) -> dict[str, dict[str, int]]:
        """{"dropped": {reason: rows}, …}, the most frequent first."""
        table: dict[str, collections.Counter[str]] = {}
        for decision in self.decisions:
            table.setdefault(decision.what, collections.Counter())[decision.reason] += 1
        return {what: dict(counter.most_common()) for what, counter in table.items()}

    def to_dict(self) -> dict[str, object]:
        """Plain JSON: totals, counts by file, counts by reason, and every row cut, dropped or remarked on."""
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
        """Writes `to_dict` as JSON, one decision a line so that grep finds a row."""
        content = self.to_dict()
        rows = ",\n".join(json.dumps(decision._asdict()) for decision in self.decisions)
        head = json.dumps({**content, "rows": []}, indent=1).removesuffix('"rows": []\n}')
        partial = Path(f"{path}.partial")
        partial.write_text(f'{head}"rows": [\n{rows}\n]}}\n', encoding="utf-8")
        partial.replace(path)

    def summary(self, parameters: int | None = None) -> str:
        """A few lines for a person: rows, tokens, books of 67,000 tokens, tokens per parameter, reasons.

        Args:
          parameters: of the model that trains on the data.
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
    """A figure with so many decimals, or two digits where those would hide it."""
    return f"{value:,.{decimals}f}" if value >= 10**-decimals else f"{value:.2g}"
