"""Runs of train.py on a GPU: resumed to the last bit, and what a card can't do is refused."""

from pathlib import Path

import pytest
import torch
from hydra.errors import CompactHydraException
from tiny import losses, train_here

pytestmark = pytest.mark.gpu

METHODS = {
    "exact": ["method=exact"],
    "basis": ["method=basis", "method.rank=3"],
    "basis, lean": ["method=basis", "method.rank=3", "activations=lean", "method.include=['*']"],
    "quantized": ["method=quantized", "activations=checkpoint"],
    "transform": ["method=transform", "method.every=3"],
    "subspace": ["method=subspace", "method.rank=3", "method.every=3"],
    "sus": ["method=exact", "attention=sus", "attention.c=3"],
}


@pytest.mark.parametrize("method", list(METHODS))
def test_resumed_to_the_last_bit(method: str, device: str, data: Path, tmp_path: Path) -> None:
    options = [
        *METHODS[method],
        f"device={device}",
        "deterministic=true",
        "compile=false",
        "cuda_graph=false",  # test_cuda_graph.py
        "model.dropout=0.1" if "attention=sus" not in METHODS[method] else "model.dropout=0",
        "optim=adamw",
        "optim.schedule=constant",
        "optim.warmup_steps=3",
        "tokens_per_step=64",
        "log.every=5",
    ]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train_here(data, straight, *options, "steps=20")
    for steps in (10, 20):
        train_here(data, resumed, *options, f"steps={steps}")
    assert losses(resumed) == losses(straight)


@pytest.mark.parametrize("compile", ["true", "false"])
def test_a_run_in_bfloat16_learns(compile: str, device: str, data: Path, tmp_path: Path) -> None:
    options = ["method=basis", "precision=bfloat16", f"compile={compile}", f"device={device}"]
    train_here(data, tmp_path / "run", *options, "steps=40", "optim.lr=0.1")
    rows = losses(tmp_path / "run")
    assert rows[-1]["val/loss"] < 0.95 * rows[0]["val/loss"]


def test_a_card_without_bfloat16_is_named(
    device: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(CompactHydraException, match=r"precision='bfloat16'.*precision=float32"):
        train_here(data, tmp_path / "run", "precision=bfloat16", "device=cuda")
    assert not (tmp_path / "run").exists()
