"""What `basis.apply` did to a model, as a table and as data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from basis.layers.left import Left


@dataclass(frozen=True)
class Change:
    """A module that was replaced.

    name: in the model; was: its class before; now: its method, or its class.
    """

    name: str
    was: str
    now: str


@dataclass(frozen=True)
class Report:
    """What was changed, what was left and why, and the bytes kept for backward.

    kept: bytes before and after by category, measured on a sample (diagnostics/kept.py); empty
    without one. tokens: of the sample. by_shapes: bytes a row of the inputs of the sketched layers,
    each counted for itself, as they are and as they are kept. head: the name of the layer that was
    fused with the loss.
    """

    changed: Sequence[Change]
    left: Sequence[Left]
    kept: Mapping[str, tuple[int, int]]
    tokens: int | None
    by_shapes: tuple[float, float]
    head: str | None = None

    @property
    def before(self) -> int:
        """Bytes kept before, in all; 0 without a sample."""
        return sum(before for before, _ in self.kept.values())

    @property
    def after(self) -> int:
        """Bytes kept now, in all; 0 without a sample."""
        return sum(after for _, after in self.kept.values())

    @property
    def touched(self) -> float:
        """The share of what was kept before that is in categories which changed; NaN without a
        sample.
        """
        changed = sum(before for before, after in self.kept.values() if before != after)
        return changed / self.before if self.before else float("nan")

    def __str__(self) -> str:
        lines = ["changed:", *_grouped((c.name, f"{c.was} -> {c.now}") for c in self.changed)]
        if self.head is not None:
            lines.append(f"  {self.head}: fused with the loss")
        if self.left:
            weights = sum(one.weights for one in self.left)
            lines += [f"left as they are ({weights:,} weights):"]
            lines += _grouped((one.name, f"{one.kind}: {one.why}") for one in self.left)
        if self.tokens is None:
            before, after = self.by_shapes
            lines += [
                "kept of the inputs of layers changed, by their shapes, each counted for itself:",
                f"  {before:,.0f} -> {after:,.0f} bytes a token{_times(before, after)}",
                "  (with sample=, all that a step keeps is measured)",
            ]
        else:
            lines += [f"kept for backward, bytes a token, measured on {self.tokens:,} tokens:"]
            total = "in all", (self.before, self.after)
            rows = [*sorted(self.kept.items(), key=lambda item: -item[1][0]), total]
            for kind, (before, after) in rows:
                was, now = before / self.tokens, after / self.tokens
                lines.append(f"  {kind:<24}{was:>12,.0f} ->{now:>12,.0f}{_times(was, now)}")
            lines.append(f"  {self.touched:.0%} of what was kept is of kinds that changed")
        return "\n".join(lines)


def _times(before: float, after: float) -> str:
    if not after or before == after:
        return ""
    if before > after:
        return f"   {before / after:.1f} times fewer"
    return f"   {after / before:.2f} times as many" if before else "   new"


def _grouped(named: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of "name: text", one for all names that differ in their numbers alone, or in one part,
    as in "layers.*.{q_proj,k_proj}".
    """
    numbered: dict[tuple[str, str], int] = {}
    for name, text in named:
        key = re.sub(r"\b\d+\b", "*", name), text
        numbered[key] = numbered.get(key, 0) + 1
    lines = [(name.split("."), text, count) for (name, text), count in numbered.items()]
    for place in range(max((len(parts) for parts, _, _ in lines), default=0) - 1, -1, -1):
        lines = _joined(lines, place)
    return [
        f"  {'.'.join(parts)}{f' ({count})' if count > 1 else ''}: {text}"
        for parts, text, count in lines
    ]


_Line = tuple[list[str], str, int]


def _joined(lines: Iterable[_Line], place: int) -> list[_Line]:
    """One line for those that differ in the part at `place` alone; where the first of them was."""
    alike: dict[tuple[str, ...], list[_Line]] = {}
    for line in lines:
        parts, text, _ = line
        if len(parts) <= place or any("{" in part for part in parts):
            key = (*parts, text)
        else:
            key = (*parts[:place], "", *parts[place + 1 :], text)
        alike.setdefault(key, []).append(line)
    joined = []
    for some in alike.values():
        parts, text, count = some[0]
        if len(some) > 1:
            choice = ",".join(one[0][place] for one in some)
            parts = [*parts[:place], f"{{{choice}}}", *parts[place + 1 :]]
            count = sum(one[2] for one in some)
        joined.append((parts, text, count))
    return joined
