"""Plans on fake tensors against steps that were taken, and the search for what fits."""

from pathlib import Path

import pytest
import torch
from composed import composed

import basis
from basis.head_sizes import SIZES, Sizes, blocks_of
from basis.ops import softmax
from bench import memory_plan as planning
from bench import plan_memory
from harness import activations, memory
from harness.build import apply_method
from harness.compose import load
from harness.config import Config
from harness.optim import make_optimizer
from models import GPT

SMALL = [
    "model=gpt2",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=64",
    "model.vocab_size=211",
    "model.block_size=64",
]


def config(*overrides: str) -> Config:
    return load(composed(*SMALL, *overrides))


METHODS = [["method=exact"], ["method=basis", "method.include=['*']", "method.rank=4"]]
KINDS = [
    "plain",
    "lean",
    "recompute",
    "checkpoint",
    "checkpoint activations.selective=true",
    *(f"checkpoint activations.boundary={bits}" for bits in (8, 4)),
]
STEPS = [
    ["device=cpu"],
    ["device=cpu", "precision=bfloat16"],
    ["device=cpu", "optim=adamw", "model.tie_head=false", "tokens_per_step=512"],
    ["device=cuda", "precision=bfloat16"],
]


# Each method with each kind, and each with each step; all with all are slow.
@pytest.mark.parametrize(
    ("method", "kind", "more"),
    [
        pytest.param(
            method,
            kind,
            more,
            marks=() if (m * 2 + k + k // 4) % 4 == s else pytest.mark.slow,
            id=f"{method[0]}-{kind}-{','.join(more)}",
        )
        for m, method in enumerate(METHODS)
        for k, kind in enumerate(KINDS)
        for s, more in enumerate(STEPS)
    ],
)
def test_plan_agrees_with_a_step_that_is_taken(
    method: list[str], kind: str, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the kernel that a GPU has: it needs no memory of its own. The numbers do not matter here.
    in_place = lambda y, *_: y.zero_()  # noqa: E731
    monkeypatch.setattr(softmax, "_plain", in_place)
    options = config(*method, *f"activations={kind}".split(), "micro_batch_size=4", *more)
    plan = planning.plan(options)
    torch.manual_seed(0)
    model = GPT(options.model)
    apply_method(model, options)
    activations.apply(model, options.activations)
    optimizer = make_optimizer(model, options.optim)
    tokens = torch.randint(211, (4, 64))

    def forward() -> torch.Tensor:
        basis.set_noise_key(model, seed=0, step=0)
        low = options.precision == "bfloat16"
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False)
        with autocast, blocks_of(options.device):
            return model(tokens, tokens)

    assert plan.kept == memory.saved_bytes(model, forward)
    peak = memory.cpu_peak_bytes(
        model, optimizer, lambda _: forward().backward(), min(options.micro_batches, 2)
    )
    assert plan.peak == pytest.approx(peak, rel=0.05)
    model.zero_grad(set_to_none=True)
    forward().backward()
    optimizer.step()
    assert plan.parameters == memory.tensor_bytes(model.parameters())
    gradients = memory.tensor_bytes(p.grad for p in model.parameters())
    padding = 4 * 64 * (256 - 211) if options.device == "cuda" else 0  # of the head's gradient
    assert plan.gradients <= gradients <= plan.gradients + padding
    assert plan.optimizer == pytest.approx(
        memory.optimizer_bytes(optimizer), abs=1000
    )  # AdamW's step counters


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        pytest.param("lean", marks=pytest.mark.slow),
        pytest.param("checkpoint", marks=pytest.mark.slow),
    ],
)
def test_deep_models_are_extended_block_by_block(kind: str) -> None:
    more = (
        ["tokens_per_step=128"] if kind == "checkpoint" else []
    )  # two micro-batches: the second one meets gradients
    options = config(
        "method=basis",
        "method.include=['*']",
        "method.rank=4",
        f"activations={kind}",
        "model.n_layer=6",
        *more,
    )
    assert planning.plan(options) == planning.walk(options).plan()


