"""A publication's losses, to stand next to ours in the tables of losses.

Which publication that is, a study says (experiments/paper); report/ only has the columns for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from data.tokens import TokenFile
from report.results import Group


@dataclass(frozen=True)
class PublishedLosses:
    """Final losses of one published run, in nats per token."""

    train_loss: float
    val_loss: float


@dataclass(frozen=True)
class Published:
    """What a publication reports, and how it validates.

    losses: the published losses of the run that a group repeats, None if it repeats none.
    exact: those of exact backpropagation, which published differences are taken to.
    batch: (training tokens, block_size, steps) -> the inputs and targets, (windows, T) each, on
    which the publication validates after so many steps.
    validates: that way of validating in words. note: what the columns hold.
    """

    losses: Callable[[Group], PublishedLosses | None]
    exact: PublishedLosses
    batch: Callable[[TokenFile, int, int], tuple[Tensor, Tensor]]
    validates: str
    note: str
