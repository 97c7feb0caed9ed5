"""What a conversion leaves as it is: said by name and with the reason, and never in silence."""

import warnings

import pytest
import torch
from lookalikes import Conv1D
from torch import nn

import basis
from basis.convert import Left, left_alone

SKETCH = basis.BalancedSketch(4)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8))


class OwnForward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def mixed() -> nn.ModuleDict:
    frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
    return nn.ModuleDict(
        {
            "words": nn.Embedding(10, 8),
            "norm": nn.LayerNorm(8),
            "dense": nn.Linear(8, 64),
            "conv": Conv1D(64, 64),
            "frozen": frozen,
            "narrow": nn.Linear(2, 8, bias=False),
            "own": OwnForward(8, 8),
            "router": Router(),
            "picture": nn.Conv2d(1, 2, 3, bias=False),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
            "lazy": nn.LazyLinear(4),
            "gelu": nn.GELU(),
        }
    )


def test_each_module_that_was_left_is_named_with_its_weights_and_the_reason() -> None:
    model = mixed()
    assert basis.convert(model, SKETCH, exclude=["conv"]) == ["dense"]
    left = {entry.name: entry for entry in left_alone(model, SKETCH)}
    own = "a forward of its own around its weights"
    assert left == {
        entry.name: entry
        for entry in (
            Left("words", "Embedding", 80, "looks rows up, and keeps indices only"),
            Left("norm", "LayerNorm", 16, "has vectors of weights only"),
            Left("conv", "Conv1D", 64 * 65, "left out by include or exclude"),
            Left("frozen", "Linear", 64, "frozen, so it keeps nothing of its input"),
            Left(
                "narrow",
                "Linear",
                16,
                "its input has 2 features where others have 64: nothing to save",
            ),
            Left(
                "own", "OwnForward", 72, "a subclass of nn.Linear, whose own forward would be lost"
            ),
            Left("router", "Router", 32, own),
            Left("picture", "Conv2d", 18, own),
            Left("normed", "ParametrizedLinear", 18, "its weight is computed by a parametrization"),
            Left("lazy", "LazyLinear", 0, "has no weight before its first forward"),
        )
    }


def test_a_frozen_layer_is_left_and_asked_for_by_name_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    method = basis.Transform(bits=1.0)
    assert basis.convert(model, method) == ["1"]
    assert type(model[0]) is nn.Linear
    assert not any(name.startswith("0.") for name, _ in model.named_buffers())
    with pytest.raises(ValueError, match=r"include='0': matches no .*0 \(Linear: frozen, so"):
        basis.convert(model, method, include=["0"])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"the model's are none.*frozen"):
        basis.convert(nn.Sequential(model[0]), method)


def test_a_narrow_layer_is_sketched_only_if_it_is_asked_for() -> None:
    def model() -> nn.ModuleDict:
        return nn.ModuleDict({"a": nn.Linear(64, 4), "b": nn.Linear(4, 64)})

    assert basis.convert(model(), SKETCH) == ["a"]
    assert basis.convert(model(), SKETCH, include=["b"]) == ["b"]
    assert basis.convert(model(), SKETCH, include=["?"]) == ["a", "b"]
    wide = nn.ModuleDict({"a": nn.Linear(2**14, 300), "b": nn.Linear(300, 2**14)})
    assert basis.convert(wide, SKETCH) == ["a", "b"]


def little() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 8, 3), Router(), nn.Embedding(99, 99))


def test_a_conversion_of_less_than_half_is_said_once_with_the_kinds_left() -> None:
    with pytest.warns(UserWarning, match=r"convert: 13% of the model's trained") as said:
        basis.convert(little(), SKETCH)  # 16 of 16 + 72 + 32
    assert len(said) == 1
    assert said[0].filename == __file__
    message = str(said[0].message)
    assert message.index("Conv2d: a forward of its own") < message.index("(72 weights)")
    assert message.index("(72 weights)") < message.index("Router: ") < message.index("(32 weights)")
    assert "Embedding" not in message


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (little(), {"include": ["0"]}),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(8, 8)), {"exclude": ["1"]}),
        (nn.Sequential(nn.Linear(4, 4), nn.Embedding(99, 99)), {}),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(8, 8).requires_grad_(False)), {}),
        (nn.Sequential(nn.Linear(64, 2), nn.Linear(2, 99)), {}),  # narrow
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(99)), {}),
    ],
    ids=["include", "exclude", "embedding", "frozen", "narrow", "norm"],
)
def test_nothing_is_said_of_what_was_left_on_purpose_or_keeps_nothing(model, options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        basis.convert(model, SKETCH, **options)


def test_a_weight_that_an_embedding_shares_counts_as_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(99, 4), nn.Linear(4, 99, bias=False))
    model[2].weight = model[1].weight
    basis.convert(model, SKETCH, exclude=["0"])  # no warning


def test_a_method_that_convert_does_not_take_is_refused() -> None:
    with pytest.raises(TypeError, match="convert: method must be"):
        left_alone(mixed(), basis.BalancedSketch)
