"""Conversion by name: what is changed, what stays, what is refused."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import basis
from basis import BalancedSketch
from basis.exchange import plain_name, plainly_named
from basis.linear import SketchedLinear
from models import GPT, GPTConfig

SKETCH = BalancedSketch(4)


def gpt(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=16, **options))


def test_default_converts_every_dense_layer_and_revert_undoes_it() -> None:
    model = gpt()
    before = {name: type(module) for name, module in model.named_modules()}
    state, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    changed = basis.convert(model, SKETCH)
    assert changed == [name for name, kind in before.items() if kind is nn.Linear]
    assert len(changed) == 2 * 4 + 1
    assert all(type(model.get_submodule(name)) is SketchedLinear for name in changed)
    assert list(model.state_dict()) == list(state)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    model.load_state_dict(state)
    assert basis.revert(model) == changed
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_include_and_exclude() -> None:
    model = gpt()
    assert basis.convert(
        model, SKETCH, include=["blocks.*.mlp.*", "head"], exclude=["blocks.1.*"]
    ) == [
        "blocks.0.mlp.fc",
        "blocks.0.mlp.proj",
        "head",
    ]
    assert type(model.blocks[0].attn.qkv) is nn.Linear


def test_converting_again_changes_the_estimator() -> None:
    model = gpt()
    basis.convert(model, SKETCH)
    basis.convert(model, BalancedSketch(2), include=["head"])
    assert model.head.estimator.rank == 2
    assert model.blocks[0].mlp.fc.estimator.rank == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": ["blocks.*.mpl.*"]},
            r"include='blocks\.\*\.mpl\.\*': matches no dense layer; .*blocks\.0\.attn\.qkv",
        ),
        ({"include": ["*"], "exclude": ["tail"]}, "exclude='tail': matches no dense layer"),
        ({"include": ["head"], "exclude": ["head"]}, "no dense layer is left"),
        ({"include": "head"}, "give a list"),
    ],
)
def test_refusals_change_nothing(options: dict, message: str) -> None:
    model = gpt()
    with pytest.raises(ValueError, match=message):
        basis.convert(model, SKETCH, **options)
    assert not list(basis.sketched_layers(model))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            "basis",
            r"an Estimator, such as basis\.BalancedSketch\(rank=32\), a .*got 'basis'",
        ),
        (BalancedSketch, r"an Estimator, such as .*got <class"),
        (
            lambda name, layer: BalancedSketch if name == "head" else SKETCH,
            "must return an Estimator.* for head it gave <class",
        ),
    ],
)
def test_what_is_no_estimator_is_refused_with_nothing_changed(wrong, message: str) -> None:
    model = gpt()
    with pytest.raises(TypeError, match=message):
        basis.convert(model, wrong)
    assert not list(basis.sketched_layers(model))


def test_a_bare_linear_is_refused() -> None:
    with pytest.raises(ValueError, match="from_linear"):
        basis.convert(nn.Linear(2, 2), SKETCH)


def test_tied_weights_stay_tied_and_both_gradients_arrive() -> None:
    model = gpt(tie_head=True, init="gpt2")
    basis.convert(model, SKETCH, include=["head"])
    assert model.head.weight is model.wte.weight
    assert len(list(model.parameters())) == len(list(gpt().parameters())) - 1
    tokens = torch.randint(13, (2, 8))
    model(tokens, tokens).backward()
    assert model.wte.weight.grad.abs().sum() > 0


def test_a_shared_layer_is_exchanged_under_all_its_names() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert basis.convert(model, SKETCH) == ["0", "2"]
    assert model[0] is model[2]
    assert basis.revert(model) == ["0", "2"]
    assert model[0] is model[2]
    assert type(model[0]) is nn.Linear


class Conv1D(nn.Module):
    """Looks like the dense layer of transformers' GPT-2."""


SKIPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "attention": (
        lambda: nn.MultiheadAttention(4, 2).out_proj,
        "NonDynamicallyQuantizableLinear: the attention around it uses its weight",
    ),
    "lazy": (lambda: nn.LazyLinear(4), "LazyLinear: has no weight before its first forward"),
    "normed": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        "its weight is computed by a parametrization",
    ),
    "foreign": (Conv1D, "Conv1D: no nn.Linear"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_looks_dense_and_is_no_plain_linear_is_left_alone_and_said_if_asked_for(
    name: str,
) -> None:
    make, why = SKIPPED[name]
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), name: make()})
    before = type(model[name])
    for patterns in ([name], ["plain", f"{name[:2]}*"]):
        with pytest.raises(
            ValueError, match=rf"matches no dense layer; the model's are plain; .*{name} \(.*{why}"
        ):
            basis.convert(model, SKETCH, include=patterns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is left: test_left.py
        assert basis.convert(model, SKETCH) == ["plain"]
    assert type(model[name]) is before


def test_where_nothing_is_found_all_that_looks_dense_is_listed() -> None:
    model = nn.ModuleDict({name: make() for name, (make, _) in SKIPPED.items()})
    with pytest.raises(ValueError, match="the model's are none") as refused:
        basis.convert(model, SKETCH)
    assert all(
        f"{name} (" in str(refused.value) and why in str(refused.value)
        for name, (_, why) in SKIPPED.items()
    )
    with pytest.raises(ValueError, match=r"the model's are none$"):
        basis.convert(nn.Sequential(nn.Tanh()), SKETCH)


def test_keys_depend_on_each_number_and_on_the_name_only() -> None:
    def keys(model: nn.Module, **numbers: int) -> dict[str, int]:
        basis.set_noise_key(model, **{"seed": 0, "step": 0, **numbers})
        return {name: int(layer.noise_key) for name, layer in basis.sketched_layers(model)}

    everything, head = gpt(), gpt()
    basis.convert(everything, SKETCH)
    basis.convert(head, SKETCH, include=["head"])
    base = keys(everything)
    assert len(set(base.values())) == len(base)
    assert keys(head)["head"] == base["head"]
    for change in ({"seed": 1}, {"step": 1}, {"micro_batch": 1}, {"process": 1}):
        assert not set(keys(everything, **change).values()) & set(base.values())
    assert keys(everything) == base
    with pytest.warns(DeprecationWarning, match="rank is now called process"):
        older = keys(everything, rank=1)
    assert older == keys(everything, process=1)
    wrapped = nn.parallel.DataParallel(head)  # names inside a wrapper carry "module."
    assert keys(wrapped) == keys(head)
    assert [name for name, _ in plainly_named(wrapped)][1:] == [
        plain_name(head, name) for name, _ in head.named_modules()
    ]


def test_only_real_wrappers_are_left_out_of_names() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "module": nn.ModuleDict({"fc": nn.Linear(2, 2)})})
    assert basis.convert(model, SKETCH) == ["fc", "module.fc"]
    basis.set_noise_key(model, seed=0, step=0)
    assert model["fc"].noise_key != model["module"]["fc"].noise_key


def test_hooks_survive_and_a_computed_weight_is_refused_with_nothing_changed() -> None:
    seen: list[str] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    basis.convert(model, SKETCH)
    model(torch.ones(2, 4))
    basis.revert(model)
    model(torch.ones(2, 4))
    assert seen == ["forward", "forward"]
    torch.nn.utils.spectral_norm(model[1])
    with pytest.raises(ValueError, match=r"include='1': .*computed by a hook"):
        basis.convert(model, SKETCH)
    assert type(model[0]) is nn.Linear


def test_whatever_hangs_on_a_layer_goes_with_it_and_comes_back() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    plain = model[0]
    plain.scale = 3
    plain.register_buffer("mask", torch.ones(4))
    plain.register_buffer("scratch", torch.zeros(2), persistent=False)
    plain.add_module("act", nn.ReLU())
    plain.act.eval()
    keys, before = list(model.state_dict()), set(vars(plain))
    basis.convert(model, SKETCH)
    for _ in range(2):
        assert (model[0].scale, model[0].mask, model[0].act) == (3, plain.mask, plain.act)
        assert model[0].training
        assert not model[0].act.training
        assert list(model.state_dict()) == keys
        basis.convert(model, BalancedSketch(2))
    basis.set_noise_key(model, seed=0, step=0)
    basis.revert(model)
    assert list(model.state_dict()) == keys
    assert set(vars(model[0])) == before  # and nothing of the sketched layer is left on it


