"""A model that a run has trained, read back with the text it was trained on: the way in for
programs that look at one run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.options import DataOptions
from data.prepare import Prepared, find_prepared, prepare
from harness.folder.checkpoint import Checkpoints
from harness.folder.one_run import check_ids
from harness.folder.rundir import CHECKPOINT_FOLDER
from models import LanguageModel, ModelConfig, build


def plain_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict without what a method has learned in its layers, for a model with plain ones."""
    return {
        name: tensor
        for name, tensor in state.items()
        if not name.rpartition(".")[2].startswith("estimator_")
    }


@dataclass(frozen=True)
class Trained:
    """model: on the CPU, with plain layers and exact attention, however it was trained. val_loss:
    at that step, or None.
    """

    model: LanguageModel
    prepared: Prepared
    step: int
    val_loss: float | None


def load_trained(run: Path, *, best: bool = False) -> Trained:
    """The newest checkpoint of the run folder `run`, or the one of lowest validation loss where
    there is one.

    Raises ValueError if there is none, if the folder holds files of several runs, or if the text
    has changed since; CheckpointError if it is damaged.
    """
    checkpoints = Checkpoints(run / CHECKPOINT_FOLDER)
    loaded = (checkpoints.load_best() if best else None) or checkpoints.load_latest()
    if loaded is None:
        raise ValueError(f"{run} holds no checkpoint; give a run folder such as runs/default")
    check_ids(run, loaded)
    config = loaded.state["config"]
    with torch.random.fork_rng():
        model = build(ModelConfig(**config["model"]), weights=False)
    model.load_state_dict(plain_weights(loaded.state["model"]))
    options, tokens = DataOptions(**config["data"]), loaded.state["data"]["train"]
    prepared = find_prepared(options, tokens) or prepare(options)
    if prepared.train.sha256 != tokens:
        raise ValueError(
            f"the text behind {run} has changed since; its tokens would be read with another "
            "vocabulary"
        )
    evaluated = loaded.state.get("val_step") == loaded.step
    return Trained(
        model, prepared, loaded.step, loaded.state["val_loss"] if evaluated else loaded.val_loss
    )
