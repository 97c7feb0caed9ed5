"""Experts of a mixture: a sketch per segment, exact outputs and input gradients."""

import copy
from collections import Counter

import pytest
import torch
from lookalike_blocks import kept_by
from lookalikes import Experts, Mixture
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import basis
from basis.convert import left_alone
from basis.diagnostics.adaptive_rank import set_rank
from basis.layers.experts import ExpertProduct, SketchedExperts
from basis.layers.routed import sum_of_experts
from basis.linear import SketchedLinear

SKETCH = basis.BalancedSketch(8, invariant_scalars=False)
KINDS = {
    "gated": {},
    "not gated": {"gate": False},
    "with bias": {"bias": True},
    "transposed": {"transposed": True, "bias": True},
}


def mixture(**options: bool) -> Mixture:
    torch.manual_seed(0)
    return Mixture(**options)


def rows(count: int = 64) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_that_keeps_all_gives_the_plain_gradients(kind: str) -> None:
    plain = gradients(mixture(**KINDS[kind]), rows())
    for method in (basis.Exact(), basis.BalancedSketch(64, invariant_scalars=False)):
        model = mixture(**KINDS[kind])
        assert basis.convert(model, method) == ["router", "experts"]
        torch.testing.assert_close(gradients(model, rows()), plain)


@pytest.mark.parametrize("kind", ["gated", "transposed"])
def test_each_experts_gradient_is_unbiased_and_all_else_exact(kind: str) -> None:
    y, dx, exact = gradients(mixture(**KINDS[kind]), rows())
    model = mixture(**KINDS[kind])
    basis.convert(model, SKETCH, include=["experts"])
    draws: dict[str, list[Tensor]] = {"experts.gate_up_proj": [], "experts.down_proj": []}
    for step in range(200):
        basis.set_noise_key(model, seed=0, step=step)
        found_y, found_dx, found = gradients(model, rows())
        torch.testing.assert_close((found_y, found_dx), (y, dx))
        for name, grad in found.items():
            if name in draws:
                draws[name].append(grad)
            else:
                torch.testing.assert_close(grad, exact[name])
    for name, grads in draws.items():
        stack = torch.stack(grads)
        z = (stack.mean(0) - exact[name]) / (stack.std(0) / len(grads) ** 0.5)
        for expert in z:
            assert expert.square().mean() < 2.2  # its entries go together
            assert expert.abs().max() < 5


