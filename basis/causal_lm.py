"""The fused head in a language model of transformers, whose own forward and own loss stay in use.

    basis.fuse_head(model)        # a PreTrainedModel, or a PeftModel around one
    model(input_ids=..., labels=..., num_items_in_batch=...).loss
    basis.unfuse_head(model)      # basis.revert does it too

In a training forward with labels the head returns no logits but `UnformedLogits`: its input and
what the model does to logits before the loss (unformed_logits.py). The model's forward goes on as
ever, scales and caps them, flattens them, hands them to its loss function, and that one calls
F.cross_entropy. There `linear_cross_entropy` takes over. So the loss is the model's own, in all its
parts (shifted labels, -100, `num_items_in_batch`, the auxiliary loss of a mixture), for any model
whose loss is a cross-entropy of its head's output; there is no list of families. torch.compile goes
through it in one graph, unless the model calls an nn.CrossEntropyLoss of its own, as T5: there the
graph ends.

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
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from basis.exchange import plain_name
from basis.loss_head import HeadHook, fusible_kinds
from basis.unformed_logits import Switch, UnformedLogits


def _forward_of_head(self: nn.Linear, input: Tensor) -> Any:
    """The forward of a fused head."""
    switch: Switch = self._basis_switch  # type: ignore[assignment]
    plain = type(self).forward
    if not switch.wanted:
        return plain(self, input)
    if why := _hooked(self):
        raise ValueError(f"fuse_head: the head {why}")
    return UnformedLogits(self, input, switch)


def _forward_of_model(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a model whose head is fused."""
    switch: Switch | None = getattr(self.get_output_embeddings(), "_basis_switch", None)
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
    head._basis_switch = Switch(place)
    head.forward = MethodType(_forward_of_head, head)
    outer.forward = MethodType(forward, outer)
    return name


def is_fused(head: nn.Module) -> bool:
    """Whether `head` is a layer that `fuse_head` has fused with its model's loss."""
    return "_basis_switch" in vars(head)


def unfuse_head(model: nn.Module) -> str | None:
    """Undo `fuse_head`. Returns the head's name, None if nothing was fused."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    for outer, head in _fused(model):
        found = plain_name(model, names[id(head)])
        del outer.forward
        if is_fused(head):  # not in a head that came later
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
