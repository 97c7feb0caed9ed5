"""The fused head in a language model of transformers, whose own forward and own loss stay in use.

    basis.fuse_head(model)        # a PreTrainedModel, or a PeftModel around one
    model(input_ids=..., labels=..., num_items_in_batch=...).loss
    basis.unfuse_head(model)      # basis.revert does it too

In a training forward with labels the head returns no logits but `UnformedLogits`: its input and
what the model does to logits before the loss. The model's forward goes on as ever, scales and caps
them, flattens them, hands them to its loss function, and that one calls F.cross_entropy. There
`linear_cross_entropy` takes over. So the loss is the model's own, in all its parts (shifted labels,
-100, `num_items_in_batch`, the auxiliary loss of a mixture), for any model whose loss is a
cross-entropy of its head's output; there is no list of families. torch.compile goes through it in
one graph, unless the model calls an nn.CrossEntropyLoss of its own, as T5: there the graph ends.

What is exact: the loss and all gradients, unless the head is a sketched layer; then its dW is that
layer's estimate. What is kept: see loss_head.py; no logits. A head whose weight is trained keeps
the weight's gradient from the forward on, so with fewer rows than the head's input is wide there is
nothing to gain.

The output's `logits` are None in such a forward. They are there, whole, without labels, in eval()
and under torch.no_grad, where nothing is changed: evaluation with metrics finds its logits. In
float16 logits are formed after all, with a warning (loss_head.py says why).

Where a model does anything else with its logits, the forward raises a ValueError that names it.
Nothing goes on with a loss other than the model's, and nothing is silently without effect.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.exchange import plain_name
from basis.loss_head import HeadHook, fusible_kinds, linear_cross_entropy
from basis.ops.matrix import cast_for_autocast


@dataclass
class _Switch:
    """What the model's forward and the head's tell each other. wanted: form no logits now. used:
    a loss was taken from logits that were not formed.
    """

    labels: int  # place of `labels` in the model's forward
    wanted: bool = False
    used: bool = False


class WholeLogitsNeeded(ValueError, AttributeError):
    """A model asks of its logits what can't be had without forming them. (An AttributeError, so
    that hasattr works.)
    """


def _needed(what: str) -> WholeLogitsNeeded:
    return WholeLogitsNeeded(
        f"fuse_head: the model's forward takes {what} of its logits, which a fused head never "
        "forms; call basis.unfuse_head(model), or train without head=True"
    )


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: UnformedLogits, *args: Any, **kwargs: Any) -> Any:
        raise _needed(name)

    return refuse


class UnformedLogits:
    """Logits layer(input) (..., V), scaled, capped and scaled again, that nobody forms.

    It does what a model does to logits before the loss: a change of scale, tanh, views that leave
    the last dimension alone, casts to a floating-point dtype (the loss is taken in float32 at
    least), and F.cross_entropy, over rows. Everything else raises WholeLogitsNeeded.
    """

    requires_grad = False  # so that hooks that wait for gradients leave it alone

    def __init__(
        self,
        layer: nn.Linear,
        input: Tensor,
        switch: _Switch,
        inner: float = 1.0,
        outer: float | None = None,  # behind a tanh; None: there is none
    ) -> None:
        self.layer, self.input, self.switch = layer, input, switch
        self.inner, self.outer = inner, outer

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.input.shape[:-1], self.layer.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.input.device

    @property
    def dtype(self) -> torch.dtype:
        return cast_for_autocast(self.input).dtype

    @property
    def ndim(self) -> int:
        return self.input.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.input.ndim

    def __getattr__(self, name: str) -> Any:
        raise _needed(f"`{name}`")

    def _with(self, **changes: Any) -> UnformedLogits:
        now = {"input": self.input, "inner": self.inner, "outer": self.outer, **changes}
        return UnformedLogits(self.layer, switch=self.switch, **now)

    # Of the values: scale and tanh.

    def __mul__(self, factor: float) -> UnformedLogits:
        if isinstance(factor, Tensor | UnformedLogits):
            raise _needed("a product with a tensor")
        if self.outer is None:
            return self._with(inner=self.inner * float(factor))
        return self._with(outer=self.outer * float(factor))

    __rmul__ = mul = __mul__

    def __truediv__(self, divisor: float) -> UnformedLogits:
        if isinstance(divisor, Tensor | UnformedLogits):
            raise _needed("a quotient with a tensor")
        return self * (1.0 / float(divisor))

    div = __truediv__

    def tanh(self) -> UnformedLogits:
        if self.outer is not None:
            raise _needed("tanh of tanh")
        return self._with(outer=1.0)

    # Of the shape: all but the last dimension is that of the input.

    def view(self, *shape: Any) -> UnformedLogits:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if sizes[-1] not in (self.shape[-1], -1):
            raise _needed(f"a view {tuple(sizes)}")
        width = self.input.shape[-1]
        if sizes[-1] == -1:
            rows = functools.reduce(lambda a, b: a * b, sizes[:-1], 1)
            if rows * width != self.input.numel():
                raise _needed(f"a view {tuple(sizes)}")
        return self._with(input=self.input.reshape(*sizes[:-1], width))

    reshape = view

    def flatten(self, start: int = 0, end: int = -1) -> UnformedLogits:
        last = end % self.ndim
        if last == self.ndim - 1 and start % self.ndim != last:
            raise _needed("a view that joins rows")
        return (
            self if start % self.ndim == last else self._with(input=self.input.flatten(start, end))
        )

    def contiguous(self) -> UnformedLogits:
        return self

    def __getitem__(self, index: Any) -> UnformedLogits:
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is Ellipsis for part in parts):
            place = next(i for i, part in enumerate(parts) if part is Ellipsis)
            missing = self.ndim - (len(parts) - 1)
            parts = (*parts[:place], *(slice(None),) * missing, *parts[place + 1 :])
        whole = len(parts) < self.ndim or parts[-1] == slice(None)
        if not whole or not all(isinstance(part, slice | int) for part in parts):
            raise _needed("a part")
        return self._with(input=self.input[parts])

    # Of the precision: the loss is taken in float32 at least.

    def float(self) -> UnformedLogits:
        return self

    double = upcast = float

    def to(self, *args: Any, **kwargs: Any) -> UnformedLogits:
        for value in (*args, *kwargs.values()):
            dtype = value.dtype if isinstance(value, Tensor) else value
            if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
                raise _needed(f"a cast to {dtype}")
            device = value.device if isinstance(value, Tensor) else value
            if isinstance(device, str | torch.device) and torch.device(device) != self.device:
                raise _needed(f"a copy on {device}")
        return self

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.cross_entropy:
            return _cross_entropy(*args, **kwargs)
        if function in (torch.tanh, F.tanh) and not kwargs:
            return args[0].tanh()
        raise _needed(f"`{getattr(function, '__name__', function)}`")


for _name in ("add", "radd", "sub", "rsub", "rtruediv", "pow", "neg", "matmul", "setitem", "iter",
              "len", "lt", "gt", "le", "ge"):  # fmt: skip
    setattr(UnformedLogits, f"__{_name}__", _refusal(f"`{_name}`"))


def _cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """F.cross_entropy of logits that are not formed."""
    if not isinstance(input, UnformedLogits):
        raise _needed("a cross-entropy of other logits")
    if weight is not None or size_average is not None or reduce is not None:
        raise _needed("a cross-entropy with class weights")
    if reduction not in ("mean", "sum") or input.ndim != 2 or target.is_floating_point():
        raise _needed(f"a cross-entropy with reduction={reduction!r} and {input.ndim} dimensions")
    switch = input.switch
    softcap = scale = None
    scale = input.inner
    if input.outer is not None:  # outer tanh(inner y) = c tanh(s y / c)
        softcap, scale = abs(input.outer), input.inner * input.outer
    if input.dtype == torch.float16:
        warnings.warn(
            "fuse_head: in float16 the logits are formed whole; train in bfloat16", stacklevel=2
        )
    switch.wanted, switch.used = False, True
    try:
        loss = linear_cross_entropy(
            input.layer,
            input.input,
            target,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=softcap,
            logit_scale=scale,
            reduction="sum" if reduction == "sum" else "mean",
        )
    finally:
        switch.wanted = True
    return loss


def _forward_of_head(self: nn.Linear, input: Tensor) -> Any:
    """The forward of a fused head."""
    switch: _Switch = self._basis_switch  # type: ignore[assignment]
    plain = type(self).forward
    if not switch.wanted:
        return plain(self, input)
    if why := _hooked(self):
        raise ValueError(f"fuse_head: the head {why}")
    return UnformedLogits(self, input, switch)


def _forward_of_model(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a model whose head is fused."""
    switch: _Switch | None = getattr(self.get_output_embeddings(), "_basis_switch", None)
    if switch is None:
        raise ValueError(
            f"fuse_head: the head of {type(self).__name__} was replaced since; call "
            "basis.unfuse_head(model), then basis.fuse_head(model)"
        )
    labels = kwargs.get("labels")
    if labels is None and len(args) > switch.labels:
        labels = args[switch.labels]
    plain = type(self).forward
    if labels is None or not self.training or not torch.is_grad_enabled():
        return plain(self, *args, **kwargs)
    switch.wanted, switch.used = True, False
    try:
        output = plain(self, *args, **kwargs)
    finally:
        switch.wanted = False
    if not switch.used:
        raise ValueError(
            f"fuse_head: {type(self).__name__} takes no loss of the output of its head; call "
            "basis.unfuse_head(model)"
        )
    return _without_logits(output)


