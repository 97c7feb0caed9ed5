"""Hydra's configuration groups, and the one way in which programs compose them.

`compose` turns overrides (`method=exact`, `data.path=book.txt`) into values, as Hydra does for
train.py. Types and ranges are checked elsewhere: data/options.py for the text, harness/config.py
for a run. `check` and `explain` put what Hydra and OmegaConf refuse into one line that names the
option; train.py, eval.py and `python -m data.prepare` all speak through them.

What an option holds is written to the run's folder and sent to its tracker, and so is the command
line. So no option may hold what the environment keeps secret (`refuse_secret`): a variable whose
name ends as those of keys, tokens and passwords do.
"""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

FOLDER = Path(__file__).resolve().parent
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE)
SECRET_LENGTH = 8  # shorter ones are not looked for: they would be found everywhere
OF_ENVIRONMENT = re.compile(r"\boc\.env:\s*([^,}\s]+)")


def compose(overrides: Sequence[str], folder: Path = FOLDER) -> DictConfig:
    """The values of `folder`/config.yaml under `overrides`, interpolations not resolved yet.

    May be called inside a Hydra program, whose own state is put aside: Hydra allows one at a time.
    Raises ValueError in one line for a group, an option or a grammar that Hydra refuses.
    """
    check(overrides, folder)
    outer = get_gh_backup()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            return hydra_compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, overrides)) from error
    finally:
        restore_gh_from_backup(outer)


def check(overrides: Sequence[str], folder: Path = FOLDER) -> None:
    """Refuse what Hydra reports without naming the option: a value that its grammar does not take
    unquoted, and a group set to null or to a number. Refuse a secret of the environment.

    Raises ValueError. For a value that needs quotes the message shows the argument that works.
    """
    parser = OverridesParser.create()
    for argument in overrides:
        key, equals, value = argument.partition("=")
        refuse_secret(key, argument)
        if not equals:
            continue  # Hydra's own message names it
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            works = quoted(argument)
            if works is None:
                raise ValueError(f"{argument}: Hydra can't read this ({error})") from None
            raise ValueError(
                f"{key}={value}: Hydra reads such a value only in quotes; give {works}"
            ) from None
        group = key.lstrip("+~").partition("@")[0]
        if not key or not (folder / group).is_dir() or override.is_delete():
            continue
        for choice in _choices(override):
            if not isinstance(choice, str | list | dict):
                raise ValueError(
                    f"{group}={'null' if choice is None else choice}: must be one of "
                    f"{', '.join(options(group, folder))}"
                )


def refuse_secret(option: str, value: str) -> None:
    """Raise ValueError naming the option and the variable, and not its content, if a value holds a
    secret of the environment.
    """
    found = [name for name in OF_ENVIRONMENT.findall(value) if SECRET.search(name)]
    for name, content in os.environ.items():
        if SECRET.search(name) and len(content) >= SECRET_LENGTH and content in value:
            found.append(name)
            option = option.replace(content, "...")
    if found:
        raise ValueError(
            f"{option}: holds the environment's {found[0]}, a secret by its name; options are "
            "written to config.yaml, the summary and the tracker, so give another value"
        )


def options(group: str, folder: Path = FOLDER) -> list[str]:
    """What a group can be set to."""
    return sorted(file.stem for file in (folder / group).glob("*.yaml"))


def _choices(override: Override) -> Iterator[object]:
    """The value of an override, or the values that it sweeps over."""
    if override.is_choice_sweep():
        yield from override.sweep_iterator()
    elif not override.is_sweep_override():
        yield override.value()


def quoted(argument: str) -> str | None:
    """`argument` (key=value) with its value in Hydra's quotes and all of it in the shell's, or None
    if quotes do not help.
    """
    key, _, value = argument.partition("=")
    parser = OverridesParser.create()
    for quote in ('"', "'"):
        candidate = f"{key}={quote}{value}{quote}"
        try:
            if parser.parse_override(candidate).value() == value:
                return shlex.quote(candidate)
        except HydraException:
            continue
    return None


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """One line, in the words of the user's options, for an error of Hydra or OmegaConf."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("See https://")]
    first = lines[0] if lines else type(error).__name__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if group and error.options is not None:
            return f"{group}={name}: must be one of {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: Hydra can't read this ({first})"
    if isinstance(error, OmegaConfBaseException):
        key = str(error.full_key or "")
        given = [word for word in overrides if "${" in word]
        if key.startswith("hydra.") and given:
            key = ", ".join(given)  # Hydra meets the value first in the name of the run's folder
        return f"{key}: {first}" if key else first
    if first.startswith("Could not override '"):
        key = first.removeprefix("Could not override '").rstrip("'.")
        return f"{key}: there is no such option"
    if first.startswith("Ambiguous value for argument '"):
        argument = first.removeprefix("Ambiguous value for argument '").rstrip("'")
        return (
            f"{argument}: several values; give -m to run each of them, or {quoted(argument)} if it "
            "is one"
        )
    return " ".join(lines[:2])
