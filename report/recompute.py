"""Losses computed again from a run's checkpoint: a table built from these numbers does not rest on
what a log says.

The model is rebuilt from the configuration and weights in the newest checkpoint, the text from the
run's data options. Two losses, in nats per token:

- *held out*: the very windows that the run was evaluated on. Text the run never trained on (for
  Shakespeare, whole works). It must equal the logged loss; a difference above 1e-6 is reported.
- *as published*: the windows on which a publication validates, if a study hands one in
  (report/published.py).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import validation_windows
from data.options import DataOptions
from data.prepare import Prepared, find_prepared, prepare
from harness.config import flat_options
from harness.device import resolve
from harness.folder.checkpoint import CheckpointError, Checkpoints
from harness.folder.one_run import check_history, check_ids
from harness.folder.rundir import CHECKPOINT_FOLDER, CONFIG_FILE, changed_options
from harness.run import validation_loss
from harness.trained import plain_weights
from models import ModelConfig, build
from report.published import Published
from report.results import RunResult, copies_by_run, loss_options

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Losses:
    """Nats per token, of the weights in the last checkpoint. as_published: None without a
    publication. logged: what the run itself found on the held-out windows.
    """

    held_out: float
    as_published: float | None
    logged: float

    @property
    def agrees(self) -> bool:
        """Whether held-out and logged loss are equal to 1e-6."""
        return abs(self.held_out - self.logged) <= TOLERANCE


def runs_that_count(
    found: Sequence[RunResult], progress: bool = True, published: Published | None = None
) -> tuple[list[RunResult], dict[str, Losses], list[str]]:
    """Runs that count, their losses by id, and one sentence for each that is left out or whose loss
    is not the logged one.

    A diverged run has no losses, and of one that only tuned the log is enough. Of copies of a run
    the furthest counts whose losses can be computed again: a damaged copy must not take the place
    of a sound one.
    """
    runs: list[RunResult] = []
    losses: dict[str, Losses] = {}
    complaints: list[str] = []
    same = copies_by_run(found)
    for members in tqdm(
        same,
        desc="losses from checkpoints",
        unit="run",
        leave=False,
        disable=None if progress else True,
    ):
        counts: RunResult | None = None
        for run in members:
            if counts is not None:
                complaints.append(
                    f"{run.folder} is left out: the same run as {counts.folder}, which counts once"
                )
                continue
            if not run.diverged and not run.tuning:
                try:
                    losses[run.id] = recompute(run, published)
                except ValueError as error:
                    complaints.append(f"{run.folder} is left out: {error}")
                    continue
                if not losses[run.id].agrees:
                    new, old = losses[run.id].held_out, losses[run.id].logged
                    complaints.append(
                        f"{run.folder}: the validation loss computed again is {new!r}, the logged "
                        f"one {old!r}; they differ by more than {TOLERANCE:g} (another machine, "
                        "version, number of threads, or a compiled run?)"
                    )
            counts = run
        runs += [counts] if counts is not None else []
    return runs, losses, complaints


def recompute(run: RunResult, published: Published | None = None) -> Losses:
    """Rebuild the model of a finished run and compute its losses again, also as `published`
    validates.

    Raises ValueError, in words, if there is no sound checkpoint of the run's last step, if it is of
    other options than the run's, if its text can't be had any more, or if the checkpoint is of a
    version that this one can't read.
    """
    try:
        return _recompute(run, published)
    except (CheckpointError, OSError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"its losses can't be computed again: {type(error).__name__}: {error}"
        ) from error


def _recompute(run: RunResult, published: Published | None) -> Losses:
    loaded = Checkpoints(run.folder / CHECKPOINT_FOLDER).load_latest()
    if loaded is None:
        raise ValueError(
            f"no checkpoint in {CHECKPOINT_FOLDER}/, so its losses can't be computed again"
        )
    if loaded.step != run.summary["step"]:
        raise ValueError(
            f"its newest checkpoint is of step {loaded.step:,}, and the run ended at "
            f"{run.summary['step']:,}"
        )
    check_ids(run.folder, loaded)
    check_history(run.folder, loaded)
    config = loaded.state["config"]
    trained, said = (
        loss_options(o) | {"seed": o["seed"]} for o in (flat_options(config), run.options)
    )
    if differing := changed_options(said, trained):
        raise ValueError(
            f"{run.folder / CONFIG_FILE}: not what its checkpoint was trained with "
            f"({', '.join(differing)} differ)"
        )
    prepared = _prepared(json.dumps(config["data"]), loaded.state["data"]["train"])
    model_config = ModelConfig(**config["model"])
    held_out = validation_windows(
        prepared.val,
        block_size=model_config.block_size,
        batch_size=config["eval"]["batch_size"],
        batches=config["eval"]["batches"],
    )
    if loaded.state["data"] != {"train": prepared.train.sha256, "validation": held_out.hash}:
        raise ValueError(
            "the text that its data options name now is not the text it was trained on"
        )
    with torch.random.fork_rng():
        model = build(model_config)
    model.load_state_dict(plain_weights(loaded.state["model"]))
    # As the run itself computed, where this machine can: TF32 and compilation move a loss by more
    # than 1e-6.
    there = loaded.state["runtime"]
    device = there["device"] if there["device"] == "cpu" or torch.cuda.is_available() else "auto"
    runtime = resolve(
        device, config["precision"], compile=there["compile"], deterministic=config["deterministic"]
    )
    model.to(runtime.device)
    forward = torch.compile(model) if runtime.compile else model
    as_published = None
    if published is not None:
        inputs, targets = published.batch(prepared.train, model_config.block_size, loaded.step)
        # No more windows at once than the run's own evaluation takes, in parts of equal size, so
        # that the mean of their means is the mean.
        count = len(inputs)
        parts = next(
            parts
            for parts in range(-(-count // config["eval"]["batch_size"]), count + 1)
            if count % parts == 0
        )
        batches = zip(inputs.chunk(parts), targets.chunk(parts), strict=True)
        as_published = validation_loss(model, batches, runtime, forward)
    return Losses(
        held_out=validation_loss(model, held_out, runtime, forward),
        as_published=as_published,
        logged=run.last("val/loss"),
    )


@functools.lru_cache(maxsize=8)
def _prepared(options: str, train_sha256: str) -> Prepared:
    """The tokens that a run was trained on: from the cache, even if the text itself is gone."""
    data = DataOptions(**json.loads(options))
    return find_prepared(data, train_sha256) or prepare(data, progress=False)
