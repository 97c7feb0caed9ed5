"""A table that is written three times: Markdown for people, CSV for spreadsheets, JSON with the unrounded numbers."""

from __future__ import annotations

import csv
import dataclasses
import io
from dataclasses import dataclass, field
from typing import Any

from harness.report.statistics import Estimate


@dataclass(frozen=True)
class Column:
    """A heading with its unit, and how its values are shown. digits: after the point; sign: show a plus too."""

    heading: str
    digits: int = 3
    sign: bool = False

    def text(self, value: Any) -> str:
        """A value as a reader sees it; None and empty stay empty."""
        if value is None:
            return ""
        if isinstance(value, Estimate):
            return value.text(self.digits, self.sign)
        if isinstance(value, float):
            return f"{value:{'+' if self.sign else ''}.{self.digits}f}"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int):
            return f"{value:,}"
        if isinstance(value, list):
            return " ".join(str(item) for item in value)
        return str(value)


@dataclass
class Table:
    """name: of its files; columns by key; rows hold raw values under those keys; notes are printed below it."""

    name: str
    title: str
    columns: dict[str, Column]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        """Headings and rows as text. Columns without any value are left out."""
        shown = [key for key in self.columns if any(self.columns[key].text(row.get(key)) for row in self.rows)]
        head = [self.columns[key].heading for key in shown]
        return [head, *([self.columns[key].text(row.get(key)) for key in shown] for row in self.rows)]

    def markdown(self) -> str:
        """An aligned Markdown table without its title, notes below."""
        cells = [[cell.replace("|", r"\|") for cell in line] for line in self.cells()]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
        lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in self.notes)

    def csv(self) -> str:
        """The same cells as CSV."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.cells())
        return text.getvalue()

    def json(self) -> dict[str, Any]:
        """Raw values, for a program to read."""
        rows = [{key: _plain(row.get(key)) for key in self.columns} for row in self.rows]
        return {
            "title": self.title,
            "columns": {k: c.heading for k, c in self.columns.items()},
            "rows": rows,
            "notes": self.notes,
        }


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if isinstance(value, Estimate) else value
