"""The arena's figures: final loss against what it costs, and against the error of dW."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from experiments.arena.standings import Standing
from report.figures import Figure, Line, Panel

Cost = Callable[[Standing], float | None]


def costs(standings: Sequence[Standing]) -> Figure:
    """Final loss against four costs: bytes of dense layers, all bytes, time of a step, time of the
    training. Bars: 95% intervals over seeds.

    The grey line joins the front: the contenders that nothing beats in both cost and loss. A
    contender that keeps nothing has no place on a logarithmic axis of bytes and is drawn at its
    left edge.
    """
    axes: list[tuple[str, Cost]] = [
        (
            "kept by dense layers and state (bytes)",
            lambda s: None if s.dense is None else s.dense + s.state,
        ),
        ("kept in all and state (bytes)", lambda s: s.kept + s.state),
        ("median time of a step (ms)", lambda s: None if s.step is None else 1000 * s.step),
        ("training (s)", lambda s: s.seconds),
    ]
    panels = [_panel(standings, title, cost, joined=True) for title, cost in axes]
    name, title = "arena_costs", "Loss against bytes and seconds"
    return Figure(name, title, panels if len(standings) > 1 else [], rows=2, legend=3)


def quality(standings: Sequence[Standing]) -> Figure:
    """Final loss against relative error and cosine of dW, of the contenders whose runs looked at
    them.
    """
    shown = [s for s in standings if s.quality]
    axes: list[tuple[str, Cost]] = [
        ("relative error of dW", lambda s: s.quality.get("relative_error")),
        ("cosine of estimated to exact dW", lambda s: s.quality.get("cosine")),
    ]
    panels = [_panel(shown, title, cost, joined=False) for title, cost in axes]
    name, title = "arena_quality", "Loss against the error of dW"
    return Figure(name, title, panels if len(shown) > 1 else [], legend=3)


def _panel(standings: Sequence[Standing], title: str, cost: Cost, *, joined: bool) -> Panel:
    """A colour for each method and a number for each contender, which the legend explains. The
    worst losses are cut off.
    """
    ended = [(s, s.loss) for s in standings if s.loss is not None]
    methods = sorted({s.group.method for s, _ in ended if s.group.method != "exact"})
    known = [(number, s, loss, cost(s)) for number, (s, loss) in enumerate(ended, start=1)]
    positive = [c for *_, c in known if c]
    edge = min(positive) / 2 if positive else 1.0  # where a cost of 0 is drawn
    lines, points = [], []
    for number, s, loss, c in known:
        exact = s.group.method == "exact"
        place = max(c, edge) if c is not None else None
        lines.append(
            Line(
                [] if place is None else [place],
                [] if place is None else [loss.mean],
                f"{number} {s.label}",
                half=[] if place is None else [loss.half_width],
                color="black" if exact else f"tab20:{methods.index(s.group.method) % 20}",
                style="",
                width=1.0,
                marker="s" if exact else "o",
                texts=[str(number)],
            )
        )
        if place is not None:
            points.append((place, loss.mean))
    if joined:
        best: list[tuple[float, float]] = []
        for place, loss_there in sorted(points):
            if not best or loss_there < best[-1][1]:
                best.append((place, loss_there))
        front = Line([x for x, _ in best], [y for _, y in best], color="grey", width=0.8)
        lines.append(front)
    means = sorted(loss.mean for _, loss in ended)
    limits = None
    if means:
        # Three times as far from the best as the upper quartile is; what lies above is cut off.
        top = means[0] + 3.0 * (means[(3 * len(means)) // 4] - means[0])
        if means[0] < top < means[-1]:
            limits = (means[0] - 0.1 * (top - means[0]), top)
    wide = bool(positive) and max(positive) > 5 * min(positive)
    label = "final validation loss (nats per token)"
    return Panel(title, label, lines, log_x=wide, limits=limits)
