"""What a layer has learned: the state of its method, as buffers of the layer (estimator.py says
which methods learn, and when).

The buffers are saved, loaded and moved with the layer, with four exceptions:

- A cast of the model (`model.bfloat16()`, `.to(torch.float64)`) is meant for its parameters. The
  state keeps the precision in which the method made it: a running count in bfloat16 would stop at
  256, orthonormal directions would not be any more.
- A checkpoint of the plain model holds no state; loaded, it leaves the state as it is. One that
  holds some of a layer's state is damaged or another method's, and PyTorch's strict error stands.
- Where a layer's weight is spread over processes as a DTensor (FSDP2), what it learns in a step
  that `basis.set_noise_key` has begun is the first process's in all of them, as it is with DDP,
  which sends buffers around. So a checkpoint (DCP) that keeps one of them keeps all.
- A layer that had shapes only, on the meta device, knows what it knows before the first step once
  it has memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from basis.estimator import Estimator, State
from basis.first_order import is_batched, without_transform
from basis.ops.matrix import cast_for_autocast, has_values

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@torch.no_grad()
def learned(estimator: Estimator, state: State, rows: Tensor, key: Tensor) -> State:
    """The state after `estimator` has learned from `rows` (B, N); in full precision also under
    autocast, and without graph.
    """
    if not state:
        return state
    with torch.autocast(rows.device.type, enabled=False):
        return estimator.learn(state, rows, key)


def learned_from_scratch(estimator: Estimator, rows: Tensor, key: Tensor) -> State:
    """The state after `rows` (B, N), if they are all that `estimator` has ever seen."""
    return learned(estimator, estimator.initial_state(rows.shape[1], rows.device), rows, key)


Names = tuple[str, ...]


def pack_state(state: State) -> tuple[Names, *tuple[Tensor, ...]]:
    """The names of a state and its tensors, as arguments of an autograd Function, which takes
    tensors one by one.
    """
    return tuple(state), *state.values()


def unpack_state(names: Names, *tensors: Tensor) -> State:
    """The state of which `pack_state` made these."""
    return dict(zip(names, tensors, strict=True))


def _is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph records what is done to `x`."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Learning(nn.Module):
    """Mixin of layers with an `estimator` that may learn; its state is in buffers named
    `estimator_<name>`.
    """

    estimator: Estimator
    in_features: int
    weight: Tensor
    _state_names: tuple[str, ...] = ()

    learning: bool | None = None
    """Whether the next training forward learns; None: each one does. Set for a step by
    `basis.set_noise_key`.
    """
    saves_state: bool = True
    """Whether the state is in the state_dict; see layers/adapters.py for where it is not."""
    shared_by: DeviceMesh | None = None
    """The processes over which the weight is spread, if it is; from `basis.set_noise_key`."""
    first_step: int = 0
    """The step at which the layer knew nothing; the method's `learns_at` counts steps from it."""
    frozen: bool = False
    """Whether `basis.set_noise_key` leaves it at not learning; see convert.py's `not_learning`."""

    @property
    def state(self) -> dict[str, Tensor]:
        """What the layer has learned, by name; empty if its method never learns."""
        return {name: getattr(self, f"estimator_{name}") for name in self._state_names}

    def forget(self, device: torch.device | None = None) -> None:
        """Make a new state, as it is before the first step, on `device` (None: the weight's)."""
        state = self.estimator.initial_state(
            self.in_features, self.weight.device if device is None else device
        )
        for name, tensor in state.items():
            self.register_buffer(f"estimator_{name}", tensor, persistent=self.saves_state)
        self._state_names = tuple(state)

    def leave_state_unsaved(self) -> None:
        """From now on the state is in no state_dict."""
        self.saves_state = False
        self._non_persistent_buffers_set |= {f"estimator_{name}" for name in self._state_names}

    def learn(self, input: Tensor, key: Tensor) -> State:
        """The state with which a forward on `input` compresses, after a look at it if this is a
        step to learn at. For forwards that may be differentiated only.
        """
        state = self.state
        if not state or self.learning is False or not has_values(input) or is_batched(input):
            return state
        rows = cast_for_autocast(input.detach()).reshape(-1, input.shape[-1])
        self._remember(learned(self.estimator, state, rows, key))
        if self.learning:
            # Once a step: a recomputed forward finds what the first one has learned.
            self.learning = False
            self._take_over_the_first()
        return self.state

    def _take_over_the_first(self) -> None:
        """Make the state the first process's, in all that share this layer. Eager mode only."""
        if self.shared_by is None or torch.compiler.is_compiling():
            return
        with torch.no_grad():
            for tensor in self.state.values():
                for dimension in range(self.shared_by.ndim):
                    group = self.shared_by.get_group(dimension)
                    torch.distributed.broadcast(tensor, group=group, group_src=0)

    def _remember(self, state: State) -> None:
        """Put the tensors of `state` in the place of the present ones. Those stay as they are: an
        earlier forward may have saved them for its backward.
        """
        for name, tensor in state.items():
            old = self.state[name]
            if torch.compiler.is_compiling() or _is_captured(old):
                # A graph is replayed with the memory that it has seen. A compiler keeps what
                # backward needs apart.
                old.copy_(tensor)
            else:
                # Contiguous as a loaded checkpoint is, so that a resumed run has the same bits.
                new = tensor.to(old.dtype).contiguous()
                self._buffers[f"estimator_{name}"] = without_transform(new)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.state
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self.state[name]
            if old.is_meta and not new.is_meta:
                self.forget(new.device)
                break
            if new.dtype != old.dtype:  # not cast back: that would have lost digits
                self._buffers[f"estimator_{name}"] = old.to(new.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *rest
        )
        own = {f"{prefix}estimator_{name}": tensor for name, tensor in self.state.items()}
        if own and not own.keys() & state_dict.keys():
            missing_keys[:] = [key for key in missing_keys if key not in own]
            if (
                any(tensor.is_meta for tensor in own.values()) and not self.weight.is_meta
            ):  # load_state_dict(assign=True)
                self.forget()
