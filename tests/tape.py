"""CUDA graphs where there is no GPU: the operators of a step are recorded as PyTorch dispatches
them, and run again on the very same tensors, without Python's part of the step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import basis.state
import harness.set_up
from harness.device import Runtime, resolve
from harness.step import CapturedStep

BASIS = str(Path(__file__).resolve().parents[1] / "basis")

LOOKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)


def use_tapes(monkeypatch: pytest.MonkeyPatch, *, always: bool) -> None:
    """Let runs of this process compute on the CPU and replay their steps from tapes: all runs, or
    those that would on CUDA.
    """

    def resolved(*args: Any, cuda_graph: bool | None, small: bool, **others: Any) -> Runtime:
        captured = small if cuda_graph is None else cuda_graph
        return replace(resolve(*args, **others), cuda_graph=captured or always)

    monkeypatch.setattr(harness.set_up, "resolve", resolved)
    monkeypatch.setattr(CapturedStep, "graphs", Tapes)
    monkeypatch.setattr(basis.state, "_is_captured", lambda _: Tape.active)


class Tape(TorchDispatchMode):
    """The operators called while it is entered: `calls`. looks: of those that move numbers between
    host and device, the function of basis/ that did.
    """

    active = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.looks: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "profiler":
            return result
        self.calls.append((func, args, kwargs or {}, result))
        if func in LOOKS:
            self.looks.add(_caller())
        return result

    def __enter__(self) -> Tape:
        Tape.active = True
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        Tape.active = False
        super().__exit__(*error)

    @torch.no_grad()
    def replay(self) -> None:
        """Run all again: each result goes where it went, unless it is a view or was written in
        place.
        """
        for func, args, kwargs, before in self.calls:
            after = func(*args, **kwargs)
            for old, new in zip(tree_flatten(before)[0], tree_flatten(after)[0], strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def outline(self) -> list[str]:
        """Each call with sizes and types of its tensors, and with all other arguments."""
        calls = (call[:3] for call in self.calls)
        return [f"{func}{tree_map(_described, (args, kwargs))}" for func, args, kwargs in calls]


def _described(x: object) -> object:
    return f"{x.dtype}{tuple(x.shape)}" if isinstance(x, Tensor) else x


def _caller() -> str:
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(BASIS):
            return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class Tapes:
    """In the place of harness.step.CudaGraphs. Recording does the work too, so the first replay is
    one already.
    """

    made: ClassVar[list[Tape]] = []
    replays: ClassVar[list[int]] = [0]

    def __init__(self, device: torch.device) -> None:
        Tapes.made.clear()
        Tapes.replays[:] = [0]

    def aside(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> tuple[Callable[[], None], int]:
        tape, done = Tape(), [True]
        with tape:
            work()
        Tapes.made.append(tape)

        def replay() -> None:
            Tapes.replays[0] += 1
            if done:
                done.clear()
            else:
                tape.replay()

        return replay, 12345
