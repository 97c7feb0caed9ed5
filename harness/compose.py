"""A run's configuration from overrides, for programs that are no Hydra applications themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from harness.config import Config, load

CONF = Path(__file__).resolve().parents[1] / "conf"


def configuration(overrides: Sequence[str]) -> Config:
    """What train.py would run under `overrides`. Raises ValueError in one line for what can't be, misspelt words too."""
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        try:
            values = compose("config", overrides=list(overrides))
        except HydraException as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise ValueError(" ".join(lines[:2])) from error
        return load(values)
