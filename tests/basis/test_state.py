"""Methods that learn between steps: where their state lives, when it changes, and what leaves it
alone.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import basis
from basis.convert import not_learning
from basis.estimator import Estimator, State
from basis.linear import SketchedLinear
from basis.sketched import sketched_linear
from models import GPT, GPTConfig


@dataclass(frozen=True)
class RunningMean(Estimator):
    """X as the mean row that was learned, in every row: poor, with an answer that is known."""

    every: int = 1

    def initial_state(self, width: int, device: torch.device) -> dict[str, Tensor]:
        return {"mean": torch.zeros(width, device=device), "looks": torch.zeros((), device=device)}

    def learns_at(self, step: int) -> bool:
        return step % self.every == 0

    def learn(self, state: State, x: Tensor, key: Tensor) -> State:
        looks = state["looks"] + 1
        return {"mean": state["mean"] + (x.float().mean(0) - state["mean"]) / looks, "looks": looks}

    def compress(self, x: Tensor, key: Tensor, state: State) -> tuple[Tensor, ...]:
        return (state["mean"],)

    def weight_grad(self, kept: tuple[Tensor, ...], grad_y: Tensor) -> Tensor:
        return torch.outer(grad_y.sum(0), kept[0].to(grad_y.dtype))


def batch(seed: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def layer(every: int = 1) -> SketchedLinear:
    torch.manual_seed(0)
    return SketchedLinear.from_linear(nn.Linear(4, 3), RunningMean(every))


def test_a_layer_learns_in_every_training_forward_before_it_compresses() -> None:
    made = layer()
    inputs = [batch(0), batch(1)]
    for x in inputs:
        made.weight.grad = None
        made(x).sum().backward()
    mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
    torch.testing.assert_close(made.state["mean"], mean)
    torch.testing.assert_close(made.weight.grad, 6 * mean.expand(3, 4))
    assert made.estimator_mean is made.state["mean"]


def test_what_does_not_train_teaches_nothing() -> None:
    made = layer()
    with torch.no_grad():
        made(batch(0))
        made.eval()(batch(0))
    made.train().weight.requires_grad_(False)
    made(batch(0))
    assert made.state["looks"] == 0


def test_state_is_saved_loaded_and_left_behind_by_revert() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    basis.convert(model, RunningMean())
    model(batch(0)).sum().backward()
    assert set(model.state_dict()) == {
        "0.weight",
        "0.bias",
        "0.estimator_mean",
        "0.estimator_looks",
    }
    again = nn.Sequential(nn.Linear(4, 3))
    basis.convert(again, RunningMean())
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again[0].state, model[0].state)
    assert again[0].state["looks"] == 1
    basis.revert(model)
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


def test_the_step_decides_when_to_learn_and_only_its_first_micro_batch_does() -> None:
    model = nn.Sequential(layer(every=3))
    looks = []
    for step in range(5):
        for micro_batch in range(2):
            basis.set_noise_key(model, seed=0, step=step, micro_batch=micro_batch)
            model(batch(step)).sum().backward()
        looks.append(int(model[0].state["looks"]))
    assert looks == [1, 1, 1, 2, 2]


def test_a_recomputed_forward_learns_once() -> None:
    model = nn.Sequential(layer())
    basis.set_noise_key(model, seed=0, step=0)
    checkpoint(model, batch(0).requires_grad_(), use_reentrant=False).sum().backward()
    assert model[0].state["looks"] == 1


def test_not_learning_leaves_the_state_and_what_comes_next() -> None:
    model = nn.Sequential(layer())
    with not_learning(model):
        basis.set_noise_key(model, seed=0, step=0)
        model(batch(0)).sum().backward()
    assert model[0].state["looks"] == 0
    basis.gradient_quality(model, lambda: model(batch(0)).sum())
    assert model[0].state["looks"] == 0
    model(batch(0)).sum().backward()
    assert model[0].state["looks"] == 1


def test_the_quality_panel_sees_the_estimate_that_the_layer_would_make() -> None:
    model = nn.Sequential(layer())
    model(batch(0)).sum().backward()
    exact = batch(1).sum(0).expand(3, 4)
    estimate = 6 * torch.stack([batch(0), batch(1)]).mean((0, 1)).expand(
        3, 4
    )  # after a look at the second batch too
    quality = basis.gradient_quality(model, lambda: model(batch(1)).sum())["0"]
    assert quality.relative_error == pytest.approx(
        float((estimate - exact).norm() / exact.norm()), rel=1e-5
    )
    assert model[0].state["looks"] == 1  # and that look is forgotten
    torch.testing.assert_close(model[0].state["mean"], batch(0).mean(0))


def test_without_a_layer_it_learns_from_the_input_itself() -> None:
    weight, x = torch.zeros(3, 4, requires_grad=True), batch(2)
    sketched_linear(
        x, weight, None, torch.zeros((), dtype=torch.int64), RunningMean()
    ).sum().backward()
    torch.testing.assert_close(weight.grad, 6 * x.mean(0).expand(3, 4))


def test_a_fused_head_learns_too() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4))
    basis.convert(model, RunningMean(), include=["head"])
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    model(tokens, tokens).backward()
    assert model.head.state["looks"] == 1
    # dY has rows that sum to zero over the vocabulary: so has the estimate, whatever was learned.
    torch.testing.assert_close(model.head.weight.grad.sum(0), torch.zeros(4))
    assert model.head.weight.grad.abs().sum() > 0


def test_training_in_eval_is_training() -> None:
    made, as_trained = layer().eval(), layer()
    for seed in (0, 1):
        for one in (made, as_trained):
            one.weight.grad = None
            one(batch(seed)).sum().backward()
    torch.testing.assert_close(made.state, as_trained.state, rtol=0, atol=0)
    torch.testing.assert_close(made.weight.grad, as_trained.weight.grad, rtol=0, atol=0)
    assert made.state["looks"] == 2


def test_each_of_two_forwards_has_what_the_layer_knew_when_it_ran() -> None:
    """Both run before the one backward: the second one must not change what the first one kept."""
    made = layer()
    (made(batch(0)).sum() + 10 * made(batch(1)).sum()).backward()
    first = batch(0).mean(0)
    both = torch.stack([batch(0), batch(1)]).mean((0, 1))
    torch.testing.assert_close(made.weight.grad, (6 * first + 60 * both).expand(3, 4))
    assert made.state["looks"] == 2


def test_a_functional_gradient_is_that_of_backward_and_teaches_as_much() -> None:
    made, by_backward = layer(), layer()
    for seed in (0, 1):
        inputs = (batch(seed),)
        gradient = torch.func.grad(
            lambda p, x=inputs: torch.func.functional_call(made, p, x).sum()
        )(dict(made.named_parameters()))
        by_backward.weight.grad = None
        by_backward(batch(seed)).sum().backward()
        torch.testing.assert_close(gradient["weight"], by_backward.weight.grad)
    torch.testing.assert_close(made.state, by_backward.state)
    assert all(type(tensor) is Tensor for tensor in copy.deepcopy(made).state.values())


STATEFUL = [basis.Subspace(3), basis.Transform(3.0), basis.EMASketch(2, rows=6)]
every_method = pytest.mark.parametrize(
    "estimator", STATEFUL, ids=lambda estimator: type(estimator).__name__
)


def network(estimator: Estimator | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    if estimator is not None:
        basis.convert(model, estimator)
    return model


def train(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    model(batch(0).to(dtype)).square().sum().backward()


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


@every_method
def test_a_layer_used_twice_before_backward_and_nothing_held_afterwards(
    estimator: Estimator,
) -> None:
    """As two copies of the layer, of which the second one knows what the first one has learned."""
    torch.manual_seed(0)
    shared = SketchedLinear.from_linear(nn.Linear(4, 4, bias=False), estimator)
    first = copy.deepcopy(shared)
    shared.set_noise_key(3)
    first.set_noise_key(3)
    shared(shared(batch(0)).tanh()).square().sum().backward()
    hidden = first(batch(0))
    second = copy.deepcopy(first)
    second.set_noise_key(3)
    second(hidden.tanh()).square().sum().backward()
    torch.testing.assert_close(shared.weight.grad, first.weight.grad + second.weight.grad)
    torch.testing.assert_close(shared.state, second.state)
    for name, tensor in shared.state.items():
        fresh = estimator.initial_state(4, torch.device("cpu"))[name]
        assert tensor.untyped_storage().nbytes() == fresh.untyped_storage().nbytes()
        assert tensor.stride() == fresh.stride()  # as a loaded checkpoint has it


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_of_the_model_is_none_of_the_state(estimator: Estimator, dtype: torch.dtype) -> None:
    model = network(estimator)
    train(model)
    before = copied(model[0].state)
    model.zero_grad()
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    torch.testing.assert_close(
        model[0].state, before, rtol=0, atol=0
    )  # dtypes too: not a digit is lost
    train(model, dtype)
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    targets = torch.zeros(6, dtype=torch.int64)
    basis.linear_cross_entropy(model[2], model[1](model[0](batch(1).to(dtype))), targets).backward()
    assert model[2].weight.grad.isfinite().all()
    # As well as a model of that precision from the start, which makes its own state.
    for model in (network(estimator).to(dtype), network().to(dtype)):
        basis.convert(model, estimator)
        train(model, dtype)
        assert {name: t.dtype for name, t in model[0].state.items()} == {
            name: t.dtype for name, t in before.items()
        }


def test_a_count_goes_on_in_a_low_precision_model() -> None:
    model = network(basis.Subspace(2)).bfloat16()
    for _ in range(260):
        train(model, torch.bfloat16)
    assert model[0].state["looks"] == 260


@every_method
def test_state_made_without_memory_is_the_initial_one_once_it_has_some(
    estimator: Estimator,
) -> None:
    expected = network(estimator)
    with torch.device("meta"):
        empty = network()
    basis.convert(empty, estimator)
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(network().state_dict(), assign=True)
    allocated = empty.to_empty(device="cpu")
    allocated.load_state_dict(network().state_dict())
    for model in (allocated, assigned):
        torch.testing.assert_close(model[0].state, expected[0].state, rtol=0, atol=0)
        train(model)
    train(expected)
    torch.testing.assert_close(allocated[0].state, expected[0].state)
    expected[0].reset_parameters()
    torch.testing.assert_close(expected[0].state, network(estimator)[0].state, rtol=0, atol=0)
    expected.share_memory()
    copy.deepcopy(expected).to("meta")


@every_method
def test_a_plain_checkpoint_is_loaded_and_a_part_of_the_state_is_refused(
    estimator: Estimator,
) -> None:
    plain, model = network().state_dict(), network(estimator)
    model[0].weight.data.zero_()
    before = copied(model[0].state)
    model.load_state_dict(plain)
    assert torch.equal(model[0].weight, plain["0.weight"])
    torch.testing.assert_close(model[0].state, before, rtol=0, atol=0)
    whole = model.state_dict()
    name = next(key for key in whole if key.startswith("0.estimator_"))
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
        model.load_state_dict({key: value for key, value in whole.items() if key != name})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.weight"'):
        model.load_state_dict({key: value for key, value in plain.items() if key != "0.weight"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        network().load_state_dict(whole)


@every_method
def test_an_empty_batch_teaches_nothing(estimator: Estimator) -> None:
    model = network(estimator)
    train(model)
    before = copied(model[0].state)
    model.zero_grad()
    basis.set_noise_key(model, seed=0, step=0)
    model(torch.empty(0, 4)).sum().backward()
    assert torch.equal(model[0].weight.grad, torch.zeros(5, 4))
    torch.testing.assert_close(model[0].state, before, rtol=0, atol=0)
    train(model)  # the step is one to learn at, and the first rows come now
    assert any(not torch.equal(new, before[name]) for name, new in model[0].state.items())
