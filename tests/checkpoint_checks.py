"""What tests of checkpoints share: states that can be recognised."""

from pathlib import Path
from typing import Any

import torch


def filled(step: int, size: int = 64) -> dict[str, Any]:
    """A small state that can be recognised: every element is `step`."""
    return {"weights": torch.full((size,), float(step)), "step": step}


def assert_is_step(state: dict[str, Any], step: int) -> None:
    assert state["step"] == step
    assert torch.equal(state["weights"], torch.full_like(state["weights"], float(step)))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