@pytest.mark.parametrize("vocabulary", [65, 2001])
@pytest.mark.slow
def test_a_deep_model_is_planned_as_if_it_were_walked_through(vocabulary: int) -> None:
    """Wherever its peak is: at a small vocabulary in the blocks, at a large one at the head."""
    options = config("method=exact", "model.n_layer=12", f"model.vocab_size={vocabulary}")
    assert planning.plan(options) == planning.walk(options).plan()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "device"),
    [
        ("plain", "cpu"),
        ("checkpoint", "cuda"),
        pytest.param("checkpoint", "cpu", marks=pytest.mark.slow),
        pytest.param("plain", "cuda", marks=pytest.mark.slow),
    ],
)
def test_three_blocks_of_the_head_say_what_all_do(
    method: list[str], kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte but for the numbers that each block of rows leaves on a CPU: its loss, and of a
    sketch the norm of its dY.
    """
    monkeypatch.setitem(SIZES, "cpu", Sizes(4 * 211 * 10))
    monkeypatch.setitem(SIZES, "cuda", Sizes(1, least=10))
    options = config(
        *method, f"activations={kind}", f"device={device}", "micro_batch_size=3", "model.n_layer=1"
    )  # 192 rows: 19 blocks of 10, and 2
    few, every = planning.walk(options), planning.walk(options, every_block=True)
    assert len(few.passes[1]) < len(every.passes[1])
    assert few.kept == every.kept
    left_out = 20 - 3
    assert (
        0
        <= every.plan().peak - few.plan().peak
        <= (0 if device == "cuda" else left_out * (4 if method == ["method=exact"] else 8))
    )


def test_largest_is_the_last_that_fits() -> None:
    calls: list[int] = []
    for slope, offset in ((7, 100), (1000, 3), (1, 0)):

        def peak(size: int, slope: int = slope, offset: int = offset) -> int:
            calls.append(size)
            return offset + slope * size + 20 * (size // 100)  # a line with small steps

        for budget in (50, 1_000, 12_345, 10**7):
            found = planning.largest(peak, budget, unit=4, limit=4000)
            assert found % 4 == 0
            assert found == 0 or peak(found) <= budget
            assert found == 4000 or peak(found + 4) > budget
    assert len(calls) < 200


def test_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *SMALL,
        "--methods",
        "exact",
        "basis",
        "--activations",
        "plain",
        "--memory",
        "0.05",
    ]
    assert plan_memory.main([*arguments, "--csv", str(tmp_path / "plan.csv")]) == 0
    lines = (tmp_path / "plan.csv").read_text().splitlines()
    assert len(lines) == 3
    contexts = [
        int(line.split(",")[lines[0].split(",").index("context_0.05")]) for line in lines[1:]
    ]
    assert contexts == sorted(contexts)  # exact, BASIS
    assert contexts[-1] > contexts[0] > 0
    assert "nothing was allocated" in capsys.readouterr().out
    assert plan_memory.main(["model.n_head=7"]) == 1
    assert "model.n_head=7" in capsys.readouterr().err


def test_the_vocabulary_is_the_tokenizer_s_and_asked_for_where_the_text_decides(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ["model=char_small", "model.n_layer=1"]
    text = [*model, "data=text", "data.path=book.txt", "data.tokenizer=char"]
    quick = ["--methods", "exact", "--activations", "plain"]
    assert plan_memory.main([*text, *quick]) == 1
    assert "model.vocab_size=null: with data.tokenizer=char" in capsys.readouterr().err
    assert plan_memory.main([*text, "model.vocab_size=65", *quick]) == 0
    assert "vocabulary 65," in capsys.readouterr().out
    assert plan_memory.main([*text, *quick, "model.vocab_size=65"]) == 1
    assert (
        "model.vocab_size=65 stands where a method or activations would" in capsys.readouterr().err
    )
    assert plan_memory.main([*model, *quick]) == 0
    assert "vocabulary 50,257," in capsys.readouterr().out


@pytest.mark.parametrize("option", ["block_size", "micro_batch_size"])
@pytest.mark.slow
def test_sizes_between_two_long_ones_lie_on_a_line(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within half a percent: the blocks of the head's rows differ by a few rows between sizes."""
    monkeypatch.setitem(SIZES, "cpu", Sizes(4 * 211 * 40))  # 40 rows
    options = config(
        "method=basis",
        "method.include=['*']",
        "method.rank=4",
        "activations=lean",
        "model.n_layer=1",
    )
    unit = 1 if option == "micro_batch_size" else 64
    peak = planning.peaks(options, option, 200 * unit)
    for size in (3, 30, 51, 120):
        real = planning.walk(
            planning.with_size(options, **{option: size * unit}), categories=False, every_block=True
        )
        assert peak(size * unit) == pytest.approx(real.plan().peak, rel=0.005)


def test_what_only_compilation_decides_is_refused() -> None:
    for wrong in ("compile=true", "activations=budget"):
        with pytest.raises(ValueError, match="compile=true"):
            planning.plan(config(wrong))


@pytest.mark.slow
def test_a_sketched_and_lean_step_takes_a_fifth_of_an_exact_one() -> None:
    """4 blocks of GPT-2's width, 4 x 1,024 tokens, vocabulary 50,257: the step of results/speed, by
    planning.
    """
    size = [
        "model.n_layer=4",
        "model.n_head=12",
        "model.n_embd=768",
        "model.block_size=1024",
        "model.vocab_size=50257",
    ]
    step = [*size, "micro_batch_size=4", "optim=sgd"]
    exact = planning.plan(config(*step, "method=exact"))
    lean = planning.plan(
        config(*step, "method=basis", "method.include=['*']", "method.rank=64", "activations=lean")
    )
    assert lean.parameters == exact.parameters
    assert 0.1 < lean.beyond / exact.beyond < 0.2
    # Not by an exact step that wastes: it keeps 16 tensors of B x T x C a block, and the head's
    # gradient and logits.
    assert exact.beyond < 1.05 * (4 * 16 * 4096 * 768 * 4)
