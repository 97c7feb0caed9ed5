"""A run's configuration from overrides, for programs that are no Hydra applications themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup

from harness.config import Config, load

CONF = Path(__file__).resolve().parents[1] / "conf"


def configuration(overrides: Sequence[str]) -> Config:
    """What train.py would run under `overrides`. Raises ValueError in one line for what can't be, misspelt words too.

    Inside a Hydra application too, whose own state is put aside: there can be one at a time.
    """
    outer = get_gh_backup()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            try:
                values = compose("config", overrides=list(overrides))
            except HydraException as error:
                lines = [line for line in str(error).splitlines() if line.strip()]
                raise ValueError(" ".join(lines[:2])) from error
            return load(values)
    finally:
        restore_gh_from_backup(outer)
