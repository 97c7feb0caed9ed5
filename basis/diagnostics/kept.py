"""What a forward of a model keeps for backward, in bytes, by what it is kept for.

Counted are distinct storages that autograd saves, and those that are announced as living until
backward (saved.py); not the parameters and buffers of the model, nor the sample itself, which are
there anyway. A storage counts once, for the module that saves it first: an attention's output,
which its output projection reads too, is attention's. What a storage is kept for is told by the
class of the innermost module at work that is of a known kind. What it costs: one forward, whose
memory is held until it ends.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._pytree import tree_leaves

from basis.convert import not_learning, sketched_layers
from basis.diagnostics.saved import observe
from basis.sketched import Sketched

DENSE = "inputs of dense layers"
NORMS = "norms"
ACTIVATIONS = "activations"
ATTENTION = "attention"
DROPOUT = "dropout"
EMBEDDINGS = "embeddings"
LOSS = "logits and loss"
OTHER = "other"
CATEGORIES = (DENSE, NORMS, ACTIVATIONS, ATTENTION, DROPOUT, EMBEDDINGS, LOSS, OTHER)

# Parts of class names, the first that fits. Other libraries' classes are told by name, so that none
# of them need be imported.
_BY_NAME = (
    ("Linear", DENSE),
    ("Conv1D", DENSE),
    ("Experts", DENSE),
    ("Norm", NORMS),
    ("Dropout", DROPOUT),
    ("Embedding", EMBEDDINGS),
    ("Attention", ATTENTION),
    *(
        (part, ACTIVATIONS)
        for part in ("MLP", "GELU", "SiLU", "ReLU", "Activation", "Tanh", "Sigmoid")
    ),
    *((part, ACTIVATIONS) for part in ("Intermediate", "DenseAct", "DenseGatedAct")),
)


def category(module: nn.Module) -> str | None:
    """What `module` keeps tensors for; None if its class says nothing."""
    if isinstance(module, Sketched):
        return DENSE
    name = type(module).__name__
    return next((kind for part, kind in _BY_NAME if part in name), None)


def call(model: nn.Module, sample: Any) -> Any:
    """`model` called with a sample: by keywords for a mapping, with several arguments for a tuple
    or list, else with the sample itself.
    """
    if isinstance(sample, Mapping):
        return model(**sample)
    if isinstance(sample, Sequence):
        return model(*sample)
    return model(sample)


def tokens_of(sample: Any) -> int:
    """Tokens of a sample: the numbers of its first tensor if that is one of integers, such as
    input_ids, else its rows.
    """
    first = next((t for t in tree_leaves(sample) if isinstance(t, Tensor)), None)
    if first is None or first.numel() == 0:
        raise ValueError("sample: has no tensor with numbers; give what the model is called with")
    return first.numel() // (first.shape[-1] if first.is_floating_point() else 1)


class _Watch:
    """Which modules are at work, and what is saved meanwhile."""

    def __init__(self, known: set[int]) -> None:
        self.known = known
        self.storages: dict[int, Any] = {}
        self.sizes: Counter[str] = Counter()
        self.rows: dict[nn.Module, int] = {}
        self._at_work: list[nn.Module] = []

    def enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._at_work.append(module)
        if category(module) == DENSE and inputs and isinstance(inputs[0], Tensor):
            x = inputs[0]
            if x.ndim > 0 and x.shape[-1] > 0:
                self.rows[module] = x.numel() // x.shape[-1]

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        assert self._at_work.pop() is module

    def _category(self) -> str:
        kinds = (category(module) for module in reversed(self._at_work))
        known = next((kind for kind in kinds if kind is not None), None)
        if known is not None:
            return known
        # Within no module of a known kind: the model's own forward, or one of its many blocks.
        in_a_block = any(
            "Layer" in type(m).__name__ or "Block" in type(m).__name__ for m in self._at_work
        )
        return OTHER if in_a_block else LOSS

    def save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known and storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage  # held, so that its address is not used again
            self.sizes[self._category()] += storage.nbytes()
        return tensor


@contextmanager
def _watching(model: nn.Module, sample: Any) -> Iterator[_Watch]:
    given = [t for t in tree_leaves(sample) if isinstance(t, Tensor)]
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *given)}
    watch = _Watch(known)
    handles = [
        register_module_forward_pre_hook(watch.enter),
        register_module_forward_hook(watch.leave, always_call=True),
    ]
    try:
        with observe(watch.save), torch.autograd.graph.saved_tensors_hooks(watch.save, lambda t: t):
            yield watch
    finally:
        for handle in handles:
            handle.remove()


def kept_by_category(model: nn.Module, sample: Any) -> tuple[dict[str, int], dict[nn.Module, int]]:
    """Bytes that a forward of `model` on `sample` keeps for backward, by category; and the rows of
    the input of each dense layer that ran.

    sample: what the model is called with (`call`). The forward runs in the mode that the model is
    in, with gradients on; PyTorch's generators, and what layers have learned, are as they were
    afterwards.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with (
        torch.random.fork_rng(devices),
        torch.enable_grad(),
        not_learning(model),
        _watching(model, sample) as watch,
    ):
        output = call(model, sample)
        del output
    return {name: watch.sizes[name] for name in CATEGORIES if watch.sizes[name]}, watch.rows


def first_readers(
    model: nn.Module, forward: Callable[[], object], skip: Sequence[nn.Module] = ()
) -> dict[str, tuple[str, int]]:
    """For each sketched layer that `forward()` runs, by name: the first one that reads the same
    tensor, itself unless it shares its input (shared_input.py), and the rows of that tensor. A head
    that is fused with its loss must be among `skip`, the layers that are not looked at.
    """
    inputs: dict[tuple[int, int], tuple[str, weakref.ref[Tensor]]] = {}
    found: dict[str, tuple[str, int]] = {}

    def note(name: str, x: Tensor) -> None:
        leader, known = inputs.get((id(x), x._version), (name, None))
        if known is None or known() is not x:  # another one had its id before
            leader = name
            inputs[id(x), x._version] = name, weakref.ref(x)
        found.setdefault(name, (leader, x.numel() // x.shape[-1]))

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, layer in sketched_layers(model)
        if not any(layer is other for other in skip)
    ]
    try:
        if handles:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found
