"""SUS in a trained GPT: gradients of all parameters through two attentions, and what
scripts/sus_variance.py measures.

The inputs of test_sus.py are made up and of one attention. Here the weights are those that training
made, and the noise of the second attention is part of what the first one is given.
"""

import csv
import math
from pathlib import Path

import pytest
import torch
from sus_checks import delta_from_sample
from tiny import train_here
from torch import Tensor

import basis
from basis.sus import MODES
from data import Sampler
from experiments.sus import variance as sus_variance
from experiments.sus.variance import (
    attention_calls,
    formula_ratios,
    gradient,
    measure,
    relative_increase,
    segments,
)
from harness.trained import Trained, load_trained
from models import GPT
from models.gpt import CausalAttention
from report.statistics import estimate

C = 3.0
LENGTH = 48


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """A run folder: two layers, trained until attention is no longer uniform."""
    model = [
        "model.n_layer=2",
        f"model.block_size={LENGTH}",
        "optim=adamw",
        "optim.lr=1e-2",
        "micro_batch_size=4",
    ]
    train_here(
        data,
        data / "run",
        "method=exact",
        *model,
        "steps=200",
        "eval.every=0",
        "checkpoint.every=0",
    )
    return data / "run"


@pytest.fixture
def trained(run: Path) -> Trained:
    return load_trained(run)


def windows(trained: Trained, count: int, length: int = LENGTH) -> list[tuple[Tensor, Tensor]]:
    sampler = Sampler(
        trained.prepared.train, block_size=length, batch_size=1, order="random", seed=0
    )
    return [sampler.batch(number) for number in range(count)]


def draws(model: GPT, batch: tuple[Tensor, Tensor], mode: str, count: int) -> Tensor:
    """`count` gradients of all parameters, (count, P), each under masks of its own."""
    basis.convert(model, basis.SUS(CausalAttention, c=C, mode=mode))
    found = []
    for step in range(count):
        basis.set_noise_key(model, seed=0, step=step)
        found.append(gradient(model, batch))
    basis.revert(model)
    return torch.stack(found).double()


def z_scores(sample: Tensor, exact: Tensor) -> Tensor:
    """(mean - exact) / standard error of every parameter on which masks act: not of the head's,
    say.
    """
    error = sample.std(0) / math.sqrt(len(sample))
    moving = error > 1e-6 * error.max()
    assert int(moving.sum()) > 5000
    return ((sample.mean(0) - exact) / error)[moving]


def test_attention_is_no_longer_uniform(trained: Trained) -> None:
    found = []
    for call in attention_calls(trained.model, windows(trained, 1)[0]):
        last = (call.q[..., -1:, :] @ call.k.mT / math.sqrt(call.q.shape[-1])).softmax(-1)
        found.append(float(last.max()))
    assert max(found) > 8 / LENGTH


