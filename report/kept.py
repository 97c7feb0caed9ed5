"""What results/ keeps, and that it is what its numbers say.

    python scripts/results.py                   # rebuild everything into runs/results, and compare
    python scripts/results.py --tidy            # first remove what can be rebuilt

Of a study, results/ keeps each number once: README.md (what, how made, what follows), and

- of runs (eval.py with metrics=true): report.json, metrics.jsonl.gz and an .svg per figure;
- of other programs: a .csv per table and an .svg per figure.

From these this program writes report.md, tables as .csv and Markdown, and figures into --out, and
checks that

- each figure drawn again from report.json is the committed one, byte for byte;
- final losses in report.json are the means of the last losses in metrics.jsonl.gz;
- nothing else lies in results/.

A figure that another version of matplotlib drew is not compared, since versions place things
differently. Exit codes: 0 all as committed, 1 something differs (the message says what).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from data.storage import write_atomic
from report.statistics import Estimate, estimate
from report.tables import Column, Table
from report.write import METRICS, Report, read_metrics

REPORT = "report.json"
KEPT = {".csv", ".svg"}
TOLERANCE = 1e-6  # of losses in nats; a loss computed again may differ from the log by as much


def superfluous(folder: Path) -> list[Path]:
    """Files below `folder` that can be rebuilt from what is kept, or are not of a kept kind."""

    def needed(path: Path) -> bool:
        if path.name == "README.md":
            return True
        if (path.parent / REPORT).exists():
            return path.suffix == ".svg" or path.name in (REPORT, METRICS)
        return path.suffix in KEPT

    return sorted(path for path in folder.rglob("*") if path.is_file() and not needed(path))


def rebuild(folder: Path, out: Path) -> list[str]:
    """Write tables and figures of all folders in `folder` into `out`. Returns one sentence for each
    thing that is not as `folder` has it.
    """
    complaints = [f"{path} can be rebuilt, or is no result" for path in superfluous(folder)]
    for path in sorted(folder.rglob(REPORT)):
        complaints += _rebuild_report(path.parent, out / path.parent.relative_to(folder))
    for path in sorted(folder.rglob("*.csv")):
        if not (path.parent / REPORT).exists():
            into = out / path.relative_to(folder).with_suffix(".md")
            into.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(into, read_csv(path).markdown())
    return complaints


def _rebuild_report(folder: Path, out: Path) -> Iterator[str]:
    """One report and its complaints."""
    values = json.loads((folder / REPORT).read_text())
    report = Report.from_json(values)
    if report.json(values["command"]) != values:
        yield f"{folder / REPORT} is not as this version writes it"
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "report.md", report.markdown(values["command"]))
    for table in report.tables:
        write_atomic(out / f"{table.name}.csv", table.csv())
    drawn = {figure.draw(out).name for figure in report.figures}
    for path in sorted({*drawn, *(path.name for path in folder.glob("*.svg"))}):
        yield from _compare(folder / path, out / path)
    if (folder / METRICS).exists():
        rows = read_metrics(folder / METRICS)
        last = {name: run[-1]["val/loss"] for name, run in rows.items()}
        for table in report.tables:
            if table.name == "final_losses":
                yield from _other_losses(folder, table, last)


def _compare(committed: Path, drawn: Path) -> Iterator[str]:
    """A figure that is missing, has no source, or differs."""
    if not committed.exists() or not drawn.exists():
        yield f"{committed} {'is missing' if drawn.exists() else f'is no figure of {REPORT}'}"
        return
    old, new = committed.read_text(), drawn.read_text()
    if _version(old) == _version(new) and old != new:
        yield f"{committed} is not what {REPORT} draws"


def _version(svg: str) -> str:
    found = re.search(r"Matplotlib v[\d.]+", svg)
    return found[0] if found else ""


def _other_losses(folder: Path, table: Table, last: dict[str, float]) -> Iterator[str]:
    """Rows whose loss is not the mean of their runs' last losses."""
    for row in table.rows:
        if not isinstance(row.get("val"), Estimate):
            continue  # a run of the group diverged
        if missing := [name for name in row["runs"] if name not in last]:
            yield f"{folder / METRICS} lacks {' '.join(missing)}, runs of {row['method']}"
            continue
        found = estimate([last[name] for name in row["runs"]])
        pairs = [(found.mean, row["val"].mean), (found.half_width, row["val"].half_width)]
        # The t quantile of few seeds enlarges an interval's share of the tolerance.
        if not all(
            a == b or (a is not None and b is not None and math.isclose(a, b, abs_tol=t))
            for (a, b), t in zip(pairs, (TOLERANCE, 20 * TOLERANCE), strict=True)
        ):
            yield (
                f"{folder / REPORT}: val of {row['method']} is {row['val'].text(6)}, and the runs' "
                f"last losses come to {found.text(6)}"
            )


def read_csv(path: Path) -> Table:
    """A table whose cells are shown as they are, numbers to six digits."""
    with path.open(newline="") as file:
        rows = [{key: _shown(cell) for key, cell in row.items()} for row in csv.DictReader(file)]
    return Table(path.stem, path.stem, {key: Column(key) for row in rows[:1] for key in row}, rows)


def _shown(cell: str) -> str:
    return f"{float(cell):.6g}" if re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", cell) else cell


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("results"), help="default: results")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/results"), help="default: runs/results"
    )
    parser.add_argument("--tidy", action="store_true", help="remove what can be rebuilt")
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        parser.error(f"--folder {options.folder}: no such folder")
    if options.tidy:
        for path in superfluous(options.folder):
            path.unlink()
            print(f"removed {path}")
    complaints = rebuild(options.folder, options.out)
    for line in complaints:
        print(line, file=sys.stderr)
    print(f"Rebuilt from {options.folder} into {options.out}: {len(complaints)} differences.")
    return 1 if complaints else 0
