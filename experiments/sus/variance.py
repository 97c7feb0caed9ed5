"""What SUS attention adds to the variance of a trained model's gradient, against c and length; and
whether the formula holds.

    python train.py experiment=sus  # a run to look at: characters, context 2,048
    python scripts/sus_variance.py runs/sus/experiment-sus --out results/sus
    python scripts/sus_variance.py runs/sus/experiment-sus --lengths 256 \\
        --c 5 25 --modes dense --windows 16

With g(x) the exact gradient of the mean loss of a window x of n tokens, g_m(x) SUS's under mask m
(arXiv 2505.15080), in all parameters or in a part of them,

    rho = E_x E_m |g_m(x) - g(x)|^2 / E_x |g(x) - E_x g|^2

is the relative increase of the gradient's variance: the noise of the masks over that of choosing a
batch. Both fall as one over the windows in a batch, so rho is the same for any batch size. Windows
are drawn at random from the training text, the same for all c and modes. An interval is the
jackknife's over windows, 95%, with one draw of all masks a window unless --draws says more.

The second thing measured: attention by attention, with q, k, v and the output's gradient of one
window, the variance over draws of dQ, dK and dV, over the formula of basis/sus/variance.py. It is 1
for independent masks (mode dense); of the systematic ones (sparse) no formula is known here, and
what the ratio shows is what they gain. Mean over layers; interval over draws.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import basis
from basis.ops.noise import fold
from bench.timing import made_by
from data import Sampler
from experiments.sus.figures import draw_variance
from harness.folder.checkpoint import CheckpointError
from harness.provenance import provenance
from harness.trained import load_trained
from models import LanguageModel
from models.base import CausalAttention
from report.statistics import Estimate, estimate
from report.tables import Column, Table

Batch = tuple[Tensor, Tensor]
PARTS = {"qk": "query and key weights", "v": "value weights", "rest": "all other parameters"}


class Call(NamedTuple):
    """What an attention was given in one forward and backward, (b, h, T, d) each, and its exact
    gradients dQ, dK, dV.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad_output: Tensor
    exact: tuple[Tensor, ...]


def gradient(model: LanguageModel, batch: Batch) -> Tensor:
    """Of the mean loss, all parameters in one vector."""
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(model(*batch), list(model.parameters()))]
    )


