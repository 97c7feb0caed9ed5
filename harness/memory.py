"""Where the bytes of a training step are: what autograd keeps for backward, by category, and the
peak.

*Kept for backward.* `saved_tensors_hooks` sees every tensor that autograd saves during forward.
Each storage is counted once, whole, for the first layer that saves it (a view keeps its whole
storage alive), and parameters and buffers are left out, since they are there anyway. The category
is the kind of the layer whose forward was running:

| category | saved by |
|---|---|
| linear inputs | nn.Linear: X, B x N |
| sketches | a sketched layer: what its estimator keeps |
| attention | the attention module: q, k, v, output, log-sum-exp, dropout |
| norms | LayerNorm, RMSNorm: input and statistics |
| activations | GELU and its like: their input or output |
| loss head | the model itself: dX and dW of the head, or dW's factors (basis/loss_head.py) |
| weight copies | autocast: a low-precision weight, which SketchedLinear makes again |
| other | embeddings (token indices), dropout, anything else |

A tensor that two layers need, such as a LayerNorm's output that is a dense layer's input, counts
where it is saved first. The categories come from an eager pass. A compiled model keeps what its
partitioner chooses; its total is measured on the compiled function and reported beside, without
categories.

*Peak.* On CUDA the allocator knows. On the CPU the storages of one forward and backward are
followed operator by operator: parameters, gradients, activations and temporaries that exist at
once, and the optimiser's state, which is counted before it exists. The count is that of PyTorch's
MemTracker (torch.distributed._tools, private) to the byte, at a third of the time.

Cost: one to three extra forward passes before the first step, side effects undone (gradients,
random state).
"""

from __future__ import annotations

import math
import resource
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from basis.diagnostics import kept
from basis.diagnostics.saved import observe
from basis.sketched import Sketched
from harness.world import local, sharded_modules, spread
from models import LanguageModel

DENSE, SKETCHES, LOSS, COPIES = "linear inputs", "sketches", "loss head", "weight copies"
CATEGORIES = (
    DENSE,
    SKETCHES,
    kept.ATTENTION,
    kept.NORMS,
    kept.ACTIVATIONS,
    LOSS,
    COPIES,
    kept.OTHER,
)
_AS_THERE = {kind: kind for kind in (kept.ATTENTION, kept.NORMS, kept.ACTIVATIONS)}
_OF_KEPT = {kept.DENSE: DENSE, **_AS_THERE}
"""What basis/diagnostics/kept.py tells by a module's class, and what it is called here."""


def _category(module: nn.Module | None, tensor: Tensor) -> str:
    """What `tensor` is kept for, where the forward of `module` is running."""
    if isinstance(module, nn.Linear) and tensor.dtype != module.weight.dtype:
        shapes = (module.weight.shape, module.weight.t().shape)
        if tensor.is_floating_point() and tensor.shape in shapes:
            return COPIES
    if isinstance(module, Sketched):
        return SKETCHES
    if module is None:
        return kept.OTHER
    if isinstance(module, LanguageModel) or _has_the_loss(module):
        return LOSS
    return _OF_KEPT.get(kept.category(module) or "", kept.OTHER)


def _has_the_loss(module: nn.Module) -> bool:
    """Whether `module` is a language model of transformers, whose own forward takes the loss."""
    return type(module).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of all storages behind `tensors`, each once; of a tensor that is spread over processes,
    this one's part.
    """
    here = [local(tensor) for tensor in tensors if tensor is not None]
    return sum({_storage_id(t): t.untyped_storage().nbytes() for t in here}.values())


def _storage_id(tensor: Tensor) -> int:
    """Equal for two tensors that are there at once if they lie in the same storage. Its address
    would not do: fake tensors have none, and what fsdp has let go of serves others.
    """
    return int(tensor.untyped_storage()._cdata)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimiser's state tensors; before its first step, those that SGD or AdamW will
    make (scalars left out).
    """
    if optimizer.state:
        return tensor_bytes(
            v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)
        )
    copies = {
        torch.optim.SGD: int(optimizer.defaults.get("momentum", 0) > 0),
        torch.optim.AdamW: 2,
    }[type(optimizer)]
    return copies * tensor_bytes(p for group in optimizer.param_groups for p in group["params"])


