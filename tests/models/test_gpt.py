"""The model: sizes, initialisation, causality, loss against its formula, generation."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from models import GPT, GPTConfig


def small(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            **{
                "vocab_size": 17,
                "block_size": 8,
                "n_layer": 2,
                "n_head": 2,
                "n_embd": 16,
                **options,
            }
        )
    )


def from_yaml(name: str, **options) -> GPTConfig:
    path = f"{__file__.rsplit('/', 3)[0]}/conf/model/{name}.yaml"
    return GPTConfig(**{**OmegaConf.to_container(OmegaConf.load(path)), **options})


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Published sizes of GPT-2, plus the 47 rows by which the vocabulary is padded.
        ("gpt2", 124_439_808 + 47 * 768),
        ("gpt2_medium", 354_823_168 + 47 * 1024),
        ("gpt2_large", 774_030_080 + 47 * 1280),
        ("gpt2_xl", 1_557_611_200 + 47 * 1600),
        # Two tables of V x C, positions, two blocks of 12 C^2 + 13 C, a final LayerNorm.
        ("paper", 2 * 50257 * 64 + 64 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64),
        ("char_small", 2 * 65 * 128 + 64 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    config = from_yaml(name, **({"vocab_size": 65} if name == "char_small" else {}))
    with torch.device("meta"):
        assert GPT(config).parameter_count() == parameters


def test_paper_initialisation() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=5000, block_size=64, n_layer=2, n_head=2, n_embd=64))
    for weight, fan_in in (
        (model.head.weight, 64),
        (model.blocks[0].attn.qkv.weight, 64),
        (model.blocks[1].mlp.proj.weight, 256),
    ):
        assert weight.var().item() == pytest.approx(1 / fan_in, rel=0.03)
        assert (
            weight.abs().max().item() <= 2 / math.sqrt(fan_in) / 0.87962566103423978
        )  # truncated at two deviations
    assert model.wte.weight.var().item() == pytest.approx(1 / 64, rel=0.03)
    assert model.wte.weight.abs().max().item() > 3 / 8  # not truncated
    assert all(
        not m.bias.any()
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and m.bias is not None
    )
    assert model.head.bias is None
    assert model.head.weight is not model.wte.weight
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_gpt2_initialisation() -> None:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(vocab_size=500, n_layer=8, n_head=4, n_embd=128, init="gpt2", tie_head=True)
    )
    assert model.head.weight is model.wte.weight
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.blocks[0].mlp.fc.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for projection in (model.blocks[0].mlp.proj, model.blocks[3].attn.proj):
        assert projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)


def test_loss_is_the_mean_cross_entropy() -> None:
    model = small()
    tokens, targets = torch.randint(17, (3, 8)), torch.randint(17, (3, 8))
    probabilities = torch.softmax(model(tokens).double(), -1)
    expected = -probabilities.gather(-1, targets[..., None]).log().mean()
    assert model(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_attention_is_causal() -> None:
    model = small()
    tokens = torch.randint(17, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 17
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_dropout_acts_in_training_only() -> None:
    model = small(dropout=0.5)
    tokens = torch.randint(17, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_generation() -> None:
    model = small().eval()
    prompt = torch.randint(17, (1, 5))

    def draw(**options) -> list[int]:
        return [
            int(t)
            for t in model.generate(
                prompt, 12, generator=torch.Generator().manual_seed(1), **options
            )
        ]

    assert len(draw()) == 12  # past block_size = 8
    assert draw() == draw()
    assert draw(temperature=0) == draw(top_k=1)
    greedy = draw(temperature=0)
    assert greedy[0] == model(prompt)[0, -1].argmax().item()
    assert set(draw(temperature=100.0, vocab_size=3)) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"n_head": 3}, "model.n_head=3"),
        ({"n_layer": 0}, "model.n_layer=0"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"init": "kaiming"}, "model.init='kaiming'"),
        ({"layer_norm_eps": 0.0}, "model.layer_norm_eps=0.0"),
        ({"vocab_size": None}, "model.vocab_size=null"),
    ],
)
def test_wrong_options_are_named(options: dict, start: str) -> None:
    with pytest.raises(ValueError, match="^" + start.replace(".", r"\.")):
        small(**options)


def test_too_long_an_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"9 tokens do not fit model\.block_size=8"):
        small()(torch.zeros(1, 9, dtype=torch.long))
