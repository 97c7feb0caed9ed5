"""Fine-tune a local Llama on a text of your own, with an eighth of what its dense layers keep.

    python examples/fine_tune_llama.py CHECKPOINT TEXT OUT

Needs transformers. The saved model is a plain one.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import basis

checkpoint, text, out = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).train()
report = basis.apply(model, "8x", lean=True, head=True)  # the one line
print(report)  # what was changed, what was left and why, bytes kept per token
tokens = tokenizer(Path(text).read_text(), return_tensors="pt").input_ids[0]
length = min(1024, len(tokens))
blocks = tokens[: len(tokens) // length * length].view(-1, length)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
for step, batch in enumerate(blocks.split(4)):
    loss = model(input_ids=batch, labels=batch).loss  # no logits are formed
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
basis.revert(model)
model.save_pretrained(out)
tokenizer.save_pretrained(out)
