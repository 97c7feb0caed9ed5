"""Whether Triton's kernels are used for a tensor, and what happens where they can't be.

A kernel here only ever does what PyTorch's operators do too, in fewer launches and fewer reads. So
each has a plain version beside it, and

    attempt(kernel, plain, x, ...)   is kernel(x, ...) where kernels may be used for x, and else
                                     plain(x, ...), the same numbers

Kernels are used on CUDA. There, before the first one, a trial kernel is compiled and run: that
fails without Triton, without a C compiler, on a card that is too old or a file system that can't be
written to, and plain operators are used from then on, with one warning. A kernel that fails to
compile on its own, for want of registers or by a change in Triton, is given up alike. In a graph of
torch.compile nothing is tried: Inductor itself needs Triton on CUDA, and says so where it is
missing.

    files       those in basis/ops/triton/ import triton at the top, and are imported within
                functions only: basis works without Triton, and is imported as fast
    launches    `wrap(kernel)[grid](...)`, within a function given to `as_op`, which torch.compile
                then sees through, and which eager mode calls directly
    tests       where there is no GPU, in Triton's interpreter: `with kernels.forced():`, CPU
                tensors, TRITON_INTERPRET=1 (tests/conftest.py). Trip counts of loops must be
                constexpr there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from basis.ops import shapes
from basis.ops.matrix import in_eager_mode

T = TypeVar("T")

_INSTALLED = importlib.util.find_spec("triton") is not None
_devices: dict[int | None, bool] = {}  # where the trial kernel was tried, and whether it ran
_given_up: set[str] = set()  # kernels that could not be compiled
_wanted: bool | None = None  # by `forced`


def usable(x: Tensor) -> bool:
    """Whether kernels may be used for `x`: it is on CUDA and the trial kernel ran there, or a test
    has forced it. Not for fake tensors, nor within transforms of torch.func.
    """
    if _wanted is not None and not torch.compiler.is_compiling():
        return _wanted and in_eager_mode(x)
    if not (_INSTALLED and x.is_cuda) or _wanted is False:
        return False
    if torch.compiler.is_compiling():
        return _devices.get(x.device.index, True)
    return in_eager_mode(x) and _runs_on(x.device)


def attempt(kernel: Callable[..., T], plain: Callable[..., T], x: Tensor, *args: Any) -> T:
    """`kernel(x, ...)` where kernels may be used for `x` and this one compiles, else `plain(x,
    ...)`.
    """
    if shapes.counts(x):
        return shapes.results(plain, x, *args)
    name = f"{kernel.__module__}.{kernel.__qualname__}"
    if name in _given_up or not usable(x):
        return plain(x, *args)
    if torch.compiler.is_compiling():
        return kernel(x, *args)
    try:
        return kernel(x, *args)
    except _errors() as error:
        _given_up.add(name)
        _say(f"the kernel {name}", error)
        return plain(x, *args)


def wrap(kernel: Any) -> Any:
    """What to launch, `wrap(kernel)[grid](...)`: a graph records the launch. In Triton's
    interpreter there is nothing to record.
    """
    from triton.runtime.jit import JITFunction

    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def as_op(name: str, function: Callable[..., T]) -> Callable[..., T]:
    """`function` as the operator basis::`name`, which torch.compile sees through; in eager mode it
    is called directly, without the dispatcher's ten microseconds.

    The function allocates what it returns, changes none of its arguments and launches kernels by
    `wrap`. Its first argument is a tensor. Its annotations must be types, no texts, so no `from
    __future__ import annotations` in its file.
    """
    op = torch.library.triton_op(f"basis::{name}", function, mutates_args={})

    def call(x: Tensor, *args: Any) -> T:
        result: T = function(x, *args) if in_eager_mode(x) else op(x, *args)
        return result

    return call


@contextlib.contextmanager
def forced(wanted: bool = True) -> Iterator[None]:
    """Within, kernels are used in eager mode for tensors on any device, the CPU's in Triton's
    interpreter; with False, nowhere, compiled graphs included. For tests and benchmarks.
    """
    global _wanted
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def _errors() -> tuple[type[Exception], ...]:
    """What may go wrong while a kernel is compiled. What the driver reports of one that runs is
    none of it.
    """
    found: list[type[Exception]] = [ImportError, OSError, subprocess.SubprocessError]
    with contextlib.suppress(ImportError):
        from triton import TritonError

        found.append(TritonError)
    return tuple(found)


def _runs_on(device: torch.device) -> bool:
    """Whether the trial kernel runs on `device`; tried once."""
    if device.index not in _devices:
        errors: tuple[type[Exception], ...] = (RuntimeError, *_errors())  # no compiler, an old card
        try:
            from basis.ops.triton import trial

            _devices[device.index] = trial.runs_on(device)
        except errors as error:
            _devices[device.index] = False
            _say(f"Triton on {device}", error)
    return _devices[device.index]


def _say(what: str, error: Exception) -> None:
    reason = str(error).strip().splitlines()
    warnings.warn(
        f"{what} could not be used, PyTorch's operators take its place, which is slower: "
        f"{type(error).__name__}{f': {reason[0]}' if reason else ''}",
        RuntimeWarning,
        stacklevel=4,
    )
