"""basis.Lean in tiny models of transformers' families: found by what their modules compute, outputs
equal to the plain model's bit by bit, gradients within the stated error, bytes before and after.
"""

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import basis
from basis.lean import LeanRegistered

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

VOCABULARY, WIDTH, BATCH, LENGTH = 97, 64, 3, 48
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
BERT = {**ENCODER, "vocab_size": VOCABULARY, "intermediate_size": 256}
VIT = {**ENCODER, "intermediate_size": 256, "image_size": 32, "patch_size": 8, "num_labels": 5}

PER_LLAMA = {"RMSNorm": 5, "MLP": 2, "Attention": 2}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, int], float, float]] = {
    # config, model, options, what is found, most error of the whole gradient, least gain in bytes
    "Llama": ("Llama", "LlamaForCausalLM", SMALL, PER_LLAMA, 0.04, 3),
    "Qwen2": ("Qwen2", "Qwen2ForCausalLM", SMALL, PER_LLAMA, 0.04, 3),
    "Qwen3": ("Qwen3", "Qwen3ForCausalLM", SMALL, {**PER_LLAMA, "RMSNorm": 9}, 0.04, 3),
    "Mistral": ("Mistral", "MistralForCausalLM", SMALL, PER_LLAMA, 0.04, 3),
    "Gemma": ("Gemma", "GemmaForCausalLM", SMALL, PER_LLAMA, 0.04, 3),
    "Phi3": ("Phi3", "Phi3ForCausalLM", SMALL, PER_LLAMA, 0.04, 3),
    "GPT-2": (
        "GPT2",
        "GPT2LMHeadModel",
        GPT2,
        {"LayerNorm": 5, "NewGELUActivation": 2, "Attention": 2, "Dropout": 7},
        0.15,
        2.8,
    ),
    "BERT": (
        "Bert",
        "BertForMaskedLM",
        BERT,
        {"LayerNorm": 6, "GELUActivation": 3, "SelfAttention": 2, "Dropout": 7},
        0.2,
        1.7,
    ),
    "ViT": (
        "ViT",
        "ViTForImageClassification",
        VIT,
        {"LayerNorm": 5, "GELUActivation": 2, "Attention": 2},
        0.25,
        1.6,
    ),
    "T5": (
        "T5",
        "T5ForConditionalGeneration",
        T5,
        {"LayerNorm": 12, "DenseGatedActDense": 4, "Attention": 6, "Dropout": 16},
        0.15,
        5,
    ),
    "Gemma2": (
        "Gemma2",
        "Gemma2ForCausalLM",
        {**SMALL, "sliding_window": 16, "query_pre_attn_scalar": 16},
        {**PER_LLAMA, "RMSNorm": 9},
        0.1,  # norms behind its MLPs raise their small outputs, and with them the noise
        3,
    ),
    "OPT": (
        "OPT",
        "OPTForCausalLM",
        {**ENCODER, "vocab_size": VOCABULARY, "ffn_dim": 128, "word_embed_proj_dim": WIDTH},
        {"LayerNorm": 5, "ReLU": 2, "Attention": 2},
        0.04,
        1.3,
    ),
}


def made(family: str) -> nn.Module:
    config, model, options, *_ = FAMILIES[family]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, f"{config}Config")(**options))


