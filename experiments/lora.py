"""Does LoRA train as well on a fifth of what it keeps? A small Llama learns Tiny Shakespeare, then
adapters teach it the same text in capitals, plainly and after `basis.apply`.

    python scripts/lora.py --text tinyshakespeare.txt --out results/lora

Three seeds, each with the same batches and first weights for both; the loss is that of the last
tenth of the text, which neither saw. Bytes are those of `Report`: all that a step keeps for
backward, the logits too. "mixed" is what PEFT makes of a model in bfloat16: adapters in float32, so
that each casts its input. Needs transformers and peft (`pip install basis-sketch[integrations]`).
What it can't show: large models, long runs, other tasks.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import basis
from report.statistics import estimate

LENGTH, BATCH = 64, 16
PRECISIONS = ("float32", "mixed", "bfloat16")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Row:
    """loss: in nats a character, at the end; kept: bytes a token; seconds: of the training."""

    seed: int
    precision: str
    variant: str
    loss: float
    kept: float
    seconds: float


class Text:
    """Characters of a text, and of the same in capitals, as ids of one alphabet."""

    def __init__(self, text: str) -> None:
        alphabet = sorted(set(text) | set(text.upper()))
        ids = {c: i for i, c in enumerate(alphabet)}
        self.size = len(alphabet)
        self.plain, self.capitals = (
            torch.tensor([ids[c] for c in t]) for t in (text, text.upper()[: len(text)])
        )

    def batch(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """(BATCH, LENGTH) of the first nine tenths."""
        starts = torch.randint(len(tokens) * 9 // 10 - LENGTH, (BATCH,), generator=generator)
        return torch.stack([tokens[s : s + LENGTH] for s in starts.tolist()])

    def held_out(self, tokens: Tensor) -> Tensor:
        """64 windows of the last tenth."""
        last = tokens[len(tokens) * 9 // 10 :]
        return last[: 64 * LENGTH].view(64, LENGTH)


def train(model: Any, text: Text, tokens: Tensor, steps: int, lr: float, seed: int) -> None:
    """AdamW with a rate that falls to zero."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps)
    )
    model.train()
    for _ in range(steps):
        ids = text.batch(tokens, generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss_of(model: Any, ids: Tensor) -> float:
    model.eval()
    return float(model(input_ids=ids, labels=ids).loss)


def llama(vocabulary: int) -> Any:
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
        )
    )


def adapted(base: nn.Module, seed: int, precision: str) -> Any:
    """A copy of `base` with adapters of rank 8 on all dense layers of its blocks."""
    import peft  # type: ignore[import-not-found, unused-ignore]

    torch.manual_seed(seed)
    options = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    model = peft.get_peft_model(copy.deepcopy(base).to(dtype), options)
    return model if precision == "mixed" else model.to(dtype)


def compare(
    text: Text, seeds: Sequence[int], precisions: Sequence[str], first: int, then: int
) -> list[Row]:
    """Rows of all variants. first, then: steps of the model, and of the adapters."""
    rows = []
    for seed in seeds:
        torch.manual_seed(seed)
        base = llama(text.size)
        train(base, text, text.plain, first, 3e-3, seed)
        ids = text.batch(text.capitals, torch.Generator().manual_seed(seed))
        for precision in precisions:
            for variant in ("plain", "8x, lean, head"):
                model = adapted(base, seed, precision)
                sample = {"input_ids": ids, "labels": ids}
                report = basis.apply(model, "8x", sample=sample, lean=True, head=True)
                kept = report.after
                if variant == "plain":
                    basis.revert(model)
                    kept = report.before
                began = time.perf_counter()
                train(model, text, text.capitals, then, 3e-3, seed)
                seconds = time.perf_counter() - began
                loss = loss_of(model, text.held_out(text.capitals))
                rows.append(Row(seed, precision, variant, loss, kept / ids.numel(), seconds))
                print(rows[-1], flush=True)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Means, and the difference to plain over pairs of seeds with a 95% interval."""
    lines = [
        "| precision | adapters | loss, nats | above plain | kept, bytes a token | fewer |",
        "|---|---|---|---|---|---|",
    ]
    for precision in dict.fromkeys(r.precision for r in rows):
        of = {
            variant: sorted(
                (r for r in rows if (r.precision, r.variant) == (precision, variant)),
                key=lambda r: r.seed,
            )
            for variant in dict.fromkeys(r.variant for r in rows)
        }
        plain = of["plain"]
        for variant, some in of.items():
            gaps = [a.loss - b.loss for a, b in zip(some, plain, strict=True)]
            gap = "" if variant == "plain" else estimate(gaps).text(4, sign=True)
            loss = statistics.fmean(r.loss for r in some)
            fewer = plain[0].kept / some[0].kept
            lines.append(
                f"| {precision} | {variant} | {loss:.4f} | {gap} | {some[0].kept:,.0f} | "
                f"{fewer:.1f} times |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows.csv")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2 (default: 3)")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--steps", type=int, nargs=2, default=(300, 200), help="model, adapters")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds={options.seeds}: an interval needs at least 2")
    rows = compare(
        Text(options.text.read_text()), range(options.seeds), options.precision, *options.steps
    )
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(table(rows))
    return 0