def test_lean_experts_keep_few_bits_and_routing_weights_have_an_unbiased_gradient() -> None:
    """The gradient of the router's weight, on average over draws; the output is exact."""
    y, _, exact = gradients(mixture(), rows(256))
    model = mixture()
    basis.convert(model, basis.Exact(), include=["experts"])
    before = kept_by(model, rows(256), trained_before=False)
    basis.convert(model, basis.Lean())
    after = kept_by(model, rows(256), trained_before=False)
    spared = 512 * 8 * 4 - (512 * 8 // 2 + 512 * 4 + 8)  # y: codes, a range a row, the key
    assert before - after == spared - 512 * 12 // 4  # SiLU's 2 bits; `up` holds what it kept
    draws = []
    for seed in range(100):
        torch.manual_seed(seed)
        found_y, _, found = gradients(model, rows(256))
        assert torch.equal(found_y, y) or torch.allclose(found_y, y, rtol=1e-6)
        draws.append(found["router.weight"].clone())
    stack, wanted = torch.stack(draws), exact["router.weight"]
    z = (stack.mean(0) - wanted) / (stack.std(0) / len(draws) ** 0.5)
    assert 0.3 < z.square().mean() < 2.2
    assert 0 < (stack[0] - wanted).norm() < 0.1 * wanted.norm()


def test_rows_of_experts_are_kept_once_for_the_routing_weights() -> None:
    """y, the weights and the order: PyTorch keeps the product of the first two as well."""
    y = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    weights = torch.rand(3, 2, dtype=torch.float64).requires_grad_()
    order = torch.tensor([4, 1, 0, 5, 2, 3])
    assert torch.autograd.gradcheck(
        lambda y, w: sum_of_experts(y, w, order, torch.float64), (y, weights)
    )
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sum_of_experts(y, weights, order, torch.float64)
    assert [id(one) for one in kept] == [id(weights), id(order), id(y)]


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_experts_keep_a_token_once_and_all_else_is_exact(kind: str) -> None:
    """One of the tokens goes to no expert, and one expert has no tokens."""
    plain, model = (mixture(**KINDS[kind]).experts for _ in range(2))
    model = nn.ModuleDict({"experts": model})
    basis.convert(model, basis.Quantized(bits=2.5))
    chosen = torch.randint(3, (64, 2), generator=torch.Generator().manual_seed(2))
    chosen[5] = 4  # there are experts 0 to 3, and no tokens for 3
    found, draws = [], []
    for step in range(101):
        basis.set_noise_key(model, seed=0, step=step)
        experts = model["experts"] if step else plain
        x, weights = rows().requires_grad_(), torch.linspace(0.1, 0.9, 128).view(64, 2)
        weights.requires_grad_()
        experts.zero_grad()
        y = experts(x, chosen, weights)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in experts.named_parameters()}
        matrix = [name for name in grads if name.endswith("proj")]
        biases = [grads[name] for name in grads if name not in matrix]
        found.append([y.detach(), x.grad, weights.grad, *biases])
        draws.append([grads[name] for name in matrix])
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])
    for exact, *some in zip(*draws, strict=True):
        once, of_mean = ((g - exact).norm() for g in (some[0], torch.stack(some).mean(0)))
        assert 0.05 * exact.norm() < once < exact.norm()
        assert of_mean < 1.5 * once / 10
        assert not some[0][3].any()