def batch(family: str, padded: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    if family == "ViT":
        pixels = torch.randn(BATCH, 3, 32, 32, generator=generator)
        return {"pixel_values": pixels, "labels": torch.arange(BATCH)}
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    given: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if padded:
        mask = torch.ones_like(ids)
        mask[0, 40:] = mask[1, 30:] = 0
        given["attention_mask"] = mask
    if family not in ("BERT", "T5"):
        given["use_cache"] = False
    return given


def kept_by(model: nn.Module, given: dict[str, Any]) -> tuple[int, Any]:
    """Bytes kept for backward, without parameters and buffers, and what the model returns."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**given)
    for tensor in (*model.parameters(), *model.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values()), output


def step(model: nn.Module, given: dict[str, Any]) -> tuple[int, Tensor, dict[str, Tensor]]:
    torch.manual_seed(5)  # of dropout
    model.zero_grad()
    kept, output = kept_by(model, given)
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return kept, output.logits.detach(), grads


def difference(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all gradients together, in norm."""
    assert found.keys() == exact.keys()
    squares = sum(float((found[name] - g).square().sum()) for name, g in exact.items())
    return (squares / sum(float(g.square().sum()) for g in exact.values())) ** 0.5


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_equal_gradients_near_and_bytes_fewer(family: str, padded: bool) -> None:
    """In training, so with the dropout that a family has by default."""
    *_, wanted, most, gain = FAMILIES[family]
    model, given = made(family), batch(family, padded)
    kinds = [type(module) for module in model.modules()]
    before, logits, exact = step(model, given)
    changed = basis.convert(model, basis.Lean(attention="sdpa"))
    basis.set_noise_key(model, seed=0, step=0)
    found = Counter(type(m).__name__ for m in model.modules() if "Lean" in type(m).__name__)
    ends = {end: sum(n for name, n in found.items() if name.endswith(end)) for end in wanted}
    assert ends == wanted
    assert len(changed) == sum(wanted.values())
    after, same, near = step(model, given)
    assert torch.equal(same, logits)
    assert 0 < difference(near, exact) < most
    assert after < before / gain
    assert sorted(basis.revert(model)) == sorted(changed)
    assert [type(module) for module in model.modules()] == kinds
    again, _, back = step(model, given)
    assert again == before
    assert difference(back, exact) == 0


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@pytest.mark.parametrize("family", ["Llama", "Gemma", "GPT-2", "BERT", "T5", "Gemma2"])
def test_outputs_are_equal_in_low_precision(family: str, how: str) -> None:
    model, given = made(family), batch(family, True)
    model = model.to(torch.bfloat16) if how == "bfloat16" else model
    *_, most, _ = FAMILIES[family]
    found = []
    for lean in (False, True):
        if lean:
            basis.convert(model, basis.Lean(attention="sdpa"))
            basis.set_noise_key(model, seed=0, step=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            kept, logits, grads = step(model, given)
        found.append((kept, logits, {name: g.float() for name, g in grads.items()}))
    (before, logits, exact), (after, same, near) = found
    assert torch.equal(same, logits)
    assert difference(near, exact) < 1.2 * most
    assert after < before / 1.5


def test_the_models_configuration_is_left_alone() -> None:
    model = made("Llama")
    config = model.config
    basis.convert(model, basis.Lean(attention="sdpa"))
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, type(made("Llama").model.layers[0].self_attn))
    assert config._attn_implementation == "sdpa"
    assert attention.config._attn_implementation == "basis_sdpa"
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    given = batch("Llama", False)
    for one in copies:
        assert isinstance(one.model.layers[0].self_attn, LeanRegistered)
        assert torch.equal(one(**given).loss, model(**given).loss)
    basis.revert(model)
    assert model.model.layers[0].self_attn.config is config
    eager = made("Llama")
    eager.set_attn_implementation("eager")
    found = basis.convert(eager, basis.Lean(attention="sdpa"))
    assert not any("self_attn" in name for name in found)


def test_probabilities_are_there_for_who_asks_for_them() -> None:
    """By the plain function, with their gradients."""
    model, given = made("Gemma2"), batch("Gemma2", True)
    wanted = model(**given, output_attentions=True).attentions
    basis.convert(model, basis.Lean(attention="sdpa"))
    found = model(**given, output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert found[0].requires_grad


def assert_one_graph(model: Any, given: dict[str, Tensor]) -> None:
    """`model` compiles as one graph, with the logits and gradients of eager mode."""
    basis.set_noise_key(model, seed=0, step=0)
    _, logits, exact = step(model, given)
    exact = {name: grad.clone() for name, grad in exact.items()}
    model.zero_grad()
    torch._dynamo.reset()
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(**given)
    output.loss.backward()
    torch.testing.assert_close(output.logits, logits)
    assert difference({n: p.grad for n, p in model.named_parameters()}, exact) < 1e-4


@pytest.mark.slow
def test_a_mixture_is_one_graph() -> None:
    """Experts of Mixtral, of which `Quantized` keeps each row by itself."""
    torch.manual_seed(0)
    options = {**SMALL, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**options))
    given = batch("Llama", True)
    basis.convert(model, basis.Quantized(bits=4), include=["*experts*"])
    basis.convert(model, basis.Lean(attention="sdpa"))
    assert_one_graph(model, given)


def test_text_is_generated_as_before() -> None:
    model = made("Qwen3").eval()
    start = torch.tensor([[5, 6, 7]])
    wanted = model.generate(start, max_new_tokens=5, do_sample=False)
    basis.convert(model, basis.Lean(attention="sdpa"))
    assert torch.equal(model.generate(start, max_new_tokens=5, do_sample=False), wanted)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "T5"])
def test_checkpointed_layers_have_the_gradients_of_the_others(family: str) -> None:
    """Dropout of T5's attention too."""
    model, given = made(family), {**batch(family, True), "use_cache": False}
    basis.convert(model, basis.Lean(attention="sdpa"))
    basis.set_noise_key(model, seed=0, step=0)
    _, _, exact = step(model, given)
    exact = {name: grad.clone() for name, grad in exact.items()}
    model.gradient_checkpointing_enable()
    kept, _, found = step(model, given)
    assert difference(found, exact) < 1e-6
    assert kept < (500_000 if family == "T5" else 300_000)


