"""The tests' short cut to a configuration gives what Hydra does."""

import pytest
from composed import composed
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

import conf


@pytest.mark.parametrize(
    "words",
    [
        ["method=basis", "method.rank=8", "steps=7", "data.path=a/b.txt"],
        ["experiment=demo", "optim.lr=0.5", "optim=adamw"],
        ["model.n_layer=null", "+model.other=3", "~tracker.tags", "method.include=[a,b]"],
    ],
)
def test_it_is_what_hydra_composes(words: list[str]) -> None:
    with initialize_config_dir(config_dir=str(conf.FOLDER), version_base="1.3"):
        expected = compose("config", overrides=words)
    for _ in range(2):  # the second time from what was kept
        found = composed(*words)
        assert OmegaConf.to_container(found) == OmegaConf.to_container(expected)
        assert OmegaConf.is_struct(found)
        found.steps = 1  # changes nothing for others


@pytest.mark.parametrize("word", ["model.n_layers=3", "methd.rank=2", "method=bases", "steps=1,2"])
def test_it_refuses_what_hydra_refuses(word: str) -> None:
    with (
        initialize_config_dir(config_dir=str(conf.FOLDER), version_base="1.3"),
        pytest.raises(HydraException) as expected,
    ):
        compose("config", overrides=[word])
    with pytest.raises(HydraException) as found:
        composed(word)
    assert str(found.value) == str(expected.value)
