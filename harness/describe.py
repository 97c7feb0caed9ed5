"""What a run says when it begins: where it computes, what it estimates, where its bytes are."""

from __future__ import annotations

import logging
import math

from harness import memory
from harness.run import Run

log = logging.getLogger(__name__)


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