def test_bits_of_quantized_experts_are_counted_by_hand() -> None:
    kept = [
        kept_by(model, rows(), trained_before=False)
        for method in (basis.Exact(), basis.Quantized(bits=4))
        for model in [mixture(gate=False)]
        if basis.convert(model, method, include=["experts"])
    ]
    code = [64 * 8 // 2 + 64 * 4, 128 * 12 // 2 + 128 * 4]  # of tokens, of what goes to `down`
    index = 128 * 8 + 4 * 8 + 2 * 8  # each row's token, the ends, two keys
    assert kept[0] - kept[1] == 4 * (128 * 8 + 128 * 12) - sum(code) - index


def test_noise_differs_between_experts_and_follows_the_key() -> None:
    """Two experts with the same rows and weights get different estimates."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Experts(2, gate=False)})
    with torch.no_grad():
        for p in model.parameters():
            p[1] = p[0]
    basis.convert(model, SKETCH)
    chosen, weights = torch.tensor([[0, 1]]).expand(64, 2), torch.ones(64, 2)

    def grad(step: int) -> Tensor:
        model.zero_grad()
        basis.set_noise_key(model, seed=0, step=step)
        model["experts"](rows(), chosen, weights).square().sum().backward()
        return model["experts"].up_proj.grad.clone()

    first = grad(0)
    assert not torch.allclose(first[0], first[1])
    assert torch.equal(first, grad(0))
    assert not torch.allclose(first, grad(1))


def test_experts_without_tokens_get_zero_and_what_goes_to_none_is_left_out() -> None:
    plain, model = (copy.deepcopy(mixture().experts) for _ in range(2))
    model = nn.ModuleDict({"experts": model})
    basis.convert(model, basis.Exact())
    chosen = torch.tensor([[0, 4], [2, 0], [4, 4]])  # there is no expert 4
    x, weights = rows(3), torch.rand(3, 2)
    found = []
    for experts in (plain, model["experts"]):
        y = experts(x, chosen, weights)
        y.square().sum().backward()
        found.append((y, experts.gate_up_proj.grad))
    torch.testing.assert_close(found[1], found[0])
    assert found[1][1][1].abs().max() == 0


def test_a_rank_counts_rows_of_the_layer_and_few_rows_are_kept_whole() -> None:
    """Rank 16 of 64 tokens: a quarter of each segment; 8 rows at least, or all there are."""
    model = nn.ModuleDict({"experts": mixture(gate=False).experts})
    basis.convert(model, basis.BalancedSketch(16))
    chosen = torch.tensor([0] * 40 + [1] * 20 + [2] * 4)[:, None]
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model["experts"](rows(), chosen, torch.ones(64, 1))
    # Of the first product's input: weights (12, 8), sketches (R, 8); of the second's, transposed.
    # Besides: what SiLU keeps, (64, 12). Routing weights without a gradient keep no rows.
    matrices = Counter(shape for shape in kept if len(shape) == 2 and 0 not in shape)
    first = {(12, 8): 3, (10, 8): 1, (8, 8): 1, (4, 8): 1}
    second = {(8, 12): 3 + 1, (10, 12): 1, (4, 12): 1, (64, 12): 1}
    assert matrices == Counter({**first, **second, (64, 1): 1})


def test_it_is_found_named_and_put_back_with_all_that_hangs_on_it() -> None:
    model = mixture()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    model.experts.register_buffer("mask", torch.ones(2))
    keys.append("experts.mask")
    assert basis.convert(model, SKETCH) == ["router", "experts"]
    layers = dict(basis.sketched_layers(model))
    assert list(layers) == ["router", "experts.gate_up_sketch", "experts.down_sketch"]
    assert layers["experts.down_sketch"].weight is model.experts.down_proj
    assert isinstance(model.experts, SketchedExperts)
    assert isinstance(model.experts, Experts)
    assert sorted(model.state_dict()) == sorted(keys)
    assert left_alone(model, SKETCH) == []
    assert type(copy.deepcopy(model).experts) is type(model.experts)
    copied = copy.deepcopy(model)
    assert copied.experts.down_sketch.weight is copied.experts.down_proj
    basis.convert(model, basis.BalancedSketch(2), include=["experts"])
    assert model.experts.down_sketch.estimator.rank == 2
    basis.convert(model, basis.BalancedSketch(3), include=["experts.down_sketch", "router"])
    assert model.experts.down_sketch.estimator.rank == 3
    assert basis.revert(model) == ["router", "experts"]
    assert type(model.experts) is Experts
    assert set(vars(model.experts)) == set(vars(mixture().experts))
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_a_function_chooses_for_each_product_from_an_experts_size() -> None:
    seen = {}

    def choose(name: str, layer: nn.Linear) -> basis.BalancedSketch:
        seen[name] = (layer.in_features, layer.out_features)
        return basis.BalancedSketch(2 if "down" in name else 4)

    model = mixture(transposed=True, bias=True)
    basis.convert(model, choose, include=["experts"])
    assert seen == {"experts.gate_up_proj": (8, 24), "experts.down_proj": (12, 8)}
    assert model.experts.gate_up_sketch.estimator.rank == 4
    assert model.experts.down_sketch.estimator.rank == 2


def test_what_is_learned_is_learned_from_all_segments_saved_and_loaded() -> None:
    model = mixture()
    plain = copy.deepcopy(model.state_dict())
    basis.convert(model, basis.Transform(bits=2.0, every=1), include=["experts"])
    basis.set_noise_key(model, seed=0, step=0)
    gradients(model, rows())
    state = model.state_dict()
    assert {key.rpartition(".")[0] for key in state.keys() - plain.keys()} == {
        "experts.gate_up_sketch",
        "experts.down_sketch",
    }
    assert model.experts.down_sketch.state["looks"] == 1
    other = mixture()
    basis.convert(other, basis.Transform(bits=2.0, every=1), include=["experts"])
    other.load_state_dict(state)
    torch.testing.assert_close(other.state_dict(), state)
    model.load_state_dict(plain)


def test_the_quality_of_a_product_is_that_of_its_experts_weights_as_one_vector() -> None:
    *_, exact = gradients(mixture(), rows())
    model = mixture()
    basis.convert(model, SKETCH, include=["experts"])
    basis.set_noise_key(model, seed=0, step=0)
    *_, found = gradients(model, rows())
    quality = basis.gradient_quality(model, lambda: model(rows()).square().sum(), masks=2)
    assert list(quality) == ["experts.gate_up_sketch", "experts.down_sketch", "all"]
    for name, parameter in (("gate_up_sketch", "gate_up_proj"), ("down_sketch", "down_proj")):
        t, estimate = exact[f"experts.{parameter}"], found[f"experts.{parameter}"]
        seen = quality[f"experts.{name}"]
        error = float((estimate - t).norm() / t.norm())
        assert 0.1 < seen.relative_error == pytest.approx(error, rel=1e-5)
        assert seen.norm_ratio == pytest.approx(float(estimate.norm() / t.norm()), rel=1e-5)
        assert seen.variance is not None
    assert model.experts.down_sketch.estimator == SKETCH
    with pytest.raises(ValueError, match=r"experts\.gate_up_sketch is used twice"):
        basis.gradient_quality(model, lambda: model(model(rows())).square().sum())


def test_another_rank_is_that_of_both_products() -> None:
    model = mixture()
    basis.convert(model, basis.Subspace(2), include=["experts"], exact_if_kept=False)
    basis.set_noise_key(model, seed=0, step=0)
    gradients(model, rows())
    set_rank(model, 3, step=7)
    for sketch in (model.experts.gate_up_sketch, model.experts.down_sketch):
        assert sketch.estimator == basis.Subspace(3)
        assert (sketch.first_step, sketch.exact_if_kept, sketch.noise_key) == (7, False, None)
        assert sketch.state["looks"] == 0
        assert sketch.state["directions"].shape[1] == 3


def test_frozen_experts_and_those_spread_over_processes_are_left_with_the_reason() -> None:
    model = mixture()
    model.experts.requires_grad_(False)
    basis.convert(model, SKETCH)
    assert [entry.why for entry in left_alone(model, SKETCH)] == [
        "frozen, so it keeps nothing of its input"
    ]
    model = mixture()
    model.experts._is_expert_parallel = True
    with pytest.warns(UserWarning, match="Experts: its experts are spread over several processes"):
        basis.convert(model, SKETCH)
    assert type(model.router) is SketchedLinear
    with pytest.raises(ValueError, match=r"include='experts'.*EMASketch pairs the rows"):
        basis.convert(mixture(), basis.EMASketch(rank=2, rows=64), include=["experts"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_in_a_checkpoint_it_draws_the_same_noise(reentrant: bool) -> None:
    found = []
    for recompute in (False, True):
        model = mixture()
        basis.convert(model, SKETCH)
        torch.manual_seed(3)
        x = rows().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        y.square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


def test_under_autocast_and_without_gradients() -> None:
    model = mixture()
    basis.convert(model, SKETCH)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(rows())
    y.sum().backward()
    assert model.experts.gate_up_proj.grad.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(model(rows()), mixture()(rows()))
    assert isinstance(model.experts.down_sketch, ExpertProduct)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gated", "with bias"])
def test_quantized_experts_are_part_of_a_graph(kind: str) -> None:
    model, found = mixture(**KINDS[kind]), []
    basis.convert(model, basis.Quantized(bits=4))
    basis.convert(model, basis.Lean())
    torch._dynamo.reset()
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        basis.set_noise_key(model, seed=0, step=1)
        model.zero_grad()
        call(rows()).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_it_is_what_it_is_in_eager_mode_whatever_the_sizes_of_segments() -> None:
    model = mixture()
    basis.convert(model, SKETCH)
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(3):
        x, found = torch.randn(64, 8), []
        for call in (model, compiled):
            basis.set_noise_key(model, seed=0, step=step)
            model.zero_grad()
            call(x).square().sum().backward()
            found.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(*found)
