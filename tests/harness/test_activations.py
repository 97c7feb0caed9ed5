"""The `activations` group in runs: checkpoints repeat the same noise, lean stays near, mistakes are
named.
"""

from pathlib import Path

import pytest
import torch
from hydra.errors import CompactHydraException
from tiny import losses, train_here

from harness import activations
from harness.activations import ActivationsOptions
from harness.folder.checkpoint import Checkpoints
from harness.memory import saved_bytes
from models import GPT, GPTConfig

METHOD = ["method=basis", "method.rank=3", "method.include=['*']"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Checkpoints(folder / "checkpoints").load_latest().state["model"]


@pytest.mark.parametrize(
    "more",
    [[], ["activations.selective=true"], ["model.dropout=0.1"]],
    ids=["full", "selective", "dropout"],
)
def test_checkpointed_blocks_repeat_the_same_noise(
    more: list[str], data: Path, tmp_path: Path
) -> None:
    options = [*METHOD, *(option for option in more if option.startswith("model"))]
    train_here(data, tmp_path / "plain", *options)
    train_here(data, tmp_path / "checkpoint", *METHOD, "activations=checkpoint", *more)
    plain, checkpointed = (losses(tmp_path / name) for name in ("plain", "checkpoint"))
    for a, b in zip(plain, checkpointed, strict=True):
        for name in ("train/loss", "val/loss", "grad_norm"):
            assert a.get(name) == b.get(name)
    assert all(
        torch.equal(w, weights(tmp_path / "checkpoint")[name])
        for name, w in weights(tmp_path / "plain").items()
    )
    for name in ("norms", "activations", "attention", "sketches"):
        assert checkpointed[0][f"mem/saved_bytes/{name}"] < plain[0][f"mem/saved_bytes/{name}"], (
            name
        )


def test_lean_runs_resume_and_stay_near(data: Path, tmp_path: Path) -> None:
    train_here(data, tmp_path / "plain", *METHOD)
    train_here(data, tmp_path / "lean", *METHOD, "activations=lean")
    plain, lean = (losses(tmp_path / name) for name in ("plain", "lean"))
    assert lean[0]["val/loss"] == plain[0]["val/loss"]
    assert lean[-1]["val/loss"] == pytest.approx(plain[-1]["val/loss"], rel=0.02)
    assert lean[-1]["val/loss"] != plain[-1]["val/loss"]
    assert lean[0]["mem/saved_bytes/attention"] < 0.45 * plain[0]["mem/saved_bytes/attention"]
    train_here(data, tmp_path / "again", *METHOD, "activations=lean", "steps=10")
    train_here(data, tmp_path / "again", *METHOD, "activations=lean")
    assert losses(tmp_path / "again")[-1]["val/loss"] == lean[-1]["val/loss"]


def test_parts_of_lean_can_be_switched_off(data: Path, tmp_path: Path) -> None:
    options = [
        "activations=lean",
        "activations.norm=false",
        "activations.attention=false",
        "activations.gelu_bits=null",
    ]
    train_here(data, tmp_path / "off", *options)
    train_here(data, tmp_path / "plain")
    assert losses(tmp_path / "off") == losses(tmp_path / "plain")


def test_a_selective_checkpoint_keeps_its_products() -> None:
    """Of a block, in units of B x T x C: the results of qkv 3, proj 1, fc 4, mlp.proj 1, the output
    of attention 1 and its log-sum-exp, and the block's input.
    """
    kept = []
    for blocks in (1, 2):
        torch.manual_seed(0)
        model = GPT(GPTConfig(50, block_size=16, n_layer=blocks, n_head=2, n_embd=64))
        activations.apply(model, ActivationsOptions(name="checkpoint", selective=True))
        tokens = torch.zeros(3, 16, dtype=torch.int64)
        kept.append(sum(saved_bytes(model, lambda m=model, t=tokens: m(t, t)).values()))
    assert kept[1] - kept[0] == 11 * 3 * 16 * 64 * 4 + 3 * 16 * 2 * 4


def test_recomputed_inputs_leave_every_number_as_it_was(data: Path, tmp_path: Path) -> None:
    train_here(data, tmp_path / "plain", "method=exact")
    train_here(data, tmp_path / "recompute", "method=exact", "activations=recompute")
    plain, again = (losses(tmp_path / name) for name in ("plain", "recompute"))
    for a, b in zip(plain, again, strict=True):
        for name in ("train/loss", "val/loss", "grad_norm"):
            assert a.get(name) == b.get(name)
    named = weights(tmp_path / "recompute").items()
    assert all(torch.equal(w, weights(tmp_path / "plain")[name]) for name, w in named)
    assert plain[0]["mem/saved_bytes/linear inputs"] > 0
    # attention's output is the one input of a dense layer that is no norm's or GELU's
    assert again[0]["mem/saved_bytes/linear inputs"] == 0
    assert again[0]["mem/saved_bytes"] < 0.75 * plain[0]["mem/saved_bytes"]


@pytest.mark.parametrize("bits", [8, 4])
def test_runs_with_compressed_boundaries_resume_and_stay_near(
    bits: int, data: Path, tmp_path: Path
) -> None:
    options = [*METHOD, "activations=checkpoint", f"activations.boundary={bits}"]
    train_here(data, tmp_path / "plain", *METHOD)
    train_here(data, tmp_path / "run", *options)
    plain, found = (losses(tmp_path / name) for name in ("plain", "run"))
    assert found[0]["val/loss"] == plain[0]["val/loss"]
    assert found[-1]["val/loss"] == pytest.approx(plain[-1]["val/loss"], rel=0.02)
    assert found[-1]["val/loss"] != plain[-1]["val/loss"]
    train_here(data, tmp_path / "again", *options, "steps=10")
    train_here(data, tmp_path / "again", *options)
    assert losses(tmp_path / "again")[-1]["val/loss"] == found[-1]["val/loss"]


# Dynamo's own look at .grad of a block's input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "options",
    [["activations=recompute"], ["activations=checkpoint", "activations.boundary=8"]],
    ids=["recompute", "boundary"],
)
@pytest.mark.slow
def test_compiled_runs_are_near_eager_ones_and_keep_as_little(
    options: list[str], data: Path, tmp_path: Path
) -> None:
    for compile in ("true", "false"):
        more = ["steps=4", "method=exact", *options, f"compile={compile}"]
        train_here(data, tmp_path / compile, *more)
    compiled, eager = (losses(tmp_path / name) for name in ("true", "false"))
    assert compiled[0]["mem/saved_bytes"] <= 1.02 * eager[0]["mem/saved_bytes"]
    assert compiled[-1]["val/loss"] == pytest.approx(eager[-1]["val/loss"], rel=1e-4)


