"""The published numbers, to stand beside ours. Source: V. Khasia, arXiv 2604.16324, Tables 1 to 3
(one run per row).
"""

from __future__ import annotations

from dataclasses import dataclass

from report.results import Group

TEXT = "FineWeb-Edu, 50,000 steps, one run each"

EVALUATION_WINDOWS = 30
"""Windows per evaluation of the published code, which goes on to the next 30 at each evaluation."""
EVALUATION_EVERY = 1000


@dataclass(frozen=True)
class PublishedRow:
    """A row of Table 3: final losses in nats per token."""

    train_loss: float
    val_loss: float


TABLE_3: dict[int | None, PublishedRow] = {
    None: PublishedRow(6.718, 6.616),  # exact
    64: PublishedRow(6.680, 6.573),
    32: PublishedRow(6.735, 6.575),
    16: PublishedRow(6.731, 6.675),
    8: PublishedRow(6.798, 6.762),
    1: PublishedRow(7.247, 7.221),
}

# What a run must have in common with Table 2 and the published code to stand beside a row of Table
# 3.
_SETTING = {
    "model.vocab_size": 50257,
    "model.block_size": 64,
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 64,
    "model.init": "paper",
    "model.tie_head": False,
    "model.dropout": 0.0,
    "model.layer_norm_eps": 1e-6,
    "precision": "float32",
    "micro_batch_size": 1,
    "optim.name": "sgd",
    "optim.lr": 0.01,
    "optim.momentum": 0.9,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0.0,
    "optim.grad_clip": None,
    "data.order": "paper",
}
_BASIS = {
    "method.hashing": "balanced",
    "method.invariant_scalars": True,
    "method.shrinkage": 0.01,
    "method.eps": 1e-8,
    "method.include": ["blocks.*.mlp.*", "head"],
    "method.exclude": [],
}


def published_row(group: Group) -> PublishedRow | None:
    """The row of Table 3 that `group` repeats (on whatever text and for however many steps), if it
    does.
    """
    options = group.runs[0].options
    wanted = _SETTING | ({} if group.method == "exact" else _BASIS)
    if group.method not in ("exact", "basis") or any(
        options.get(name) != value for name, value in wanted.items()
    ):
        return None
    if options.get("tokens_per_step") not in (None, 64):
        return None
    return TABLE_3.get(group.rank)
