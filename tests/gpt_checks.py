"""Loss and gradients of a whole GPT, for tests of what it keeps for backward."""

from typing import Any

import torch
from torch import Tensor


def loss_of(tokens: Tensor, model: Any, low: bool = False) -> Tensor:
    """The loss on `tokens` (B, T + 1); low: under autocast to bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        loss: Tensor = model(tokens[:, :-1], tokens[:, 1:])
        return loss


def gradients(tokens: Tensor, model: Any, low: bool = False) -> list[Tensor]:
    """The loss, and the gradient of each parameter; the same dropout each time."""
    torch.manual_seed(2)
    loss = loss_of(tokens, model, low)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]
