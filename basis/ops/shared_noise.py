"""Noise that layers share: drawn once for a micro-batch, and used by all layers that can.

A hashing of B rows takes a sort of B integers and some thirty small operations, whatever the layer.
Drawn in each layer, forward and backward, they were most of what a sketched layer adds to an exact
one. Since dX is exact, layers do not see each other's noise: each dW is unbiased whether or not its
noise is shared. What sharing can do is correlate the errors of different layers; a method that
shares says how it keeps them apart (hashing.py: the bins are shared, the signs are not).

A method asks for what it shares in `Estimator.shared_noise`, by a name: the first layer that asks
has it drawn, the others get the same tensors. They are kept once until backward, however many
layers save them.

Where keys were assigned (basis/noise_key.py), what is shared is a function of the base key.
Elsewhere it is drawn from PyTorch's default generator once for each pass through the layers: a
layer that comes round again begins the next pass (`Passes`). Under torch.compile nothing is
remembered: a graph draws by the key wherever it is asked to, and its compiler joins what is the
same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from basis.ops.noise import draw_key


class SharedNoise:
    """What the layers of a model share in one micro-batch.

    key: 0-dimensional int64; or the device on which it is drawn when it is first asked for. layers:
    how many places there are for layers; each has its own.
    """

    def __init__(self, key: Tensor | torch.device, layers: int) -> None:
        self._key, self.layers = key, layers
        self._drawn: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}
        self.readings: dict[int, Any] = {}
        """How the inputs of this micro-batch are kept, and the last one that a cast made
        (shared_input.py).
        """
        self.cast: Any = None

    @property
    def key(self) -> Tensor:
        if isinstance(self._key, torch.device):
            self._key = draw_key(self._key)
        return self._key

    def once(
        self,
        name: tuple[Any, ...],
        device: torch.device,
        draw: Callable[[Tensor], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """`draw(key)` on `device`, the same tensors each time for the same `name`."""
        if torch.compiler.is_compiling():
            return draw(self.key.to(device))
        name = (*name, device)
        if name not in self._drawn:
            with torch.no_grad():
                self._drawn[name] = draw(self.key.to(device))
        return self._drawn[name]

    def __getstate__(self) -> dict[str, Any]:
        # drawn again from the key
        return vars(self) | {"_key": self.key, "_drawn": {}, "readings": {}, "cast": None}


class Passes:
    """Shared noise of layers whose keys nobody assigns: new for each pass through them."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._now: SharedNoise | None = None
        self._seen: set[int] = set()

    def noise(self, place: int, device: torch.device) -> SharedNoise:
        """What the layer at `place` shares in a forward that begins now."""
        if self._now is None or place in self._seen:
            self._now, self._seen = SharedNoise(device, self.layers), set()
        self._seen.add(place)
        return self._now

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "_now": None, "_seen": set()}
