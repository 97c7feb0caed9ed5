"""A mirror of `metrics.jsonl` in Weights & Biases: nice to have, never needed, never in the way.

Three modes, one switch. `offline`, the default, writes the run next to its other files, needs no
account and no network, and can be looked at with `wandb leet <run directory>/wandb` or uploaded
later with `wandb sync`. `online` uploads while training. `disabled` does not even import wandb, so
a machine without it can train.

*Failing.* What ends a run is a mistake of the user, a missing key say, and only at its start. A
server that can't be reached then (wandb tries for WANDB_INIT_TIMEOUT, 90 seconds) leaves a run that
writes wandb's files offline, after one warning that says how to upload them. A network that is lost
later does not slow training: wandb keeps the rows and tries again, at the end for
WANDB_FINISH_TIMEOUT, here 60 seconds. Whatever else wandb or its helper process fails with, the
mirror ends with one warning and the run goes on.

*Identity.* Id and labels come from `harness/folder/run_id.py`, which keeps them in the run
directory: an interrupted run continues as itself, and a multirun never writes two runs into one.
The whole nested configuration goes along, to group runs by any key of it.

*Steps.* wandb's own step counter only ever grows, and drops what a run resumed from an earlier step
reports again. So `step=` is never passed: `step` and `tokens` are logged like any metric, and
`step` is declared the x axis of all. After a resume the mirror has two points where the interrupted
run had gone past its checkpoint; `metrics.jsonl` has one, and so has a mirror rebuilt from it.

*Ending.* A tracker is a context manager: however the block ends, the run is finished, as failed if
an exception ends it. `finish` may be called before, with an exit code of its own.

wandb 0.31 sends usage telemetry to its server even when offline. Offline runs therefore set
`WANDB_ERROR_REPORTING=false` unless the environment already has a value. Console capture, code
saving and system statistics are off. What is left costs about a millisecond of this process per
logged row, one helper process, and about two seconds at the first run.
"""

import contextlib
import importlib.util
import logging
import math
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from harness.folder.run_id import TAG_LIMIT, update_run_file

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

FINISH_SECONDS = 60.0
REACH_SECONDS = 5.0
MODES = ("online", "offline", "disabled")

# What a dashboard's table of runs shows of a metric; of all others, the last value. "last" stands
# here too where it matters besides, because naming any summary replaces the default one. Bytes are
# the same for all of a run: columns of the table, and no panels that would stand before the curves.
_HIDDEN = ("mem/*", "lr", "tokens")
_SUMMARIES = {
    "val/loss": "min,last",
    "val/perplexity": "min,last",
    "mem/peak_bytes": "max",
    "mem/saved_bytes": "max",
}


