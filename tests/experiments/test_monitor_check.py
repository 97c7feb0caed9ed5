"""The check of the monitor: its true values against autograd's, its files, and what it refuses."""

import csv
from pathlib import Path

import pytest
import torch
from tiny import MODEL, overrides
from torch import nn

from experiments.monitor import check as monitor_check


def test_true_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 1))
    x, state = torch.randn(10, 4), torch.get_rng_state()
    found = monitor_check.true_values(model, lambda: model(x).square().sum())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    model(x).square().sum().backward()
    assert list(found) == ["0", "2"]
    first = found["0"]
    assert first["gradient_norm"] == pytest.approx(float(model[0].weight.grad.norm()), rel=1e-6)
    singular = torch.linalg.svdvals(x.double())
    assert first["activation_energy"] == pytest.approx(float(singular.square().sum()))
    assert first["stable_rank"] == pytest.approx(float(singular.square().sum() / singular[0] ** 2))


def tiny_text(folder: Path) -> list[str]:
    quick = ["optim.warmup_steps=0", "optim.lr=1e-2", "micro_batch_size=4"]
    return [word for word in overrides(folder) if word.startswith("data")] + MODEL + quick


def test_readings_tables_and_figure(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *tiny_text(data),
        "steps=9",
        "--probes",
        "2",
        "64",
        "--every",
        "4",
        "--out",
        str(tmp_path),
    ]
    assert monitor_check.main(words) == 0
    with (tmp_path / "readings.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 5 * 2  # looks at steps 0, 4 and 8, layers, numbers of probes
    assert {row["layer"] for row in rows} >= {"blocks.0.attn.qkv", "head"}
    with (tmp_path / "monitor.csv").open() as file:
        sizes = {(r["quantity"], r["probes"]): float(r["size"]) for r in csv.DictReader(file)}
    for quantity in ("activation energy", "gradient norm", "stable rank"):
        assert sizes[quantity, "64"] < 0.2
        assert sizes[quantity, "64"] < sizes[quantity, "2"]
    assert {p.name for p in tmp_path.iterdir()} == {
        "readings.csv",
        *(f"monitor.{kind}" for kind in ("csv", "md", "svg")),
        *(f"monitor_layers.{kind}" for kind in ("csv", "md")),
    }
    held = (tmp_path / "monitor.md").read_text().split("Held between steps")[1]
    first, last = held.split("together: ")[1].split(" after the first look, ")
    assert last.startswith(first)
    assert "relative error, median" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["method=basis"], "method=basis"),
        (["tokens_per_step=128"], "tokens_per_step=128"),
        (["model.tie_head=true"], "model.tie_head=true"),
        (["steps=3"], "steps=3"),
        (["model.n_head=3"], "model.n_head=3"),
    ],
)
def test_refusals(
    wrong: list[str], named: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert monitor_check.main([*tiny_text(data), *wrong, "--out", str(tmp_path / "out")]) == 1
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
