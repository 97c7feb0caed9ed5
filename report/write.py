"""All tables, sentences and figures about some finished runs, into one folder.

    report.md       everything, to be read            report.json     everything, unrounded
    <table>.md      each table by itself              <table>.csv     the same for a spreadsheet
    <figure>.png    and .svg                          metrics/        with `metrics`: each run's evaluations, thinned

A run that can't be used is named with the reason, and the rest is reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.arena import tables as arena
from experiments.arena.plan import LEDGER, read_ledger
from experiments.arena.standings import Standing, is_arena
from experiments.paper import claims, stability
from harness.files import write_atomic
from harness.rundir import FREE_OPTIONS
from report import figures, losses
from report.recompute import Losses, usable
from report.results import Group, RunResult, find_runs, group_runs, setting
from report.tables import Column, Table


@dataclass
class Report:
    """What was found, before it is written."""

    groups: list[Group]
    complaints: list[str]
    tables: list[Table]
    sentences: list[str]
    standings: list[Standing] = field(default_factory=list)


def gather(
    folders: Sequence[Path], progress: bool = True, compare: bool = False, times: Path | None = None
) -> Report:
    """Read runs, compute their losses again, and make the tables. Raises ValueError if no run can
    be used.

    compare: also the tables of arena.py, which are made unasked where runs keep to budgets or are
    of several methods. times: of steps, for these tables, see step_times.py.
    """
    found, complaints = find_runs(folders)
    counted, recomputed, more = usable(found, progress)
    complaints += more
    tuning, runs = (
        [run for run in counted if run.tuning],
        [run for run in counted if not run.tuning],
    )
    if not runs:
        raise ValueError(
            "\n".join(
                [f"runs={[str(f) for f in folders]}: no finished run in these folders", *complaints]
            )
        )
    groups = group_runs(runs)
    compare = compare or is_arena(groups)
    tables = [
        losses.final_losses(groups, recomputed),
        losses.differences(groups, recomputed),
        stability.stability(groups),
    ]
    tables.append(run_list(groups, recomputed))
    sentences, standings = claims.claims(groups, recomputed), list[Standing]()
    if compare:
        ledgers = [
            read_ledger(file.parent) for folder in folders for file in sorted(folder.rglob(LEDGER))
        ]
        standings, first, said = arena.tables(groups, tuning, recomputed, ledgers, times)
        tables, sentences = first + tables, said + sentences
    settings = {setting(group.runs[0]) for group in groups}
    if len(settings) > 1 and not standings:
        complaints.append(
            f"The runs are of {len(settings)} settings (they differ in more than the method, see "
            "their labels); differences to exact are formed within each setting only"
        )
    return Report(
        groups, complaints, [table for table in tables if table.rows], sentences, standings
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
    pictures = {
        "Loss against bytes and seconds": figures.arena_costs(
            report.standings, out / "arena_costs"
        ),
        "Loss against the error of dW": figures.arena_quality(
            report.standings, out / "arena_quality"
        ),
        "Validation loss": figures.validation_curves(report.groups, out / "validation_loss"),
        "Loss and momentum": figures.stability_curves(report.groups, out / "stability"),
        "Quality of dW": figures.quality_curves(report.groups, out / "gradient_quality"),
    }
    pictures = {title: paths for title, paths in pictures.items() if paths}
    written = [path for paths in pictures.values() for path in paths]
    for table in report.tables:
        table.write(out / f"{table.name}.csv")
        written += [out / f"{table.name}.md", out / f"{table.name}.csv"]
    parts = ["# Report\n", f"Made by `{command}`.\n"]
    if report.sentences:
        parts += ["## What holds\n", *(f"- {sentence}" for sentence in report.sentences), ""]
    if report.complaints:
        parts += ["## Left out and noticed\n", *(f"- {line}" for line in report.complaints), ""]
    parts += [f"## {table.title}\n\n{table.markdown()}" for table in report.tables]
    parts += [f"## {title}\n\n![{title}]({paths[0].name})\n" for title, paths in pictures.items()]
    write_atomic(out / "report.md", "\n".join(parts))
    everything = {
        "command": command,
        "sentences": report.sentences,
        "complaints": report.complaints,
        "tables": {table.name: table.json() for table in report.tables},
    }
    write_atomic(out / "report.json", json.dumps(everything, indent=1, allow_nan=False) + "\n")
    written += [out / "report.md", out / "report.json"]
    if metrics:
        (out / "metrics").mkdir(exist_ok=True)
        for run in (run for group in report.groups for run in group.runs):
            path = out / "metrics" / f"{run.id}.jsonl"
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in thinned(run)))
            written.append(path)
    return written


def thinned(run: RunResult) -> list[dict[str, Any]]:
    """The run's evaluations: rows with a validation loss, without what only the machine's moment
    explains.
    """
    fleeting = ("mem/rss_bytes", "step_seconds", "tokens_per_second", "val/perplexity")
    return [
        {k: v for k, v in row.items() if k not in fleeting} for row in run.rows if "val/loss" in row
    ]
