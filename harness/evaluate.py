"""Validation loss: the same windows for every run and every evaluation, without touching any random state.

Batches are of equal size and their losses are averaged in float64, so the result is the plain mean over all tokens.
Evaluation runs without grad mode: sketched layers are then plain ones and draw no noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from harness.device import Runtime


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    runtime: Runtime,
    forward: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> float:
    """Mean cross-entropy in nats per token over `batches` of (inputs, targets), each int64 (b, T).

    `forward` replaces calling `model` (a compiled form of it). The model's training mode is restored.
    """
    run = model if forward is None else forward
    training = model.training
    model.eval()
    losses = []
    for inputs, targets in batches:
        with runtime.autocast():
            loss = run(inputs.to(runtime.device), targets.to(runtime.device))
        losses.append(loss.double())
    model.train(training)
    return torch.stack(losses).mean().item()
