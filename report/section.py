"""What a study adds to a report: tables, sentences and figures.

report/ knows no study. eval.py gives `write.gather` a list of them, and the report puts their
sections next to its own tables. A whole study, in ten lines:

    def section(found: Evidence) -> Section:
        rows = [{"method": g.label, "seeds": len(g.runs)} for g in found.groups]
        columns = {"method": Column("method"), "seeds": Column("seeds")}
        return Section(
            tables=[Table("seeds", "Seeds", columns, rows)],
            sentences=[f"There are {len(rows)} groups."],
            figures=[validation_curves(found.groups)],
        )

    report = write.gather(folders, [Study(section)])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from report.figures import Figure
from report.published import Published
from report.recompute import Losses
from report.results import Group, RunResult
from report.tables import Table


@dataclass(frozen=True)
class Evidence:
    """What the given folders hold, for a study to look at.

    groups: of runs that differ in their seed alone; tuning: runs that only chose a learning rate
    and enter no average; losses: by run id, of all runs that did not diverge; folders: as given.
    """

    groups: Sequence[Group]
    tuning: Sequence[RunResult]
    losses: Mapping[str, Losses]
    folders: Sequence[Path]


@dataclass(frozen=True)
class Section:
    """What a study found. Tables without rows and figures without lines are left out.

    leads: it stands before the report's own tables and figures instead of after them.
    compares_settings: it compares runs that differ in more than their method, so the report need
    not warn that there are several settings.
    """

    tables: Sequence[Table] = ()
    sentences: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    complaints: Sequence[str] = ()
    leads: bool = False
    compares_settings: bool = False


@dataclass(frozen=True)
class Study:
    """A study as eval.py hands it in. published: a publication's losses, next to ours."""

    section: Callable[[Evidence], Section]
    published: Published | None = None
