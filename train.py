"""Train a GPT, exactly or with sketched activations.

    python train.py                     # the paper's model, BASIS R = 32, Shakespeare, 2,000 steps
    python train.py method=exact
    python train.py -m method=basis method.rank=1,8,32 seed=0,1,2
    torchrun --nproc-per-node=8 train.py model=gpt2        # or: srun python train.py
    python train.py --help              # every option and its default

The same command continues an interrupted run and skips a finished one. A run leaves config.yaml,
metrics.jsonl, summary.json and checkpoints in its directory, runs/<overrides>. Of what it is made:
harness/set_up.py; here is the loop.

Exit codes: 0 finished, 1 refused or failed (the message says why), 128 + signal when stopped after
saving by Ctrl-C, SIGTERM, SIGUSR1 or a closed terminal (SIGHUP).
"""

from __future__ import annotations

import signal
import sys

from harness import terminal

if __name__ == "__main__":
    terminal.attach()
    # Until all libraries are loaded, Ctrl-C ends the process at once and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import logging
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from data.bar import bar
from harness import command_line, memory, memory_limit, worker, world
from harness.command_line import StopRequest
from harness.compose import load
from harness.config import Config
from harness.describe import describe
from harness.folder import disk, one_run, rundir
from harness.folder.checkpoint import CheckpointError
from harness.folder.metrics import Stopwatch
from harness.folder.summary import at_the_start, last_values, leave
from harness.optim import learning_rate, momentum_norm
from harness.profile import profiled
from harness.run import NonFiniteError, Run, validation_loss
from harness.saving import save
from harness.set_up import held, set_up
from harness.step import CaptureError, make_step

log = logging.getLogger("train")


def train(run: Run, stop: StopRequest) -> dict[str, Any]:
    """Take the steps that are left, until `stop`; the final numbers, which summary.json holds."""
    config, optimizer = run.config, run.optimizer
    table = run.measure_memory()
    describe(run, table)
    take_step = make_step(run)
    progress = bar(
        total=config.steps,
        initial=run.step,
        unit="step",
        disable=None if config.log.progress and world.here().first else True,
    )
    if run.runtime.device.type == "cuda":
        # else a sweep's later runs would show the peak of an earlier one
        torch.cuda.reset_peak_memory_stats()
    with (
        logging_redirect_tqdm(),
        progress,
        profiled(config.profile, run.folder) as step_is_done,
    ):
        if run.step == 0:
            record(
                run,
                table
                | ({} if run.rank_control is None else run.rank_control.metrics())
                | evaluate(run),
            )
        clock, last_logged = Stopwatch(), run.step
        # A signal reaches the processes of a run one by one; all stop after the same step.
        while run.step < config.steps and not (stopped := world.largest(stop.code or 0)):
            lr = learning_rate(config.optim, run.step, config.steps)
            done = run.step + 1
            log_now, eval_now, save_now, look_now = (
                due(done, g.every, config.steps)
                for g in (config.log, config.eval, config.checkpoint, config.diagnostics)
            )
            row: dict[str, Any] = {}
            if look_now and config.diagnostics.every:
                with clock.paused():
                    row = run.gradient_quality() | run.kept_entries()
            loss, grad_norm = take_step(lr, log_now)
            run.step = done
            run.pending.append(loss)
            progress.update()
            step_is_done()

            if log_now or eval_now or save_now:
                run.runtime.synchronize()
            if log_now:
                step_losses = run.pending_losses()
                run.forget_losses()
                assert grad_norm is not None
                seconds, last_logged = clock.lap() / (done - last_logged), done
                row |= {
                    "train/loss": math.fsum(step_losses) / len(step_losses),
                    "train/loss_last_step": step_losses[-1],
                    "lr": lr,
                    "grad_norm": float(grad_norm),
                    "momentum_norm": momentum_norm(optimizer),
                    "step_seconds": seconds,
                    "tokens_per_second": config.step_tokens / seconds,
                    "mem/rss_bytes": memory.rss_bytes(),
                    "mem/optimizer_bytes": memory.optimizer_bytes(optimizer),
                }
                row |= run.readings()
                if run.runtime.device.type == "cuda":
                    peak = torch.cuda.max_memory_allocated()
                    row["mem/peak_bytes"] = max(peak, take_step.peak_bytes)
            # A step's time includes logging; diagnostics, evaluation, rank and checkpoint are not
            # part of it.
            with clock.paused():
                if eval_now:
                    row |= evaluate(run)
                adapted = run.adapt_rank()
                table |= {name: int(value) for name, value in adapted.items() if name in table}
                row |= adapted
            if row:
                show(progress, record(run, row), table["mem/saved_bytes"])
            is_best = eval_now and config.checkpoint.best and run.val_loss == run.best_val_loss
            if save_now or is_best:
                with clock.paused():
                    save(run)  # after the row is written: a resumed run has the rows up to here
        if run.step < config.steps:
            save(run)
            log.warning(
                "stopped by a signal at step %d, checkpoint saved; the same command continues",
                run.step,
            )
            raise SystemExit(stopped)
    return {"memory": table}


