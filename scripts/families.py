"""What `basis.apply(model, "8x", lean=True, head=True)` spares in models of other libraries: a
table, by family and by what is kept.

    python scripts/families.py                  # the table of docs/models.md
    python scripts/families.py --report Llama   # the report of one family

Models of two blocks, 256 wide, with random weights and 4 x 128 tokens of 4,096; bytes depend on the
shapes alone. Needs transformers, and peft for the adapters.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

import basis
from basis.diagnostics.kept import CATEGORIES
from basis.diagnostics.report import Report

VOCABULARY, BATCH, LENGTH = 4096, 4, 128
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BERT = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 256, "n_layer": 2, "n_head": 4}
        | {"bos_token_id": None, "eos_token_id": None},
    ),
    "Llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", LLAMA | {"head_dim": 64}),
    "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM", LLAMA | {"head_dim": 64}),
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", LLAMA | {"num_local_experts": 4}),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64},
    ),
    "BERT": ("BertConfig", "BertForMaskedLM", BERT),
    "ViT": (
        "ViTConfig",
        "ViTForImageClassification",
        {name: BERT[name] for name in BERT if name != "vocab_size"}
        | {"image_size": 88, "patch_size": 8, "intermediate_size": 1024},
    ),
    "T5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 256, "d_kv": 64, "d_ff": 1024}
        | {"num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "Llama + LoRA": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
}


def report_of(family: str, dtype: torch.dtype) -> Report:
    """The report of a model of `family`, applied to in `dtype`."""
    import transformers

    config, model, options = FAMILIES[family]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**options)).to(dtype)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    sample: dict[str, Any] = {"input_ids": tokens, "labels": tokens}
    if family == "ViT":
        sample = {
            "pixel_values": torch.randn(BATCH, 3, 88, 88).to(dtype),
            "labels": torch.zeros(BATCH, dtype=torch.int64),
        }
    if "LoRA" in family:
        import peft  # type: ignore[import-not-found, unused-ignore]

        wanted = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        made = peft.get_peft_model(made, wanted)
    made.train()
    return basis.apply(made, "8x", sample=sample, lean=True, head=family != "ViT")


def table(precision: str) -> str:
    """Bytes before -> after, in units of one number for each token and feature in `precision`."""
    dtype = getattr(torch, precision)
    rows = []
    for family in FAMILIES:
        report = report_of(family, dtype)
        unit = BATCH * (LENGTH if family != "ViT" else 122) * 256 * dtype.itemsize
        cells = [
            f"{report.kept[kind][0] / unit:.1f} → {report.kept[kind][1] / unit:.1f}"
            if kind in report.kept and report.kept[kind][0] > unit / 20
            else ""
            for kind in CATEGORIES
        ]
        rows.append([family, *cells, f"{report.before / report.after:.1f}"])
    columns = [i for i in range(len(rows[0])) if any(row[i] for row in rows)]
    head = ["family", *CATEGORIES, "fewer in all, times"]
    lines = [[head[i] for i in columns], ["---"] * len(columns)]
    lines += [[row[i] for i in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--report", choices=FAMILIES, help="print the report of one family")
    options = parser.parse_args(arguments)
    if options.report:
        print(report_of(options.report, getattr(torch, options.precision)))
    else:
        print(table(options.precision))
    return 0


if __name__ == "__main__":
    sys.exit(main())
