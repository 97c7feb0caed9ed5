"""One line for each family: `basis.apply(model, "8x", sample=..., lean=True, head=True)`.

The model's outputs, and the gradient that reaches its embeddings, are the plain model's; its loss
falls; fewer bytes are kept, and the report says of what; `basis.revert` gives the plain model back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import basis

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

VOCABULARY, WIDTH, BATCH, LENGTH = 499, 64, 4, 32
ENCODER = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {
    **ENCODER,
    "vocab_size": VOCABULARY,
    "intermediate_size": 172,
    "num_key_value_heads": 1,
    "max_position_embeddings": LENGTH,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2,
        "n_positions": LENGTH, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
BERT = {**ENCODER, "vocab_size": VOCABULARY, "intermediate_size": 256}
VIT = {**ENCODER, "intermediate_size": 256, "image_size": 32, "patch_size": 8, "num_labels": 5}
T5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 32, "d_ff": 128, "num_heads": 2,
      "num_layers": 2, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}  # fmt: skip
GEMMA2 = {**LLAMA, "head_dim": 32, "sliding_window": LENGTH // 2, "pad_token_id": 0}
OPT = {**ENCODER, "vocab_size": VOCABULARY, "ffn_dim": 256, "word_embed_proj_dim": WIDTH,
       "max_position_embeddings": LENGTH}  # fmt: skip
DENSE, NORMS, DROPOUT = "inputs of dense layers", "norms", "dropout"
ACTIVATIONS, ATTENTION, LOSS = "activations", "attention", "logits and loss"
BLOCK = {DENSE, NORMS, ACTIVATIONS, ATTENTION}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], set[str], float]] = {
    # config, model, options, what must keep less, how many times less in all
    "GPT-2": ("GPT2", "GPT2LMHeadModel", GPT2, BLOCK | {LOSS}, 6),
    "Llama": ("Llama", "LlamaForCausalLM", LLAMA, BLOCK | {LOSS}, 4),
    "Qwen2": ("Qwen2", "Qwen2ForCausalLM", LLAMA, BLOCK | {LOSS}, 4),
    "Mixtral": (
        "Mixtral",
        "MixtralForCausalLM",
        {**LLAMA, "num_local_experts": 4},
        BLOCK | {LOSS},
        3,
    ),
    "BERT": ("Bert", "BertForMaskedLM", BERT, BLOCK, 3.5),
    "ViT": ("ViT", "ViTForImageClassification", VIT, BLOCK, 5),
    "T5": ("T5", "T5ForConditionalGeneration", T5, BLOCK | {DROPOUT}, 5),
    "Gemma2": ("Gemma2", "Gemma2ForCausalLM", GEMMA2, BLOCK | {LOSS}, 5),
    "OPT": ("OPT", "OPTForCausalLM", OPT, BLOCK | {LOSS}, 2.5),  # its dropout is a function
    "Llama, LoRA": ("Llama", "LlamaForCausalLM", LLAMA, BLOCK | {LOSS}, 5),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def made(family: str) -> Any:
    config, kind, options, *_ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, f"{config}Config")(**options))
    if "LoRA" in family:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # else nothing reaches lora_A at first
                nn.init.normal_(parameter, std=0.05)
    return model.train()


def batch(family: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    if family == "ViT":
        pixels = torch.randn(BATCH, 3, 32, 32, generator=generator)
        return {"pixel_values": pixels, "labels": torch.arange(BATCH)}
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids}


def has_head(family: str) -> bool:
    return "CausalLM" in FAMILIES[family][1] or "LMHead" in FAMILIES[family][1]


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


@contextmanager
def embedded(model: Any, family: str) -> Iterator[list[Tensor]]:
    """The outputs of the input embeddings, which keep their gradients."""
    found: list[Tensor] = []
    if family == "ViT":
        modules = [model.vit.embeddings]
    elif family == "T5":
        modules = [model.encoder.embed_tokens, model.decoder.embed_tokens]
    else:
        modules = [model.get_input_embeddings()]

    def note(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if output.is_leaf:  # of frozen embeddings
            output.requires_grad_()
        output.retain_grad()
        found.append(output)
        return output

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def step(model: Any, family: str) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """The loss, dX of the embeddings' outputs, and the gradients of the parameters."""
    model.zero_grad()
    torch.manual_seed(5)  # of dropout
    with embedded(model, family) as outputs:
        loss = model(**batch(family)).loss
        loss.backward()
    found = [x.grad for x in outputs if x.grad is not None]
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found, grads


@every_family
def test_dense_layers_alone_leave_outputs_and_dx_exact(family: str) -> None:
    plain, model = made(family), made(family)
    loss, wanted, exact = step(plain, family)
    report = basis.apply(model, "8x", sample=batch(family))
    basis.set_noise_key(model, seed=0, step=0)
    same, found, grads = step(model, family)
    assert len(wanted) == (2 if family == "T5" else 1)
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)
    assert grads.keys() == exact.keys()
    before, after = report.kept[DENSE]
    assert before > 1.3 * after  # attention keeps its own output
    first = report.changed[0].name + ".weight"
    assert not torch.allclose(grads[first], exact[first])


@every_family
def test_one_line_converts_it_and_revert_gives_it_back(family: str) -> None:
    *_, fewer, times = FAMILIES[family]
    plain, model = made(family), made(family)
    given = batch(family)
    loss, _, exact = step(plain, family)
    report = basis.apply(model, "8x", sample=given, lean=True, head=has_head(family))
    basis.set_noise_key(model, seed=0, step=0)
    same, _, near = step(model, family)
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=0.0)
    assert near.keys() == exact.keys()
    assert (report.head is not None) == has_head(family)
    for kind in fewer:
        before, after = report.kept[kind]
        assert before > 1.2 * after, (kind, before, after)
        assert kind in str(report)
    assert report.before > times * report.after
    assert report.changed
    for one in (plain, model):
        one.eval()
    with torch.no_grad():
        assert torch.equal(model(**given).logits, plain(**given).logits)
    basis.revert(model)
    assert kinds(model) == kinds(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    for one in (plain, model):
        one.train()
    again, _, back = step(model, family)
    assert torch.equal(again, step(plain, family)[0])
    torch.testing.assert_close(back, exact, rtol=0.0, atol=0.0)


@every_family
def test_the_loss_falls_in_20_steps(family: str) -> None:
    model, given = made(family), batch(family)
    basis.apply(model, "8x", sample=given, lean=True, head=has_head(family))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=2e-2 if "LoRA" in family else 3e-3
    )
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
