"""Small tables of numbers that every step needs where its tensors are.

Copying one there makes the host wait for the device, and a CUDA graph can't record it. So on an
accelerator a table is copied once for each device and then stays.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from basis.ops.matrix import in_eager_mode


def table(values: tuple[float, ...], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`values` (n,) on the device of `like`, not to be written into."""
    if like.device.type == "cpu" or not in_eager_mode(like):
        return torch.tensor(values, dtype=dtype, device=like.device)
    return _kept(values, like.device, dtype)


@functools.lru_cache(maxsize=256)
def _kept(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
