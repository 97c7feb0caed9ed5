"""What `basis.apply(model, "8x", lean=True, head=True)` does to every causal language model of
transformers.

    python scripts/every_family.py --out results/families

One small model of each class, with random weights, two blocks, 64 wide, in float32. Two things must
hold of each: the training loss is that of the plain model, and `basis.revert` gives the same model
back. Two more are measured: the cosine of the whole gradient with the exact one, and the bytes that
a forward keeps. A class whose configuration can't be made small by the names that most
configurations use is listed as not tried, with the reason. What this can't show: real sizes, real
weights, training. docs/models.md has bytes of wider models.

Dropout is off, so that the plain model's forward can be repeated. A family that draws other noise
has a loss that depends on the seed, and is not tried.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import basis

VOCABULARY, BATCH, LENGTH = 512, 4, 64
LARGEST = 5_000_000
"""Weights of a model that counts as small."""
CLOSE = 2e-6
"""How far apart losses may be, relative: some roundings of float32."""
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size"), 64),
    "word_embed_proj_dim": 64,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 2 * LENGTH),
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("pad_token_id", "decoder_start_token_id"), 0),
    "bos_token_id": 1,
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    "layer_types": None,
    "use_cache": False,
}

FOREIGN = (
    *(RuntimeError, TypeError, ValueError, AttributeError),
    *(LookupError, AssertionError, ImportError),
)
"""What a model may raise for a configuration that it did not expect."""

SAME, DIFFERS, REFUSED, UNTRIED = "same", "differs", "refused", "not tried"


@dataclass(frozen=True)
class Row:
    """One class. loss: of the plain model, in nats; apart: the loss after `apply` less that; back:
    after `revert`; cosine: of all gradients with the exact ones; before, after: bytes a token.
    """

    family: str
    kind: str
    outcome: str
    loss: float = float("nan")
    apart: float = float("nan")
    back: float = float("nan")
    cosine: float = float("nan")
    before: float = float("nan")
    after: float = float("nan")
    why: str = ""


class NotTried(Exception):
    """A model that can't be tried here."""


def _is_random(option: str) -> bool:
    return "drop" in option or "jitter" in option


def small(family: str, kind: str) -> nn.Module:
    """A model of class `kind`. Raises NotTried, and whatever transformers raises."""
    import transformers

    config_of = transformers.CONFIG_MAPPING[family]
    usual = config_of().to_dict()
    options = {name: value for name, value in SMALL.items() if name in usual}
    if "qk_rope_head_dim" in usual:
        options.pop("head_dim", None)  # another name for it there
    if "attention_types" in usual:
        options["attention_types"] = [[["global", "local"], 1]]
    random = {n: 0.0 for n, v in usual.items() if isinstance(v, float) and _is_random(n)}
    config = config_of(**options | random)
    with torch.device("meta"):
        weights = sum(p.numel() for p in getattr(transformers, kind)(config).parameters())
    if weights > LARGEST:
        raise NotTried(f"its configuration has other names: {weights:,} weights")
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def step(
    model: nn.Module, sample: dict[str, Tensor], seed: int = 1
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients, by name, of one batch."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**sample).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def tried(family: str, kind: str) -> Row:
    tokens = torch.randint(
        3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    sample = {"input_ids": tokens, "labels": tokens}
    from huggingface_hub.errors import StrictDataclassError

    try:
        plain = small(family, kind)
        model = copy.deepcopy(plain)  # now: some keep tensors of a graph after a forward
        loss, exact = step(plain, sample)
        if step(plain, sample, seed=2)[0] != loss:
            raise NotTried("its loss depends on the seed")
    except (NotTried, StrictDataclassError, *FOREIGN) as error:
        return Row(family, kind, UNTRIED, why=f"{type(error).__name__}: {error}")
    try:
        report = basis.apply(model, "8x", sample=sample, lean=True, head=True)
        found, sketched = step(model, sample)
    except ValueError as error:
        return Row(family, kind, REFUSED, loss, why=str(error))
    flat, estimate = (
        torch.cat([grads.get(n, torch.zeros_like(exact[n])).flatten() for n in exact]).double()
        for grads in (exact, sketched)
    )
    cosine = float(torch.nn.functional.cosine_similarity(flat, estimate, dim=0))
    basis.revert(model)
    again, _ = step(model, sample)
    classes = [[type(module) for module in one.modules()] for one in (plain, model)]
    same = abs(found - loss) <= CLOSE * abs(loss) and again == loss and classes[0] == classes[1]
    size = tokens.numel()
    before, after = report.before / size, report.after / size
    outcome = SAME if same and exact.keys() == sketched.keys() else DIFFERS
    return Row(family, kind, outcome, loss, found - loss, again - loss, cosine, before, after)


def every(only: Sequence[str] = ()) -> list[Row]:
    """Rows of all families, or of those named."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    kinds = {
        family: kind if isinstance(kind, str) else kind[0]
        for family, kind in NAMES.items()
        if not only or family in only
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [tried(*item) for item in tqdm(kinds.items(), unit="family")]


def summary(rows: Sequence[Row]) -> str:
    """How many came out how, and the figures of those that were tried."""
    counts = Counter(row.outcome for row in rows)
    lines = [f"- {outcome}: {counts[outcome]}" for outcome in (SAME, DIFFERS, REFUSED, UNTRIED)]
    done = [row for row in rows if row.outcome in (SAME, DIFFERS)]
    if done:
        worst = max(abs(row.apart / row.loss) for row in done)
        cosines, fewer = (
            sorted(values)
            for values in ([r.cosine for r in done], [r.before / r.after for r in done])
        )
        middle = len(done) // 2
        lines += [
            f"- largest relative difference of the loss: {worst:.1e}",
            f"- cosine with the exact gradient: median {cosines[middle]:.3f}, "
            f"least {cosines[0]:.3f}",
            f"- times fewer bytes: median {fewer[middle]:.1f}, least {fewer[0]:.1f}, "
            f"most {fewer[-1]:.1f}, at least 3 in {sum(x >= 3 for x in fewer)} of {len(done)}",
        ]
    lines += [f"- refused: {r.family} ({r.kind}): {r.why}" for r in rows if r.outcome == REFUSED]
    lines += [f"- differs: {r.family} ({r.kind}): {r}" for r in rows if r.outcome == DIFFERS]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for families.csv")
    parser.add_argument("--only", nargs="+", default=(), help="names such as llama, gpt2")
    options = parser.parse_args(arguments)
    import transformers

    transformers.logging.set_verbosity_error()
    rows = every(options.only)
    if not rows:
        parser.error(f"--only {' '.join(options.only)}: no causal language model of transformers")
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "families.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    name: f"{value:.6g}" if isinstance(value, float) else value
                    for name, value in asdict(row).items()
                }
            )
    print(summary(rows))
    return 1 if any(row.outcome == DIFFERS for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