@dataclass(frozen=True)
class TrackerOptions:
    """The `tracker` group of the configuration; `group` and `name` replace the run's own choice,
    `tags` are added.
    """

    mode: str = "offline"
    project: str = "basis"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raise ValueError, with the dotted name of the option, for a value that wandb would
        refuse.
        """
        if self.mode not in MODES:
            raise ValueError(f"tracker.mode={self.mode!r}: must be one of {', '.join(MODES)}")
        if not 1 <= len(self.project) <= 128 or set(self.project) & set("/\\#?%:"):
            raise ValueError(
                f"tracker.project={self.project!r}: must be 1 to 128 characters, none of "
                "/ \\ # ? % :"
            )
        for index, tag in enumerate(self.tags):
            if not 1 <= len(tag) <= TAG_LIMIT:
                raise ValueError(
                    f"tracker.tags[{index}]={tag!r}: must be 1 to {TAG_LIMIT} characters"
                )


class Tracker:
    """The tracker of `mode=disabled`, and of every rank but the first: accepts everything, does
    nothing.
    """

    url: str | None = None
    """Where to watch the run; None unless online."""
    folder: Path | None = None
    """The directory in which wandb keeps this run (after a resume: this segment of it); None if
    disabled.
    """

    def log(self, metrics: Mapping[str, object]) -> None:
        """Mirror one row of `metrics.jsonl`; it must have a `step`."""

    def summary(self, values: Mapping[str, object]) -> None:
        """Mirror the scalars of `summary.json` as `final/<name>`, beside the summaries that wandb
        makes of metrics.
        """

    def finish(self, exit_code: int = 0) -> None:
        """End the run, as failed if `exit_code` is not 0. Later calls do nothing."""

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        self.finish(exit_code_of(error))


class WandbTracker(Tracker):
    """A run in wandb, open from construction to `finish`. Made by `make_tracker`."""

    def __init__(self, run: "wandb.Run", *, online: bool) -> None:
        self._run: wandb.Run | None = run
        self._failed = False
        self.url = run.url if online else None  # offline, asking for it prints a warning
        self.folder = Path(run.dir).parent
        self._home = self.folder.parent.parent
        run.define_metric("*", step_metric="step")
        for name in _HIDDEN:
            run.define_metric(name, step_metric="step", hidden=True)
        for name, summary in _SUMMARIES.items():
            run.define_metric(
                name, step_metric="step", summary=summary, hidden=name.startswith("mem/")
            )

    def log(self, metrics: Mapping[str, object]) -> None:
        assert "step" in metrics, f"a row needs a `step`: {dict(metrics)}"
        self._ask(lambda run: run.log(dict(metrics)))

    def summary(self, values: Mapping[str, object]) -> None:
        # Under a name of its own: the final val/loss would overwrite the minimum that wandb keeps
        # as val/loss.
        scalars = {
            name: value
            for name, value in values.items()
            if isinstance(value, bool | int | float | str)
        }
        said = {f"final/{name}": _spell(value) for name, value in scalars.items()}
        self._ask(lambda run: run.summary.update(said))

    def finish(self, exit_code: int = 0) -> None:
        if self._run is not None:
            self._ask(lambda run: run.finish(exit_code=exit_code))
            self._run = None

    def _ask(self, work: "Callable[[wandb.Run], object]") -> None:
        """Whatever fails in a mirror, once, must not end what is mirrored."""
        if self._failed:
            return
        assert self._run is not None, "used after finish"
        try:
            work(self._run)
        except Exception as error:  # noqa: BLE001  wandb does not say what it raises
            self._failed = True
            log.warning(
                "the tracker has failed (%s), the run goes on without it; when it has ended, "
                "python scripts/sync.py %s --mode online --new-id uploads all of it",
                f"{type(error).__name__}: {error}".removesuffix(": "),
                self._home,
            )
            _leave_helper()


def make_tracker(
    options: TrackerOptions,
    *,
    run_dir: Path,
    run_id: str,
    config: dict[str, Any],
    group: str | None = None,
    job_type: str = "train",
    tags: Sequence[str] = (),
    name: str | None = None,
) -> Tracker:
    """Start (or, with an id used before, continue) the mirror of the run in `run_dir`; notes its
    labels in `run.json`.

    `config` is the resolved configuration as nested plain dicts. `options.group` and `options.name`
    win over `group` and `name`; `options.tags` come after `tags`. Raises ValueError naming
    `tracker.mode` if wandb is not installed or the server does not let the run in. Call it from one
    process (rank 0), and give `Tracker()` to the others.
    """
    labels = {
        "project": options.project,
        "entity": options.entity,
        "name": options.name or name,
        "group": options.group or group,
        "job_type": job_type,
        "tags": list(dict.fromkeys([*tags, *options.tags])),
    }
    update_run_file(run_dir, {"id": run_id, **labels})
    return open_tracker(options.mode, run_dir=run_dir, run_id=run_id, config=config, **labels)


def open_tracker(
    mode: str, *, run_dir: Path, run_id: str, config: dict[str, Any], **labels: Any
) -> Tracker:
    """`make_tracker` without bookkeeping: `labels` (project, entity, name, group, job_type, tags)
    go to wandb as is.
    """
    if mode == "disabled":
        return Tracker()
    if mode == "offline":
        os.environ.setdefault(
            "WANDB_ERROR_REPORTING", "false"
        )  # the telemetry of the docstring above
    require_wandb(mode)
    import wandb

    online = mode == "online"
    patience = float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_SECONDS))
    try:
        run = wandb.init(
            mode="online" if online else "offline",
            id=run_id,
            dir=run_dir,
            config=config,
            resume="allow",
            # in a multirun, wandb's default would hand back the run of the job before
            reinit="finish_previous",
            settings=wandb.Settings(
                console="off",
                quiet=True,
                silent=mode == "offline",
                disable_code=True,
                x_disable_stats=True,
                x_save_requirements=False,
                finish_timeout=patience,
                finish_timeout_raises=True,
            ),
            **labels,
        )
    except (wandb.errors.UsageError, wandb.errors.CommError) as error:
        server = str(wandb.setup().settings.base_url)
        if online and isinstance(error, wandb.errors.CommError) and not _answers(server):
            log.warning(
                "tracker.mode=online: %s can't be reached, so wandb's files are written offline; "
                "when the run has ended, python scripts/sync.py %s --mode online uploads it",
                server,
                run_dir,
            )
            _leave_helper()  # which holds on to the id
            return open_tracker("offline", run_dir=run_dir, run_id=run_id, config=config, **labels)
        raise ValueError(
            f"tracker.mode={mode!r}: {error}\nRun `wandb login` once, or set tracker.mode=offline "
            "and upload later."
        ) from error
    return WandbTracker(run, online=online)


def _answers(server: str) -> bool:
    """Whether there is anybody: an answer of any kind."""
    try:
        urllib.request.urlopen(server, timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _leave_helper() -> None:
    """Let go of wandb's helper process now: one that has gone shows a traceback at exit."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def require_wandb(mode: str) -> None:
    """Raise ValueError naming `tracker.mode` if `mode` needs wandb and it is not installed; nothing
    is imported.
    """
    if mode == "disabled":
        return
    found = importlib.util.find_spec("wandb")
    # A directory "wandb" with runs in it, beside the program, is found as a package too; it has no
    # file to come from.
    if found is None or found.origin is None:
        raise ValueError(
            f"tracker.mode={mode!r}: wandb is not installed; install it or set "
            "tracker.mode=disabled"
        )


def exit_code_of(error: BaseException | None) -> int:
    """The exit code of a process that ends by `error`: 0 for None, a SystemExit's own, 130 for
    Ctrl-C, else 1.
    """
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        return 1  # a message
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _spell(value: object) -> object:
    """A non-finite float as the word that wandb's own history uses for it; its summary would make
    it null.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
