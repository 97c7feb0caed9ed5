"""Modules whose noise can be fixed: sketched layers, and lean layers that round at random.

`noise_key` decides the noise; while it is None, each training forward draws a key from PyTorch's
default generator. `basis.set_noise_key` sets it for a whole model. It is no buffer: it is not
saved, and DistributedDataParallel does not overwrite it with rank 0's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from basis.ops.noise import draw_key


class HasNoiseKey(nn.Module):
    """Mixin of modules that draw noise in a training forward."""

    noise_key: Tensor | None = None

    def set_noise_key(self, key: int | Tensor, device: torch.device | None = None) -> None:
        """Fix the noise: an integer in [0, 2^63) is a seed, a tensor of B codes an explicit hashing
        (`encode_hashing`).
        """
        # A new tensor each time: a compiled graph may keep the one it was given until backward.
        if isinstance(key, Tensor):
            self.noise_key = key if device is None else key.to(device)
        else:
            self.noise_key = torch.full((), key, dtype=torch.int64, device=device)

    def fixed_or_fresh_key(self, device: torch.device) -> Tensor:
        """`noise_key` on `device`, or a new one."""
        return draw_key(device) if self.noise_key is None else self.noise_key.to(device)

    def pass_without_grad(self, device: torch.device) -> None:
        """For a forward without grad mode: move PyTorch's generator on, in training.

        A reentrant checkpoint runs its first forward so, and restores the generator for the
        recomputation, which draws the key. Had the generator not moved in between, all steps would
        draw the same noise. In eval() nothing is drawn; use `basis.set_noise_key` there, or
        checkpoints that are not reentrant.
        """
        if self.training and self.noise_key is None and not torch.is_grad_enabled():
            draw_key(device)
