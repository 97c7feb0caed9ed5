"""Dense layers of models of transformers and PEFT, found and sketched. Tiny models from configs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import basis
from basis.convert import left_alone
from basis.diagnostics.kept import kept_by_category

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.arange(64).reshape(2, 32) % 60
UNBIASED = basis.BalancedSketch(16, invariant_scalars=False)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, **options, **tokens
    )
    return transformers.GPT2LMHeadModel(config)


def gradients(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def falls(model: nn.Module, lr: float = 3e-3, to: float = 0.9) -> bool:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(20):
        basis.set_noise_key(model, seed=0, step=step)
        losses.append(gradients(model)[0])
        optimizer.step()
    return losses[-1] < to * losses[0]


def test_gpt2_is_sketched_in_its_blocks_and_reverted() -> None:
    plain, model = gpt2(), gpt2()
    loss, exact = gradients(plain)
    changed = basis.convert(model, UNBIASED)
    assert len(changed) == 2 * 4 + 1
    assert all(type(m).__name__ != "Conv1D" for m in model.modules())
    found, sketched = gradients(model)
    assert found == pytest.approx(loss, rel=1e-6)
    # All that is not a sketched weight has passed through exact dX alone.
    same = [name for name in exact if "bias" in name or "ln_" in name or "wpe" in name]
    assert len(same) > 10
    torch.testing.assert_close([sketched[n] for n in same], [exact[n] for n in same])
    assert not torch.allclose(
        sketched["transformer.h.0.mlp.c_fc.weight"], exact["transformer.h.0.mlp.c_fc.weight"]
    )
    assert {entry.kind for entry in left_alone(model, UNBIASED)} == {"Embedding", "LayerNorm"}
    assert falls(model)
    basis.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())


def test_falcon_adds_its_biases_late_and_so_do_its_stand_ins() -> None:
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        **{k: SMALL[k] for k in ("vocab_size", "hidden_size", "num_attention_heads")},
        num_hidden_layers=2,
        bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    model = transformers.FalconForCausalLM(config).to(torch.bfloat16)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    kinds = [type(module) for module in model.modules()]
    wanted, exact = gradients(model)
    assert len(basis.convert(model, UNBIASED)) == 2 * 4 + 1
    found, sketched = gradients(model)
    assert found == wanted
    same = [name for name in exact if "bias" in name]
    assert len(same) > 8
    assert all(torch.equal(sketched[n], exact[n]) for n in same)
    some = "transformer.h.0.mlp.dense_h_to_4h.weight"
    assert not torch.allclose(sketched[some], exact[some], rtol=0.1)
    basis.revert(model)
    assert [type(module) for module in model.modules()] == kinds


def test_lora_sketches_what_is_trained_and_wide_and_saves_adapters_as_ever(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL)
    targets = ["q_proj", "v_proj", "down_proj"]
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config),
        peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"),
    )
    keys = list(model.state_dict())
    changed = basis.convert(model, basis.Transform(bits=1.0))
    assert len(changed) == 2 * len(targets)
    assert all(name.endswith("lora_A.default") for name in changed)
    left = {entry.name: entry.why for entry in left_alone(model, basis.Transform(bits=1.0))}
    assert all("nothing to save" in why for name, why in left.items() if "lora_B" in name)
    assert all("frozen" in why for name, why in left.items() if name.endswith("base_layer"))
    assert falls(model, lr=3e-2, to=0.98)
    assert list(model.state_dict()) == keys
    assert sum("lora_A" in name for name, _ in model.named_buffers()) == 6 * len(
        basis.Transform(bits=1.0).initial_state(32, torch.device("cpu"))
    )
    model.save_pretrained(tmp_path)
    load_file = pytest.importorskip("safetensors.torch").load_file
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * len(targets)
    fresh = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM(config), tmp_path)
    assert torch.equal(
        fresh.get_parameter(changed[0] + ".weight"), model.get_parameter(changed[0] + ".weight")
    )
    basis.revert(model)
    assert list(model.state_dict()) == keys


def test_adapters_in_float32_share_what_peft_casts_for_each() -> None:
    """As PEFT makes them in a model of bfloat16: three copies of one input, and one sketch."""
    peft = pytest.importorskip("peft")

    def kept_inputs(targets: list[str]) -> float:
        torch.manual_seed(0)
        model = peft.get_peft_model(
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).to(torch.bfloat16),
            peft.LoraConfig(r=1, target_modules=targets, task_type="CAUSAL_LM"),
        )
        model.enable_input_require_grads()
        basis.convert(model, basis.Quantized(bits=4))
        by_kind, _ = kept_by_category(model, {"input_ids": IDS, "labels": IDS})
        return by_kind["inputs of dense layers"] / IDS.numel() / 2  # bytes a token and block

    one, three = kept_inputs(["q_proj"]), kept_inputs(["q_proj", "k_proj", "v_proj"])
    assert one == pytest.approx(32 / 2 + 4 + 4, abs=2)  # 4 bits, a range, the input of lora_B
    assert three == pytest.approx(one + 2 * 4, abs=2)  # two more inputs of lora_B


def moe(kind: str, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"num_experts_per_tok": 2, "output_router_logits": False, "head_dim": 8}
    config, model = {
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
        "qwen3": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
        "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
    }[kind]
    experts = {"num_experts": 4} if kind == "qwen3" else {"num_local_experts": 4}
    if kind == "qwen3":
        options["moe_intermediate_size"] = 24
    made = model(config(**SMALL, **experts, **options, attn_implementation="eager"))
    made.set_experts_implementation(implementation)
    for name, p in made.named_parameters():
        if "experts" in name:  # those of gpt_oss are made without values
            nn.init.normal_(p, std=0.1)
    return made


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [("mixtral", "eager"), ("mixtral", "grouped_mm"), ("qwen3", "eager"), ("gpt_oss", "eager")],
)
def test_experts_are_sketched_with_exact_outputs(kind: str, implementation: str) -> None:
    plain, model = moe(kind, implementation), moe(kind, implementation)
    loss, exact = gradients(plain)
    changed = basis.convert(model, UNBIASED)
    assert sum(name.endswith("experts") for name in changed) == 2
    found, sketched = gradients(model)
    assert found == pytest.approx(loss, rel=1e-5)
    same = [name for name in exact if "norm" in name or "embed" in name or "bias" in name]
    torch.testing.assert_close([sketched[n] for n in same], [exact[n] for n in same])
    some = next(name for name in exact if name.endswith("experts.gate_up_proj"))
    assert not torch.allclose(sketched[some], exact[some])
    basis.convert(model, basis.Exact())
    everything = gradients(model)[1]
    torch.testing.assert_close(everything, exact)
    assert falls(model)
    basis.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_a_lean_gate_between_sketched_experts() -> None:
    """Outputs as ever, gradients near the exact ones, and half of the bytes at most."""
    plain, model = moe("mixtral", "eager"), moe("mixtral", "eager")
    loss, exact = gradients(plain)
    basis.convert(model, basis.Quantized(bits=8), include=["*experts*"])
    sample = {"input_ids": IDS, "labels": IDS}
    gated = kept_by_category(model, sample)[0]
    basis.convert(model, basis.Lean(norm=False, dropout=False))
    found, lean = gradients(model)
    assert found == pytest.approx(loss, rel=1e-6)
    for name in exact:
        if "experts" in name:
            off = (lean[name] - exact[name]).norm() / exact[name].norm()
            assert 0.001 < off < 0.2, name  # noise of 4 bits a number
    after = kept_by_category(model, sample)[0]
    dense, acts = "inputs of dense layers", "activations"
    assert gated[dense] + gated[acts] > 1.8 * (after[dense] + after.get(acts, 0))
