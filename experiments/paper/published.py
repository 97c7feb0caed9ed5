"""The published numbers, which stand next to ours. Source: V. Khasia, arXiv 2604.16324, Tables 1 to
3 (one run per row).

The published code validates on **training text**: on the beginning of its training stream, where
each evaluation reads the next 30 windows. The k-th evaluation (k = steps / 1,000) reads windows
30 (k - 1) to 30 k - 1. Such a loss is of text already seen, and two evaluations are of different
text.
"""

from __future__ import annotations

from torch import Tensor

from data import Sampler
from data.tokens import TokenFile
from report.published import Published, PublishedLosses
from report.results import Group

EVALUATION_WINDOWS = 30
"""Windows per evaluation of the published code, which goes on to the next 30 at each evaluation."""
EVALUATION_EVERY = 1000

TABLE_3: dict[int | None, PublishedLosses] = {
    None: PublishedLosses(6.718, 6.616),  # exact
    64: PublishedLosses(6.680, 6.573),
    32: PublishedLosses(6.735, 6.575),
    16: PublishedLosses(6.731, 6.675),
    8: PublishedLosses(6.798, 6.762),
    1: PublishedLosses(7.247, 7.221),
}

# What a run must have in common with Table 2 and the published code to be compared with a row of
# Table 3.
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


def published_row(group: Group) -> PublishedLosses | None:
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


def published_batch(train: TokenFile, block_size: int, steps: int) -> tuple[Tensor, Tensor]:
    """The windows on which the published code validates after so many steps: inputs and targets,
    (30, T) each.
    """
    windows = Sampler(
        train, block_size=block_size, batch_size=EVALUATION_WINDOWS, order="paper", seed=0
    )
    return windows.batch(max(steps // EVALUATION_EVERY, 1) - 1)


PUBLISHED = Published(
    losses=published_row,
    exact=TABLE_3[None],
    batch=published_batch,
    validates="as the published code validates, on 30 windows of text that is also training text",
    note="The paper's columns: FineWeb-Edu, 50,000 steps, one run each; its train loss is of the "
    "last step, its validation text is also training text.",
)
