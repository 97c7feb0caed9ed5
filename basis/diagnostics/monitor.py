"""Watching exact training through sketches: how large activations and gradients are, layer by
layer, without forming either again.

    monitor = Monitor(model, probes=16)
    with monitor:          # hooks are there within; the training is the same to the last bit
        loss_fn(model(x), y).backward()
    monitor.read()["0"].gradient_norm              # and the next `with` starts from zero

After the monitoring use of H. Antil and D. Verma (arXiv 2510.00442), whose own quantities were not
read. With p probes and random matrices Omega (B, p) and S (N, p) of standard normal entries, drawn
again from a seed, for a dense layer with input X (B, N) and gradient dY (B, M) of its output:

    activation energy   |X|_F^2 ~ |X^T Omega|_F^2 / p
                        unbiased; relative deviation at most sqrt(2 / p)
    gradient norm       |dW|_F ~ |dY^T (X S)|_F / sqrt(p)
                        its square is unbiased, as above; no M x N matrix is formed
    stable rank         |X|_F^2 / |X|_2^2 ~ |Y|_F^2 / |Y|_2^2,   Y = X^T Omega
                        at most p, and too low near p: see below
    subspace drift      share of |Y|_F^2 outside the range of the Y that was read before
                        in [0, 1]; 0 if X is the same again

The deviations are those of a single direction; their squares shrink as 1 / stable rank. The stable
rank of p mixtures is below that of X: measured in a small GPT, by a twentieth where the true one is
p / 10, an eighth at p / 5, a quarter at p / 3 (results/monitor). X is that of the layer whatever
the method: with a sketched layer the gradient norm is that of the exact dW, of which the method
makes an estimate.

A layer that is used several times, and several micro-batches, add up: energies as sums, gradients
as the sum that .grad is. Forwards without a graph are not seen; nor is a forward without a
backward; what is recomputed in backward is not counted twice. A head that is fused with its loss
(loss_head.py) stays so and is seen block by block. Of a weight that several layers share, each
layer's own part of the gradient is seen. Where numbers are not finite, readings are NaN or
infinite. Hooks are not seen by a graph of torch.compile made before.

Cost: 4 B N p + 2 B M p FLOPs a layer and use. Held: X S and X^T Omega, p (B + N) numbers, until
backward; between steps the last range, N p numbers a layer, whatever the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from basis.exchange import plain_name
from basis.layers.conv1d import is_conv1d
from basis.layers.sketch import width_of
from basis.linear import SketchedLinear
from basis.loss_head import BlockObserver, HeadHook
from basis.ops.noise import fold, normal_rows


@dataclass(frozen=True)
class Reading:
    """Of one layer; see the module's table. drift is None the first time a layer is read."""

    activation_energy: float
    gradient_norm: float
    stable_rank: float
    drift: float | None = None

    def metrics(self) -> dict[str, float]:
        """By name, without what is None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


class _Sums:
    """What one layer's uses have added up to."""

    def __init__(self) -> None:
        self.uses = 0
        self.activations: Tensor | None = (
            None  # sum of X^T Omega (N, p), Omega another one for each use
        )
        self.gradient: Tensor | None = None  # sum of dY^T X S (M, p)

    def add(self, activations: Tensor, gradient: Tensor) -> None:
        self.activations = (
            activations if self.activations is None else self.activations + activations
        )
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


