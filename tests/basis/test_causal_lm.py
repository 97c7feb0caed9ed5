"""fuse_head on a language model in the manner of transformers, without transformers: what is done
to logits on the way to the loss, and what is refused. Its own models: tests/integrations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import basis
from basis.diagnostics.monitor import Monitor
from basis.linear import SketchedLinear
from harness.memory import saved_bytes_total

WIDTH, CLASSES, ROWS, LENGTH = 6, 101, 3, 10
Loss = Callable[[Any, Tensor], Tensor]


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor | None


class Model(nn.Module):
    """An embedding, a bottleneck, a head with a bias, and a loss that a test gives."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.loss = loss
        self.double()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.head(self.body(self.embedding(tokens)))
        return Output(None if labels is None else self.loss(logits, labels), logits)


def shifted(logits: Any, labels: Tensor, **options: Any) -> Tensor:
    """As older models have it."""
    rows = logits[..., :-1, :].contiguous().view(-1, logits.size(-1))
    return F.cross_entropy(rows, labels[..., 1:].reshape(-1).to(logits.device), **options)


def capped(logits: Any, labels: Tensor) -> Tensor:
    logits = torch.tanh(logits / 0.5) * 0.5 / 0.25
    return F.cross_entropy(logits.float().reshape(-1, CLASSES), labels.flatten(), reduction="sum")


LOSSES: dict[str, Loss] = {
    "shifted": shifted,
    "smoothed": lambda y, t: shifted(y, t, label_smoothing=0.2),
    "capped": capped,
    "scaled down": lambda y, t: F.cross_entropy((y * -0.5).flatten(0, 1), t.flatten()),
    "flat": lambda y, t: F.cross_entropy(
        (0.5 * y.to(torch.float64)).view((-1, CLASSES)), t.view(-1)
    ),
    "a module": lambda y, t: nn.CrossEntropyLoss()(y.view(ROWS * LENGTH, -1), t.view(-1)),
    "of two parts": lambda y, t: shifted(y, t) + 0.1 * capped(y, t),
}


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(CLASSES, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :4] = -100
    return tokens, labels


