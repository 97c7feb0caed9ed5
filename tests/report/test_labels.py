"""What groups of runs are called: all that varies where that is little, else what differs from
most, and never two alike.
"""

from pathlib import Path
from typing import Any

import pytest
from composed import composed

from harness.compose import load
from report import losses
from report.labels import LONGEST, labels
from report.recompute import Losses
from report.results import RunResult, group_runs


def options(*words: str, text: str = "text") -> dict[str, Any]:
    """What `python train.py <words>` runs with, as far as it changes a loss."""
    known = load(composed(*words)).flat()
    free = (
        "tracker.",
        "checkpoint.",
        "log.",
        "diagnostics.",
        "data.cache_dir",
        "seed",
        "experiment_name",
        "device",
        "eval.every",
    )
    return dict(sorted((k, v) for k, v in known.items() if not k.startswith(free))) | {
        "text": {"train": text}
    }


def short(*rows: dict[str, Any]) -> list[str]:
    return [label.short for label in labels(rows)]


def test_what_varies_is_all_named_where_it_fits() -> None:
    assert short(
        *(options(*words) for words in (["method=exact"], ["method.rank=32"], ["method.rank=1"]))
    ) == [
        "exact",
        "basis R=32",
        "basis R=1",
    ]
    rows = [
        options("method.rank=8", f"method.hashing={hashing}", f"optim.lr={rate}")
        for hashing in ("balanced", "uniform")
        for rate in (0.01, 0.1)
    ]
    assert short(*rows) == [
        f"basis R=8 hashing={hashing} optim.lr={rate}"
        for hashing in ("balanced", "uniform")
        for rate in (0.01, 0.1)
    ]
    arena = [options("method=exact", "activations=lean")]
    arena += [options("method=transform", f"method.budget={share}") for share in ("1/8", "1/24")]
    assert short(*arena) == [
        "exact activations.name=lean",
        "transform activations.name=plain budget=1/8",
        "transform activations.name=plain budget=1/24",
    ]


MIXED = {
    "basis R=32": [],
    "exact": ["method=exact"],
    "basis R=32 precision=bfloat16": ["precision=bfloat16"],
    "basis R=32 model.vocab_size=None data.tokenizer=char": [
        "model.vocab_size=null",
        "data.tokenizer=char",
    ],
    "basis R=32 optim.lr=0.03": ["optim.lr=0.03"],
    "basis R=32 optim.lr=0.1": ["optim.lr=0.1"],
    "basis R=32 optim.name=adamw optim.lr=0.001 optim.grad_clip=1.0 ...": ["optim=adamw"],
    "basis R=32 optim.name=adamw optim.lr=0.002 optim.grad_clip=1.0 ...": [
        "optim=adamw",
        "optim.lr=0.002",
    ],
    "basis R=32 activations.name=lean": ["activations=lean"],
    "basis R=32 attention.name=sus attention.c=25.0 attention.mode=sparse": ["attention=sus"],
    "basis R=32 hashing=uniform": ["method.hashing=uniform"],
    "basis R=8 steps=500": ["method.rank=8", "steps=500"],
    "subspace R=32 adaptive_rank.every=20": ["method=subspace", "adaptive_rank.every=20"],
    "quantized budget=1/8": ["method=quantized", "method.budget=1/8"],
    "quantized budget=1/4": ["method=quantized", "method.budget=1/4"],
}


def test_in_mixed_company_a_label_names_what_differs_from_most() -> None:
    rows = [options(*words) for words in MIXED.values()]
    assert short(*rows) == list(MIXED)
    assert short(*reversed(rows)) == list(reversed(MIXED))
    named = labels(rows)
    assert all("precision=" in label.full and "activations.name=" in label.full for label in named)
    assert "optim.warmup_steps=" in named[6].full
    assert "precision=float32" in named[0].usual.split()
    assert "optim.lr=0.01" in named[0].usual.split()


@pytest.mark.parametrize("company", [[], list(MIXED.values())])
def test_two_rows_are_never_called_alike(company: list[list[str]]) -> None:
    long = [
        "method.include=[blocks.*.attn.qkv,blocks.*.attn.proj,blocks.*.mlp.fc,blocks.*.mlp.proj,head]",
        "optim=adamw",
    ]
    twins = [
        options(*long, f"optim.beta2={value}", "precision=bfloat16", "data=text", "data.path=x")
        for value in (0.5, 0.6, 0.7)
    ]
    rows = [
        *twins,
        *(options(*words) for words in company),
        options("data.path=x", text="one"),
        options("data.path=x", text="two"),
    ]
    rows += [
        options("method.budget=1/8", f"method.rank={rank}") for rank in (3, 4)
    ]  # a rank that the budget overrules
    found = short(*rows)
    assert len(set(found)) == len(rows)
    older = options("method.rank=7")
    del older["method.shrinkage"]  # as of a version that had no such option
    assert len(set(short(options("method.rank=7"), older))) == 2


def test_a_model_of_a_folder_is_told_by_a_digest() -> None:
    folders = [
        options(f"method.rank={rank}", "optim.lr=0.1", "seed=1")
        | {"model.family": "hf", "model.sha256": sha * 64, "model.architecture": sha * 900}
        for rank in (1, 2)
        for sha in "ab"
    ]
    made = short(*folders, options("method=exact", "model.n_layer=9"))
    assert len(set(made)) == 5
    assert max(map(len, made)) <= LONGEST
    assert "model.sha256=" in made[1] or "model.sha256=" in made[0]


def test_of_equally_frequent_values_the_default_is_the_usual_one() -> None:
    rows = [
        options("optim.lr=0.003", "precision=bfloat16", f"method.eps={eps}", f"steps={steps}")
        for eps, steps in ((1e-8, 7), (1e-8, 8), (1e-6, 7), (1e-6, 8))
    ]
    rows += [
        options("optim.lr=0.01", "method=quantized", f"model.n_layer={layers}")
        for layers in (2, 3, 4, 5)
    ]
    assert all(len(label) <= LONGEST for label in short(*rows))
    assert short(*rows)[0] == "basis R=32 precision=bfloat16 optim.lr=0.003 steps=7"
    assert short(*rows)[2] == "basis R=32 eps=1e-06 precision=bfloat16 optim.lr=0.003 steps=7"
    assert short(*rows)[4] == "quantized"


def run(*words: str) -> RunResult:
    summary = {"status": "finished", "run_id": " ".join(words), "step": 1, "data": "text"}
    config = load(composed(*words)).flat()
    return RunResult(Path("nowhere"), config, summary, [{"step": 1, "val/loss": 5.0}])


def test_the_csv_has_every_option_that_varies() -> None:
    def table(found: list[RunResult]) -> Any:
        return losses.final_losses(group_runs(found), {r.id: Losses(5.0, 5.0, 5.0) for r in found})

    few = table([run("method=exact"), run()])
    assert "options" not in few.csv().splitlines()[0]
    many = table([run(*words) for words in MIXED.values()])
    assert many.csv().splitlines()[0].startswith("method,options,seeds,")
    (row,) = (
        line
        for line in many.csv().splitlines()
        if line.startswith("basis R=32 precision=bfloat16,")
    )
    assert "optim.name=sgd" in row.split(",")[1]
    assert "every option" not in many.markdown().splitlines()[0]
    assert (
        "(where they are not named: adaptive_rank.every=0 activations.name=plain "
        in many.markdown()
    )
