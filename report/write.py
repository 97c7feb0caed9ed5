"""All tables, sentences and figures about some finished runs, in one folder.

    report.md       everything, to be read       report.json        everything, unrounded
    <table>.csv     for a spreadsheet            <figure>.svg       drawn from report.json
    metrics.jsonl.gz    with `metrics`: the evaluations of every run, its id in each row

A run that can't be used is named with the reason, and the rest is reported.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.storage import write_atomic
from harness.folder.rundir import FREE_OPTIONS
from report import figures, losses
from report.figures import Figure
from report.recompute import Losses, runs_that_count
from report.results import Group, RunResult, find_runs, group_runs, setting
from report.section import Evidence, Section, Study
from report.tables import Column, Table

METRICS = "metrics.jsonl.gz"


@dataclass
class Report:
    """What was found, before it is written. groups: the runs behind it."""

    groups: list[Group]
    complaints: list[str]
    tables: list[Table]
    sentences: list[str]
    figures: list[Figure]

    def json(self, command: str) -> dict[str, Any]:
        """Everything as report.json keeps it. command: what makes this report again."""
        return {
            "command": command,
            "sentences": self.sentences,
            "complaints": self.complaints,
            "tables": {table.name: table.json() for table in self.tables},
            "figures": [figure.json() for figure in self.figures],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Report:
        """The inverse of json(), without the runs."""
        return cls(
            groups=[],
            complaints=values["complaints"],
            tables=[Table.from_json(name, table) for name, table in values["tables"].items()],
            sentences=values["sentences"],
            figures=[Figure.from_json(figure) for figure in values["figures"]],
        )

    def markdown(self, command: str) -> str:
        """Everything as report.md shows it."""
        parts = ["# Report\n", f"Made by `{command}`.\n"]
        if self.sentences:
            parts += ["## What holds\n", *(f"- {sentence}" for sentence in self.sentences), ""]
        if self.complaints:
            parts += ["## Left out and noticed\n", *(f"- {line}" for line in self.complaints), ""]
        parts += [f"## {table.title}\n\n{table.markdown()}" for table in self.tables]
        parts += [f"## {f.title}\n\n![{f.title}]({f.name}.svg)\n" for f in self.figures]
        return "\n".join(parts)


def gather(folders: Sequence[Path], studies: Sequence[Study] = (), progress: bool = True) -> Report:
    """Read runs, compute their losses again, and make the tables, those of `studies` among them.

    Raises ValueError if no run can be used. At most one study may bring published losses.
    """
    published = next((study.published for study in studies if study.published), None)
    found, complaints = find_runs(folders)
    counted, recomputed, more = runs_that_count(found, progress, published)
    complaints += more
    tuning = [run for run in counted if run.tuning]
    runs = [run for run in counted if not run.tuning]
    if not runs:
        raise ValueError(
            "\n".join(
                [f"runs={[str(f) for f in folders]}: no finished run in these folders", *complaints]
            )
        )
    groups = group_runs(runs)
    evidence = Evidence(groups, tuning, recomputed, folders)
    sections = [study.section(evidence) for study in studies]
    own = Section(
        tables=[
            losses.final_losses(groups, recomputed, published),
            losses.differences(groups, recomputed, published),
        ],
        figures=[figures.validation_curves(groups)],
    )
    ordered = [
        *(section for section in sections if section.leads),
        own,
        *(section for section in sections if not section.leads),
        Section(tables=[run_list(groups, recomputed)]),
    ]
    settings = {setting(group.runs[0]) for group in groups}
    if len(settings) > 1 and not any(section.compares_settings for section in sections):
        complaints.append(
            f"The runs are of {len(settings)} settings (they differ in more than the method, see "
            "their labels); differences to exact are formed within each setting only"
        )
    return Report(
        groups,
        [*complaints, *(line for section in ordered for line in section.complaints)],
        [table for section in ordered for table in section.tables if table.rows],
        [sentence for section in ordered for sentence in section.sentences],
        [figure for section in ordered for figure in section.figures if figure.shows_something()],
    )


def run_list(groups: Sequence[Group], recomputed: dict[str, Losses]) -> Table:
    """Where every number comes from: a row per run with the command and the commit that made it."""
    rows = []
    for group in groups:
        for run in group.runs:
            again = recomputed.get(run.id)
            machine = run.summary.get("machine", {})
            on_gpu = run.summary.get("runtime", {}).get("device") == "cuda"
            where = (
                machine.get("gpu")
                if on_gpu
                else f"{machine.get('processor')}, {machine.get('threads')} threads"
            )
            rows.append(
                {
                    "id": run.id,
                    "method": group.label,
                    "seed": run.seed,
                    "status": run.summary["status"],
                    "steps": run.summary["step"],
                    "val": run.last("val/loss"),
                    "apart": again and abs(again.held_out - again.logged),
                    "minutes": run.summary.get("wall_seconds", math.nan) / 60,
                    "command": f"`{essential(str(run.summary.get('command')))}`",
                    "commit": run.summary.get("commit"),
                    "machine": where,
                    "torch": run.summary.get("versions", {}).get("torch"),
                }
            )
    columns = {
        "id": Column("run id"),
        "method": Column("method"),
        "seed": Column("seed"),
        "status": Column("status"),
        "steps": Column("steps"),
        "val": Column("logged val loss", digits=4),
        "apart": Column("computed again, apart by", digits=9),
        "minutes": Column("minutes", digits=1),
        "command": Column("command"),
        "commit": Column("commit"),
        "machine": Column("machine"),
        "torch": Column("torch"),
    }
    notes = ["Commands are given without options that change nothing about what is computed."]
    if any(str(row["commit"]).endswith("+") for row in rows):
        notes.append("A `+` behind a commit: tracked files differed from it.")
    return Table("runs", "Runs", columns, rows, notes)


def essential(command: str) -> str:
    """A command without the options that change nothing about what is computed (where the cache
    lies, how often is logged).
    """
    return " ".join(word for word in command.split() if not word.startswith(FREE_OPTIONS))


def write(report: Report, out: Path, *, command: str, metrics: bool = False) -> list[Path]:
    """Write everything into `out` and return the paths. command: what makes this report again."""
    out.mkdir(parents=True, exist_ok=True)
    written = [figure.draw(out) for figure in report.figures]
    for table in report.tables:
        write_atomic(out / f"{table.name}.csv", _encoded(table.csv()))
        written.append(out / f"{table.name}.csv")
    write_atomic(out / "report.md", _encoded(report.markdown(command)))
    write_atomic(out / "report.json", json_text(report.json(command)))
    written += [out / "report.md", out / "report.json"]
    if metrics:
        runs = [run for group in report.groups for run in group.runs]
        write_metrics(out / METRICS, {run.id: thinned(run) for run in runs})
        written.append(out / METRICS)
    return written


def _encoded(text: str) -> bytes:
    """As UTF-8. The name of a folder need not be: its other bytes are written as escapes."""
    return text.encode(errors="backslashreplace")


def json_text(values: Any) -> str:
    """JSON with a line for each value, but lists of numbers on one line: such a file shows what
    changed, and is a third smaller.
    """
    text = json.dumps(values, indent=1, allow_nan=False)
    number = r"(?:-?\d[\d.e+-]*|null)"
    lists = rf"\[\n\s*({number}(?:,\n\s*{number})*)\n\s*\]"
    return re.sub(lists, lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"


FLEETING = ("mem/rss_bytes", "step_seconds", "tokens_per_second", "val/perplexity")


def thinned(run: RunResult) -> list[dict[str, Any]]:
    """The run's evaluations: rows with a validation loss, without values that depend on how busy
    the machine was and without those of single layers, which are most of a row.
    """

    def kept(name: str) -> bool:
        of_a_layer = name.startswith("sketch/") and not name.startswith("sketch/all/")
        return name not in FLEETING and not of_a_layer

    return [
        {name: value for name, value in row.items() if kept(name)}
        for row in run.rows
        if "val/loss" in row
    ]


def write_metrics(path: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Rows of metrics by run id into one compressed file. Equal rows are equal bytes: gzip's header
    would else hold the time and the file's name.
    """
    lines = [json.dumps({"run": name} | row) + "\n" for name, rows in runs.items() for row in rows]
    write_atomic(path, gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0))


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The inverse of write_metrics."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        row = json.loads(line)
        runs.setdefault(row.pop("run"), []).append(row)
    return runs
