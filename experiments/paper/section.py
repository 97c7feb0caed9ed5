"""What the paper adds to a report: its losses next to ours, stability, and its claims judged."""

from __future__ import annotations

from experiments.paper.claims import claims
from experiments.paper.published import PUBLISHED
from experiments.paper.stability import quality_curves, stability, stability_curves
from report.section import Evidence, Section, Study


def section(found: Evidence) -> Section:
    """Sentences only about those claims for which there are runs."""
    return Section(
        tables=[stability(found.groups)],
        sentences=claims(found.groups, found.losses),
        figures=[stability_curves(found.groups), quality_curves(found.groups)],
    )


STUDY = Study(section, PUBLISHED)
