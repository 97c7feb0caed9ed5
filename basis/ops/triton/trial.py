"""The smallest kernel that shows whether Triton can compile for a device: see kernels.py."""

import torch
import triton
import triton.language as tl


@triton.jit
def _double(x, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, 2.0 * tl.load(x + place))


def runs_on(device: torch.device) -> bool:
    """Whether it gives the right numbers. Raises what Triton raises where it can't be built."""
    x = torch.ones(16, device=device)
    out = torch.empty_like(x)
    _double[(1,)](x, out, SIZE=16)
    return bool((out == 2.0).all())
