"""Options of the wrong type: refused by name, for every option of every estimator; what is nearly
an int becomes one.
"""

from dataclasses import MISSING, fields, make_dataclass
from typing import Any

import numpy as np
import pytest
from torch import nn

import basis
from basis.checks import check_types, whole_number
from basis.diagnostics.adaptive_rank import AdaptiveRank
from basis.estimator import Estimator
from basis.estimators import ESTIMATORS

WRONG: dict[str, tuple[list[Any], str]] = {
    "int": ([2.5, 4.0, "3", True, None], "must be a whole number"),
    "float": (["4", True, [1.0], 1j], "must be a number"),
    "bool": (["no", 1, None], "must be true or false"),
}
OPTIONS = [
    (kind, field) for kind in ESTIMATORS.values() for field in fields(kind) if field.type != "str"
]


@pytest.mark.parametrize(
    ("kind", "field"), OPTIONS, ids=lambda part: getattr(part, "__name__", None) or part.name
)
def test_every_option_of_every_estimator_is_held_to_its_type(
    kind: type[Estimator], field: Any
) -> None:
    needed = {other.name: 2 for other in fields(kind) if other.default is MISSING}
    values, message = WRONG[field.type.removesuffix(" | None")]
    for value in values:
        if value is None and field.type.endswith(" | None"):
            continue
        with pytest.raises(ValueError, match=rf"^{field.name}=.*: {message}"):
            kind(**(needed | {field.name: value}))


def test_integers_of_numpy_become_ints_and_whole_floats_are_fine_for_floats() -> None:
    made = basis.BalancedSketch(np.int64(4))
    assert made == basis.BalancedSketch(4)
    assert type(made.rank) is int
    assert basis.Quantized(np.float32(4.0)) == basis.Quantized(4.0) == basis.Quantized(4)
    with pytest.raises(ValueError, match=r"^rank=0: must be at least 1"):
        basis.BalancedSketch(np.int64(0))


def test_a_dataclass_without_deferred_annotations_is_checked_too() -> None:
    Plain = make_dataclass("Plain", [("count", int), ("share", float | None, None)])
    check_types(Plain(1))
    with pytest.raises(ValueError, match=r"^count=1\.5"):
        check_types(Plain(1.5))
    with pytest.raises(ValueError, match=r"^share='half'"):
        check_types(Plain(1, "half"))


def test_whole_numbers_have_a_least_one() -> None:
    assert whole_number("step", np.uint8(7), least=0) == 7
    with pytest.raises(ValueError, match=r"^step=-1: must be at least 0"):
        whole_number("step", -1, least=0)


@pytest.mark.parametrize("name", ["seed", "step", "micro_batch", "process"])
@pytest.mark.parametrize("value", [1.5, -1, True])
def test_noise_is_a_function_of_whole_numbers_only(name: str, value: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    basis.convert(model, basis.BalancedSketch(1))
    with pytest.raises(ValueError, match=f"^{name}={value}"):
        basis.set_noise_key(model, **({"seed": 0, "step": 0} | {name: value}))
    assert model[0].noise_key is None


def test_a_seed_of_numpy_draws_the_same_noise() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    basis.convert(model, basis.BalancedSketch(1))
    keys = []
    for seed in (3, np.int64(3)):
        basis.set_noise_key(model, seed=seed, step=np.int32(1))
        keys.append(model[0].noise_key)
    assert keys[0] == keys[1]


def test_the_adaptive_rank_is_held_to_its_types() -> None:
    with pytest.raises(ValueError, match=r"^rank=2\.5: must be a whole number"):
        AdaptiveRank(rank=2.5, low=0.1, high=0.3)  # type: ignore[arg-type]
