"""The `activations` group in runs: checkpoints repeat the same noise, lean stays near, mistakes are
named.
"""

from pathlib import Path

import pytest
import torch
from hydra.errors import CompactHydraException
from tiny import losses, train_here

from harness.checkpoint import Checkpoints

METHOD = ["method=basis", "method.rank=3", "method.include=['*']"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Checkpoints(folder / "checkpoints").load_latest().state["model"]


@pytest.mark.parametrize(
    "more",
    [[], ["activations.selective=true"], ["model.dropout=0.1"]],
    ids=["full", "selective", "dropout"],
)
def test_checkpointed_blocks_repeat_the_same_noise(
    more: list[str], data: Path, tmp_path: Path
) -> None:
    options = [*METHOD, *(option for option in more if option.startswith("model"))]
    train_here(data, tmp_path / "plain", *options)
    train_here(data, tmp_path / "checkpoint", *METHOD, "activations=checkpoint", *more)
    plain, checkpointed = (losses(tmp_path / name) for name in ("plain", "checkpoint"))
    for a, b in zip(plain, checkpointed, strict=True):
        for name in ("train/loss", "val/loss", "grad_norm"):
            assert a.get(name) == b.get(name)
    assert all(
        torch.equal(w, weights(tmp_path / "checkpoint")[name])
        for name, w in weights(tmp_path / "plain").items()
    )
    for name in ("norms", "activations", "attention", "sketches"):
        assert checkpointed[0][f"mem/saved_bytes/{name}"] < plain[0][f"mem/saved_bytes/{name}"], (
            name
        )


def test_lean_runs_resume_and_stay_near(data: Path, tmp_path: Path) -> None:
    train_here(data, tmp_path / "plain", *METHOD)
    train_here(data, tmp_path / "lean", *METHOD, "activations=lean")
    plain, lean = (losses(tmp_path / name) for name in ("plain", "lean"))
    assert lean[0]["val/loss"] == plain[0]["val/loss"]
    assert lean[-1]["val/loss"] == pytest.approx(plain[-1]["val/loss"], rel=0.02)
    assert lean[-1]["val/loss"] != plain[-1]["val/loss"]
    assert lean[0]["mem/saved_bytes/attention"] < 0.45 * plain[0]["mem/saved_bytes/attention"]
    train_here(data, tmp_path / "again", *METHOD, "activations=lean", "steps=10")
    train_here(data, tmp_path / "again", *METHOD, "activations=lean")
    assert losses(tmp_path / "again")[-1]["val/loss"] == lean[-1]["val/loss"]


def test_parts_of_lean_can_be_switched_off(data: Path, tmp_path: Path) -> None:
    options = [
        "activations=lean",
        "activations.norm=false",
        "activations.attention=false",
        "activations.gelu_bits=null",
    ]
    train_here(data, tmp_path / "off", *options)
    train_here(data, tmp_path / "plain")
    assert losses(tmp_path / "off") == losses(tmp_path / "plain")


@pytest.mark.slow
def test_budget_under_compile_keeps_less(data: Path, tmp_path: Path) -> None:
    kept = {}
    for share in (1.0, 0.0):
        folder = tmp_path / str(share)
        options = [
            "steps=4",
            "method=exact",
            "activations=budget",
            f"activations.budget={share}",
            "compile=true",
        ]
        train_here(data, folder, *options)
        kept[share] = losses(folder)[0]["mem/saved_bytes"]
    assert kept[0.0] < 0.8 * kept[1.0]
    assert losses(tmp_path / "0.0")[-1]["val/loss"] == pytest.approx(
        losses(tmp_path / "1.0")[-1]["val/loss"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["activations=budget"], "activations=budget: a budget is kept by torch.compile"),
        (["activations=lean", "activations.gelu_bits=3"], "activations.gelu_bits=3"),
        (["activations=budget", "activations.budget=2"], "activations.budget=2"),
        (["activations.name=thin"], "activations.name='thin'"),
    ],
)
def test_mistakes_are_named(wrong: list[str], said: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(CompactHydraException, match=said.replace("'", ".")):
        train_here(data, tmp_path / "run", *wrong)
    assert not (tmp_path / "run").exists()
