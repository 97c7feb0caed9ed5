"""What every method must do: bytes as its docstring says, budgets, the loss head, low precision,
compile, configuration.
"""

import ast
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from composed import composed
from estimator_checks import data, estimate, key, relative
from torch import Tensor, nn

import basis
from basis import (
    BalancedSketch,
    CountSketch,
    Gaussian,
    LowRank,
    Quantized,
    RowSampling,
    linear_cross_entropy,
)
from basis.diagnostics.budget import fit_budget, kept_bytes
from basis.estimator import Estimator
from basis.estimators import ESTIMATORS
from basis.linear import SketchedLinear
from harness.compose import load

METHODS = [
    BalancedSketch(6, center=True),
    BalancedSketch(6, invariant_scalars=False, shrinkage=0.1, center=True),
    BalancedSketch(64, center=True),
    CountSketch(6),
    Gaussian(6),
    Gaussian(5, "rademacher"),
    CountSketch(64),
    Gaussian(64),
    Gaussian(64, "rademacher"),
    RowSampling(6, "uniform"),
    RowSampling(6, "crs"),
    RowSampling(6, "wta_crs"),
    RowSampling(6, "wta_crs", "systematic"),
    RowSampling(64),
    Quantized(4),
    Quantized(3, group=4, dither="none"),
    LowRank(2),
    LowRank(2, truncate=False),
    LowRank(2, core="exact"),
]
every_method = pytest.mark.parametrize("estimator", METHODS, ids=str)