def test_adapters_keep_their_names_and_outputs() -> None:
    """LoRA: frozen layers keep nothing, dropout of adapters a bit, their inputs are sketched."""
    peft = pytest.importorskip("peft")
    options = {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}
    torch.manual_seed(1)
    model = peft.get_peft_model(made("Llama"), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    given = batch("Llama", True)
    before, logits, exact = step(model, given)
    changed = basis.convert(model, basis.Lean(attention="sdpa"))
    assert sum("lora_dropout" in name for name in changed) == 2 * 7
    basis.set_noise_key(model, seed=0, step=0)
    after, same, near = step(model, given)
    assert torch.equal(same, logits)
    assert difference(near, exact) < 0.06
    basis.convert(model, basis.Quantized(bits=2), include=["*lora_A*"])
    basis.set_noise_key(model, seed=0, step=0)
    fewest, same, _ = step(model, given)
    assert torch.equal(same, logits)
    assert before > 2.4 * after
    assert before > 6.5 * fewest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "padded"), [("Llama", False), ("Llama", True), ("Gemma2", True), ("T5", True)]
)
def test_a_model_is_one_graph_with_the_gradients_of_eager_mode(family: str, padded: bool) -> None:
    model, given = made(family), batch(family, padded)
    for module in model.modules():  # no dropout: a graph has other draws
        if hasattr(module, "dropout"):
            module.dropout = 0.0 if isinstance(module.dropout, float) else nn.Identity()
    basis.convert(model, basis.Lean(attention="sdpa"))
    assert_one_graph(model, given)


CATEGORIES = ("dense inputs", "norms", "gate, up, act", "attention", "rest")


def category(module: nn.Module | None) -> str:
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return "dense inputs"
    for word, kind in (("Norm", "norms"), ("MLP", CATEGORIES[2]), ("SiLU", CATEGORIES[2])):
        if word in name:
            return kind
    return "attention" if "Attention" in name else "rest"


@pytest.fixture
def running() -> Iterator[list[nn.Module]]:
    """The modules whose forward runs, the innermost last."""
    stack: list[nn.Module] = []
    register = torch.nn.modules.module
    handles = [
        register.register_module_forward_pre_hook(lambda module, _: stack.append(module)),
        register.register_module_forward_hook(lambda *_: stack.pop() and None, always_call=True),
    ]
    yield stack
    for handle in handles:
        handle.remove()


Change = Callable[[nn.Module], object]


def llama_block(change: Change, heads: int, running: list[nn.Module]) -> dict[str, float]:
    """What a block in bfloat16 keeps, in bytes for each of B x T x C numbers, by category."""
    batch_size, length, width = 2, 256, 256
    tables: list[Counter[str]] = []
    for layers in (2, 1):
        options = {"num_hidden_layers": layers, "num_key_value_heads": heads, "head_dim": 64}
        sizes = {"hidden_size": width, "intermediate_size": 688, "max_position_embeddings": length}
        config = transformers.LlamaConfig(**{**SMALL, **options, **sizes})
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        change(model)
        ids = torch.randint(3, VOCABULARY, (batch_size, length))
        found: dict[int, tuple[str, int]] = {}

        def pack(tensor: Tensor, found: dict[int, tuple[str, int]] = found) -> Tensor:
            storage = tensor.untyped_storage()
            kind = category(running[-1] if running else None)
            found.setdefault(storage.data_ptr(), (kind, storage.nbytes()))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(input_ids=ids, use_cache=False)
        for tensor in (*model.parameters(), *model.buffers()):
            found.pop(tensor.untyped_storage().data_ptr(), None)
        table: Counter[str] = Counter()
        for kind, size in found.values():
            table[kind] += size
        tables.append(table)
        del output
    numbers = batch_size * length * width
    return {kind: (tables[0][kind] - tables[1][kind]) / numbers for kind in CATEGORIES}


def eighth_and_lean(model: nn.Module) -> None:
    basis.convert(model, basis.Quantized(bits=2), exclude=["lm_head"])  # of 16
    basis.convert(model, basis.Lean(attention="sdpa"))


@pytest.mark.parametrize("heads", [4, 1])
def test_a_sketched_and_lean_llama_block_keeps_a_quarter(
    heads: int, running: list[nn.Module]
) -> None:
    exact = llama_block(lambda model: None, heads, running)
    lean = llama_block(eighth_and_lean, heads, running)
    wide = 688 / 256
    assert exact["norms"] == pytest.approx(12, abs=0.1)
    assert exact["gate, up, act"] == pytest.approx(3 * 2 * wide, abs=0.1)
    assert exact["attention"] == pytest.approx(2 * (1 + 2 * heads / 4) + 2, abs=0.1)
    assert lean["norms"] == pytest.approx(2 * (1 + 8 / 128 + 4 / 256), abs=0.05)
    assert lean["gate, up, act"] == pytest.approx(wide * (1 + 8 / 128), abs=0.05)
    assert lean["attention"] == pytest.approx((2 + 2 * heads / 4) * (1 + 4 / 64), abs=0.1)
    assert sum(exact.values()) > 4 * sum(lean.values())
