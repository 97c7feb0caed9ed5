"""Replace modules of any model, by name, with ones that keep less for backward, and put them back.

Modules are replaced in place and keep their Parameter objects, so an optimiser made before, tied
weights and the state_dict all stay as they were. Patterns are shell patterns over the names of
`model.named_modules()`: "head", "blocks.*.mlp.*".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from basis.causal_lm import unfused
from basis.diagnostics.budget import BudgetError
from basis.exchange import StandIn, become, is_held, is_sharded_itself, plain_name
from basis.layers.adapters import settle_in_adapters
from basis.layers.left import Left, left_alone, warn_of_little
from basis.layers.sketch import Method, Sketch, exchange_of
from basis.ops.shared_noise import Passes
from basis.sketched import Sketched

__all__ = [
    "Left",
    "Method",
    "convert",
    "left_alone",
    "not_learning",
    "put_back",
    "revert",
    "sketched_layers",
]


EVERYTHING = ["*"]


def convert(
    model: nn.Module,
    method: Method,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    *,
    exact_if_kept: bool = True,
) -> list[str]:
    """Replace modules of `model` whose names match `include` and not `exclude`, in place, as
    `method` says. Returns the names changed.

    method:
    - an estimator, such as `basis.BalancedSketch(32)`: each nn.Linear becomes a SketchedLinear with
      it, and so do the dense layers of layers/sketch.py that are no nn.Linear; or a function of a
      layer's name and the layer that returns an estimator, where layers differ
      (diagnostics/budget.py). A layer that is no nn.Linear is described to it by one of its size on
      the meta device;
    - `basis.Lean(...)`: norms, activations, gated MLPs, dropout and attention in few bits;
    - `basis.SUS(...)`: attention whose backward follows a few entries of each row.

    exact_if_kept: a dense layer whose input is kept anyway by the operation that made it, as
    attention, tanh and ReLU do, keeps that and is exact, since a sketch would only add bytes
    (shared_input.py). False: it is sketched all the same, as it is under torch.compile.

    What stands in for another module already takes the options of the new `method`.

    Dense layers that are left as they are, whatever the patterns: those whose weight is frozen, of
    whose input nothing is kept anyway; and subclasses of nn.Linear whose own forward would be
    lost. Those are nn.LazyLinear before its first forward, layers under
    torch.nn.utils.parametrizations (weight_norm, spectral_norm, ...: convert first, then put them
    on) and other libraries' layers. With the default `include`, layers with a very narrow input are
    left too, such as lora_B of an adapter. `left_alone` lists what was left, and why; and a
    UserWarning says so where, with the default `include`, less than half of the model's trained
    matrices are in layers that were changed.

    An estimator that learns adds `estimator_...` buffers to the state_dict. A plain model's
    state_dict is loaded all the same, and leaves what the layers have learned (after `convert`:
    nothing) as it is. PyTorch refuses the opposite direction with `strict=True`: save the
    `revert`ed model, or load with `strict=False`.

    Raises, before anything is changed: ValueError if a pattern matches no module that can be
    replaced (the message says why those that it does match can't), if nothing is left to replace,
    if `model` is itself such a module, or if a chosen one can't be replaced (a forward replaced on
    the object; a dense layer whose weight is computed by a hook, as by the older
    torch.nn.utils.weight_norm; attention with dropout or hooks, for SUS); TypeError if `method` is
    none of the above.
    """
    exchange = exchange_of(method)
    include, exclude = _patterns("include", include), _patterns("exclude", exclude)
    if exchange.accepts(model):
        hint = "; use SketchedLinear.from_linear" if isinstance(model, nn.Linear) else ""
        raise ValueError(f"convert: the model is itself a {exchange.kind}{hint}")
    # A shared module is listed under all of its names, and is to be exchanged under all of them.
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()  # what a module to be exchanged holds stays as it is
    for name, module in modules.items():
        if exchange.accepts(module) and not name.startswith(inside):
            found[name] = module
            inside = (*inside, *(f"{name}.{child}" for child in exchange.leaves(module)))
    names = {name: plain_name(model, name) for name in found}
    known_as = {
        name: [plain, *(f"{plain}.{part}" for part in exchange.parts(found[name]))]
        for name, plain in names.items()
    }
    others = {
        plain_name(model, name): why
        for name, module in modules.items()
        if (why := exchange.why_not(module))
    }
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            to_match = [plain for all_of in known_as.values() for plain in all_of]
            if not any(_matches(plain, [pattern]) for plain in to_match):
                known = _first_twelve(names.values())
                left = _first_twelve(
                    f"{name} ({why})" for name, why in others.items() if fnmatchcase(name, pattern)
                )
                but = f"; it matches, and they are left as they are: {left}" if left else ""
                raise ValueError(
                    f"{option}={pattern!r}: matches no {exchange.kind}; the model's are "
                    f"{known or 'none'}{but}"
                )
    spared = exchange.spared(modules) if include == EVERYTHING else {}
    excluded = {name for name, plain in names.items() if _matches(plain, exclude)}
    chosen = [
        name
        for name in names
        if name not in excluded
        and name not in spared
        and any(_matches(known, include) for known in known_as[name])
    ]
    if not chosen:
        raise ValueError(
            f"include={include}, exclude={exclude}: no {exchange.kind} is left to convert"
        )
    made: dict[int, nn.Module] = {}
    # All are made before the first is put in place: a module that can't be changed leaves the model
    # as it was.
    for name in chosen:
        if id(found[name]) not in made:
            try:
                made[id(found[name])] = exchange.stand_in(names[name], found[name])
            except BudgetError:
                raise  # the share is what can't be kept, whatever the layer
            except ValueError as error:
                raise ValueError(f"include={names[name]!r}: {error}") from None
    for new in made.values():
        for layer in new.modules():
            if isinstance(layer, Sketched):
                layer.exact_if_kept = exact_if_kept
    for name in chosen:
        parent, _, child = name.rpartition(".")
        _put(model.get_submodule(parent), child, made[id(found[name])])
    settle_in_adapters(model)
    layers = [layer for _, layer in sketched_layers(model)]
    passes = Passes(len(layers))
    for place, layer in enumerate(layers):
        layer.passes = (passes, place)
    if include == EVERYTHING and isinstance(exchange, Sketch):
        passed_over = [modules[name] for name in (*excluded, *spared)]
        warn_of_little(model, exchange, passed_over, stacklevel=3)
    return [names[name] for name in chosen]


def revert(model: nn.Module) -> list[str]:
    """Put the plain modules back that sketched, lean and SUS ones stand for, with the same
    parameters, and undo `fuse_head`. Returns the names changed, each once.

    Raises ValueError, before anything is changed, if `model` itself stands for another module:
    `model.original()` is that one; and if something was put on a converted layer since that would
    be lost: a replaced forward, a parametrization, hooks of an attention module.
    """
    with unfused(model) as head:
        changed = put_back(model, (StandIn,))
    return changed if head is None or head in changed else [*changed, head]


def put_back(model: nn.Module, kinds: tuple[type[StandIn], ...]) -> list[str]:
    """`revert` for stand-ins of some `kinds` only."""
    if isinstance(model, kinds):
        raise ValueError(
            f"revert: the model is itself a {type(model).__name__}; use its original()"
        )
    names = {
        name: plain_name(model, name) for name, _ in model.named_modules(remove_duplicate=False)
    }
    originals: dict[StandIn, nn.Module] = {}  # a shared module has one original
    changes: list[tuple[nn.Module, str, nn.Module]] = []
    changed: list[str] = []

    def visit(parent: nn.Module, prefix: str) -> None:
        for child, module in list(parent._modules.items()):
            if module is None:
                continue
            plain: nn.Module = module
            while isinstance(plain, kinds):  # lean attention around SUS around the exact one
                if plain not in originals:
                    if is_sharded_itself(plain):
                        raise ValueError(
                            f"revert: {names[prefix + child]}: it was given to fully_shard itself; "
                            "revert first"
                        )
                    try:
                        originals[plain] = plain.original()
                    except ValueError as error:
                        raise ValueError(f"revert: {names[prefix + child]}: {error}") from None
                plain = originals[plain]
            if plain is not module:
                changes.append((parent, child, plain))
                changed.append(names[prefix + child])
            visit(plain, f"{prefix}{child}.")

    visit(model, "")
    for parent, child, plain in changes:
        _put(parent, child, plain)
    return changed


def sketched_layers(model: nn.Module) -> Iterator[tuple[str, Sketched]]:
    """The sketched layers and their plain names, each once."""
    for name, module in model.named_modules():
        if isinstance(module, Sketched):
            yield plain_name(model, name), module


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


def _first_twelve(items: Iterable[str]) -> str:
    """The first twelve of `items` in alphabetical order, each once, for a message."""
    return ", ".join(sorted(set(items))[:12])


def _patterns(option: str, patterns: Iterable[str]) -> list[str]:
    if isinstance(patterns, str):
        raise ValueError(f"{option}={patterns!r}: give a list of patterns, such as [{patterns!r}]")
    return list(patterns)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _put(parent: nn.Module, child: str, new: nn.Module) -> None:
    old = parent._modules[child]
    if old is not None and is_held(old):
        become(old, new)
    else:
        setattr(parent, child, new)
