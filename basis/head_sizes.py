"""How many rows of logits a loss head works on at once, by the kind of device.

*CPU.* At most 64 MiB of logits in float32: larger blocks gain nothing.

*CUDA.* A product of few rows leaves most of a GPU idle (dX of 333 rows has fewer tiles than there
are multiprocessors), so a block has 2,048 rows at least, 196 MiB at V = 50,257 in bfloat16, and
more where 200 MiB hold more. Twice as many would spare a hundredth of a GPT-2 step by two measured
sizes, and cost a checkpointed one a quarter of its planned peak. Rows of Y and W are padded to a
multiple of 64 classes, since a row of 50,257 bfloat16 numbers starts at an odd address for three in
four; the padding is zero in W and in dY. W is cast anyway, so padding it costs no copy. In float32
nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Rows of a block: as many as `bytes` of logits hold, a multiple of `step`, `least` or more."""

    bytes: int
    least: int = 1
    step: int = 1

    def most_rows(self, row_bytes: int) -> int:
        return max(self.bytes // row_bytes // self.step * self.step, self.least)


SIZES = {"cpu": Sizes(64 * 2**20), "cuda": Sizes(200 * 2**20, 2048, 128)}
"""By kind of device; any that is not a CPU is taken for CUDA."""

_PADDING = 64  # classes

_skipping_blocks = False
_kind: str | None = None


@contextmanager
def skipping_blocks() -> Iterator[None]:
    """Within, a head goes through the first two and the last of its blocks of rows only.

    For programs that count what a step holds (bench/memory_plan.py) on tensors without values: all
    blocks between those hold the same bytes. The loss and the gradients are meaningless. A head
    whose method needs dY whole takes all blocks, since it collects them.
    """
    global _skipping_blocks
    before, _skipping_blocks = _skipping_blocks, True
    try:
        yield
    finally:
        _skipping_blocks = before


@contextmanager
def blocks_of(kind: str) -> Iterator[None]:
    """Within, heads take their rows as on "cpu" or "cuda", wherever their tensors are: for plans,
    and for tests of the one on the other.
    """
    global _kind
    before, _kind = _kind, kind
    try:
        yield
    finally:
        _kind = before


def by_rows(device: torch.device) -> bool:
    """Whether blocks are row-major, as on CUDA."""
    return (_kind or device.type) != "cpu"


def padded_classes(classes: int, dtype: torch.dtype) -> int:
    """Classes in a row of a row-major block for inputs of `dtype`."""
    return -(-classes // _PADDING) * _PADDING if dtype.itemsize <= 2 else classes


def most_rows(classes: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a whole block of logits, for inputs of `dtype` and V = `classes`."""
    if by_rows(device):
        return SIZES["cuda"].most_rows(padded_classes(classes, dtype) * dtype.itemsize)
    return SIZES["cpu"].most_rows(4 * classes)


def blocks_of_rows(x: Tensor, classes: int, whole: bool) -> list[slice]:
    """The rows of `x` (B, N) in as few and as equal blocks as may be. whole: dY will be collected,
    so that no block can be left out (`skipping_blocks`).
    """
    rows, most = x.shape[0], most_rows(classes, x.dtype, x.device)
    step = SIZES["cuda" if by_rows(x.device) else "cpu"].step
    size = -(-rows // -(-rows // most))
    size = -(-size // step) * step
    blocks = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    if _skipping_blocks and not whole and len(blocks) > 3:
        return [*blocks[:2], blocks[-1]]
    return blocks
