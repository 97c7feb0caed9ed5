"""Small groups of a run's options: how often it evaluates, saves, logs and looks at itself, and how
it is continued. Each checks its own values; combinations of groups are checked in config.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvalOptions:
    """Every `every` steps the loss of the first batches * batch_size windows of the validation
    file; 0: only at the end.
    """

    every: int = 100
    batches: int = 8
    batch_size: int = 8

    def __post_init__(self) -> None:
        at_least(0, "eval", every=self.every)
        at_least(1, "eval", batches=self.batches, batch_size=self.batch_size)


@dataclass(frozen=True)
class CheckpointOptions:
    """Every `every` steps (0: only at the end); the last `keep` and, if `best`, the one of lowest
    validation loss stay.
    """

    every: int = 1000
    keep: int = 2
    best: bool = True

    def __post_init__(self) -> None:
        at_least(0, "checkpoint", every=self.every)
        at_least(1, "checkpoint", keep=self.keep)


@dataclass(frozen=True)
class LogOptions:
    """A row of metrics every `every` steps; `progress`: a bar on a terminal."""

    every: int = 20
    progress: bool = True

    def __post_init__(self) -> None:
        at_least(1, "log", every=self.every)


@dataclass(frozen=True)
class DiagnosticsOptions:
    """Every `every` steps (0: never) exact dW beside the estimate, per sketched layer, and over
    `masks` further noises; with attention=sus also the entries of a row that it keeps.

    monitor: with every row of metrics, of each dense layer the gradient's norm and the activations'
    energy, from sketches.
    """

    every: int = 0
    masks: int = 0
    monitor: bool = False

    def __post_init__(self) -> None:
        at_least(0, "diagnostics", every=self.every, masks=self.masks)
        if self.masks == 1:
            raise ValueError(
                "diagnostics.masks=1: must be 0, or at least 2 to tell bias from variance"
            )


@dataclass(frozen=True)
class ResumeOptions:
    """world_size: "same", or "any" to continue a run with another number of processes, or with
    another way to divide the work among them.
    """

    world_size: str = "same"

    def __post_init__(self) -> None:
        if self.world_size not in ("same", "any"):
            raise ValueError(f"resume.world_size={self.world_size!r}: must be same or any")


def at_least(least: int, group: str, **values: int) -> None:
    """Raise ValueError that names the option of `group` whose value is below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(
                f"{group + '.' if group else ''}{name}={value}: must be at least {least}"
            )
