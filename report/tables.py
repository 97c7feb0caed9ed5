"""A table in three forms: Markdown for people, CSV and JSON with unrounded numbers for programs.

The JSON form is complete: a table can be made from it again.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data.storage import write_atomic
from report.statistics import Estimate, p_text


@dataclass(frozen=True)
class Column:
    """A heading with its unit, and how its values are shown.

    digits: after the decimal point. sign: positive numbers have a plus. p: shown as a p-value.
    data: left out of Markdown, so for programs only.
    """

    heading: str
    digits: int = 3
    sign: bool = False
    p: bool = False
    data: bool = False

    def text(self, value: Any) -> str:
        """A value as a reader sees it; None, NaN and empty stay empty."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, Estimate):
            return "" if math.isnan(value.mean) else value.text(self.digits, self.sign)
        if isinstance(value, float):
            return p_text(value) if self.p else f"{value:{'+' if self.sign else ''}.{self.digits}f}"
        if isinstance(value, int):
            return f"{value:,}"
        if isinstance(value, list):
            return " ".join(str(item) for item in value)
        return str(value)


@dataclass
class Table:
    """name: of its files. columns: by key, in order. rows: raw values under the keys of columns; a
    key that a row lacks is an empty cell. notes: sentences printed below the table.
    """

    name: str
    title: str
    columns: dict[str, Column]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def _shown(self) -> list[str]:
        """Keys of the columns that have a value in some row."""
        return [
            key
            for key in self.columns
            if any(self.columns[key].text(row.get(key)) for row in self.rows)
        ]

    def markdown(self) -> str:
        """An aligned Markdown table without its title, notes below."""
        keys = [key for key in self._shown() if not self.columns[key].data]
        cells = [[self.columns[key].heading for key in keys]]
        cells += [[self.columns[key].text(row.get(key)) for key in keys] for row in self.rows]
        cells = [[cell.replace("|", r"\|") for cell in line] for line in cells]
        widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
        lines = [
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
            for line in cells
        ]
        lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in self.notes)

    def csv(self) -> str:
        """A column per key with unrounded numbers; an estimate takes three: <key>, <key>_half_width
        and <key>_count.
        """
        records = []
        for row in self.rows:
            record: dict[str, Any] = {}
            for key in self._shown():
                value = row.get(key)
                is_estimate = any(isinstance(other.get(key), Estimate) for other in self.rows)
                if is_estimate:
                    known = value if isinstance(value, Estimate) else None
                    record |= {
                        key: known and known.mean,
                        f"{key}_half_width": known and known.half_width,
                        f"{key}_count": known and known.count,
                    }
                else:
                    record[key] = " ".join(map(str, value)) if isinstance(value, list) else value
            records.append(record)
        text = io.StringIO()
        writer = csv.DictWriter(
            text, list(records[0]) if records else list(self.columns), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue()

    def write(self, path: Path) -> None:
        """Write `path`, a .csv, and next to it the same as Markdown; the folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, self.csv())
        write_atomic(path.with_suffix(".md"), self.markdown())

    def json(self) -> dict[str, Any]:
        """Raw values and how to show them. NaN becomes null, infinity a word, as JSON wants it."""
        rows = [{key: _plain(row.get(key)) for key in self.columns} for row in self.rows]
        columns = {key: without_defaults(column) for key, column in self.columns.items()}
        return {"title": self.title, "columns": columns, "rows": rows, "notes": self.notes}

    @classmethod
    def from_json(cls, name: str, values: Mapping[str, Any]) -> Table:
        """The inverse of json()."""
        rows = [{key: _raw(value) for key, value in row.items()} for row in values["rows"]]
        columns = {key: Column(**column) for key, column in values["columns"].items()}
        return cls(name, values["title"], columns, rows, values["notes"])


def without_defaults(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, by name: what JSON keeps."""
    every = {f.name: (getattr(value, f.name), f.default) for f in fields(value)}
    return {name: now for name, (now, default) in every.items() if now != default}


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return {name: _plain(number) for name, number in asdict(value).items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _raw(value: Any) -> Any:
    if isinstance(value, dict):
        numbers = {name: _raw(number) for name, number in value.items()}
        return Estimate(**numbers | ({"mean": math.nan} if numbers["mean"] is None else {}))
    return float(value) if value in ("inf", "-inf") else value
