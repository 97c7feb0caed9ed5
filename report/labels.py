"""What groups of runs are called, each by what tells it from the others.

Method and rank, then options in which the runs at hand differ: options of a method among groups of
the same method, the rest among all. While everything that varies fits into a column, all of it is
named. In a more mixed company every row would repeat what most rows have; there a label names what
differs from that, the *usual* value, most telling first. What it takes to tell two groups apart is
never cut off; the rest is, where it gets long.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from basis.estimators import ESTIMATORS
from harness.config import flat_options

LONGEST = 72
"""Characters that a label may take in a table."""

Options = Mapping[str, Any]
"""A group's options that change a loss, by dotted name, and under "text" what it was trained on."""

# What was done, then on what, then how.
_TELLING = (
    *(
        "method.",
        "adaptive_rank.",
        "activations.name",
        "activations.",
        "attention.name",
        "attention.",
        "precision",
    ),
    *(
        "model.n_layer",
        "model.n_embd",
        "model.vocab_size",
        "model.sha256",
        "model.",
        "data.name",
        "data.tokenizer",
        "data.",
        "text",
    ),
    *("optim.name", "optim.lr", "steps", "micro_batch_size", "tokens_per_step", "optim."),
)
_LONG = ("text", "model.sha256", "model.architecture")
"""Of the text, and of a model that was read from a folder."""
_ABSENT = "absent"


@dataclass(frozen=True)
class Label:
    """short: no other group's; full: names everything that varies; usual: what a short one leaves
    unsaid.
    """

    short: str
    full: str
    usual: str = ""


def labels(groups: Sequence[Options]) -> list[Label]:
    """A label for each of some groups, no two of which have equal options."""
    full = [" ".join([_ranked(group), *_varying(group, groups)]) for group in groups]
    if len(set(full)) == len(full) and all(len(label) <= LONGEST for label in full):
        return [Label(label, label) for label in full]
    every = {name: {_said(group, name) for group in groups} for group in groups for name in group}
    names = sorted((name for name, said in every.items() if len(said) > 1), key=_rank)
    needed = _needed(groups, names)
    usual = {
        group["method.name"]: {name: _usual(group, name, groups) for name in names}
        for group in groups
    }
    common = usual[groups[0]["method.name"]]
    others = [
        name
        for name in names
        if name != "text" and not name.startswith("method.") and common[name] != _ABSENT
    ]
    unsaid = " ".join(f"{name}={common[name]}" for name in others)
    made = []
    for group, everything in zip(groups, full, strict=True):
        differing = [
            n
            for n in names
            if n not in _in_head(group) and _said(group, n) != usual[group["method.name"]][n]
        ]
        optional = [
            name
            for name in differing
            if name in group and name not in (*needed, "text", _turned(group))
        ]
        said = {name for name in differing if name in needed}
        for name in optional:
            if len(_joined(group, [n for n in differing if n in said | {name}])) > LONGEST:
                break
            said.add(name)
        short = _joined(group, [name for name in differing if name in said])
        made.append(
            Label(short if said.issuperset(optional) else f"{short} ...", everything, unsaid)
        )
    return made


def _ranked(group: Options) -> str:
    """The method, and its rank where no budget decides it."""
    ranked = "method.rank" in group and not group.get("method.budget")
    return (
        f"{group['method.name']} R={group['method.rank']}" if ranked else str(group["method.name"])
    )


def _head(group: Options) -> str:
    """The method with its rank or budget."""
    return (
        f"{_ranked(group)} budget={group['method.budget']}"
        if group.get("method.budget")
        else _ranked(group)
    )


def _in_head(group: Options) -> tuple[str, ...]:
    return (
        "method.name",
        "method.budget",
        *(() if group.get("method.budget") else ("method.rank",)),
    )


def _turned(group: Options) -> str | None:
    """The option that a budget decides: what is given there is not looked at."""
    known = ESTIMATORS.get(group["method.name"]) if group.get("method.budget") else None
    return f"method.{known.knob}" if known else None


def _peers(group: Options, name: str, groups: Sequence[Options]) -> list[Options]:
    """Groups among which an option of `group` is compared."""
    same = [other for other in groups if other["method.name"] == group["method.name"]]
    return same if name.startswith("method.") else list(groups)


def _varying(group: Options, groups: Sequence[Options]) -> list[str]:
    """Every option of a group that varies, in order of name."""
    return [
        _part(group, name)
        for name, value in group.items()
        if name not in ("method.name", "method.rank", "text", _turned(group))
        and any(other.get(name) != value for other in _peers(group, name, groups))
    ]


def _said(group: Options, name: str) -> str:
    """An option's value in a label; of what is long a digest."""
    value = group.get(name, _ABSENT)
    if name not in _LONG or value in (None, _ABSENT):
        return str(value)
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def _part(group: Options, name: str) -> str:
    return f"{name.removeprefix('method.')}={_said(group, name)}"


def _joined(group: Options, names: Sequence[str]) -> str:
    return " ".join([_head(group), *(_part(group, name) for name in names)])


def _rank(name: str) -> tuple[int, str]:
    """Where an option stands among others: the earlier, the more it tells."""
    return next(
        (i for i, start in enumerate(_TELLING) if name.startswith(start)), len(_TELLING)
    ), name


def _needed(groups: Sequence[Options], names: Sequence[str]) -> list[str]:
    """Of some options those that tell apart groups which method, rank, budget and the ones before
    do not.
    """
    needed = []
    told: list[tuple[str, ...]] = [(_head(group),) for group in groups]
    for name in names:
        finer = [(*before, _said(group, name)) for before, group in zip(told, groups, strict=True)]
        if len(set(finer)) > len(set(told)):
            needed.append(name)
            told = finer
    return needed


def _usual(group: Options, name: str, groups: Sequence[Options]) -> str:
    """The value that most of the peers of `group` have; of several such the option's default, if it
    is among them.
    """
    counts = Counter(_said(other, name) for other in _peers(group, name, groups))
    most = sorted(value for value, count in counts.items() if count == max(counts.values()))
    default = _default(group["method.name"], name)
    return default if default in most else most[0]


def _default(method: str, name: str) -> str:
    if not name.startswith("method."):
        return str(flat_options({}).get(name))
    own = dataclasses.fields(ESTIMATORS[method]) if method in ESTIMATORS else ()  # type: ignore[arg-type]
    return str({f"method.{field.name}": field.default for field in own}.get(name))