@pytest.mark.slow
def test_budget_under_compile_keeps_less(data: Path, tmp_path: Path) -> None:
    kept = {}
    for share in (1.0, 0.0):
        folder = tmp_path / str(share)
        options = [
            "steps=4",
            "method=exact",
            "activations=budget",
            f"activations.budget={share}",
            "compile=true",
        ]
        train_here(data, folder, *options)
        kept[share] = losses(folder)[0]["mem/saved_bytes"]
    assert kept[0.0] < 0.8 * kept[1.0]
    assert losses(tmp_path / "0.0")[-1]["val/loss"] == pytest.approx(
        losses(tmp_path / "1.0")[-1]["val/loss"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["activations=budget"], "activations=budget: a budget is kept by torch.compile"),
        (["activations=lean", "activations.gelu_bits=3"], "activations.gelu_bits=3"),
        (["activations=budget", "activations.budget=2"], "activations.budget=2"),
        (["activations=checkpoint", "activations.boundary=5"], "activations.boundary=5: must be"),
        (
            ["activations=checkpoint", "activations.boundary=8", "activations.selective=true"],
            "activations.boundary=8: not with activations.selective=true",
        ),
        (
            [
                "activations=checkpoint",
                "activations.boundary=8",
                "compile=true",
                "model.dropout=0.1",
            ],
            "model.dropout=0.1: with activations.boundary=8 a compiled block",
        ),
        (["activations.name=thin"], "activations.name='thin'"),
    ],
)
def test_mistakes_are_named(wrong: list[str], said: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(CompactHydraException, match=said.replace("'", ".")):
        train_here(data, tmp_path / "run", *wrong)
    assert not (tmp_path / "run").exists()