def step(model: nn.Module) -> tuple[Tensor, ...]:
    loss = model(*batch()).loss
    return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_models_own(name: str) -> None:
    model = Model(LOSSES[name])
    wanted = step(model)
    kept = saved_bytes_total(model, lambda: model(*batch()).loss)
    assert basis.fuse_head(model) == "head"
    torch.testing.assert_close(step(model), wanted, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert model(*batch()).logits is None
    fewer = saved_bytes_total(model, lambda: model(*batch()).loss)
    gradients = 8 * (WIDTH + 1) * CLASSES + 8 * ROWS * LENGTH * WIDTH
    assert fewer < kept - 8 * (ROWS * LENGTH - ROWS) * CLASSES + 2 * gradients


@pytest.mark.parametrize("name", ["shifted", "capped"])
def test_compiled_in_one_graph(name: str) -> None:
    model = Model(LOSSES[name])
    wanted = step(model)
    basis.fuse_head(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(*batch()).loss
    found = loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_nothing_changes_where_nothing_is_trained() -> None:
    model, (tokens, labels) = Model(shifted), batch()
    wanted = model(tokens, labels)
    basis.fuse_head(model)
    with torch.no_grad():
        found = [model(tokens, labels)]
    found.append(model.eval()(tokens, labels=labels))
    for output in found:
        assert torch.equal(output.logits, wanted.logits)
        assert torch.equal(output.loss, wanted.loss)
    assert model.train()(tokens).logits.requires_grad


def test_all_is_frozen_but_the_body() -> None:
    model = Model(shifted)
    model.head.requires_grad_(False)
    model.embedding.requires_grad_(False)
    wanted = torch.autograd.grad(model(*batch()).loss, model.body.weight)
    basis.fuse_head(model)
    torch.testing.assert_close(torch.autograd.grad(model(*batch()).loss, model.body.weight), wanted)
    model.body.requires_grad_(False)
    assert not model(*batch()).loss.requires_grad


def test_a_monitor_watches_a_fused_head() -> None:
    """What it reads is what it reads of the head before."""
    found = []
    for fused in (False, True):
        model = Model(shifted)
        if fused:
            basis.fuse_head(model)
        with Monitor(model, probes=4) as monitor:
            model(*batch()).loss.backward()
            found.append(monitor.read()["head"].gradient_norm)
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_applied_to_a_head_bits_are_not_taken_from_it_and_sketches_are() -> None:
    """A fused head keeps dW, or a sketch's factors: fewer bits of its input would spare nothing."""
    for method, now in (
        (basis.Quantized(bits=4), nn.Linear),
        (basis.BalancedSketch(4), SketchedLinear),
    ):
        model = Model(shifted)
        report = basis.apply(model, method, head=True)
        assert (report.head, type(model.head)) == ("head", now)
        assert type(model.body) is SketchedLinear
        assert model(*batch()).logits is None
        assert ("head" in [change.name for change in report.changed]) == (now is SketchedLinear)
        basis.revert(model)
        assert type(model.body) is nn.Linear
        assert model(*batch()).logits is not None


def test_revert_undoes_it_or_leaves_it_as_it_was() -> None:
    model = Model(shifted)
    basis.convert(model, basis.Exact())
    basis.fuse_head(model)
    model.body.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="body"):
        basis.revert(model)
    assert model(*batch()).logits is None
    del model.body.forward
    assert sorted(basis.revert(model)) == ["body", "head"]
    assert model(*batch()).logits is not None
    basis.fuse_head(model)
    with pytest.raises(ValueError, match="its forward was replaced"):
        basis.convert(model, basis.Exact())


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (lambda y, t: y.logsumexp(-1).mean(), "logsumexp"),
        (lambda y, t: F.log_softmax(y, -1).mean(), "log_softmax"),
        (lambda y, t: (y + 1.0).sum(), "add"),
        (lambda y, t: F.cross_entropy(y.transpose(1, 2), t), "transpose"),
        (lambda y, t: shifted(y[..., :50], t), "a part"),
        (lambda y, t: shifted(y * torch.ones(()), t), "a product with a tensor"),
        (lambda y, t: shifted(y, t, weight=torch.ones(CLASSES)), "class weights"),
        (lambda y, t: shifted(y, t, reduction="none").mean(), "reduction='none'"),
        (lambda y, t: F.cross_entropy(y, t), "3 dimensions"),
        (lambda y, t: F.cross_entropy(y.view(-1, 2 * CLASSES), t.flatten()), "a view"),
        (lambda y, t: shifted(torch.tanh(torch.tanh(y)), t), "tanh of tanh"),
        (lambda y, t: torch.ones(3) * y, "mul"),
        (lambda y, t: y.to(torch.int64), "a cast"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_needs_whole_logits_is_named(loss: Loss, what: str) -> None:
    model = Model(loss)
    basis.fuse_head(model)
    with pytest.raises(ValueError, match=rf"fuse_head: .*{what}.*unfuse_head"):
        model(*batch())
    model.eval()(batch()[0])  # the switch is off again


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Linear holds no language model"):
        basis.fuse_head(nn.Linear(2, 2))
    model = Model(shifted)
    model.get_output_embeddings = lambda: None  # type: ignore[assignment, return-value]
    with pytest.raises(ValueError, match="Model has no head"):
        basis.fuse_head(model)
    model = Model(shifted)
    model.head = nn.Bilinear(1, 1, 1)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="the head head of Model is a Bilinear"):
        basis.fuse_head(model)
    model = Model(lambda y, t: torch.zeros(()))
    basis.fuse_head(model)
    with pytest.raises(ValueError, match="takes no loss of the output"):
        model(*batch())
    with pytest.raises(ValueError, match="forward was replaced"):
        basis.fuse_head(model)
    model.head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has hooks"):
        model(*batch())
