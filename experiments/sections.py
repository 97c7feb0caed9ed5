"""The studies whose sections eval.py puts into a report: a new study is added here."""

from __future__ import annotations

from pathlib import Path

from experiments.arena import section as arena
from experiments.paper import section as paper
from report.section import Study


def studies(*, compare: bool = False, times: Path | None = None) -> list[Study]:
    """The arena and the paper. compare, times: eval.py's options `arena` and `times`."""
    return [arena.study(compare=compare, times=times), paper.STUDY]