def _without_logits(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(part for part in output if not isinstance(part, UnformedLogits))
    names = [field.name for field in dataclasses.fields(output)]
    values = {name: getattr(output, name) for name in names}
    return type(output)(
        **{
            name: None if isinstance(value, UnformedLogits) else value
            for name, value in values.items()
        }
    )


def _hooked(head: nn.Module) -> str | None:
    """What a head has that must see its output, which is never formed."""
    others = [hook for hook in head._forward_hooks.values() if not isinstance(hook, HeadHook)]
    tables = (others, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return "has hooks, which must see its output" if any(tables) else None


def _language_model(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The outermost module with a head and a loss of its own, and its name."""
    for name, module in model.named_modules():
        kind = type(module)
        has_head = callable(getattr(kind, "get_output_embeddings", None))
        if has_head and "labels" in inspect.signature(kind.forward).parameters:
            return name, module
    return None


def _fused(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Models with a fused head and their heads."""
    return [
        (module, module.get_output_embeddings())  # type: ignore[operator]
        for module in model.modules()
        if getattr(vars(module).get("forward"), "_basis_fused", False)
    ]


def fuse_head(model: nn.Module) -> str:
    """Fuse the last layer of a language model of transformers with its loss: no logits are kept,
    and none whole are formed, in a training forward with labels. Returns the head's name.

    model: a PreTrainedModel whose forward takes `labels`, or anything around one, such as a
    PeftModel. The loss stays the model's own. In a training forward with labels the output's
    `logits` are None; in eval(), under torch.no_grad or without labels nothing is changed: a
    Trainer's own label smoothing, which keeps the labels from the model, has whole logits. Before
    accelerate's or a Trainer's preparation; not with nn.DataParallel, whose replicas share a
    forward. A pickled model comes back without it, `save_pretrained` knows nothing of it.

    Raises ValueError, before anything is changed: if there is no such model or it has no head; if
    the head is no plain, sketched or recomputing dense layer (adapters on the head), has hooks or
    is in float16; if either forward was replaced. A model that takes something else than a
    cross-entropy of its logits raises ValueError in its first training forward.
    """
    found = _language_model(model)
    if found is None:
        raise ValueError(
            f"fuse_head: {type(model).__name__} holds no language model of transformers: no module "
            "with get_output_embeddings() whose forward takes labels"
        )
    _, outer = found
    kind = type(outer).__name__
    head = outer.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise ValueError(f"fuse_head: {kind} has no head: get_output_embeddings() is None")
    names = {id(module): name for name, module in model.named_modules()}
    name = plain_name(model, names[id(head)])
    what = f"fuse_head: the head {name} of {kind}"
    if type(head) not in fusible_kinds():
        raise ValueError(
            f"{what} is a {type(head).__name__}, whose own forward would be lost; only nn.Linear "
            "and what basis.convert makes of it can be fused"
        )
    for module, who in ((outer, f"fuse_head: {kind}"), (head, what)):
        if "forward" in vars(module):
            raise ValueError(
                f"{who}: its forward was replaced on the object (by fuse_head itself, or by "
                "accelerate's hooks); undo that first"
            )
    if why := _hooked(head):
        raise ValueError(f"{what} {why}")
    if head.weight.dtype == torch.float16:
        raise ValueError(f"{what} is in float16, where logits are formed whole; use bfloat16")
    plain = type(outer).forward
    place = [*inspect.signature(plain).parameters].index("labels") - 1  # without self

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward_of_model(self, *args, **kwargs)

    forward._basis_fused = True  # type: ignore[attr-defined]
    head._basis_switch = _Switch(place)
    head.forward = MethodType(_forward_of_head, head)
    outer.forward = MethodType(forward, outer)
    return name


def unfuse_head(model: nn.Module) -> str | None:
    """Undo `fuse_head`. Returns the head's name, None if nothing was fused."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    for outer, head in _fused(model):
        found = plain_name(model, names[id(head)])
        del outer.forward
        if "_basis_switch" in vars(head):  # not in a head that came later
            del head.forward, head._basis_switch
    return found


@contextmanager
def unfused(model: nn.Module) -> Iterator[str | None]:
    """`unfuse_head` that is undone if the block raises."""
    name = unfuse_head(model)
    try:
        yield name
    except BaseException:
        if name is not None:
            fuse_head(model)
        raise
