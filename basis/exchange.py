"""The two sides of an exchange: what `basis.convert` puts into a model and `basis.revert` takes out.

An `Exchange` says which modules of a model are replaced, and by what: sketched layers for dense
ones (convert.py), `basis.Lean` and `basis.SUS`. What it puts in is a `StandIn`, which can give the
module back that it stands for. `convert` and `revert` know nothing else of either.
"""

from __future__ import annotations

import abc
from typing import ClassVar

from torch import nn


class StandIn(nn.Module):
    """Mixin of modules that stand in a model for another one."""

    def original(self) -> nn.Module:
        """The module that this one stands for, with the same parameters."""
        raise NotImplementedError


class Exchange(abc.ABC):
    """Which modules are replaced, and by what. Frozen dataclasses, whose fields are its options."""

    kind: ClassVar[str]
    """What the modules are called in messages, in the singular."""

    @abc.abstractmethod
    def accepts(self, module: nn.Module) -> bool:
        """Whether `module` is of the kind that is replaced, or stands in for such a one already."""

    @abc.abstractmethod
    def stand_in(self, name: str, module: nn.Module) -> StandIn:
        """What replaces `module`, an accepted one called `name`; `module` stays as it is.

        Raises ValueError where it can't be replaced.
        """

    def why_not(self, module: nn.Module) -> str | None:
        """Why a module that looks like one of the kind is not accepted; None if it does not."""
        return None
