"""Everything a run consists of, put together in the order in which it can be refused.

`held` takes the run directory for this process, before anything in it is read: what was read
before would be the past of a run that another process goes on with. Then `set_up` checks what needs
no data (device, method scope, the run directory's old configuration), prepares the data, builds
model and optimiser, and only then writes into the run directory. It continues from the newest sound
checkpoint if there is one.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from basis.diagnostics.monitor import Monitor
from basis.noise_key import NOISE_VERSION, HasNoiseKey
from basis.ops.noise import fold
from data import Sampler, validation_windows
from data.prepare import prepare
from data.tokens import TokenFile
from harness import memory_limit, world
from harness.build import build_model, check_method, rank_controller, training_text
from harness.config import Config, flat_options
from harness.device import Runtime, resolve
from harness.folder import one_run, rundir
from harness.folder.checkpoint import Checkpoints, Loaded
from harness.folder.metrics import MetricsLog, NoMetrics
from harness.folder.run_id import RUN_FILE, label_options, run_id, run_labels
from harness.layer_budgets import apply_knobs, measure_knobs
from harness.optim import make_optimizer
from harness.parallel import Parallel
from harness.rank_control import RankControl
from harness.run import Run
from harness.saving import restore
from harness.tracker import Tracker, make_tracker, require_wandb
from models import LanguageModel

log = logging.getLogger(__name__)


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """`folder`, made if absent, for this process alone; gives whether it may be written.

    The system lets go of it when the process ends, however it ends. A run that did not begin leaves
    no lock file. Raises ValueError if another process has the folder.
    """
    lock = FileLock(folder / rundir.LOCK_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.2)  # scripts/status.py has it for a moment, to see whether it can
    except Timeout:
        raise ValueError(f"{folder}: another process is working on this run") from None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS):
            raise
        yield False  # a finished run on a disk for reading is still told from others
        return
    try:
        yield True
    finally:
        if not (folder / rundir.CONFIG_FILE).exists():
            (folder / rundir.LOCK_FILE).unlink()  # before it is let go of
        lock.release()


def _empty(folder: Path) -> None:
    """Take away what a run left that did not begin: the contents alone, for the folder may be the
    user's, or the working directory.
    """
    for path in folder.iterdir():
        if path.name != rundir.LOCK_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _rank_control(model: LanguageModel, config: Config, unseen: TokenFile) -> RankControl | None:
    """What sets the rank from step to step, if anything does; it looks at batches of `unseen` as
    large as a micro-batch.
    """
    controller = rank_controller(model, config)
    if controller is None:
        return None
    batches = Sampler(
        unseen,
        block_size=config.model.block_size,
        batch_size=config.micro_batch_size,
        order=config.data.order,
        seed=config.seed,
    )
    return RankControl(controller, config.adaptive_rank.every, batches)


def _runtime(config: Config) -> Runtime:
    return resolve(
        config.device,
        config.precision,
        config.compile,
        deterministic=config.deterministic,
        cuda_graph=config.cuda_graph,
        small=config.captured_by_default,
    )


def set_up(config: Config, folder: Path) -> Run:
    """The run of `config` in `folder`, new or continued; the caller holds the folder (`held`).

    Raises ValueError for what the user can mend, before writing.
    """
    runtime = world.together(lambda: _runtime(config))
    if config.activations.name == "budget" and not runtime.compile:
        raise ValueError("activations=budget: a budget is kept by torch.compile; give compile=true")
    kept = config.activations
    boundaries = kept.name == "checkpoint" and kept.boundary is not None and runtime.compile
    if boundaries and config.parallel != "none":
        raise ValueError(
            f"activations.boundary={kept.boundary}: not compiled with parallel={config.parallel}; "
            "give compile=false or activations.boundary=null"
        )
    if boundaries and config.model.dropout > 0.0:
        raise ValueError(
            f"model.dropout={config.model.dropout}: with activations.boundary={kept.boundary} a "
            "compiled block would drop other numbers in backward; give compile=false, "
            "activations.boundary=null or model.dropout=0"
        )
    if config.diagnostics.monitor and runtime.compile:
        raise ValueError(
            "diagnostics.monitor=true: hooks on layers are not seen by a compiled model; give "
            "compile=false"
        )
    require_wandb(config.tracker.mode)
    memory_limit.check(config, runtime.device)
    check_method(config)
    rundir.check_same_run(folder, config)

    known, shown = rundir.trained_on(folder), config.log.progress and world.here().first
    # The first one prepares the text, the others find it prepared.
    world.by_first(lambda: prepare(config.data, progress=shown, known=known), None)
    config, prepared, sampler = training_text(config, progress=shown, known=known)
    rundir.check_same_run(folder, config)  # now that the vocabulary is known
    validation = validation_windows(
        prepared.val,
        block_size=config.model.block_size,
        batch_size=config.eval.batch_size,
        batches=config.eval.batches,
    )
    asked = config.eval.batches * config.eval.batch_size
    if validation.windows < asked:
        log.warning(
            "eval.batches=%d: %d windows of model.block_size + 1 = %d tokens are asked for, the "
            "held-out text has %d; evaluations take %d (data.val_fraction holds out more)",
            config.eval.batches,
            asked,
            config.model.block_size + 1,
            prepared.val.count // (config.model.block_size + 1),
            validation.windows,
        )
    model, sketched = build_model(config)
    model.to(runtime.device)
    checkpoints = Checkpoints(folder / rundir.CHECKPOINT_FOLDER, keep=config.checkpoint.keep)
    loaded = _newest(checkpoints)
    known_id = world.agreed(lambda: one_run.check(folder, loaded))
    data_hashes = {"train": prepared.train.sha256, "validation": validation.hash}
    if loaded and loaded.state["data"] != data_hashes:
        raise ValueError(
            f"data.path={config.data.path}: the prepared tokens are not those that the run in "
            f"{folder} was started with; bring the same text back, give another hydra.run.dir, or "
            "delete the folder"
        )
    if loaded:  # it knows the vocabulary, which config.yaml of an older version may not
        rundir.check_same_options(folder, flat_options(loaded.state["config"]), config)
    if loaded:
        # older versions knew no graphs
        before, now = {"cuda_graph": False} | loaded.state["runtime"], runtime.describe()
        changes = "; ".join(
            f"{option}: {before[option]} -> {now[option]}"
            for option in now
            if before[option] != now[option]
        )
        if changes:
            raise ValueError(
                f"{folder} holds a run that computes elsewhere ({changes}); losses would not "
                "continue bit for bit"
            )
        draws = any(isinstance(module, HasNoiseKey) for module in model.modules())
        if draws and loaded.state.get("noise") != NOISE_VERSION:
            raise ValueError(
                f"{folder} holds a run whose noise was drawn by another version of basis; losses "
                "would not continue: finish it with that version, give another hydra.run.dir, or "
                "delete the folder"
            )

    knobs: dict[str, Any] = {}
    if config.method.varies_by_layer:
        knobs = loaded.state["knobs"] if loaded else measure_knobs(model, config, sampler, runtime)
        apply_knobs(model, knobs)
    rank_control = _rank_control(model, config, prepared.val)
    if rank_control is not None and loaded:
        rank_control.restore(
            loaded.state["adaptive_rank"], model
        )  # before what the layers had learned, whose sizes depend on it
    if not world.here().first:  # dropout of its own; a resumed run has its random numbers
        torch.manual_seed(fold("process", config.seed, world.here().rank))
    elsewhere: tuple[MetricsLog, Tracker, str] = (NoMetrics(), Tracker(), "")
    metrics, tracker, identity = world.by_first(
        lambda: _open(config, folder, loaded, known_id), elsewhere
    )
    if runtime.compile:
        # graphs of a sweep's earlier runs count against the limit of recompilations
        torch.compiler.reset()
    parallel = Parallel(config.parallel, model, runtime, config.activations)
    run = Run(
        config=config,
        folder=folder,
        runtime=runtime,
        sampler=sampler,
        validation=validation,
        model=model,
        parallel=parallel,
        forward=parallel.forward(),
        sketched=sketched,
        data_hashes=data_hashes,
        optimizer=make_optimizer(model, config.optim),  # of the parameters that fsdp leaves here
        checkpoints=checkpoints,
        metrics=metrics,
        tracker=tracker,
        id=identity,
        knobs=knobs,
        rank_control=rank_control,
        monitor=Monitor(model) if config.diagnostics.monitor else None,
    )
    if loaded:
        restore(run, loaded)
        log.info("continuing from step %d (%s)", run.step, loaded.path)
        before = {"parallel": "none", "world_size": 1} | loaded.state["config"]
        if any(before[option] != getattr(config, option) for option in rundir.PROCESSES):
            log.warning(
                "resume.world_size=any: parallel=%s, world_size=%d so far, now %s and %d. "
                "Text and sketch noise of a step stay; its sums are rounded in another order%s, so "
                "losses agree with those of before to rounding only",
                before["parallel"],
                before["world_size"],
                config.parallel,
                config.world_size,
                ", dropout is another" if config.model.dropout else "",
            )
    return run


def _newest(checkpoints: Checkpoints) -> Loaded | None:
    """The newest sound checkpoint, the same in all processes."""
    loaded = world.by_first(checkpoints.load_latest, None)
    path = world.agreed(lambda: None if loaded is None else loaded.path)
    return loaded if path is None or loaded is not None else checkpoints.load(path)


def _open(
    config: Config, folder: Path, loaded: Loaded | None, known_id: str | None
) -> tuple[MetricsLog, Tracker, str]:
    """What the run writes to, and its id. Nothing stays of a run that the tracker refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = all(path.name == rundir.LOCK_FILE for path in folder.iterdir())
    with ExitStack() as undo:
        if fresh:
            undo.callback(_empty, folder)
        rundir.write_config(folder, config)
        if known_id is not None and not (folder / RUN_FILE).exists():
            log.warning("%s is gone; it is made again for run %s", folder / RUN_FILE, known_id)
        identity = run_id(folder, known_id)
        metrics = undo.enter_context(MetricsLog(folder / rundir.METRICS_FILE))
        metrics.truncate_after(loaded.step if loaded else -1)
        labels = run_labels(
            method=config.method.name,
            settings=label_options(config),
            seed=config.seed,
            experiment=config.experiment_name,
        )
        tracker = make_tracker(  # wandb refuses a missing key only when asked
            config.tracker,
            run_dir=folder,
            run_id=identity,
            config=config.to_dict(),
            group=labels.group,
            job_type=labels.job_type,
            tags=labels.tags,
            name=labels.name,
        )
        undo.pop_all()  # nothing was refused
    return metrics, tracker, identity
