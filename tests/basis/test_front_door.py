"""The front door of the library: its names, its one `convert` and `revert`, and the older names."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

import basis
from basis.lean import LeanAttention, LeanGELU, LeanLayerNorm
from basis.linear import SketchedLinear
from basis.moved import MOVED
from basis.sus import SusAttention
from models import GPT, GPTConfig
from models.gpt import CausalAttention

METHODS = (
    "Exact BalancedSketch CountSketch Gaussian RowSampling Quantized LowRank Subspace Transform "
    "EMASketch"
)
FUNCTIONS = (
    "convert revert set_noise_key sketched_layers gradient_quality linear_cross_entropy Lean "
    "Recompute SUS apply fuse_head unfuse_head"
)


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=16))


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def test_names() -> None:
    assert sorted(basis.__all__) == sorted((METHODS + " " + FUNCTIONS).split())
    assert all(hasattr(basis, name) for name in basis.__all__)
    assert basis.__version__ == "0.4.0"
    with pytest.raises(AttributeError, match="no attribute 'sketch'"):
        basis.sketch  # noqa: B018


def test_one_import_gives_lean_and_sus_and_leaves_the_compiler_alone() -> None:
    program = (
        "import sys, basis; basis.lean.LeanGELU, basis.sus.kept_statistics;"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", MOVED)
def test_an_old_name_works_and_tells_the_new_place(name: str) -> None:
    module, _, new = MOVED[name].rpartition(".")
    with pytest.warns(DeprecationWarning, match=rf"from {module} import {new}$") as caught:
        found = getattr(basis, name)
    expected = getattr(importlib.import_module(module), new)
    assert found is expected or (name == "LearningEstimator" and issubclass(found, expected))
    assert caught[0].filename == __file__


def test_the_old_converts_work_and_tell_the_new_one() -> None:
    model = gpt()
    before = kinds(model)
    with pytest.warns(DeprecationWarning, match=r"basis\.convert\(model, basis\.SUS"):
        attention = basis.sus.convert(model, CausalAttention, c=3)
    with pytest.warns(DeprecationWarning, match=r"basis\.convert\(model, basis\.Lean"):
        lean = basis.lean.convert(model, gelu_bits=None, attention=SusAttention)
    assert attention == ["blocks.0.attn.attend", "blocks.1.attn.attend"]
    assert set(lean) > set(attention)
    with pytest.warns(DeprecationWarning, match=r"basis\.revert"):
        assert basis.lean.revert(model) == lean
    assert type(model.blocks[0].attn.attend) is SusAttention
    with pytest.warns(DeprecationWarning, match=r"basis\.revert"):
        assert basis.sus.revert(model) == attention
    assert kinds(model) == before


def test_three_kinds_are_converted_by_name_and_reverted_together() -> None:
    model = gpt()
    before, parameters = kinds(model), dict(model.named_parameters())
    dense = basis.convert(model, basis.BalancedSketch(4), include=["*.mlp.*"])
    sus = basis.convert(model, basis.SUS(CausalAttention, c=3), exclude=["blocks.1.*"])
    lean = basis.convert(
        model, basis.Lean(attention=(CausalAttention, SusAttention)), include=["blocks.*"]
    )
    assert dense == [f"blocks.{i}.mlp.{name}" for i in (0, 1) for name in ("fc", "proj")]
    assert sus == ["blocks.0.attn.attend"]
    found = kinds(model)
    assert {name for name, kind in found.items() if kind is SketchedLinear} == set(dense)
    assert found["blocks.0.attn.attend.attend"] is SusAttention  # lean around SUS
    assert found["blocks.1.attn.attend.attend"] is CausalAttention
    for kind, plain in ((LeanLayerNorm, nn.LayerNorm), (LeanGELU, nn.GELU)):
        assert [n for n, k in found.items() if k is kind] == [
            n for n, k in before.items() if k is plain and n in lean
        ]
    assert [n for n, k in found.items() if k is LeanAttention] == [
        f"blocks.{i}.attn.attend" for i in (0, 1)
    ]
    changed = basis.revert(model)
    assert sorted(changed) == sorted({*dense, *sus, *lean})
    assert kinds(model) == before
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert basis.revert(model) == []


def test_converting_again_takes_the_new_options_and_nests_nothing() -> None:
    model = gpt()
    basis.convert(model, basis.SUS(CausalAttention, c=3))
    basis.convert(model, basis.SUS(CausalAttention, c=5, mode="dense"))
    attend = model.blocks[0].attn.attend
    assert (attend.c, attend.mode, type(attend.attend)) == (5, "dense", CausalAttention)
    basis.convert(model, basis.Lean(gelu_bits=1, attention=SusAttention))
    lean = kinds(model)
    basis.convert(model, basis.Lean(gelu_bits=4, attention=SusAttention))
    assert kinds(model) == lean
    assert {m.bits for m in model.modules() if isinstance(m, LeanGELU)} == {4}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: basis.Lean(norm=1), "^norm=1: must be true or false"),
        (lambda: basis.Lean(gelu_bits=3), "^gelu_bits=3: must be one of 1, 2, 4"),
        (lambda: basis.Lean(gelu_bits="2"), "^gelu_bits='2': must be a whole number"),
        (lambda: basis.Lean(attention=CausalAttention(0.0)), "^attention=.*a class of modules"),
        (lambda: basis.SUS("CausalAttention"), "^attention='CausalAttention': must be a class"),
        (lambda: basis.SUS(()), r"^attention=\(\): must name at least one"),
        (lambda: basis.SUS(CausalAttention, c=0.0), "^c=0.0: must be positive"),
        (lambda: basis.SUS(CausalAttention, c=float("nan")), "^c=nan: must be positive"),
        (lambda: basis.SUS(CausalAttention, c="3"), "^c='3': must be a number"),
        (lambda: basis.SUS(CausalAttention, mode="thin"), "^mode='thin': must be one of dense"),
    ],
)
def test_a_wrong_option_is_named_when_it_is_given(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "include", "message"),
    [
        (basis.Lean(), ["head"], "include='head': matches no module to make lean; .*blocks"),
        (basis.SUS(nn.Tanh), ["*"], "matches no attention module of the type given; .*are none"),
        (basis.SUS(CausalAttention), "blocks.*", "include='blocks.*': give a list"),
    ],
)
def test_patterns_without_a_match_are_refused(method, include: list[str], message: str) -> None:
    model = gpt()
    before = kinds(model)
    with pytest.raises(ValueError, match=message):
        basis.convert(model, method, include=include)
    assert kinds(model) == before


def test_a_model_that_is_itself_such_a_module_is_refused() -> None:
    with pytest.raises(ValueError, match="the model is itself a module to make lean"):
        basis.convert(nn.GELU(), basis.Lean())
    with pytest.raises(ValueError, match=r"itself a LeanGELU; use its original\(\)"):
        basis.revert(LeanGELU())


def test_a_shared_module_has_one_stand_in() -> None:
    gelu = nn.GELU()
    model = nn.Sequential(gelu, nn.Linear(2, 2), gelu)
    assert basis.convert(model, basis.Lean()) == ["0", "2"]
    assert model[0] is model[2]
    assert basis.revert(model) == ["0", "2"]
    assert type(model[0]) is nn.GELU
    assert model[0] is model[2]
