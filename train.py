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

if __name__ == "__main__":
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

from harness import command_line, disk, memory, memory_limit, one_run, rundir, worker, world
from harness.checkpoint import CheckpointError
from harness.command_line import StopRequest
from harness.config import Config, load
from harness.metrics import Stopwatch, read_metrics
from harness.optim import learning_rate, momentum_norm
from harness.profile import profiled
from harness.provenance import provenance
from harness.run import NonFiniteError, Run, validation_loss
from harness.set_up import held, set_up
from harness.step import CaptureError, make_step

log = logging.getLogger("train")


def train(run: Run, stop: StopRequest) -> dict[str, Any]:
    """Take the steps that are left, until `stop`; the final numbers, which summary.json holds."""
    config, optimizer = run.config, run.optimizer
    table = run.measure_memory()
    describe(run, table)
    take_step = make_step(run)
    progress = tqdm(
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
                    run.save()  # after the row is written: a resumed run has the rows up to here
        if run.step < config.steps:
            run.save()
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


def describe(run: Run, table: dict[str, int]) -> None:
    """Say what is about to run, and where its bytes are."""
    config = run.config
    sketch = "dW is exact in all dense layers"
    if run.sketched:
        sketch = f"dW is estimated in {len(run.sketched)} dense layers and exact in the others"
    if run.zeroth_order is not None:
        sketch = "no backward pass"
    found = config.adaptive_rank.label_options() | config.attention.label_options()
    sketch += "".join(f", {name}={value}" for name, value in found.items())
    log.info(
        "run directory  %s\n"
        "model          %s parameters on %s, %s%s\n"
        "method         %s: %s\n"
        "training       %s of %s steps are left, %s tokens each",
        run.folder,
        f"{run.model.parameter_count():,}",
        run.runtime.device,
        config.precision,
        (", compiled" if run.runtime.compile else "")
        + (", steps as CUDA graphs" if run.runtime.cuda_graph else ""),
        config.method.name,
        sketch,
        f"{config.steps - run.step:,}",
        f"{config.steps:,}",
        f"{config.step_tokens:,}",
    )
    if run.knobs:
        lines = [f"  {name:<24}{value:>10g}" for name, value in run.knobs.items()]
        knob = config.method.estimator.knob
        log.info(
            "method.budget=%s, divided by the error of dW, gives the layers that keep an input "
            "these values of %s:\n%s",
            config.method.budget.text if config.method.budget else None,
            knob,
            "\n".join(lines),
        )
    if run.zeroth_order is not None and config.optim.name == "sgd":
        log.warning(
            "zeroth_order: its gradient is about %.0f times as long as the true one (the root of "
            "the number of parameters), so optim.lr=%g acts like one that much larger",
            math.sqrt(run.model.parameter_count()),
            config.optim.lr,
        )
    if run.sketched and config.micro_batches > 1 and config.method.estimator.state_replaces_input:
        log.warning(
            "%s pairs each of the %d micro-batches with a sketch of the first: their dW is little "
            "but the mean's; prefer one micro-batch a step",
            config.method.name,
            config.micro_batches,
        )
    prefix = "mem/saved_bytes/"
    saved = {
        name.removeprefix(prefix): size for name, size in table.items() if name.startswith(prefix)
    }
    others = {"parameters": table["mem/parameter_bytes"], "gradients": table["mem/gradient_bytes"]}
    if run.runtime.compile:
        others = {"kept when compiled": table["mem/saved_bytes"]} | others
    if "mem/peak_bytes" in table:
        others["peak of a step"] = table["mem/peak_bytes"]
    log.info(
        "%s%s",
        memory.memory_table(saved, others),
        inputs_line(run, table),
    )


def inputs_line(run: Run, table: dict[str, int]) -> str:
    """What the sketched layers keep of their inputs, as method.budget counts it, and what lives
    between steps; a line.
    """
    inputs, state = table["mem/input_bytes"], table["mem/estimator_bytes"]
    if not inputs:
        return ""
    kept, beside = (
        table.get("mem/saved_bytes/sketches", 0),
        f", and {memory.format_bytes(state)} of state between steps",
    )
    if run.config.method.estimator.state_replaces_input:
        kept, beside = kept + state, ", as state between steps"
    of = f"{memory.format_bytes(kept)} of {memory.format_bytes(inputs)} of inputs"
    share = f"{kept / inputs:.4f}{beside if state else ''}"
    return f"\nlayers with an estimated dW keep {of}, {share}"


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
    summary: dict[str, Any] = {
        "status": "running",
        "run_id": run.id,
        "method": config.method.name,
        "runtime": run.runtime.describe(),
        "saved_step": run.saved_step,
    }
    summary |= {
        "data": run.data_hashes,
        "parameters": run.model.parameter_count(),
        "sketched_layers": run.sketched,
    }
    if run.knobs:
        summary["knobs"] = run.knobs
    summary |= provenance()
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


def last_values(run: Run) -> dict[str, Any]:
    """Of each metric the last value in the folder."""
    file = run.folder / rundir.METRICS_FILE
    return {k: v for row in (read_metrics(file) if file.exists() else []) for k, v in row.items()}


def leave(run: Run, summary: dict[str, Any]) -> None:
    """Add the last numbers of `run` to `summary`, and write it for people and for the tracker."""
    summary |= last_values(run)
    summary |= {
        "step": run.step,
        "saved_step": run.saved_step,
        "val/loss_best": run.best_val_loss if math.isfinite(run.best_val_loss) else None,
        "wall_seconds": run.wall_seconds(),
    }
    rundir.write_summary(run.folder, summary)
    run.tracker.summary({k: v for k, v in summary.items() if isinstance(v, int | float | str)})


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(values: DictConfig) -> None:
    with worker.job():
        execute(values, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
