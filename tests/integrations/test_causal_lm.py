"""fuse_head in tiny models of transformers' families: the loss and all gradients are those of the
model's own forward, and no logits are kept.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import basis
from harness.memory import saved_bytes_total

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

VOCABULARY, WIDTH, BATCH, LENGTH = 211, 16, 4, 24
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {
    **{name: SMALL[name] for name in list(SMALL) if name not in ("num_key_value_heads", "head_dim")}
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "dropout": 0.0,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": (
        "GPT2",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": 32},
    ),
    "Llama": ("Llama", "LlamaForCausalLM", SMALL),
    "Llama, tied": ("Llama", "LlamaForCausalLM", {**SMALL, "tie_word_embeddings": True}),
    "Qwen2": ("Qwen2", "Qwen2ForCausalLM", SMALL),
    "Mixtral": (
        "Mixtral",
        "MixtralForCausalLM",
        {**SMALL, "num_local_experts": 4, "output_router_logits": True},
    ),
    "Gemma 2, soft cap": ("Gemma2", "Gemma2ForCausalLM", {**SMALL, "final_logit_softcapping": 2.0}),
    "Granite, scaled": ("Granite", "GraniteForCausalLM", {**SMALL, "logits_scaling": 4.0}),
    "Cohere, scaled": ("Cohere", "CohereForCausalLM", {**SMALL, "logit_scale": 0.25}),
    "BERT, causal, a bias": ("Bert", "BertLMHeadModel", {**BERT, "is_decoder": True}),
    "BERT, masked": ("Bert", "BertForMaskedLM", BERT),
    "BART, its own cross-entropy": ("Bart", "BartForCausalLM", BART),
    "T5": (
        "T5",
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 1,
         "num_heads": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0},
    ),
}  # fmt: skip


def made(family: str) -> Any:
    config, kind, options = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, f"{config}Config")(**options))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def batch(count: int | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels = tokens.clone()
    labels[0, :7] = -100
    given: dict[str, Any] = {"input_ids": tokens, "labels": labels}
    return given if count is None else {**given, "num_items_in_batch": torch.tensor(count)}


def step(model: Callable[..., Any], given: dict[str, Any], of: nn.Module) -> list[Tensor]:
    """The loss and the gradients of the parameters."""
    loss = model(**given).loss
    wanted = [p for p in of.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True)]


def takes_a_count(model: nn.Module) -> bool:
    return (
        "ConditionalGeneration" not in type(model).__name__ and "Bart" not in type(model).__name__
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_models_own(family: str) -> None:
    model = made(family)
    given = batch(150 if takes_a_count(model) else None)
    plain, whole = step(model, given, model), model(**given).logits
    name = basis.fuse_head(model)
    assert model.get_submodule(name) is model.get_output_embeddings()
    torch.testing.assert_close(step(model, given, model), plain, rtol=2e-5, atol=2e-7)
    output = model(**given)
    assert output.logits is None
    assert not [part for part in model(**given, return_dict=False) if part is whole]
    for unchanged in (
        model(input_ids=given["input_ids"], **_decoder_input(model, given)),
        *_quietly(model, given),
    ):
        assert unchanged.logits.shape == whole.shape
    assert basis.unfuse_head(model) == name
    assert model(**given).logits is not None
    assert "forward" not in {**vars(model), **vars(model.get_output_embeddings())}


def _decoder_input(model: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    return {"decoder_input_ids": given["input_ids"]} if "T5" in type(model).__name__ else {}


def _quietly(model: nn.Module, given: dict[str, Any]) -> list[Any]:
    with torch.no_grad():
        found = [model(**given)]
    model.eval()
    found.append(model(**given))
    model.train()
    return found


@pytest.mark.parametrize("family", ["GPT-2", "Llama, tied", "Gemma 2, soft cap"])
def test_no_logits_are_kept(family: str) -> None:
    model, given = made(family), batch()
    before = saved_bytes_total(model, lambda: model(**given).loss)
    basis.fuse_head(model)
    after = saved_bytes_total(model, lambda: model(**given).loss)
    logits, kept = 4 * BATCH * LENGTH * VOCABULARY, 4 * WIDTH * (BATCH * LENGTH + VOCABULARY)
    assert before - after > logits - kept


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_accumulated_micro_batches_are_one_batch(family: str) -> None:
    """By `num_items_in_batch`; without it, each mean counts as much as the whole step."""
    model, given = made(family), batch()
    if family == "Mixtral":
        model.config.output_router_logits = False  # its auxiliary loss is a mean by nature
    basis.fuse_head(model)
    count = int((given["labels"][:, 1:] != -100).sum())
    one = step(model, given, model)
    parts = [
        step(model, {name: value[i : i + 1] for name, value in given.items()}
             | {"num_items_in_batch": count}, model)
        for i in range(BATCH)
    ]  # fmt: skip
    total = [torch.stack(same).sum(0) for same in zip(*parts, strict=True)]
    torch.testing.assert_close(total, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["Llama", "Gemma 2, soft cap"])
def test_compiled_in_one_graph(family: str) -> None:
    model, given = made(family), batch(150)
    plain = step(model, given, model)
    basis.fuse_head(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(compiled, given, model), plain, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_sketched_head_and_revert(precision: str) -> None:
    model, given = made("Llama"), batch()
    plain = step(model, given, model)
    basis.convert(model, basis.BalancedSketch(BATCH * LENGTH), include=["lm_head"])
    assert basis.fuse_head(model) == "lm_head"
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        found = step(model, given, model)
    tolerance = (
        {"rtol": 1e-3, "atol": 1e-5} if precision == "float32" else {"rtol": 0.1, "atol": 0.02}
    )
    torch.testing.assert_close(found, plain, **tolerance)
    assert basis.revert(model) == ["lm_head"]
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(step(model, given, model)[0], plain[0])


def test_a_model_that_is_only_fused_is_reverted() -> None:
    model = made("Llama")
    basis.fuse_head(model)
    with pytest.raises(ValueError, match="replaced"):
        basis.fuse_head(model)
    assert basis.revert(model) == ["lm_head"]
    assert basis.unfuse_head(model) is None


def test_what_a_trainer_reads_of_the_forward_is_unchanged() -> None:
    model = made("Llama")
    before, state = inspect.signature(model.forward), set(model.state_dict())
    basis.fuse_head(model)
    assert inspect.signature(model.forward) == before
    assert set(model.state_dict()) == state


def test_a_copy_is_fused_on_its_own() -> None:
    model, given = made("Llama"), batch()
    basis.fuse_head(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    loss = other(**given).loss
    torch.testing.assert_close(loss, torch.tensor(float(VOCABULARY)).log())
    assert other(**given).logits is None
    assert basis.unfuse_head(other) == "lm_head"
    assert model(**given).logits is None


def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    given = batch(150)
    model = peft.get_peft_model(made("Llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = step(model, given, model)
    assert basis.fuse_head(model) == "base_model.model.lm_head"
    torch.testing.assert_close(step(model, given, model), plain, rtol=2e-5, atol=2e-7)
    assert model(**given).logits is None
    basis.revert(model)
    assert model(**given).logits is not None
    own = peft.get_peft_model(made("Llama"), peft.LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(ValueError, match=r"lm_head of LlamaForCausalLM is a Linear.*own forward"):
        basis.fuse_head(own)


def test_models_that_cannot_be_served() -> None:
    with pytest.raises(ValueError, match="LlamaModel holds no language model"):
        basis.fuse_head(made("Llama").model)
    model = made("Llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="lm_head of LlamaForCausalLM has hooks"):
        basis.fuse_head(model)
    with pytest.raises(ValueError, match="float16"):
        basis.fuse_head(made("Llama").half())
    model = made("Llama")
    basis.fuse_head(model)
    model.loss_function = lambda logits, labels, **_: logits.logsumexp(-1).mean()
    with pytest.raises(ValueError, match=r"takes `logsumexp`.*unfuse_head"):
        model(**batch())
    model.loss_function = lambda logits, labels, **_: torch.zeros(())
    with pytest.raises(ValueError, match="takes no loss of the output of its head"):
        model(**batch())
    model.resize_token_embeddings(VOCABULARY + 5)
    with pytest.raises(ValueError, match="was replaced since"):
        model(**batch())
    basis.unfuse_head(model)
    assert model(**batch()).loss.isfinite()
