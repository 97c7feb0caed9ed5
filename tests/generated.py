"""Command lines of train.py drawn at random, right and wrong, and what becomes of them.

A command line is a tiny run of two steps (tiny.py) with a choice for each group of conf/, and up to
four further words: options of this choice at values that fit their type or do not, at the edges of
what is allowed, misspelt, added or deleted. Not drawn are what takes minutes or a network:
compiled models, sizes beyond 64, other texts, GPT-2's tokenizer, wandb.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
from hypothesis import strategies as st
from omegaconf import OmegaConf

import conf
import train
from harness import command_line
from harness.config import flattened
from harness.folder.metrics import read_metrics

GROUPS: dict[str, tuple[list[str], int]] = {  # choices, and in how many of ten lines one is made
    "method": (conf.options("method"), 9),
    "activations": ([*[n for n in conf.options("activations") if n != "budget"] * 4, "budget"], 7),
    "attention": (conf.options("attention"), 5),
    "optim": (conf.options("optim"), 5),
    "row": (conf.options("row"), 1),
    "experiment": (conf.options("experiment"), 2),
}
FEATURES = [
    ["method.rank=2"],
    ["method.budget=1/2", "method.allocation=uniform"],
    ["method.budget=1/4", "method.allocation=variance"],
    ["method.include=['*']"],
    ["adaptive_rank.every=1"],
    ["diagnostics.every=1", "diagnostics.masks=2"],
    ["diagnostics.monitor=true"],
    ["precision=bfloat16"],
    ["model.dropout=0.1"],
    ["model.tie_head=true"],
    ["model.init=paper"],
    ["model.block_size=1"],
    ["micro_batch_size=3"],
    ["micro_batch_size=2", "tokens_per_step=64"],
    ["checkpoint.every=1", "checkpoint.keep=1"],
    ["eval.every=1", "eval.batches=1"],
    ["deterministic=true"],
    ["optim.grad_clip=0.1"],
    ["data.order=paper"],
]
FORMS = ["{}={}"] * 20 + ["+{}={}", "++{}={}", "~{}", "{}x={}", "{}"]
FIXED = ("steps", "compile", "tracker.mode", "data.path", "data.cache_dir", "data.source")
ENDS = ["0", "-1", "1", "2", "3", "4", "5", "8", "16", "17", "63", "64"]
LARGE = ["1000", "4294967296", "9223372036854775807", "9223372036854775808", "1e3", "1_000"]
MAY_BE_LARGE = re.compile(r"^seed|\.seed|every|keep|batches|patience|min_lr|eps|max_tokens")
FLOATS = ["0", "-1", "1", "0.5", "1.0", "1e-3", "1e-30", "1e30", "1e308", "-0.0", "nan", "inf"]
WRONG = [
    "null",
    "true",
    "abc",
    "[]",
    "[1]",
    "{a: 1}",
    '""',
    "1.5",
    "-inf",
    "0x10",
    "${seed}",
    "???",
]
WRONG += ["${nothing.there}", "${oc.env:NOT_SET}", "${precision}", '"\\${open"', "\\${open"]
WRONG += ["本", "'a b'", '"a=b"', "a\\,b", "$", "a,b", "(", "'"]
TEXTS = {
    "precision": ["float32", "bfloat16", "float16"],
    "device": ["cpu", "auto", "cuda", "tpu"],
    "purpose": ["training", "tuning", "fun"],
    "method.include": ["['*']", "[head]", "[blocks.*]", "[blocks.0.mlp.*]", "[]", "head", "[nope]"],
    "method.exclude": ["['*']", "[head]", "[]", "[blocks.*.mlp.*]", "[nope]"],
    "method.budget": ["1/2", "1/8", "1/24", "0.5", "1", "2", "0", "-1/2", "1/0", "1/1000", "a/b"],
    "tracker.tags": ["[a]", "[a,b]", "['']", "[" + "x" * 65 + "]"],
    "tracker.project": ["mine", "a/b", '""'],
    "data.tokenizer": ["char", "bert"],
    "data.order": ["random", "paper", "sorted"],
    "data.val_fraction": ["0.1", "0.5", "0.9", "0.001", "0", "1", "null"],
    "data.max_tokens": ["1", "10", "1000", "null", "0"],
    "data.revision": ["null", "main"],
    "optim.schedule": ["constant", "cosine", "linear"],
    "parallel": ["none", "ddp", "fsdp", "tp", "null"],
    "resume.world_size": ["same", "any", "2"],
    "attention.mode": ["sparse", "dense", "null"],
    "model.init": ["gpt2", "paper", "torch", "none"],
    "model.block_size": ["1", "2", "3", "16", "64"],
    "tokens_per_step": ["16", "32", "48", "1", "0", "-16", "17"],
    "diagnostics.masks": ["0", "1", "2", "3", "-1"],
}


@functools.cache
def options_of(words: tuple[str, ...]) -> dict[str, Any]:
    """The options that exist with these choices, and their values; those of no choice if they
    exclude each other.
    """
    try:
        values = conf.compose(words)
    except ValueError:
        values = conf.compose(())
    return flattened(OmegaConf.to_container(values, resolve=False))


def fits(option: str, value: object) -> list[str]:
    """Values of the right type, allowed or not, for an option that has `value` now."""
    if option in TEXTS:
        return TEXTS[option]
    if isinstance(value, bool):
        return ["true", "false", "null"]
    if isinstance(value, int) or value is None:
        return [*ENDS, *(LARGE if MAY_BE_LARGE.search(option) else []), "0.5", "1e-3", "null"]
    return FLOATS if isinstance(value, float) else [str(value), "none"]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """The words behind those of tiny.overrides."""
    groups = []
    for group, (names, share) in GROUPS.items():
        if draw(st.integers(1, 10)) <= share:
            groups.append(f"{group}={draw(st.sampled_from(names))}")
    words = [*groups, "steps=2", "optim.warmup_steps=0"]
    known = options_of(tuple(groups))
    for feature in draw(st.lists(st.sampled_from(FEATURES), max_size=4, unique_by=str)):
        words += [word for word in feature if word.partition("=")[0] in known]
    names = [name for name in known if not name.startswith(FIXED)]
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 1, 2, 3]))):
        option = draw(st.sampled_from(names))
        fitting = draw(st.integers(1, 3)) < 3
        value = draw(st.sampled_from(fits(option, known[option]) if fitting else WRONG))
        words.append(draw(st.sampled_from(FORMS)).format(option, value))
    return words


def outcome(data: Path, here: Path, words: list[str]) -> str:
    """Run train.py on these words in the empty folder `here`, in this process: "trained", "refused"
    or "diverged". Raises AssertionError for any other end, whatever train.py raises for a crash.
    """
    run = here / "run"
    line = ["train.py", *tiny.overrides(data), "log.progress=false", *words]
    said = io.StringIO()
    root, interrupt = logging.getLogger(), signal.getsignal(signal.SIGINT)
    handlers, level = root.handlers[:], root.level
    try:
        with (
            mock.patch.object(sys, "argv", [*line, f"hydra.run.dir={run}"]),
            contextlib.chdir(here),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            code = command_line.run(train.main)
    finally:
        root.handlers[:], root.level = handlers, level
        signal.signal(signal.SIGINT, interrupt)
    message = said.getvalue()
    if code == 0:
        summary = json.loads((run / "summary.json").read_bytes())
        assert (summary["status"], summary["step"]) == ("finished", 2)
        assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 2
        end = "trained"
    else:
        assert code == 1
        refusals = [line for line in message.splitlines() if line.startswith("train.py: ")]
        assert len(refusals) == 1, message
        if (run / "summary.json").exists():
            summary = json.loads((run / "summary.json").read_bytes())
            assert (summary["status"], "loss is" in refusals[0]) == ("diverged", True), message
            end = "diverged"
        else:
            assert list(here.iterdir()) == [], message
            assert len(message.splitlines()) <= 4, message
            assert names_an_option(refusals[0], words), message
            end = "refused"
    shutil.rmtree(run, ignore_errors=True)
    return end


def names_an_option(message: str, words: list[str]) -> bool:
    """Whether a refusal names an option or a group, one of the command line's or another."""
    given = [word.partition("=")[0].lstrip("+~") for word in words]
    known = {*given, *GROUPS, *options_of(()), "eval", "log", "model", "data", "tracker", "optim"}
    return any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message) for name in known)
