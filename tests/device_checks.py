"""What a training step on a GPU must not do, watched at the operators that PyTorch dispatches.

A copy from the host waits for the host, a number read from the device waits for the device, and a
shape that depends on values does both. None of them can be recorded in a CUDA graph. The same watch
serves a real GPU (tests/gpu) and a machine without one, where a *pretend device* stands in for it
(tests/pretend_device.py): its tensors have shapes and a device of their own, and no values.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]


class Watch(TorchDispatchMode):
    """Within, notes in `found` each operator on `device` that copies from or to the host, mixes
    tensors of the host in, reads a number, or has a shape that depends on values; once for each
    place in the project's code.

    Kernels that write an index's bounds check and the like do no such thing: they are asserted on
    the device.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.found: list[str] = []
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.count += 1
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = [t for t in given if t.device.type == self.device]
        what = None
        if on_device and _depends_on_values(func, args):
            what = "depends on values"
        elif on_device and len(on_device) < len(given):
            what = "mixes tensors of the host in"
        if what:  # before the call, which a pretend device refuses
            self._note(func, what)
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if given and not what:
            if not on_device and any(t.device.type == self.device for t in made):
                self._note(func, "copies from the host")
            elif on_device and any(t.device.type != self.device for t in made):
                self._note(func, "copies to the host")
        return result

    def _note(self, func: Any, what: str) -> None:
        text = f"{func} {what} at {_place()}"
        if text not in self.found:
            self.found.append(text)


def _depends_on_values(func: Any, args: tuple[Any, ...]) -> bool:
    if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default):
        # tagged for what a mask does
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in func.tags for tag in tags)


def _place() -> str:
    """The innermost line of the project's own code that runs now, outside of tests."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in ("tests", ".venv"):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "PyTorch"


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Within, CUDA raises RuntimeError where an operator would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