class _Watch(HeadHook):
    """The hook of one layer. normal: standard normal numbers, (rows, p), by device and name."""

    def __init__(self, sums: _Sums, normal: Callable[..., Tensor]) -> None:
        self.sums, self.normal = sums, normal

    @torch.no_grad()
    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """X^T Omega (N, p) and X S (B, p)."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.flatten(0, -2).float()
            omega = self.normal(x.shape[0], x.device, "rows", self.sums.uses)
            self.sums.uses += 1
            return x.t() @ omega, x @ self.normal(x.shape[1], x.device, "columns")

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        activations, projected = self._project(inputs[0].detach())

        def on_gradient(grad: Tensor) -> None:
            with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
                self.sums.add(activations, grad.flatten(0, -2).float().t() @ projected)

        output.register_hook(on_gradient)

    def fused(self, x: Tensor) -> tuple[BlockObserver, Callable[[Tensor], None]]:
        activations, projected = self._project(x)
        parts: list[Tensor] = []

        def observe(block: slice, grad_y: Tensor) -> None:
            with torch.autocast(grad_y.device.type, enabled=False):
                part = grad_y.float() @ projected[block]  # (V, block) (block, p)
            parts[:] = [parts[0] + part] if parts else [part]

        @torch.no_grad()
        def on_gradient(grad_loss: Tensor) -> None:
            self.sums.add(activations, parts[0] * grad_loss)

        return observe, on_gradient


class Monitor:
    """Sketches of the dense layers of `model` (nn.Linear, transformers' Conv1D, sketched or not)
    while it is entered as a context. Experts of a mixture are not watched.

    include, exclude: shell patterns over layer names. probes: p, at least 1. seed: of the random
    matrices. Raises ValueError for `probes`, and if no layer is left.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        include: Iterable[str] = ("*",),
        exclude: Iterable[str] = (),
        probes: int = 16,
        seed: int = 0,
    ) -> None:
        if probes < 1:
            raise ValueError(f"probes={probes}: must be at least 1")
        include, exclude = list(include), list(exclude)
        names = {
            plain_name(model, name): m
            for name, m in model.named_modules()
            if type(m) in (nn.Linear, SketchedLinear) or is_conv1d(m)
        }
        self.layers = {
            name: layer
            for name, layer in names.items()
            if any(fnmatchcase(name, p) for p in include)
            and not any(fnmatchcase(name, p) for p in exclude)
        }
        if not self.layers:
            raise ValueError(
                f"include={include}, exclude={exclude}: no dense layer is left to watch"
            )
        self.probes, self.seed = probes, seed
        self._sums: dict[str, _Sums] = {}
        self._ranges: dict[str, Tensor] = {}  # of the last reading, (N, p) with orthonormal columns
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self._sums = {name: _Sums() for name in self.layers}
        self._handles = [
            layer.register_forward_hook(_Watch(self._sums[n], self._normal))
            for n, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _normal(self, rows: int, device: torch.device, *parts: str | int) -> Tensor:
        key = torch.full((), fold("monitor", self.seed, *parts), dtype=torch.int64, device=device)
        return normal_rows(key, slice(0, rows), self.probes)

    @torch.no_grad()
    def read(self) -> dict[str, Reading]:
        """A reading per layer that took part since the context was last entered, by name; drift is
        against the last call.
        """
        found = {}
        for name, sums in self._sums.items():
            if sums.activations is None or sums.gradient is None:
                continue
            y = sums.activations
            square = float(y.square().sum())
            stable_rank, drift = math.nan, None
            if math.isfinite(square):  # else there is no decomposition
                largest = float(torch.linalg.matrix_norm(y, 2))
                stable_rank = square / largest**2 if largest else 0.0
                before = self._ranges.get(name)
                if before is not None and square:
                    drift = max(1.0 - float((before.t() @ y).square().sum()) / square, 0.0)
                self._ranges[name] = torch.linalg.qr(y).Q
            found[name] = Reading(
                activation_energy=square / self.probes,
                gradient_norm=float(sums.gradient.square().sum() / self.probes) ** 0.5,
                stable_rank=stable_rank,
                drift=drift,
            )
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """What lives between readings: of each layer the last range, (N, p)."""
        return dict(self._ranges)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict()` of a monitor of the same model; what doesn't fit this one's
        layers and probes is left out.
        """
        shapes = {name: (width_of(layer), self.probes) for name, layer in self.layers.items()}
        self._ranges = {
            name: range_.to(self.layers[name].weight.device)
            for name, range_ in state.items()
            if name in shapes and tuple(range_.shape) == (shapes[name][0], min(shapes[name]))
        }
