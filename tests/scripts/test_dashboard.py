"""The wandb sweep file through wandb's own argument code, and workspace and report as
wandb-workspaces builds them.
"""

import itertools
import json
import warnings
from pathlib import Path

import pytest
import yaml
from composed import composed
from tiny import REPOSITORY, losses, train_here

from harness.compose import load


def test_sweep_file_expands_to_the_papers_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((REPOSITORY / "scripts" / "sweep_paper.yaml").read_text())
    grid = {
        name: spec.get("values", [spec.get("value")]) for name, spec in sweep["parameters"].items()
    }
    cells = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    assert len(cells) == 6 * 3
    seen = set()
    for cell in cells:
        arguments = create_sweep_command_args(
            {"args": {name: {"value": value} for name, value in cell.items()}}
        )
        words = []
        for word in create_sweep_command(list(sweep["command"])):
            words += arguments["args_no_hyphens"] if word == "${args_no_hyphens}" else [word]
        assert words[:3] == ["${env}", "python", "${program}"]
        config = load(composed(*words[3:]))
        assert (config.steps, config.micro_batch_size, config.optim.lr, config.optim.momentum) == (
            50_000,
            1,
            0.01,
            0.9,
        )
        assert (config.tracker.mode, config.eval.every, config.data.order) == (
            "online",
            1000,
            "paper",
        )
        seen.add((config.method.name, config.method.own_options().get("rank"), config.seed))
    assert seen == {
        (m, r, s)
        for m, r in [("exact", None), *(("basis", r) for r in (64, 32, 16, 8, 1))]
        for s in range(3)
    }


def test_experiment_and_sweep_file_have_the_same_rows() -> None:
    sweep = yaml.safe_load((REPOSITORY / "scripts" / "sweep_paper.yaml").read_text())
    experiment = yaml.safe_load((REPOSITORY / "conf" / "experiment" / "paper.yaml").read_text())
    assert (
        experiment["hydra"]["sweeper"]["params"]["row"].split(",")
        == sweep["parameters"]["row"]["values"]
    )


@pytest.fixture
def dashboard():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # wandb-workspaces uses what pydantic has deprecated
        pytest.importorskip("wandb_workspaces.workspaces")
        from scripts import dashboard

        yield dashboard


def test_workspace_draws_metrics_that_runs_log_grouped(
    dashboard, data: Path, tmp_path: Path
) -> None:
    looks = ["diagnostics.every=10", "diagnostics.monitor=true", "adaptive_rank.every=10"]
    train_here(data, tmp_path / "run", "attention=sus", "method=low_rank", "method.rank=2", *looks)
    logged = {name for row in losses(tmp_path / "run") for name in row} | {"step_seconds"}
    workspace = dashboard.workspace("me", "basis")
    model = json.loads(workspace._to_model().model_dump_json(by_alias=True))
    text = json.dumps(model)
    for key in (
        "experiment_name.value",
        "method.value.name",
        "method.value.rank",
        "optim.value.lr",
    ):
        assert f'{{"section": "config", "name": "{key}"}}' in text
    curves = [curve for section in dashboard.SECTIONS.values() for curve in section]
    for curve in curves:
        assert curve.metric in logged, curve
        assert f'"{curve.metric}"' in text
    assert [section.is_open for section in workspace.sections] == [True] * len(dashboard.SECTIONS)


def test_report_holds_every_section(dashboard) -> None:
    report = dashboard.report("me", "basis")
    headings = [block.text for block in report.blocks if type(block).__name__ == "H2"]
    assert headings == list(dashboard.SECTIONS)
    grids = [block for block in report.blocks if type(block).__name__ == "PanelGrid"]
    assert all(
        grid.runsets[0].groupby == [f"config.{key}" for key in dashboard.GROUP_BY] for grid in grids
    )
    assert [len(grid.panels) for grid in grids] == [
        len(curves) for curves in dashboard.SECTIONS.values()
    ]


def test_command_line_builds_without_a_network(
    dashboard, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dashboard.main(["--entity", "me", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("Workspace(entity='me', project='basis'")
