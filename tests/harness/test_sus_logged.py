"""What train.py logs of SUS attention's kept entries: the right numbers, of the right weights, and
nothing of training changed.

The second route forms softmax(q k^T) with whole matrices in float64, from a checkpoint of the
weights that the look was at.
"""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import REPOSITORY, losses, overrides, train_here
from torch import Tensor

import basis
from harness.build import training_text
from harness.compose import configuration
from harness.folder.checkpoint import Checkpoints
from models import GPT, GPTConfig
from models.gpt import CausalAttention

C = 2.5
SUS = ["model.n_layer=2", "attention=sus", f"attention.c={C}"]
LAYERS = ("blocks.0.attn", "blocks.1.attn")
NAMES = ("kept_entries", "kept_entries_largest", "kept_share")


def kept_by_row(model: GPT, tokens: Tensor) -> list[Tensor]:
    """Sum of min(c W, 1) of every row, (b, h, T), of every block: from plain modules, a whole
    matrix at a time.
    """
    model.double()
    x = model.wte(tokens) + model.wpe.weight[: tokens.shape[1]]
    found = []
    for block in model.blocks:
        b, length, width = x.shape
        q, k, _ = (
            block.attn.qkv(block.ln_1(x))
            .view(b, length, 3, block.attn.n_head, -1)
            .permute(2, 0, 3, 1, 4)
        )
        scores = q @ k.mT / math.sqrt(width // block.attn.n_head)
        behind = torch.ones(length, length, dtype=torch.bool).triu(1)
        found.append(
            (C * scores.masked_fill(behind, -math.inf).softmax(-1)).clamp(max=1).sum(-1).detach()
        )
        x = block(x)
    return found


VARIANTS = {
    "exact": ["method=exact"],
    "basis, accumulation": ["method.rank=3", "tokens_per_step=32"],
    "independent masks": ["method=exact", "attention.mode=dense"],
    "lean, learning": [
        "method=subspace",
        "method.rank=4",
        "method.include=['*']",
        "activations=lean",
    ],
    "checkpointed": ["method.rank=3", "activations=checkpoint"],
    "bfloat16": ["method.rank=3", "precision=bfloat16"],
}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(more, marks=pytest.mark.slow if name in ("exact", "checkpointed") else ())
        for name, more in VARIANTS.items()
    ],
    ids=VARIANTS,
)
def test_the_logged_entries_are_those_of_the_probabilities_and_training_stays(
    more: list[str], data: Path, tmp_path: Path
) -> None:
    options = [*SUS, *more, "checkpoint.every=8", "checkpoint.keep=9"]
    train_here(data, tmp_path / "without", *options)
    train_here(data, tmp_path / "with", *options, "diagnostics.every=9")
    rows = losses(tmp_path / "with")
    looks = [
        {k: row.pop(k) for k in list(row) if k.startswith(("sus/", "sketch/"))} for row in rows
    ]
    assert [row for row in rows if len(row) > 2] == losses(tmp_path / "without")
    weights = [
        Checkpoints(tmp_path / name / "checkpoints").load_latest().state["model"]
        for name in ("with", "without")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    seen = {row["step"]: look for row, look in zip(rows, looks, strict=True) if look}
    assert list(seen) == [9, 18, 20]
    logged = {name: value for name, value in seen[9].items() if name.startswith("sus/")}
    assert list(logged) == [f"sus/{layer}/{name}" for layer in (*LAYERS, "all") for name in NAMES]
    config = configuration([*overrides(data), *options])
    config, _, sampler = training_text(config, progress=False)
    state = Checkpoints.load(
        tmp_path / "with" / "checkpoints" / "step_00000008"
    ).state  # the look was before the ninth step
    model = GPT(GPTConfig(**state["config"]["model"]))
    model.load_state_dict({k: v for k, v in state["model"].items() if "estimator_" not in k})
    expected = kept_by_row(model, sampler.batch(8, 0)[0])
    close = {"rel": 1e-2 if "precision=bfloat16" in more else 1e-4}
    for layer, kept in zip((*LAYERS, "all"), (*expected, torch.stack(expected)), strict=True):
        mean, largest, share = (logged[f"sus/{layer}/{name}"] for name in NAMES)
        assert mean == pytest.approx(float(kept.mean()), **close)
        assert largest == pytest.approx(float(kept.max()), **close)
        length = kept.shape[-1]
        assert share == pytest.approx(
            float(kept.mean()) * length / (length * (length + 1) / 2), **close
        )
        assert 1 < mean < largest <= C * (1 + 1e-6)


def test_a_resumed_run_logs_the_same(data: Path, tmp_path: Path) -> None:
    options = [*SUS, "activations=lean", "diagnostics.every=3", "checkpoint.every=7"]
    train_here(data, tmp_path / "straight", *options)
    train_here(data, tmp_path / "resumed", *options, "steps=13")
    train_here(data, tmp_path / "resumed", *options)
    seen = {
        name: {
            row["step"]: {k: v for k, v in row.items() if k.startswith("sus/")}
            for row in losses(tmp_path / name)
        }
        for name in ("straight", "resumed")
    }
    looked = [step for step, found in seen["straight"].items() if found]
    assert looked == [3, 6, 9, 12, 15, 18, 20]
    assert seen["resumed"].pop(13)  # its own end, before it was given more steps
    assert [seen["resumed"][step] for step in looked] == [seen["straight"][step] for step in looked]
    last = [losses(tmp_path / name)[-1]["val/loss"] for name in ("straight", "resumed")]
    assert last[0] == last[1]


def test_where_no_attention_is_cut_nothing_is_logged(data: Path, tmp_path: Path) -> None:
    train_here(data, tmp_path, "diagnostics.every=10", "attention=exact")
    assert not [name for row in losses(tmp_path) for name in row if name.startswith("sus/")]


def test_under_autocast_the_probabilities_are_those_of_backward() -> None:
    torch.manual_seed(0)
    attend = torch.nn.Sequential(CausalAttention(0.0))
    basis.convert(attend, basis.SUS(CausalAttention, c=C))
    q, k = (2 * torch.randn(1, 2, 64, 16) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = basis.sus.kept_statistics(attend, lambda: attend[0](q, k, k)).values()
    low = [x.bfloat16().double() for x in (q, k)]  # what the module is given, then without rounding
    scores = (low[0] @ low[1].mT / 4).masked_fill(
        torch.ones(64, 64, dtype=torch.bool).triu(1), -math.inf
    )
    sums = (C * scores.softmax(-1)).clamp(max=1).sum(-1)
    assert found.expected == pytest.approx(float(sums.mean()), rel=1e-6)
    assert found.largest == pytest.approx(float(sums.max()), rel=1e-6)


def test_the_experiment_names_the_folder_that_its_second_command_measures(data: Path) -> None:
    comment = (REPOSITORY / "conf" / "experiment" / "sus.yaml").read_text()
    (first,) = re.findall(r"^#   python train\.py (experiment=sus) ", comment, re.MULTILINE)[:1]
    (measured,) = re.findall(r"python scripts/sus_variance\.py (\S+)", comment)
    words = [
        sys.executable,
        str(REPOSITORY / "train.py"),
        first,
        "--cfg",
        "hydra",
        "--package",
        "hydra.run",
        "--resolve",
    ]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    assert f"dir: {measured}\n" in said
