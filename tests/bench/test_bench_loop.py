"""The bare loop beside train.py: as it is on a CPU, and replayed from tapes as on a GPU."""

from pathlib import Path
from typing import Any

import pytest
from tape import Tapes
from tiny import overrides

import harness.device
import harness.step
from bench.bench_loop import bare_loop
from harness.device import Runtime, resolve


def test_the_bare_loop_takes_steps(data: Path) -> None:
    adamw = ["optim=adamw", "optim.schedule=constant", "optim.warmup_steps=0"]
    assert len(bare_loop([*overrides(data), *adamw, "optim.grad_clip=null"], 3)) == 3


def test_the_bare_loop_replays_where_a_run_would(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_graphs(*args: Any, cuda_graph: Any, small: bool) -> Runtime:
        assert small
        found = resolve(*args)
        return Runtime(found.device, found.precision, found.compile, True)

    monkeypatch.setattr(harness.device, "resolve", with_graphs)
    monkeypatch.setattr(harness.step, "CudaGraphs", Tapes)
    assert len(bare_loop(overrides(data), 8)) == 8
    assert Tapes.replays == [5]


def test_what_it_does_not_know_is_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="bench_loop: the bare loop knows one micro-batch"):
        bare_loop([*overrides(data), "optim.grad_clip=1.0"], 3)