def due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after `done`
    steps.
    """
    return done == steps or (every > 0 and done % every == 0)


def evaluate(run: Run) -> dict[str, float]:
    """Validation loss of the present weights; the run remembers the last and the best."""
    run.val_step, run.val_loss = (
        run.step,
        validation_loss(run.model, run.validation, run.runtime, run.forward),
    )
    if run.runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the peak that is logged is training's
    if math.isfinite(run.val_loss):
        run.best_val_loss = min(run.best_val_loss, run.val_loss)
    return {"val/loss": run.val_loss, "val/perplexity": math.exp(min(run.val_loss, 700.0))}


def record(run: Run, row: dict[str, Any]) -> dict[str, Any]:
    """Write one row of metrics to the run directory and to the tracker; returns it with its step
    and tokens.
    """
    row = {"step": run.step, "tokens": run.step * run.config.step_tokens} | row
    run.metrics.log(row)
    run.tracker.log(row)
    return row


def show(progress: tqdm[Any], row: dict[str, Any], kept: int) -> None:
    """The latest numbers behind the progress bar, and a line for each evaluation."""
    if "val/loss" in row:
        log.info("step %d  val/loss %.4f", row["step"], row["val/loss"])
    shown = {"kept": memory.format_bytes(kept)}
    if "train/loss" in row:
        shown |= {"loss": f"{row['train/loss']:.3f}", "tok/s": f"{row['tokens_per_second']:,.0f}"}
    progress.set_postfix(shown, refresh=False)


def begin(config: Config, folder: Path, writable: bool) -> Run | None:
    """The run in `folder`, which this process holds, ready for its next step; None if it is
    finished.
    """
    finished = world.agreed(lambda: is_finished(config, folder, writable))
    return None if finished else set_up(config, folder)


def is_finished(config: Config, folder: Path, writable: bool) -> bool:
    """Whether `folder` holds the run of `config`, finished. Raises ValueError if it can't be begun
    or continued there.
    """
    summary = rundir.read_summary(folder)
    one_run.check_ids(folder)
    if summary.get("status") == "finished" and summary["step"] >= config.steps:
        rundir.check_same_run(folder, config)
        log.info(
            "%s is finished (step %d, val/loss %.4f)",
            folder,
            summary["step"],
            summary.get("val/loss", math.nan),
        )
        if config.tracker.mode == "online":
            log.info("to upload it: python scripts/sync.py %s --mode online", folder)
        return True
    if not writable:
        raise ValueError(f"{folder}: a run writes here, and this folder may not be written")
    if summary.get("status") == "diverged":
        # it would do so again: a run is a function of its configuration
        rundir.check_same_run(folder, config)
        raise ValueError(
            f"{folder} holds a run that diverged: {summary['reason']}; delete it to run it again"
        )
    return False


def execute(values: DictConfig, folder: Path) -> None:
    """Check, set up, train, and leave a summary whatever happens."""
    with ExitStack() as stack:
        stack.callback(command_line.remove_if_empty, folder)
        folders = {"hydra.run.dir": folder}
        try:
            config = load(values)
            folders["data.cache_dir"] = config.data.cache_path()
            meet(config)
            writable = world.by_first(lambda: stack.enter_context(held(folder)), True)
            run = begin(config, folder, writable)
        except (ValueError, CheckpointError, OSError) as error:
            raise CompactHydraException(said(error, folders)) from error
        except (MemoryError, RuntimeError) as error:
            if not memory_limit.is_out_of_memory(error):
                raise
            device = torch.device("cuda" if isinstance(error, torch.OutOfMemoryError) else "cpu")
            raise CompactHydraException(memory_limit.explain(config, device, {})) from error
        if run is None:
            return
        try:
            # Signals are caught to the end: where one process is lost, the others are sent SIGTERM
            # while they leave their summary.
            with StopRequest() as stop, run.metrics, run.tracker:
                work(run, stop)
        except OSError as error:
            if (refused := disk.first_refusal(error)) is None:
                raise
            raise CompactHydraException(
                f"{disk.explain(refused, folders)}. The same command then goes on; "
                f"{run.last_checkpoint()}"
            ) from error


def said(error: Exception, folders: dict[str, Path]) -> str:
    """The message of a refusal, in words about the disk where the disk refused."""
    refused = disk.first_refusal(error) if isinstance(error, OSError) else None
    return str(error) if refused is None else disk.explain(refused, folders)


def meet(config: Config) -> None:
    """Meet the other processes of the run, if there are any. Raises ValueError if there are others
    than `config` says.
    """
    here = world.here()
    if config.world_size != here.size:
        raise ValueError(
            f"world_size={config.world_size}: {here.size} "
            f"{'process was' if here.size == 1 else 'processes were'} started; start as many with "
            "torchrun --nproc-per-node or srun, or leave it out"
        )
    if config.parallel != "none":
        world.connect(here, cuda=torch.cuda.is_available() and config.device != "cpu")


def work(run: Run, stop: StopRequest) -> None:
    """Train to the end, and leave a summary whatever happens."""
    config, folder = run.config, run.folder
    summary = at_the_start(run)
    first = world.here().first
    if first:  # a run that is killed from here on is not taken for finished
        rundir.write_summary(folder, summary)
    summary["status"] = "failed"
    try:
        result = train(run, stop)
        summary |= {"status": "finished"} | result
    except NonFiniteError as error:
        summary |= {"status": "diverged", "reason": str(error), "diverged_at": error.step}
        raise CompactHydraException(str(error)) from error
    except CaptureError as error:
        summary["reason"] = str(error)
        raise CompactHydraException(str(error)) from error
    except OSError as error:
        summary["reason"] = str(error)
        raise
    except (MemoryError, RuntimeError) as error:
        if memory_limit.is_out_of_memory(error):
            summary["reason"] = "out of memory"
            raise command_line.OwnError(
                memory_limit.explain(
                    config,
                    run.runtime.device,
                    last_values(run),
                    captured=run.runtime.cuda_graph,
                )
            ) from error
        if not world.lost_another(error):
            raise
        summary["reason"] = "another process of the run has ended"
        raise command_line.OwnError(
            f"process {world.here().rank} of {config.world_size}: another process of this run has "
            f"ended, so this one ends too; the same command goes on; {run.last_checkpoint()}"
        ) from error
    except (KeyboardInterrupt, SystemExit):
        summary["status"] = "interrupted"
        raise
    finally:
        if summary["status"] == "failed":
            summary.setdefault("reason", repr(sys.exception()))
        if first:
            leave(run, summary)
    if first:
        log.info(
            "finished: val/loss %.4f, best %.4f, %.0f s",
            summary["val/loss"],
            summary["val/loss_best"],
            summary["wall_seconds"],
        )


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(values: DictConfig) -> None:
    with worker.job():
        execute(values, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    code = command_line.run(main)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is done: again without a traceback
    sys.exit(code)
