"""Checkpoints: what could not be loaded is refused when it is saved, and whatever is accepted can
be loaded.
"""

import collections
import dataclasses
import pathlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.folder.checkpoint import Checkpoints, check_state


@dataclasses.dataclass
class Thing:
    value: int = 0


def tagged(tag: object) -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.tag = tag  # type: ignore[attr-defined]
    return tensor


REFUSED = {
    "state['a']['b']": {"a": {"b": np.float64(1.5)}},
    "state['a'][1]": {"a": [0, np.ones(2)]},
    "state['path']": {"path": pathlib.PurePosixPath("data")},
    "state['thing']": {"thing": Thing()},
    "state['per']": {"per": collections.defaultdict(int)},
    "state['rng'][1][0]": {"rng": (1, [frozenset()])},
    "state['type']": {"type": int},
    "state['t'].tag": {"t": tagged(np.int64(1))},
    "state, key": {np.int64(1): 2},
}


@pytest.mark.parametrize("where", REFUSED)
def test_a_type_that_could_not_be_loaded_is_refused_when_saving(tmp_path, where):
    state = REFUSED[where]
    with pytest.raises(TypeError) as caught:
        Checkpoints(tmp_path).save(1, state)
    assert str(caught.value).startswith(where)
    assert list(tmp_path.iterdir()) == []
    torch.save(state, tmp_path / "state.pt")  # and indeed
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "state.pt", weights_only=True)


def test_a_hydra_config_is_refused(tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    with pytest.raises(
        TypeError, match=r"state\['config'\]: a omegaconf\.dictconfig\.DictConfig cannot be stored"
    ):
        Checkpoints(tmp_path).save(1, {"config": omegaconf.OmegaConf.create({"a": 1})})


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary()
    | st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.Size([2, 3])])
    | st.builds(np.float32, st.just(1.0))
    | st.frozensets(st.integers())
)
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(collections.OrderedDict)
        | st.sets(st.integers(), max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(states)
def test_whatever_the_check_accepts_can_be_loaded(value):
    with tempfile.TemporaryDirectory() as folder:
        try:
            check_state({"value": value})
        except TypeError:
            return
        torch.save({"value": value}, Path(folder) / "state.pt")
        loaded = torch.load(Path(folder) / "state.pt", weights_only=True)
        assert loaded == {"value": value}
        assert type(loaded["value"]) is type(value)
