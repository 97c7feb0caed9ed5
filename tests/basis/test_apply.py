"""One line for a model, and a report whose bytes are those that autograd saves."""

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import basis
from basis.apply import parse_budget
from basis.diagnostics.budget import kept_bytes
from basis.diagnostics.kept import CATEGORIES, kept_by_category, tokens_of
from basis.diagnostics.report import Change, Report
from basis.linear import SketchedLinear

WIDTH, HIDDEN, ROWS = 128, 256, 48


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.out(self.act(self.fc(x))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, -2), tokens.flatten())


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(50, (3, ROWS // 3), generator=torch.Generator().manual_seed(0))


def saved(model: nn.Module, tokens: Tensor) -> int:
    """Bytes of the storages that autograd saves, by its own graph and not by hooks."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), tokens)}
    storages: dict[int, int] = {}
    nodes, seen = [model(tokens).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names = [name for name in dir(node) if name.startswith("_saved_")]
        values = [getattr(node, name) for name in names] + list(getattr(node, "saved_tensors", ()))
        for t in values:
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in own:
                storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        nodes += [following for following, _ in node.next_functions]
    return sum(storages.values())


def test_the_bytes_are_those_of_the_graph(model: Model, tokens: Tensor) -> None:
    plain = copy.deepcopy(model)
    report = basis.apply(model, "8x", sample=tokens)
    assert report.before == saved(plain, tokens)
    assert report.after == saved(model, tokens)
    assert report.tokens == tokens_of(tokens) == ROWS
    assert set(report.kept) <= set(CATEGORIES)


def test_categories_are_as_counted_by_hand(model: Model, tokens: Tensor) -> None:
    kept, rows = kept_by_category(model, tokens)
    numbers = {
        "inputs of dense layers": 2 * (WIDTH + HIDDEN) + WIDTH,
        "norms": 2 * (WIDTH + 2),  # the input, its mean and deviation
        "activations": 2 * HIDDEN,
        "logits and loss": 50 + 1 / ROWS,  # and the number of targets
    }
    assert kept == {name: 4 * ROWS * count for name, count in numbers.items()}
    assert set(rows.values()) == {ROWS}
    assert len(rows) == 5


def test_a_budget_is_of_each_input_in_the_precision_of_its_weight(
    model: Model, tokens: Tensor
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        low = copy.deepcopy(model).to(dtype)
        report = basis.apply(low, "8x", sample=tokens)
        for _, layer in basis.sketched_layers(low):
            assert isinstance(layer.estimator, basis.Quantized)
            more = basis.Quantized(layer.estimator.bits + 1 / 16)
            sizes = [kept_bytes(e, 1024, layer.in_features, dtype) for e in (layer.estimator, more)]
            assert sizes[0] <= 1024 * layer.in_features * dtype.itemsize / 8 < sizes[1]
        before, after = report.kept["inputs of dense layers"]
        assert 7.9 <= before / after < 8.8
        before, after = report.by_shapes
        assert 7.9 <= before / after < 8.6


def test_rows_come_from_the_sample_or_are_asked_for(model: Model, tokens: Tensor) -> None:
    sketch = basis.BalancedSketch(1)
    with pytest.raises(ValueError, match=r"rows=None: .*BalancedSketch.*give rows="):
        basis.apply(model, "8x", method=sketch)
    assert not list(basis.sketched_layers(model))
    for options in ({"sample": tokens}, {"rows": ROWS}):
        basis.apply(model, 1 / 8, method=sketch, **cast(dict[str, Any], options))
        for _, layer in basis.sketched_layers(model):
            whole = ROWS * layer.in_features * 4
            assert kept_bytes(layer.estimator, ROWS, layer.in_features) <= whole / 8
            assert layer.estimator == basis.BalancedSketch(5)


def test_a_layer_of_few_rows_does_not_end_it() -> None:
    """As a classifier on one row for each sequence."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.gelu(self.body(torch.sin(x))).mean(1)).sum()

    x = torch.randn(3, 16, WIDTH)
    for method in (basis.Quantized(), basis.BalancedSketch(1)):
        model = Classifier()
        report = basis.apply(model, "8x", method=method, sample=x)
        assert len(report.changed) == 2
        layers = dict(basis.sketched_layers(model))
        assert kept_bytes(layers["body"].estimator, ROWS, WIDTH) <= ROWS * WIDTH * 4 / 8
        if method.knob == "rank":
            assert layers["last"].estimator == basis.BalancedSketch(1)
    with pytest.raises(ValueError, match=r"budget="):
        basis.apply(Classifier(), "80x", method=basis.BalancedSketch(1), sample=x)


def test_an_estimator_or_a_function_as_for_convert(model: Model) -> None:
    basis.apply(model, basis.BalancedSketch(3))
    assert all(la.estimator == basis.BalancedSketch(3) for _, la in basis.sketched_layers(model))
    report = basis.apply(model, lambda name, _: basis.Quantized(8 if "fc" in name else 2))
    assert {c.name: c.now[:15] for c in report.changed}["blocks.0.mlp.fc"] == "Quantized(bits="


def test_lean_too_and_all_is_undone(model: Model, tokens: Tensor) -> None:
    plain = copy.deepcopy(model)
    report = basis.apply(model, "8x", sample=tokens, lean=True, exclude=["head"])
    assert torch.equal(model(tokens), plain(tokens))
    assert {c.was for c in report.changed} == {"Linear", "LayerNorm", "GELU"}
    assert [one.name for one in report.left] == ["embed", "head"]
    assert "exclude" in report.left[1].why
    assert report.kept["activations"][1] * 15 < report.kept["activations"][0]
    assert 0.9 < report.touched < 1
    assert report.before / report.after > 4
    basis.revert(model)
    assert saved(model, tokens) == saved(plain, tokens)
    assert str(model) == str(plain)


def test_the_table(model: Model, tokens: Tensor) -> None:
    text = str(basis.apply(model, "8x", sample=tokens, lean=True))
    assert "blocks.*.mlp.{fc,out} (4): Linear -> Quantized(bits=3.6875" in text
    assert "embed: Embedding:" in text
    assert f"measured on {ROWS} tokens" in text
    before = 2 * (WIDTH + HIDDEN) * 4 + WIDTH * 4
    assert f"inputs of dense layers  {before:>12,.0f} ->" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "by their shapes" in str(basis.apply(Model(), "8x"))


def test_layers_that_differ_in_one_part_of_their_names_share_a_line() -> None:
    names = [f"h.{i}.{part}" for i in range(3) for part in ("a.q", "a.k", "b.q", "c", "d")]
    report = Report([Change(name, "Linear", "x") for name in names], [], {}, None, (0, 0))
    assert str(report).splitlines()[1:4] == [
        "  h.*.a.{q,k} (6): Linear -> x",
        "  h.*.b.q (3): Linear -> x",
        "  h.*.{c,d} (6): Linear -> x",
    ]


def test_measuring_leaves_the_model_and_the_noise_as_they_were(
    model: Model, tokens: Tensor
) -> None:
    model.train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    basis.apply(model, basis.Transform(bits=2.0), sample=tokens)
    assert torch.equal(torch.get_rng_state(), before)
    fresh = Model()
    basis.convert(fresh, basis.Transform(bits=2.0))
    for (_, a), (_, b) in zip(
        basis.sketched_layers(model), basis.sketched_layers(fresh), strict=True
    ):
        for name, tensor in a.state.items():
            assert torch.equal(tensor, b.state[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: basis.apply(nn.LayerNorm(3), "8x"), "no dense layer"),
        (lambda m: basis.apply(nn.Sequential(nn.Linear(128, 128)), "8x", lean=True), "lean=True"),
        (lambda m: basis.apply(m, "8x", include=["blocks.9.*"]), r"include='blocks.9.\*'"),
        (lambda m: basis.apply(m, "8x", head=True), "head"),
        (lambda m: basis.apply(m, "eight"), "what='eight'"),
        (lambda m: basis.apply(m, "0.5x"), "what='0.5x'"),
        (lambda m: basis.apply(m, 2.0), "what='2.0'"),
        (lambda m: basis.apply(m, "900x"), "budget=0.00111"),
        (lambda m: basis.apply(m, basis.Exact(), method=basis.Quantized()), "method="),
        (lambda m: basis.apply(m, "8x", sample={}), "sample"),
        (lambda m: basis.apply(m.requires_grad_(False), "8x"), "frozen"),
    ],
)
def test_refused_with_the_model_as_it_was(
    call: Callable[[Model], object], message: str, model: Model
) -> None:
    before = str(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert str(model) == before
    assert not any(isinstance(module, SketchedLinear) for module in model.modules())


def test_wrong_kinds_of_arguments(model: Model) -> None:
    with pytest.raises(TypeError, match="lean must be"):
        basis.apply(model, "8x", lean=cast(Any, "yes"))
    with pytest.raises(TypeError, match="method must be"):
        basis.apply(model, cast(Any, nn.Linear))


def test_budgets_as_text() -> None:
    assert parse_budget("8x") == parse_budget("1/8") == parse_budget("0.125") == 1 / 8
    assert parse_budget(" 1x ") == 1


def test_what_keeps_no_less_is_said(model: Model, tokens: Tensor) -> None:
    for options in ({"sample": tokens}, {"rows": ROWS}):
        with pytest.warns(UserWarning, match=r"keeps no less than before: ([\d,]+) -> \1 bytes"):
            basis.apply(model, basis.BalancedSketch(ROWS), **cast(dict[str, Any], options))
        basis.revert(model)


class Own(nn.Linear):
    """A class of somebody's, whose forward may be anything."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def test_unsupported_layers_are_refused_or_said() -> None:
    with pytest.raises(ValueError, match=r"matches no dense layer.*Own: a subclass of nn.Linear"):
        basis.apply(nn.Sequential(Own(WIDTH, WIDTH), nn.Conv1d(3, 3, 3)), "8x")
    part = nn.Sequential(Own(WIDTH, WIDTH), nn.Linear(WIDTH, 8))
    with pytest.warns(UserWarning, match=r"subclass of nn.Linear"):
        report = basis.apply(part, "8x")
    assert [(one.name, one.kind) for one in report.left] == [("0", "Own")]
