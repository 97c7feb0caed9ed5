"""Llama: sizes, rotary positions, grouped queries and SwiGLU against formulas, and refusals."""

import math
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

import basis
from basis.linear import SketchedLinear
from models import Llama, ModelConfig, build
from models.llama import Rotary


def config(**options: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "vocab_size": 17,
            "block_size": 8,
            "n_layer": 2,
            "n_head": 4,
            "n_embd": 16,
            "family": "llama",
            "init": "llama",
            "n_kv_head": 2,
            "n_inner": 24,
            **options,
        }
    )


def small(**options: Any) -> Llama:
    torch.manual_seed(0)
    model = build(config(**options)).double()
    assert isinstance(model, Llama)
    return model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Without both tables of 32,000 rows: 25.3 and 85.0 million (GaLore's code says 58 and 134
        # with them); TinyLlama's own count.
        ("llama_60m", 2 * 32000 * 512 + 8 * (4 * 512**2 + 3 * 512 * 1376 + 2 * 512) + 512),
        ("llama_130m", 2 * 32000 * 768 + 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768),
        ("tinyllama", 1_100_048_384),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    path = f"{__file__.rsplit('/', 3)[0]}/conf/model/{name}.yaml"
    options: dict[str, Any] = {**OmegaConf.to_container(OmegaConf.load(path))}  # type: ignore[dict-item]
    made = ModelConfig(**{**options, "vocab_size": 32000})
    assert made.parameters == parameters
    with torch.device("meta"):
        assert build(made).parameter_count() == parameters


def test_a_block_by_its_formulas() -> None:
    """Position by position, head by head, in complex numbers."""
    model = small()
    block = model.blocks[0]
    for norm in (block.norm_1, block.norm_2):
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(1, 5, 16, dtype=torch.float64)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * weight

    def turned(head: Tensor, position: int) -> Tensor:
        """Numbers i and i + 2 of a head of 4 as one complex number."""
        angles = torch.tensor([position * 10000 ** (-2 * i / 4) for i in range(2)])
        z = torch.complex(head[:2], head[2:]) * torch.polar(torch.ones(2).double(), angles.double())
        return torch.cat((z.real, z.imag))

    attn, n = block.attn, [norm(row, block.norm_1.weight) for row in x[0]]
    for t in range(5):
        heads = []
        for h in range(4):
            q = turned((attn.q_proj.weight @ n[t])[4 * h : 4 * h + 4], t)
            kv = slice(4 * (h // 2), 4 * (h // 2) + 4)  # two heads of queries for one of keys
            keys = [turned((attn.k_proj.weight @ n[s])[kv], s) for s in range(t + 1)]
            scores = torch.stack([q @ key / math.sqrt(4) for key in keys]).softmax(0)
            values = torch.stack([(attn.v_proj.weight @ n[s])[kv] for s in range(t + 1)])
            heads.append(scores @ values)
        y = x[0, t] + attn.o_proj.weight @ torch.cat(heads)
        m, mlp = norm(y, block.norm_2.weight), block.mlp
        gate = mlp.gate_proj.weight @ m
        y = y + mlp.down_proj.weight @ (gate * gate.sigmoid() * (mlp.up_proj.weight @ m))
        torch.testing.assert_close(block(x)[0, t], y, rtol=1e-6, atol=1e-7)


def test_scores_depend_on_the_distance_alone() -> None:
    rotary = Rotary(8, 32, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 32, 8)
    scores = (rotary(q) @ rotary(k).transpose(-1, -2))[0, 0]
    for distance in range(0, 32, 5):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_loss_and_causality() -> None:
    model = small()
    tokens = torch.randint(17, (2, 8))
    logits = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]), loss)
    changed = tokens.clone()
    changed[:, 5] += 1
    changed %= 17
    torch.testing.assert_close(model(changed)[:, :5], logits[:, :5])
    with pytest.raises(ValueError, match=r"9 tokens do not fit model.block_size=8"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    assert len(list(model.generate(tokens[:1, :3], 4))) == 4


def test_tied_head_and_initialisation() -> None:
    assert small(tie_head=True).head.weight is not small().wte.weight
    tied = small(tie_head=True, vocab_size=4000)
    assert tied.head.weight is tied.wte.weight
    tied(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64)).backward()
    for weight in (tied.wte.weight, tied.blocks[0].mlp.down_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_what_reads_one_tensor_keeps_one_sketch() -> None:
    model = small().float()
    basis.convert(model, basis.Quantized(bits=4), include=["blocks.*"], exact_if_kept=False)
    basis.set_noise_key(model, seed=0, step=0)
    model(torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    layers = (attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj)
    assert all(isinstance(layer, SketchedLinear) for layer in layers)
    from basis.diagnostics.kept import first_readers

    tokens = torch.zeros(2, 8, dtype=torch.int64)
    readers = first_readers(model, lambda: model(tokens, tokens))
    assert readers["blocks.1.attn.v_proj"] == ("blocks.1.attn.q_proj", 16)
    assert readers["blocks.1.mlp.up_proj"] == ("blocks.1.mlp.gate_proj", 16)
    assert readers["blocks.1.attn.o_proj"] == ("blocks.1.attn.o_proj", 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "bert"}, r"model.family='bert': must be one of gpt, llama"),
        ({"n_kv_head": 3}, "model.n_kv_head=3: must divide model.n_head=4"),
        ({"n_kv_head": 0}, "model.n_kv_head=0: must be at least 1"),
        ({"n_inner": 0}, "model.n_inner=0"),
        ({"n_head": 16}, "model.n_head=16: rotary positions"),
        ({"dropout": 0.1}, "model.dropout=0.1: must be 0"),
        ({"rope_theta": 0.0}, "model.rope_theta=0.0"),
        ({"init": "paper"}, "model.init='paper': must be llama"),
        ({"family": "gpt", "init": "gpt2"}, "model.n_kv_head=2: is of model.family=llama only"),
        ({"vocab_size": None}, "model.vocab_size=null"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config(**options))
