"""models/llama.py against transformers' LlamaForCausalLM with the same weights."""

import pytest
import torch

from models import ModelConfig, build

transformers = pytest.importorskip("transformers")

NAMES = (("wte", "model.embed_tokens"), ("norm_f", "model.norm"), ("head", "lm_head"))
IN_BLOCK = (
    ("norm_1", "input_layernorm"),
    ("norm_2", "post_attention_layernorm"),
    ("attn", "self_attn"),
)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_loss_and_gradients_are_those_of_transformers(kv_heads: int) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        97, 16, 2, 4, 32, family="llama", init="llama", n_kv_head=kv_heads, n_inner=80
    )
    ours = build(config)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            rms_norm_eps=config.layer_norm_eps,
        )
    )
    weights = {}
    for name, tensor in ours.state_dict().items():
        for mine, others in (*NAMES, *IN_BLOCK):
            name = name.replace(f"{mine}.", f"{others}.")
        weights[name.replace("blocks.", "model.layers.")] = tensor
    theirs.load_state_dict(weights)
    tokens = torch.randint(97, (3, 17))
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    targets = tokens[:, 1:].contiguous()
    wanted = theirs(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    loss.backward()
    wanted.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        for mine, others in (*NAMES, *IN_BLOCK):
            name = name.replace(f"{mine}.", f"{others}.")
        found = grads[name.replace("blocks.", "model.layers.")]
        torch.testing.assert_close(p.grad, found, rtol=1e-4, atol=1e-6)