MAKERS: dict[str, tuple[Callable[[], nn.Module], object]] = {
    "dense": (lambda: nn.Linear(8, 8), SKETCH),
    "norm": (lambda: nn.LayerNorm(8), basis.Lean()),
    "gelu": (nn.GELU, basis.Lean()),
    "rms norm": (lambda: nn.RMSNorm(8), basis.Lean()),
    "silu": (nn.SiLU, basis.Lean()),
    "dropout": (nn.Dropout, basis.Lean()),
}
of_each_kind = pytest.mark.parametrize("kind", MAKERS)


@of_each_kind
def test_a_forward_replaced_on_the_object_is_refused_by_name(kind: str) -> None:
    make, method = MAKERS[kind]
    model = nn.Sequential(make(), make())

    def patch(layer: nn.Module) -> None:
        before = layer.forward
        layer.forward = lambda x: 2 * before(x)

    patch(model[1])
    with pytest.raises(ValueError, match="include='1': its forward was replaced"):
        basis.convert(model, method)
    assert type(model[0]) is type(make())
    del model[1].forward
    basis.convert(model, method)
    patch(model[1])
    with pytest.raises(ValueError, match="revert: 1: its forward was replaced"):
        basis.revert(model)
    assert type(model[0]) is not type(make())
    del model[1].forward
    model[1].compile(backend="eager")
    with pytest.raises(ValueError, match="revert: 1: it was compiled"):
        basis.revert(model)


@of_each_kind
def test_every_hook_is_called_after_convert_and_after_revert(kind: str) -> None:
    make, method = MAKERS[kind]
    model, seen = nn.Sequential(make()), []
    handles = [
        model[0].register_full_backward_hook(lambda *_: seen.append("backward")),
        model[0].register_full_backward_pre_hook(lambda *_: seen.append("backward pre")),
        model[0].register_forward_hook(lambda *_, **__: seen.append("forward"), with_kwargs=True),
        model[0].register_state_dict_pre_hook(lambda *_: seen.append("saved")),
        model[0]._register_load_state_dict_pre_hook(
            lambda module, *_: seen.append(type(module)), with_module=True
        ),
    ]

    def calls() -> set[object]:
        seen.clear()
        model(torch.randn(4, 8, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        return set(seen)

    for change in (lambda: basis.convert(model, method), lambda: basis.revert(model)):
        change()
        assert calls() == {"backward", "backward pre", "forward", "saved", type(model[0])}
    for handle in handles:
        handle.remove()
    assert calls() <= {type(model[0])}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "put_on",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
    ids=["pruned", "weight norm", "spectral norm"],
)
def test_a_weight_computed_since_by_a_hook_stays_so_after_revert(put_on) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(4, 8)
    basis.convert(model, basis.Exact())
    put_on(model[0])
    model.eval()
    outputs, gradients = [], []
    for _ in range(2):
        model.zero_grad()
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        basis.revert(model)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)
    assert type(model[0]) is nn.Linear


def test_a_parametrization_put_on_since_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    basis.convert(model, SKETCH)
    nn.utils.parametrizations.weight_norm(model[1])
    with pytest.raises(ValueError, match=r"revert: 1: it has a parametrization.*remove_param"):
        basis.revert(model)
    assert type(model[0]) is SketchedLinear
    with pytest.raises(ValueError, match="its weight is computed by a parametrization"):
        basis.convert(model, SKETCH, include=["1"])
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert basis.revert(model) == ["0", "1"]


@pytest.mark.parametrize("name", ["state", "frozen", "estimator", "original"])
def test_a_name_that_the_sketched_layer_needs_is_refused(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    setattr(model[0], name, True)
    with pytest.raises(ValueError, match=f"include='0': it has {name}, which SketchedLinear needs"):
        basis.convert(model, SKETCH)


def test_noise_keys_are_not_saved() -> None:
    model = gpt()
    basis.convert(model, SKETCH)
    basis.set_noise_key(model, seed=0, step=0)
    assert list(model.state_dict()) == list(gpt().state_dict())


def test_a_sketched_model_trains_with_an_optimiser_made_before() -> None:
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    basis.convert(model, SKETCH)
    tokens = torch.arange(8)[None]
    losses = []
    for step in range(30):
        basis.set_noise_key(model, seed=0, step=step)
        loss = model(tokens, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