@pytest.mark.parametrize("itemsize", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_kept_bytes_are_the_docstrings(itemsize: int) -> None:
    rows, width = 44, 20
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    expected: dict[Estimator, int] = {
        BalancedSketch(6, center=True): 7 * width * itemsize + 8,
        CountSketch(6): 6 * width * itemsize + 8,
        CountSketch(64): rows * width * itemsize + 8,
        Gaussian(6): 6 * width * itemsize + 8,
        Gaussian(64): rows * width * itemsize + 8,
        **{
            RowSampling(6, scheme): 6 * (width * itemsize + 8)
            for scheme in ("uniform", "crs", "wta_crs")
        },
        **{Quantized(b, group=10): rows * width * b // 8 + 4 * rows * 2 + 8 for b in (2, 4, 6, 8)},
        **{Quantized(b, group=8): 48 * width * b // 8 + 4 * rows * 3 + 8 for b in (1, 3, 5, 7)},
        LowRank(3): 3 * (rows + width) * itemsize,
        LowRank(3, truncate=False): 7 * (rows + width) * itemsize,
    }
    whole = rows * width * itemsize
    for estimator, size in expected.items():
        assert kept_bytes(estimator, rows, width, dtype) == min(size, whole), estimator
        kept = estimator.compress(torch.randn(rows, width, dtype=dtype), key(1), {})
        assert sum(t.untyped_storage().nbytes() for t in kept) == size, estimator


def test_four_bits_cost_four_and_a_quarter() -> None:
    assert 8 * kept_bytes(Quantized(4), 768, 512) / (768 * 512) < 4.2502


@pytest.mark.parametrize("width", [128, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "estimator",
    [
        BalancedSketch(1, center=True),
        CountSketch(1),
        Gaussian(1),
        RowSampling(1),
        LowRank(1),
        LowRank(1, truncate=False),
        Quantized(1),
    ],
    ids=str,
)
def test_a_budget_of_an_eighth(estimator: Estimator, width: int) -> None:
    rows = 768
    chosen = fit_budget(estimator, 1 / 8, rows, width)
    used = kept_bytes(chosen, rows, width) / (rows * width * 4 / 8)
    assert 0.9 < used <= 1
    if isinstance(estimator, Quantized):
        assert chosen == Quantized(3.6875), (
            "a sixteenth below 3.75, which with ranges and key is 8 bytes too much"
        )


@every_method
def test_the_fused_head_agrees_with_the_layer(estimator: Estimator) -> None:
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.bfloat16, 0.04)):
        layer = SketchedLinear(8, 37, bias=False, estimator=estimator, dtype=dtype)
        layer.set_noise_key(7)
        x = (3 * torch.randn(3, 4, 8, dtype=dtype)).requires_grad_()
        targets = torch.randint(37, (3, 4))
        fused = linear_cross_entropy(layer, x, targets)
        plain = F.cross_entropy(
            layer(x).flatten(0, -2).to(torch.promote_types(dtype, torch.float32)), targets.flatten()
        )
        got, expected = (torch.autograd.grad(loss, layer.weight)[0] for loss in (fused, plain))
        assert got.dtype == dtype
        assert relative(got, expected) < tolerance


@every_method
def test_low_precision_is_near_and_float32_nearer(estimator: Estimator) -> None:
    x, dy = data(40, 16)
    x, dy = x.bfloat16().double(), dy.bfloat16().double()  # the same numbers in all
    expected = estimate(estimator, x, dy, key(3))
    assert expected.isfinite().all()
    tight = not isinstance(
        estimator, LowRank
    )  # least squares with a few more equations than unknowns
    assert relative(estimate(estimator, x.float(), dy.float(), key(3)), expected) < (
        2e-6 if tight else 1e-4
    )
    if (
        not isinstance(estimator, RowSampling) or estimator.scheme == "uniform"
    ):  # else norms may decide for another row
        assert relative(estimate(estimator, x.bfloat16(), dy.bfloat16(), key(3)), expected) < (
            0.02 if tight else 0.1
        )


@every_method
def test_zeros_give_zeros_and_one_row_is_enough(estimator: Estimator) -> None:
    x, dy = data(40, 16)
    assert torch.equal(estimate(estimator, 0 * x, dy, key(1)), torch.zeros(4, 16).double())
    assert torch.equal(estimate(estimator, x, 0 * dy, key(1)), torch.zeros(4, 16).double())
    got = estimate(estimator, x[:1], dy[:1], key(1))
    assert got.shape == (4, 16)
    assert got.isfinite().all()


@every_method
def test_the_key_alone_decides(estimator: Estimator) -> None:
    x, dy = data(40, 16)
    first, again, other = (estimate(estimator, x, dy, key(k)) for k in (1, 1, 2))
    assert torch.equal(first, again)
    without_noise = not estimator.uses_noise or getattr(estimator, estimator.knob) == 64
    assert torch.allclose(first, other) == without_noise


@every_method
def test_autocast_through_the_layer(estimator: Estimator) -> None:
    torch.manual_seed(0)
    layer = SketchedLinear(16, 8, estimator=estimator)
    layer.set_noise_key(3)
    x = torch.randn(40, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(x).float().square().sum()
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "exact"])
def test_configuration_and_class_agree(name: str) -> None:
    values = composed(f"method={name}")
    method = load(values).method
    kind = ESTIMATORS[name]
    # Or an option is hidden from the command line.
    assert {field.name for field in fields(kind)} <= set(values.method)
    assert type(method.estimator) is kind
    with pytest.raises(ValueError, match=rf"method\.{kind.knob}=0(\.0)?: must be"):
        load(composed(f"method={name}", f"method.{kind.knob}=0"))


@pytest.mark.parametrize(
    ("make", "start"),
    [
        (lambda: Gaussian(1, "dct"), "distribution='dct'"),
        (lambda: RowSampling(1, "top"), "scheme='top'"),
        (lambda: RowSampling(1, draws="few"), "draws='few'"),
        (lambda: Quantized(9), "bits=9"),
        (lambda: Quantized(4, group=0), "group=0"),
        (lambda: Quantized(dither="all"), "dither='all'"),
        (lambda: LowRank(1, core="none"), "core='none'"),
    ],
)
def test_wrong_options_are_named(make, start: str) -> None:
    """Of ranges; wrong types: test_checks.py; the knob: test_configuration_and_class_agree."""
    with pytest.raises(ValueError, match=f"^{start}: must be"):
        make()


def gradient(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    return torch.autograd.grad(layer(x).sin().sum(), weight)[0]


@pytest.mark.parametrize(
    "estimator",
    [
        BalancedSketch(4, center=True),
        *(
            pytest.param(estimator, marks=pytest.mark.slow)
            for estimator in (CountSketch(4), Gaussian(4), RowSampling(4))
        ),
        Quantized(3),
        LowRank(2),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_without_a_break_and_equal(estimator: Estimator, backend: str) -> None:
    """aot_eager: the graph, its keys and its numbers. Inductor: the code that it makes of it."""
    torch.manual_seed(0)
    layer = SketchedLinear(10, 6, estimator=estimator)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(20, 10)
    for noise in (1, 2):  # a key must not be baked in
        layer.set_noise_key(noise)
        expected = gradient(layer, x, layer.weight)
        torch.testing.assert_close(
            gradient(compiled, x, layer.weight), expected, rtol=2e-4, atol=2e-4
        )


ESTIMATOR_FILES = sorted(Path(basis.estimators.__file__).parent.glob("[a-z]*.py"))
MODULES = {path.stem for path in Path(basis.__file__).parent.glob("[a-z]*.py")}


def estimators_imported(source: str, file: str = "basis/estimators/some.py") -> list[str]:
    """What a file in basis/estimators imports that is an estimator, or a package that hands them
    out: `basis` itself too.
    """
    found = []
    for node in ast.walk(ast.parse(source, file)):
        if isinstance(node, ast.Import):
            found += [
                name.name
                for name in node.names
                if name.name == "basis" or name.name.startswith("basis.estimators")
            ]
        elif isinstance(node, ast.ImportFrom):
            parents = ["basis", "estimators"][: 3 - node.level] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            if module.startswith("basis.estimators"):
                found += [f"{module}.{name.name}" for name in node.names]
            elif module == "basis":  # its modules may be had from it, and nothing else
                found += [f"basis.{name.name}" for name in node.names if name.name not in MODULES]
    return found


@pytest.mark.parametrize("path", ESTIMATOR_FILES, ids=lambda path: path.stem)
def test_no_estimator_imports_another(path: Path) -> None:
    assert estimators_imported(path.read_text(), str(path)) == []