def segments(model: LanguageModel) -> list[tuple[str, slice]]:
    """Which slices of that vector belong to which of PARTS."""
    found, start = [], 0
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        cuts = [("qk", 2 * size // 3), ("v", size // 3)] if ".qkv." in name else [("rest", size)]
        for part, length in cuts:
            found.append((part, slice(start, start + length)))
            start += length
    return found


def by_part(parts: list[tuple[str, slice]], vector: Tensor) -> Tensor:
    """Squared norm of each of PARTS, then of everything: (4,) float64."""
    sums = dict.fromkeys(PARTS, 0.0)
    for part, where in parts:
        sums[part] += float(vector[where].double().square().sum())
    return torch.tensor([*sums.values(), sum(sums.values())], dtype=torch.float64)


def grams(parts: list[tuple[str, slice]], vectors: Tensor) -> Tensor:
    """Inner products of gradients (X, P) about their mean, in each of PARTS, then in all: (4, X, X)
    float64.
    """
    centred = vectors - vectors.mean(0)
    table = {part: torch.zeros(len(vectors), len(vectors), dtype=torch.float64) for part in PARTS}
    for part, where in parts:
        table[part] += (centred[:, where] @ centred[:, where].t()).double()
    return torch.stack([*table.values(), sum(table.values(), torch.zeros(()))])


def relative_increase(noise: Tensor, gram: Tensor) -> Estimate:
    """rho and its interval, by the jackknife over windows. noise: |g_m - g|^2 of each (X,); gram:
    exact gradients' (X, X).
    """
    count = len(noise)

    def variance(norms: Tensor, square_of_sum: Tensor, windows: int) -> Tensor:
        return (norms - square_of_sum / windows) / (windows - 1)

    norms, total, rows = gram.diagonal(), gram.sum(), gram.sum(1)
    whole = noise.mean() / variance(norms.sum(), total, count)
    without = (noise.sum() - noise) / (count - 1)
    without = without / variance(norms.sum() - norms, total - 2 * rows + norms, count - 1)
    return estimate((count * whole - (count - 1) * without).tolist())


def attention_calls(model: LanguageModel, batch: Batch) -> list[Call]:
    """Of every attention of `model` in one exact step."""
    calls: list[Call] = []
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []

    def look(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs, output))

    handles = [
        m.register_forward_hook(look) for m in model.modules() if isinstance(m, CausalAttention)
    ]
    try:
        loss = model(*batch)
    finally:
        for handle in handles:
            handle.remove()
    grads = torch.autograd.grad(loss, [output for _, output in seen])
    for ((q, k, v), _), grad in zip(seen, grads, strict=True):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        exact = torch.autograd.grad(CausalAttention(0.0)(q, k, v), (q, k, v), grad)
        calls.append(Call(q.detach(), k.detach(), v.detach(), grad, exact))
    return calls


def formula_ratios(
    calls: Sequence[Call], c: float, mode: str, *, draws: int, seed: int
) -> dict[str, Estimate]:
    """Variance of dQ, dK, dV over its formula, mean over `calls`, for "ratio_q", "ratio_k" and
    "ratio_v".

    NaN where the formula says 0, which is so if every entry is at least 1/c.
    """
    expected = [basis.sus.mask_variance(*call[:4], c=c) for call in calls]
    found: list[list[float]] = [[], [], []]
    for draw in range(draws):
        ratios: list[list[float]] = [[], [], []]
        for number, call in enumerate(calls):
            q, k, v = (x.detach().requires_grad_() for x in call[:3])
            key = torch.tensor(fold(seed, draw, number, "formula"))
            output = basis.sus.sus_attention(q, k, v, key, c=c, mode=mode)
            drawn = torch.autograd.grad(output, (q, k, v), call.grad_output)
            for kind, (a, b) in enumerate(zip(drawn, call.exact, strict=True)):
                size = float((a - b).double().square().sum())
                ratios[kind].append(
                    size / expected[number][kind] if expected[number][kind] else math.nan
                )
        for kind, values in enumerate(ratios):
            found[kind].append(sum(values) / len(values))
    return {f"ratio_{name}": estimate(values) for name, values in zip("qkv", found, strict=True)}


def noise_of_masks(
    model: LanguageModel,
    batches: Sequence[Batch],
    exact: Tensor,
    parts: list[tuple[str, slice]],
    *,
    draws: int,
    seed: int,
) -> Tensor:
    """|g_m - g|^2 of each window, mean over `draws`: (X, 4), for a model whose attention is SUS."""
    noise = torch.zeros(len(batches), len(PARTS) + 1, dtype=torch.float64)
    for number, batch in enumerate(batches):
        for draw in range(draws):
            basis.set_noise_key(model, seed=seed, step=number, micro_batch=draw)
            noise[number] += by_part(parts, gradient(model, batch) - exact[number]) / draws
    return noise


def measure(
    model: LanguageModel,
    batches: Sequence[Batch],
    settings: Iterable[tuple[float, str]],
    *,
    draws: int = 1,
    formula_draws: int = 16,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """A row per (c, mode) of `settings` on `batches` of one length; rho and shares are per cent."""
    length = batches[0][0].shape[1]
    parts = segments(model)
    exact = torch.stack([gradient(model, batch) for batch in batches])
    spread = grams(parts, exact)
    calls = attention_calls(model, batches[0])
    for c, mode in settings:
        row: dict[str, Any] = {"n": length, "c": c, "mode": mode}
        basis.convert(model, basis.SUS(CausalAttention, c=c, mode=mode))
        try:
            noise = noise_of_masks(model, batches, exact, parts, draws=draws, seed=seed)
            kept = basis.sus.kept_statistics(model, lambda: model(batches[0][0])).values()
        finally:
            basis.revert(model)
        row["kept"] = sum(found.expected for found in kept) / len(kept)
        row["share"] = 100 * sum(found.share for found in kept) / len(kept)
        for number, part in enumerate([*PARTS, "all"]):
            rho = relative_increase(noise[:, number], spread[number])
            row[f"rho_{part}"] = Estimate(100 * rho.mean, 100 * (rho.half_width or 0.0), rho.count)
        yield (
            row
            | formula_ratios(calls, c, mode, draws=formula_draws, seed=seed)
            | {"windows": len(batches), "draws": draws}
        )


def table(rows: list[dict[str, Any]], notes: list[str]) -> Table:
    """The rows with headings and units."""
    columns = {"n": Column("n, tokens"), "c": Column("c", digits=0), "mode": Column("masks")}
    columns |= {
        "kept": Column("kept a row", digits=1),
        "share": Column("of the causal triangle, %", digits=1),
    }
    columns |= {"rho_all": Column("rho, %", digits=2)}
    columns |= {
        f"rho_{part}": Column(f"rho of {name}, %", digits=2) for part, name in PARTS.items()
    }
    columns |= {
        f"ratio_{x}": Column(f"variance of d{x.upper()} / formula", digits=3) for x in "qkv"
    }
    columns |= {"windows": Column("windows"), "draws": Column("draws")}
    return Table("variance", "What SUS adds to the gradient's variance", columns, rows, notes)


def write(out: Path, rows: list[dict[str, Any]], notes: list[str]) -> None:
    """The table and its figure."""
    result = table(rows, notes)
    result.write(out / "variance.csv")
    draw_variance(rows, out / "variance.svg")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[64, 128, 256, 512, 1024, 2048],
        help="n, tokens of a window",
    )
    parser.add_argument("--c", type=float, nargs="+", default=[5, 10, 25, 50, 100])
    parser.add_argument(
        "--modes", nargs="+", choices=list(basis.sus.MODES), default=list(basis.sus.MODES)
    )
    parser.add_argument(
        "--windows", type=int, default=32, help="windows of each length (default: 32)"
    )
    parser.add_argument(
        "--draws", type=int, default=1, help="draws of all masks a window (default: 1)"
    )
    parser.add_argument(
        "--formula-draws",
        type=int,
        default=16,
        help="draws an attention, for the formula (default: 16)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of windows and masks (default: 0)")
    parser.add_argument("--out", type=Path, help="folder for variance.csv, .md and .svg")
    options = parser.parse_args(argv)
    if (
        min(options.windows, options.formula_draws) < 3
        or min(*options.lengths, options.draws) < 1
        or min(options.c) <= 0
    ):
        parser.error(
            "--windows and --formula-draws must be at least 3, --lengths and --draws at least 1, "
            "--c positive"
        )
    settings = [(c, mode) for mode in options.modes for c in options.c]
    counts = {"draws": options.draws, "formula_draws": options.formula_draws, "seed": options.seed}
    rows: list[dict[str, Any]] = []
    try:
        trained = load_trained(options.run)
        config = trained.model.config
        notes = [
            f"{config.n_layer} blocks, {config.n_head} heads, width {config.n_embd}, after "
            f"{trained.step:,} steps"
            + (
                ""
                if trained.val_loss is None
                else f", validation loss {trained.val_loss:.3f} nats per token"
            )
            + ". Intervals: 95%.",
            made_by(f"python scripts/{provenance()['command']}"),
        ]
        samplers = [
            Sampler(
                trained.prepared.train,
                block_size=n,
                batch_size=1,
                order="random",
                seed=options.seed,
            )
            for n in options.lengths
        ]
        with tqdm(
            total=len(samplers) * len(settings), unit="setting", leave=False, disable=None
        ) as bar:
            for sampler in samplers:
                batches = [sampler.batch(number) for number in range(options.windows)]
                for row in measure(trained.model, batches, settings, **counts):
                    rows.append(row)
                    bar.update()
                if options.out:  # after each length: the longest ones take most of the time
                    write(options.out, rows, notes)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"sus_variance: {error}", file=sys.stderr)
        return 1
    print(table(rows, notes).markdown())
    return 0
