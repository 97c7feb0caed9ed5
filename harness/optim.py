"""Optimisers and the learning rate, as functions of the configuration.

`sgd` is the paper's (momentum 0.9, constant rate 0.01); `adamw` decays matrices and embeddings and
leaves biases and LayerNorm alone. PyTorch's fused kernels are used: one pass over the parameters,
on the CPU too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from harness.world import spread, whole

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class OptimOptions:
    """`optim`: rate, its course over the steps, clipping, and each optimiser's own numbers.

    The rate rises linearly over `warmup_steps`, then stays (constant) or falls to min_lr_ratio * lr
    along half a cosine that ends with the last step. `grad_clip`: largest 2-norm of all gradients
    together, null for no clipping.
    """

    name: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    grad_clip: float | None = None

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optim.name={self.name!r}: must be one of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"optim.schedule={self.schedule!r}: must be one of {', '.join(SCHEDULES)}"
            )
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"optim.lr={self.lr}: must be positive")
        for name in ("momentum", "beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must be in [0, 1)")
        if not self.eps > 0.0:
            raise ValueError(f"optim.eps={self.eps}: must be positive")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"optim.weight_decay={self.weight_decay}: must be at least 0")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps={self.warmup_steps}: must be at least 0")
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise ValueError(f"optim.min_lr_ratio={self.min_lr_ratio}: must be in [0, 1]")
        if self.grad_clip is not None and not self.grad_clip > 0.0:
            raise ValueError(
                f"optim.grad_clip={self.grad_clip}: must be positive, or null for none"
            )


def make_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.Optimizer:
    """The optimiser of `options` for the parameters of `model`, fused."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if options.name == "sgd":
        # PyTorch (2.11 to 2.13) has no fused SGD for parameters that fsdp has spread.
        kernels = {"foreach" if any(map(spread, parameters)) else "fused": True}
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, **kernels)
    return torch.optim.AdamW(
        groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=True
    )


def learning_rate(options: OptimOptions, step: int, steps: int) -> float:
    """The rate of `step` (the first is 0) in a run of `steps`."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.lr
    progress = (step - options.warmup_steps) / max(steps - 1 - options.warmup_steps, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.lr * (options.min_lr_ratio + (1.0 - options.min_lr_ratio) * cosine)


def momentum_norm(optimizer: torch.optim.Optimizer) -> float:
    """2-norm of what the optimiser remembers of gradients, all parameters together.

    SGD's momentum buffers, which are discounted sums, or AdamW's first moments, which are
    discounted means.

    0 before the first step, and for SGD without momentum.
    """
    names = ("momentum_buffer", "exp_avg")
    buffers = [
        state[name]
        for state in optimizer.state.values()
        for name in names
        if state.get(name) is not None
    ]
    return float(whole(torch.nn.utils.get_total_norm(buffers))) if buffers else 0.0
