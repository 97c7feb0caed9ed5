"""The two sides of an exchange: what `basis.convert` puts into a model, `basis.revert` takes out.

An `Exchange` says which modules of a model are replaced, and by what: sketched layers for dense
ones (convert.py), `basis.Lean` and `basis.SUS`. What it puts in is a `StandIn`, which can give the
module back that it stands for. `convert` and `revert` know nothing else of either.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.fx import Proxy
from torch.nn.modules.module import _WrappedHook

Module = TypeVar("Module", bound=nn.Module)


class StandIn(nn.Module):
    """Mixin of modules that stand in a model for another one.

    In eval() they work as in training, with the same gradients, as nn.Linear does: to evaluate, use
    torch.no_grad or inference_mode. What is made for inference alone, by torch.export or
    torch.jit.trace of a model in eval(), holds the plain operations (`for_inference`). A graph of
    torch.fx.symbolic_trace calls the stand-in as one module, as it calls nn.Linear (`node`).
    """

    stands_for: ClassVar[type[nn.Module]] = nn.Module
    """For a subclass of the class whose modules it stands for: that class."""

    @property
    def own_names(self) -> frozenset[str]:
        """Attributes, buffers and submodules of this object that the module it stands for does not
        have. Those with a default in the class need not be named.
        """
        return frozenset()

    @abc.abstractmethod
    def original(self) -> nn.Module:
        """The module that this one stands for, with the same parameters.

        Raises ValueError if something was put on this one that would be lost.
        """

    def settle(self) -> None:
        """Called where this object has taken over what another one was, as its own."""

    def for_inference(self) -> bool:
        """Whether a graph is being made of this module in eval(): it will have no backward."""
        return not self.training and (torch.compiler.is_exporting() or torch.jit.is_tracing())

    def node(self, *inputs: Proxy) -> Proxy:
        """The call of this module in a graph of torch.fx.symbolic_trace."""
        tracer = inputs[0].tracer
        assert isinstance(tracer, torch.fx.Tracer)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), inputs, {})


def take_over(layer: Module, old: nn.Module) -> Module:
    """Give `layer` all that `old` has: parameters, buffers, submodules, hooks, mode and attributes,
    apart from the names that a stand-in has to itself. Returns `layer`.

    Raises ValueError for what can't be taken over: a forward or a compiled call of the object's
    own, a parametrization, and names that the stand-in `layer` needs itself.
    """
    refuse_replaced_forward(old)
    if nn.utils.parametrize.is_parametrized(old):
        raise ValueError(
            "it has a parametrization; take that away first, with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    leave: set[str] = set()
    if isinstance(old, StandIn):
        leave = {name for name in vars(old) if _has_more(type(old), old.stands_for, name)}
        leave |= old.own_names
    kept = {name: value for name, value in vars(old).items() if name not in leave}
    tables = {
        table: {name: value for name, value in kept.pop(table).items() if name not in leave}
        for table in ("_parameters", "_buffers", "_modules")
    }
    if isinstance(layer, StandIn):
        given = kept.keys() | {name for entries in tables.values() for name in entries}
        needed = {name for name in given if _has_more(type(layer), type(old), name)}
        if taken := sorted(needed | (layer.own_names & given)):
            raise ValueError(
                f"it has {', '.join(taken)}, which {type(layer).__name__} needs for itself; rename "
                "it, or exclude the layer"
            )
    layer._parameters.clear()  # those of `layer` are on the meta device
    for table, entries in tables.items():
        getattr(layer, table).update(entries)
    layer._non_persistent_buffers_set |= kept.pop("_non_persistent_buffers_set") - leave
    for name, value in kept.items():
        vars(layer)[name] = _rebound(value, layer) if name.endswith("_hooks") else value
    return layer


def is_held(module: nn.Module) -> bool:
    """Whether others keep hold of the object `module`, so that no other one can take its place:
    fully_shard (FSDP2) puts gathered parameters into the modules that it has seen.
    """
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def is_sharded_itself(module: nn.Module) -> bool:
    """Whether `module` was given to fully_shard, which changed its class and put hooks on it."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def become(old: nn.Module, new: nn.Module) -> None:
    """Make `old` all that `new` is, class, attributes and hooks; `new` is used up."""
    vars(old).clear()
    old.__class__ = type(new)
    vars(old).update(vars(new))
    for name, value in vars(old).items():
        if name.endswith("_hooks"):
            vars(old)[name] = _rebound(value, old)
    if isinstance(old, StandIn):
        old.settle()