@pytest.mark.parametrize("mode", MODES)
def test_without_a_limit_it_is_the_exact_gradient(trained: Trained, mode: str) -> None:
    (batch,) = windows(trained, 1)
    exact = gradient(trained.model, batch)
    basis.convert(trained.model, basis.SUS(CausalAttention, c=1e9, mode=mode))
    found = gradient(trained.model, batch)
    assert float((found - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_the_mean_over_masks_of_two_layers_is_the_exact_gradient(
    trained: Trained, mode: str
) -> None:
    (batch,) = windows(trained, 1)
    z = z_scores(draws(trained.model, batch, mode, 400), gradient(trained.model, batch).double())
    assert float(z.abs().max()) < 4.5  # of some 5,000
    assert 0.75 < float(z.square().mean().sqrt()) < 1.25  # many share their masks


@pytest.mark.slow
def test_delta_from_the_sample_is_biased_and_the_test_sees_it(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch,) = windows(trained, 1)
    exact = gradient(trained.model, batch).double()
    monkeypatch.setitem(MODES, "dense", delta_from_sample)
    z = z_scores(draws(trained.model, batch, "dense", 400), exact)
    assert float(z.abs().max()) > 9
    assert float(z.square().mean().sqrt()) > 2


@pytest.mark.slow
def test_variance_of_every_attention_is_that_of_the_formula(trained: Trained) -> None:
    calls = attention_calls(trained.model, windows(trained, 1)[0])
    assert len(calls) == 2
    for call in calls:
        for ratio in formula_ratios([call], C, "dense", draws=300, seed=0).values():
            assert ratio.mean == pytest.approx(1, abs=0.05)
        for ratio in formula_ratios([call], C, "sparse", draws=100, seed=0).values():
            assert 0.3 < ratio.mean < 1.05


@pytest.mark.parametrize("mode", MODES)
def test_as_many_entries_are_kept_as_the_probabilities_say(trained: Trained, mode: str) -> None:
    basis.convert(trained.model, basis.SUS(CausalAttention, c=C, mode=mode))
    inputs = torch.cat([inputs for inputs, _ in windows(trained, 64)])
    for kept in basis.sus.kept_statistics(trained.model, lambda: trained.model(inputs)).values():
        assert 1 < kept.expected < C
        assert kept.drawn == pytest.approx(kept.expected, rel=0.01)


def test_rho_is_the_noise_of_masks_over_that_of_batches(trained: Trained) -> None:
    batches = windows(trained, 6)
    (row,) = measure(trained.model, batches, [(C, "dense")], draws=2, formula_draws=3, seed=4)
    exact = torch.stack([gradient(trained.model, batch) for batch in batches]).double()
    basis.convert(trained.model, basis.SUS(CausalAttention, c=C, mode="dense"))
    noise = []
    for number, batch in enumerate(batches):
        for draw in range(2):
            basis.set_noise_key(trained.model, seed=4, step=number, micro_batch=draw)
            noise.append((gradient(trained.model, batch).double() - exact[number]).square())
    masks = torch.stack(noise).view(6, 2, -1).mean(1)  # (X, P)
    is_qk = torch.zeros(exact.shape[1], dtype=torch.bool)
    for part, where in segments(trained.model):
        is_qk[where] = part == "qk"
    assert int(is_qk.sum()) == 2 * 2 * 16 * (16 + 1)
    for name, chosen in (("rho_all", torch.ones_like(is_qk)), ("rho_qk", is_qk)):

        def rho(some: list[int], chosen: Tensor = chosen) -> float:
            return float(masks[some][:, chosen].sum(1).mean() / exact[some][:, chosen].var(0).sum())

        everything = list(range(6))
        without = [rho([i for i in everything if i != left]) for left in everything]
        expected = estimate([6 * rho(everything) - 5 * value for value in without])
        assert row[name].mean == pytest.approx(100 * expected.mean, rel=1e-4)
        assert row[name].half_width == pytest.approx(100 * (expected.half_width or 0), rel=1e-4)


def test_rho_of_a_known_case() -> None:
    source = torch.Generator().manual_seed(0)
    exact = torch.randn(400, 50, generator=source, dtype=torch.float64)
    masks = 0.1 * torch.randn(400, 50, generator=source, dtype=torch.float64)
    centred = exact - exact.mean(0)
    found = relative_increase(masks.square().sum(1), centred @ centred.t())
    assert found.low < 0.01 < found.high
    assert found.half_width == pytest.approx(1.96 * 0.01 * math.sqrt(2 * 2 / 50 / 400), rel=0.2)


def test_the_program_writes_what_falls_with_c(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--lengths",
        "24",
        "48",
        "--c",
        "2",
        "8",
        "1e9",
        "--windows",
        "12",
        "--formula-draws",
        "3",
    ]
    assert sus_variance.main([str(run), *options, "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"variance.{end}" for end in ("csv", "md", "svg")
    }
    with (tmp_path / "out" / "variance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["n"], row["mode"], row["c"]) for row in rows[:4]] == [
        *(("24", "dense", c) for c in ("2.0", "8.0", "1000000000.0")),
        ("24", "sparse", "2.0"),
    ]
    for start in range(0, len(rows), 3):
        few, more, every = (float(row["rho_all"]) for row in rows[start : start + 3])
        assert few > more > every
        assert every < 1e-6
        assert float(rows[start + 2]["share"]) == pytest.approx(100, rel=1e-4)
    assert "after 200 steps, validation loss" in capsys.readouterr().out


def test_mistakes_are_said(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sus_variance.main([str(tmp_path)]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
    assert sus_variance.main([str(run), "--lengths", "64"]) == 1
    assert "64 tokens do not fit model.block_size=48" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sus_variance.main([str(run), "--windows", "2"])
