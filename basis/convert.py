"""Swap the dense layers of any model for sketched ones, by name, and back.

Layers are exchanged in place and keep their Parameter objects, so an optimiser made before, tied weights and the state_dict
all stay as they were. Patterns are shell patterns over the names of `model.named_modules()`: "head", "blocks.*.mlp.*".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from basis.estimator import Estimator
from basis.keyed import Keyed
from basis.linear import SketchedLinear
from basis.noise import fold

# Modules that hold the real one under a name of their own, by class name (so that none of them need be imported).
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def plain_name(model: nn.Module, name: str) -> str:
    """A module's name in `model` without the parts that torch.compile, DDP, FSDP and checkpoint wrappers put in."""
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
    """Replace each nn.Linear whose name matches `include` and not `exclude` by a SketchedLinear. Returns the names changed.

    estimator: one for all layers, or a function of a layer's name and the layer, where layers differ (budget.py).
    Layers already sketched take the new estimator. Raises ValueError, before anything is changed, if a pattern matches no
    dense layer, if nothing is left to convert, or if `model` is itself a dense layer.
    """
    if isinstance(model, nn.Linear):
        raise ValueError("convert: the model is itself a dense layer; use SketchedLinear.from_linear")
    # Subclasses of nn.Linear have a forward of their own that must not be thrown away; the exact type is asked for. All
    # names of a shared layer are listed, and all of them are to be exchanged.
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) in (nn.Linear, SketchedLinear)
    }
    names = {name: plain_name(model, name) for name in layers}
    include, exclude = _patterns("include", include), _patterns("exclude", exclude)
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(plain, pattern) for plain in names.values()):
                known = ", ".join(sorted(set(names.values()))[:12]) or "none"
                raise ValueError(f"{option}={pattern!r}: matches no dense layer; the model's are {known}")
    chosen = [
        name
        for name, plain in names.items()
        if any(fnmatchcase(plain, p) for p in include) and not any(fnmatchcase(plain, p) for p in exclude)
    ]
    if not chosen:
        raise ValueError(f"include={include}, exclude={exclude}: no dense layer is left to convert")
    made: dict[int, nn.Module] = {}
    for (
        name
    ) in chosen:  # all are made before the first is put in place: a layer that can't be changed leaves the model as it was
        if id(layers[name]) not in made:
            chosen_for = estimator if isinstance(estimator, Estimator) else estimator(names[name], layers[name])
            try:
                made[id(layers[name])] = SketchedLinear.from_linear(layers[name], chosen_for)
            except ValueError as error:
                raise ValueError(f"include={names[name]!r}: {error}") from None
    for name in chosen:
        _replace(model, name, made[id(layers[name])])
    return [names[name] for name in chosen]


def revert(model: nn.Module) -> list[str]:
    """Replace every SketchedLinear by a plain nn.Linear with the same parameters. Returns the names changed."""
    made: dict[int, nn.Module] = {}
    changed = []
    names = {name: plain_name(model, name) for name, _ in model.named_modules(remove_duplicate=False)}
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


def set_noise_key(model: nn.Module, *, seed: int, step: int, micro_batch: int = 0, rank: int = 0, since: int = 0) -> None:
    """Fix the noise of every sketched and lean layer as a function of seed, step, micro_batch, rank and the layer's name.

    Call it before each forward of a training step. Recomputing or resuming with the same numbers draws the same noise, and a
    layer's noise does not depend on which other layers are sketched. It also decides which layers learn in that forward: those
    whose method learns at `step`, in its first micro-batch. since: the step at which the layers knew nothing, from which
    methods count.
    """
    for name, module in model.named_modules():
        if isinstance(module, SketchedLinear):
            module.learning = micro_batch == 0 and not module.frozen and module.estimator.learns_at(step - since)
        if isinstance(module, Keyed):
            parameter = next(module.parameters(), None)
            module.set_noise_key(
                fold(seed, step, micro_batch, rank, plain_name(model, name)), None if parameter is None else parameter.device
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


def _patterns(option: str, patterns: Iterable[str]) -> list[str]:
    if isinstance(patterns, str):
        raise ValueError(f"{option}={patterns!r}: give a list of patterns, such as [{patterns!r}]")
    return list(patterns)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
