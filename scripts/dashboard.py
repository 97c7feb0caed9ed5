"""Make a wandb workspace and a report that show a sweep of this project: losses, stability, quality
of dW, bytes.

    python scripts/dashboard.py --entity me --project basis  # save both, print their addresses
    python scripts/dashboard.py --entity me --project basis --dry-run  # print them only

Runs are told apart by the options of `GROUP_BY`; what else differs is the seed, which is averaged,
the shade being the standard error. Needs `pip install wandb-workspaces` (the extra "dashboard").
Without an account: `python eval.py runs=...` draws the same curves.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

GROUP_BY = (
    "experiment_name",
    "method.name",
    "method.rank",
    "method.hashing",
    "method.invariant_scalars",
    "optim.lr",
    "steps",
)


@dataclass(frozen=True)
class Curve:
    """A metric against steps; log: logarithmic y axis; bar: a number known at the start, as a bar
    per method instead.
    """

    title: str
    metric: str
    unit: str
    log: bool = False
    bar: bool = False


SECTIONS: dict[str, tuple[Curve, ...]] = {
    "Loss": (
        Curve("Validation loss", "val/loss", "nats per token"),
        Curve("Training loss", "train/loss", "nats per token"),
    ),
    "Stability": (
        Curve("Norm of the gradient", "grad_norm", "2-norm", log=True),
        Curve("Norm of the momentum", "momentum_norm", "2-norm", log=True),
    ),
    "Quality of dW (diagnostics.every)": (
        Curve("Cosine of sketched to exact dW", "sketch/all/cosine", "cosine"),
        Curve("Norm of sketched / exact dW", "sketch/all/norm_ratio", "ratio", log=True),
        Curve("Relative error of dW", "sketch/all/relative_error", "ratio", log=True),
    ),
    "Attention (attention=sus, diagnostics.every)": (
        Curve("Entries kept of a row, expected", "sus/all/kept_entries", "entries"),
        Curve("Part of the causal triangle kept", "sus/all/kept_share", "ratio"),
    ),
    "Layers (diagnostics.monitor)": (
        Curve("Norm of the head's gradient", "monitor/head/gradient_norm", "2-norm", log=True),
        Curve("Stable rank of the head's input", "monitor/head/stable_rank", "rank"),
    ),
    "Rank (adaptive_rank.every)": (
        Curve("Rank", "rank/estimator", "rank"),
        Curve("Error of reconstructed inputs", "rank/error", "ratio"),
    ),
    "Cost": (
        Curve("Time of a step", "step_seconds", "seconds"),
        Curve("Kept for backward", "mem/saved_bytes", "bytes", bar=True),
    ),
}


def panel(curve: Curve) -> wr.LinePlot | wr.BarPlot:
    """One panel, seeds averaged."""
    import wandb_workspaces.reports.v2 as wr

    if curve.bar:
        return wr.BarPlot(
            title=curve.title,
            metrics=[curve.metric],
            title_x=curve.unit,
            aggregate=True,
            max_runs_to_show=100,
        )
    return wr.LinePlot(
        title=curve.title,
        x="step",
        y=[curve.metric],
        title_x="step",
        title_y=curve.unit,
        log_y=curve.log,
        aggregate=True,
        groupby_aggfunc="mean",
        groupby_rangefunc="stderr",
        max_runs_to_show=100,
    )


def workspace(entity: str, project: str) -> ws.Workspace:
    """The project's view: all sections open, runs grouped by `GROUP_BY`."""
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name="BASIS: loss, stability, bytes",
        sections=[
            ws.Section(name=name, panels=[panel(curve) for curve in curves], is_open=True)
            for name, curves in SECTIONS.items()
        ],
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=100),
        runset_settings=ws.RunsetSettings(groupby=[ws.Config(key) for key in GROUP_BY]),
    )


def report(entity: str, project: str) -> wr.Report:
    """The same panels as a document with a heading for each section."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [
        wr.P(
            "Runs that differ in their seed alone are averaged; the shade is the standard error "
            "over seeds."
        ),
        wr.LatexBlock(r"\hat{dW} = (1-\lambda)^2\,\widehat{SdY}^{\top}\widehat{SX}"),
    ]
    runset = wr.Runset(
        entity=entity, project=project, groupby=[f"config.{key}" for key in GROUP_BY]
    )
    for name, curves in SECTIONS.items():
        blocks += [
            wr.H2(name),
            wr.PanelGrid(runsets=[runset], panels=[panel(curve) for curve in curves]),
        ]
    return wr.Report(
        entity=entity, project=project, title="BASIS: what a sketch of X costs", blocks=blocks
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entity", required=True, help="user or team in wandb")
    parser.add_argument("--project", default="basis")
    parser.add_argument("--dry-run", action="store_true", help="build and print, save nothing")
    options = parser.parse_args(argv)
    try:
        views = workspace(options.entity, options.project), report(options.entity, options.project)
    except ImportError:
        print(
            "dashboard: wandb-workspaces is not installed; pip install wandb-workspaces",
            file=sys.stderr,
        )
        return 1
    for view in views:
        if options.dry_run:
            print(view)
            continue
        view.save()
        print(view.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