def _record(
    model: nn.Module, forward: Callable[[], Tensor], category: Callable[[Tensor], str]
) -> dict[str, int]:
    """Bytes kept for the backward of `forward()`, by what `category(tensor)` says at the moment of
    saving.
    """
    found: dict[int, tuple[str, int]] = {}
    known: set[int] = set()

    def note(module: nn.Module, _: object) -> None:
        """Parameters that are whole only while their module runs."""
        known.update(_storage_id(p) for p in module.parameters() if not spread(p))

    def pack(tensor: Tensor) -> Tensor:
        found.setdefault(_storage_id(tensor), (category(tensor), tensor.untyped_storage().nbytes()))
        return tensor

    handles = [module.register_forward_pre_hook(note) for module in sharded_modules(model)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), observe(pack):
        loss = (
            forward()
        )  # named, so that the graph lives (and no storage is used again) until all is counted
    for handle in handles:
        handle.remove()
    assert (
        loss.requires_grad == torch.is_grad_enabled()
    )  # without grad mode, as zeroth order runs, nothing is kept
    # Parameters and buffers are there anyway. Asked for after the forward: a layer that learns has
    # new buffers then, and keeps these.
    known |= {_storage_id(t) for t in [*map(local, model.parameters()), *model.buffers()]}
    table: dict[str, int] = {}
    for storage, (name, size) in found.items():
        if storage not in known:
            table[name] = table.get(name, 0) + size
    return table


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> dict[str, int]:
    """Bytes that autograd keeps for the backward of `forward()`, by category. `forward` runs
    `model` and returns the loss.
    """
    running: list[nn.Module] = []

    def enter(module: nn.Module, _: object) -> None:
        running.append(module)

    def leave(module: nn.Module, _: object, __: object) -> None:
        left = running.pop()
        assert left is module

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for module in model.modules():
        if isinstance(model, LanguageModel) and module is model.head:
            continue  # with a hook on it, its logits would be made for the hook to see
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        table = _record(
            model, forward, lambda tensor: _category(running[-1] if running else None, tensor)
        )
    finally:
        for handle in handles:
            handle.remove()
    return dict.fromkeys(CATEGORIES, 0) | table


def saved_bytes_total(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes kept for the backward of `forward()` in all; a compiled one too, where hooks on layers
    would break the graph.
    """
    return sum(_record(model, forward, lambda _: "all").values())


class LiveBytes(TorchDispatchMode):
    """Follows, operator by operator, the storages that exist: those of `tensors`, and all that
    operators make meanwhile.

    resized: whether storages may change their size meanwhile, as those of whole parameters do under
    fsdp; all are then looked at after each operator. series: the operators, and the bytes alive
    after each.
    """

    def __init__(self, tensors: Iterable[Tensor], *, resized: bool = False) -> None:
        super().__init__()
        self._resized = resized
        self.series: list[tuple[Any, int]] = []
        self._now = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in tensors:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = local(tensor).untyped_storage()
        key, size = (
            storage._cdata,
            storage.nbytes(),
        )  # a fake tensor has a storage with an identity, and no address
        if key in self._alive:
            return

        def freed(_: object) -> None:
            del self._alive[key]
            self._now -= size  # counted anew where sizes change

        self._alive[key] = weakref.ref(storage, freed)  # of the storage: views come and go
        self._now += size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if self._resized:
            storages = (reference() for reference in list(self._alive.values()))
            self._now = sum(storage.nbytes() for storage in storages if storage is not None)
        self.series.append((function, self._now))
        return result


def held_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters, buffers, gradients and optimiser state, as far as they exist."""
    state = [
        v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)
    ]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*model.parameters(), *model.buffers(), *gradients, *state]


def cpu_peak_bytes(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    forward_backward: Callable[[int], None],
    micro_batches: int = 1,
) -> int:
    """Most bytes of tensors alive at once during `forward_backward(i)` for each micro-batch i.

    Counts parameters, buffers, gradients, optimiser state (before it exists too), activations and
    temporaries.
    """
    resized = bool(sharded_modules(model))
    with LiveBytes(held_tensors(model, optimizer), resized=resized) as live:
        for micro_batch in range(micro_batches):
            forward_backward(micro_batch)
    return max(now for _, now in live.series) + (
        0 if optimizer.state else optimizer_bytes(optimizer)
    )


def rss_bytes() -> int:
    """Resident set of this process: now on Linux, elsewhere the largest so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def format_bytes(size: float) -> str:
    """`size` with three significant digits and a binary unit: 1536 -> "1.50 KiB"."""
    if size < 1024:
        return f"{size:.0f} B"
    units = ("KiB", "MiB", "GiB", "TiB")
    exponent = min(int(math.log(size, 1024)), len(units))
    value = size / 1024**exponent
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {units[exponent - 1]}"


def memory_table(saved: dict[str, int], others: dict[str, int]) -> str:
    """The table that a run prints: categories kept for backward, their total, then `others`."""
    total = sum(saved.values())
    lines = ["memory kept from forward to backward, of one micro-batch:"]
    lines += [
        f"  {name:<18}{format_bytes(size):>12}{size / max(total, 1):>7.1%}"
        for name, size in saved.items()
        if size
    ]
    lines.append(f"  {'total':<18}{format_bytes(total):>12}")
    lines += [f"{name:<20}{format_bytes(size):>12}" for name, size in others.items()]
    return "\n".join(lines)