class StandInOfClass(StandIn):
    """Mixin of stand-ins for modules of many classes, such as those of other libraries: the class
    of each is made of the mixin and the class of the module (`standing_in`), so that isinstance
    goes on saying what it did.
    """

    mixin: ClassVar[type[StandInOfClass]]
    prefix: ClassVar[str] = "Sketched"
    """Before the name of the class, in the name of the one that is made."""

    def original(self) -> nn.Module:
        return take_over(blank(self.stands_for), self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A class made on the way has no name by which it could be found again.
        state = tuple(super().__reduce_ex__(protocol))[2:]
        return _unpickled, (self.mixin, self.stands_for), *state


OfClass = TypeVar("OfClass", bound=StandInOfClass)


def standing_in(mixin: type[OfClass], module: nn.Module) -> OfClass:
    """A stand-in of kind `mixin` for `module`, with nothing in it: `take_over` comes next. `module`
    may be one already.
    """
    plain = module.stands_for if isinstance(module, StandInOfClass) else type(module)
    return blank(_class_of(mixin, plain))  # type: ignore[return-value]


_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _class_of(mixin: type[StandInOfClass], plain: type[nn.Module]) -> type[nn.Module]:
    """The one class that is both, so that two modules of one class stay of one class."""
    if (mixin, plain) not in _CLASSES:
        members = {"mixin": mixin, "stands_for": plain, "__doc__": mixin.__doc__}
        _CLASSES[mixin, plain] = type(f"{mixin.prefix}{plain.__name__}", (mixin, plain), members)
    return _CLASSES[mixin, plain]


def blank(cls: type[Module]) -> Module:
    """A module of class `cls` that has nothing yet."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    return module


def _unpickled(mixin: type[StandInOfClass], plain: type[nn.Module]) -> nn.Module:
    cls = _class_of(mixin, plain)
    return cls.__new__(cls)


def _has_more(cls: type, other: type, name: str) -> bool:
    """Whether `cls` has an attribute `name` that `other` does not have."""
    return hasattr(cls, name) and not hasattr(other, name)


def _rebound(hooks: Any, layer: nn.Module) -> Any:
    """A table of hooks with `layer` for the module that some of them are given. Where there are
    none of these it is the same table, so that handles can still remove hooks from it.
    """
    if not isinstance(hooks, dict) or not any(
        isinstance(hook, _WrappedHook) and hook.with_module for hook in hooks.values()
    ):
        return hooks
    rebound = type(hooks)()
    for key, hook in hooks.items():
        bound = isinstance(hook, _WrappedHook) and hook.with_module
        rebound[key] = _WrappedHook(hook.hook, layer) if bound else hook
    return rebound


def refuse_replaced_forward(module: nn.Module) -> None:
    """Raise ValueError if `module` has a forward of its own, not its class's: another module in its
    place would not run it.
    """
    if "forward" in vars(module):
        raise ValueError(
            "its forward was replaced on the object (as by accelerate's hooks); undo that first, "
            "or exclude it"
        )
    if vars(module).get("_compiled_call_impl") is not None:
        raise ValueError("it was compiled by its compile(); do that afterwards, or exclude it")


def has_hooks(module: nn.Module) -> bool:
    """Whether `module` has hooks of forward or backward."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, table) for table in tables)


def is_special(module: nn.Module) -> bool:
    """Whether a call of `module` may do more than the forward of its class."""
    compiled = vars(module).get("_compiled_call_impl") is not None
    return has_hooks(module) or compiled or "forward" in vars(module)


def refuse_hooks(module: nn.Module) -> None:
    """Raise ValueError if `module` has hooks of forward or backward, which would not be called."""
    if has_hooks(module):
        raise ValueError(
            "it has hooks, which would no longer be called; remove them first, or exclude it"
        )


# Modules that hold the real one under a name of their own, by class name (so that none of them need
# be imported).
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def plain_name(model: nn.Module, name: str) -> str:
    """A module's name in `model` without the parts that torch.compile, DDP, FSDP and checkpoint
    wrappers put in.
    """
    parts, module = [], model
    for part in name.split(".") if name else []:
        if _WRAPPERS.get(type(module).__name__) != part:
            parts.append(part)
        module = getattr(module, part)
    return ".".join(parts)


def plainly_named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` with plain names, in a walk that takes microseconds a module."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield name, module
        wrapped = _WRAPPERS.get(type(module).__name__)
        for child, inner in module._modules.items():
            if inner is not None:
                longer = f"{name}.{child}" if name else child
                yield from walk(inner, name if child == wrapped else longer)

    return walk(model, "")


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

    def leaves(self, module: nn.Module) -> tuple[str, ...]:
        """What of the things that `module`, an accepted one, holds is left as it is: beginnings of
        their names in it.
        """
        return ("",)

    def stands_in(self, module: nn.Module) -> bool:
        """Whether `module` is what this kind of exchange put into a model."""
        return isinstance(module, StandIn) and self.accepts(module)

    def why_not(self, module: nn.Module) -> str | None:
        """Why a module that looks like one of the kind is not accepted; None if it does not."""
        return None

    def spared(self, modules: Mapping[str, nn.Module]) -> dict[str, str]:
        """Of `modules`, all those of a model by name, the accepted ones that are better left as
        they are unless they are asked for by name, and why.
        """
        return {}

    def parts(self, module: nn.Module) -> tuple[str, ...]:
        """Names within `module`, an accepted one, that are replaced along with it: who asks for one
        of them gets `module`.
        """
        return ()
