"""Swap the dense layers of any model for sketched ones, by name, and back.

Layers are exchanged in place and keep their Parameter objects, so an optimiser made before, tied
weights and the state_dict all stay as they were. Patterns are shell patterns over the names of
`model.named_modules()`: "head", "blocks.*.mlp.*".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from basis.checks import whole_number
from basis.estimator import Estimator
from basis.keyed import Keyed
from basis.linear import WANTED, SketchedLinear
from basis.ops.noise import fold

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


def convert(
    model: nn.Module,
    estimator: Estimator | Callable[[str, nn.Linear], Estimator],
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
) -> list[str]:
    """Replace each nn.Linear whose name matches `include` and not `exclude` by a SketchedLinear.
    Returns the names changed.

    estimator: one for all layers, or a function of a layer's name and the layer, where layers
    differ (budget.py). Layers already sketched take the new estimator.

    Left as they are, whatever the patterns: subclasses of nn.Linear, whose own forward would be
    lost. Those are the out_proj of nn.MultiheadAttention (which never calls it), nn.LazyLinear
    before its first forward, layers under torch.nn.utils.parametrizations (weight_norm,
    spectral_norm, ...) and other libraries' layers. So are dense layers that are no nn.Linear at
    all.

    With a method that learns, the state_dict has `estimator_...` buffers besides. A plain model's
    is loaded all the same, and leaves what the layers have learned (after `convert`: nothing) as it
    is; the other way `strict=True` is refused by PyTorch: save `revert`ed, or load with
    `strict=False`.

    Raises, before anything is changed: ValueError if a pattern matches no layer that can be
    converted (the message says why those that it does match can't), if nothing is left to convert,
    if `model` is itself a dense layer, or if a chosen layer's weight is computed by a hook (the
    older torch.nn.utils.weight_norm and spectral_norm); TypeError for an `estimator` that is
    neither an Estimator nor a function that gives one.
    """
    if isinstance(model, nn.Linear):
        raise ValueError(
            "convert: the model is itself a dense layer; use SketchedLinear.from_linear"
        )
    if isinstance(estimator, type) or not (isinstance(estimator, Estimator) or callable(estimator)):
        raise TypeError(
            f"convert: estimator must be {WANTED}, or a function of a layer's name and the layer "
            f"that returns one; got {estimator!r}"
        )
    # All names of a shared layer are listed, and all of them are to be exchanged.
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {
        name: module
        for name, module in modules.items()
        if type(module) in (nn.Linear, SketchedLinear)
    }
    names = {name: plain_name(model, name) for name in layers}
    others = {
        plain_name(model, name): why
        for name, module in modules.items()
        if (why := _why_not(module))
    }
    include, exclude = _patterns("include", include), _patterns("exclude", exclude)
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(plain, pattern) for plain in names.values()):
                known = _listed(names.values())
                left = _listed(
                    f"{name} ({why})" for name, why in others.items() if fnmatchcase(name, pattern)
                )
                but = f"; it matches, and they are left as they are: {left}" if left else ""
                raise ValueError(
                    f"{option}={pattern!r}: matches no dense layer; the model's are "
                    f"{known or 'none'}{but}"
                )
    chosen = [
        name
        for name, plain in names.items()
        if any(fnmatchcase(plain, p) for p in include)
        and not any(fnmatchcase(plain, p) for p in exclude)
    ]
    if not chosen:
        raise ValueError(f"include={include}, exclude={exclude}: no dense layer is left to convert")
    made: dict[int, nn.Module] = {}
    # All are made before the first is put in place: a layer that can't be changed leaves the model
    # as it was.
    for name in chosen:
        if id(layers[name]) not in made:
            chosen_for = (
                estimator
                if isinstance(estimator, Estimator)
                else estimator(names[name], layers[name])
            )
            if not isinstance(chosen_for, Estimator):
                raise TypeError(
                    f"convert: the function must return {WANTED}; for {names[name]} it gave "
                    f"{chosen_for!r}"
                )
            try:
                made[id(layers[name])] = SketchedLinear.from_linear(layers[name], chosen_for)
            except ValueError as error:
                raise ValueError(f"include={names[name]!r}: {error}") from None
    for name in chosen:
        _replace(model, name, made[id(layers[name])])
    return [names[name] for name in chosen]


def revert(model: nn.Module) -> list[str]:
    """Replace every SketchedLinear by a plain nn.Linear with the same parameters. Returns the names
    changed.
    """
    made: dict[int, nn.Module] = {}
    changed = []
    names = {
        name: plain_name(model, name) for name, _ in model.named_modules(remove_duplicate=False)
    }
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, SketchedLinear):
            _replace(model, name, made.setdefault(id(layer), layer.to_linear()))
            changed.append(names[name])
    return changed


def sketched_layers(model: nn.Module) -> Iterator[tuple[str, SketchedLinear]]:
    """The sketched layers and their plain names, each once."""
    for name, module in model.named_modules():
        if isinstance(module, SketchedLinear):
            yield plain_name(model, name), module


def set_noise_key(
    model: nn.Module, *, seed: int, step: int, micro_batch: int = 0, rank: int = 0, since: int = 0
) -> None:
    """Fix the noise of every sketched and lean layer as a function of seed, step, micro_batch, rank
    and the layer's name.

    Call it before each forward of a training step. Recomputing or resuming with the same numbers
    draws the same noise, and a layer's noise does not depend on which other layers are sketched. It
    also decides which layers learn in that forward: those whose method learns at `step`, in its
    first micro-batch. since: the step at which the layers knew nothing, from which methods count.
    Raises ValueError, beginning with the name, for what is no whole number from 0 on.
    """
    given = {"seed": seed, "step": step, "micro_batch": micro_batch, "rank": rank, "since": since}
    seed, step, micro_batch, rank, since = (
        whole_number(name, value, least=0) for name, value in given.items()
    )
    for name, module in model.named_modules():
        if isinstance(module, SketchedLinear):
            module.learning = (
                micro_batch == 0 and not module.frozen and module.estimator.learns_at(step - since)
            )
        if isinstance(module, Keyed):
            parameter = next(module.parameters(), None)
            module.set_noise_key(
                fold(seed, step, micro_batch, rank, plain_name(model, name)),
                None if parameter is None else parameter.device,
            )


@contextmanager
def not_learning(model: nn.Module) -> Iterator[None]:
    """Within, no layer of `model` learns: for looks at a model that shall leave it as it was."""
    layers = [layer for _, layer in sketched_layers(model)]
    before = [(layer.frozen, layer.learning) for layer in layers]
    try:
        for layer in layers:
            layer.frozen, layer.learning = True, False
        yield
    finally:
        for layer, (frozen, learning) in zip(layers, before, strict=True):
            layer.frozen, layer.learning = frozen, learning


def _why_not(module: nn.Module) -> str | None:
    """Why a layer that looks dense is never exchanged; None for those that are, and for all that
    don't look it.
    """
    kind = type(module).__name__
    if type(module) in (nn.Linear, SketchedLinear):
        return None
    if isinstance(module, nn.LazyLinear):
        return f"{kind}: has no weight before its first forward"
    if nn.utils.parametrize.is_parametrized(module) and isinstance(module, nn.Linear):
        return f"{kind}: its weight is computed by a parametrization"
    if isinstance(module, nn.Linear):
        return f"{kind}: a subclass of nn.Linear, whose own forward would be lost"
    return (
        f"{kind}: no nn.Linear" if "Linear" in kind or kind == "Conv1D" else None
    )  # such as transformers' Conv1D


def _listed(items: Iterable[str]) -> str:
    """Some of them, in order."""
    return ", ".join(sorted(set(items))[:12])


def _patterns(option: str, patterns: Iterable[str]) -> list[str]:
    if isinstance(patterns, str):
        raise ValueError(f"{option}={patterns!r}: give a list of patterns, such as [{patterns!r}]")
    return list(patterns)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
