"""Models read back from runs of methods that have state of their own in the layers."""

from pathlib import Path

import pytest
from tiny import train_here

from harness.trained import load_trained
from report import write


@pytest.mark.parametrize("method", ["subspace", "transform", "ema_sketch"])
def test_what_a_method_learned_is_left_out(method: str, data: Path, tmp_path: Path) -> None:
    train_here(data, tmp_path / "run", f"method={method}", "micro_batch_size=4")
    trained = load_trained(tmp_path / "run")
    assert not [name for name in trained.model.state_dict() if "estimator_" in name]
    report = write.gather([tmp_path])
    assert report.complaints == []  # the loss computed again is the logged one
