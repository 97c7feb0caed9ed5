"""From the values that Hydra composes to the typed `Config` of a run.

conf/ holds values, config.py holds types. `load` puts one into the other, before anything is
allocated or written; what is misspelt, of another type or a secret is refused here. `configuration`
is the same for programs that are given overrides as words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from functools import cache
from typing import Any, get_type_hints

from omegaconf import MISSING as OMEGACONF_MISSING
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from data.options import with_tokenizer
from harness.config import Config, flattened
from harness.method import make_method, method_schema
from harness.world import here
from models.hf_config import described


def load(values: DictConfig, *, weights: bool = True) -> Config:
    """The typed, checked configuration of composed values; the method is made here, once.
    weights: whether a model of a folder is to have some, as it need not to be planned.

    Raises ValueError that names the user's dotted option.
    """
    for group in fields(Config):
        if group.default is MISSING and values.get(group.name, group) is None:
            raise ValueError(f"{group.name}=null: is a group of options, which can't be left out")
    try:
        schema = _schema(str(OmegaConf.select(values, "method.name")))
        # Resolved first: OmegaConf does not look at the type of what an interpolation stands for.
        given: Any = OmegaConf.to_container(values, resolve=True)
        for name, value in flattened(given).items():
            conf.refuse_secret(name, str(value))
            # OmegaConf lets lists within a list pass for words.
            if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
                raise ValueError(f"{name}={value}: must be a list of words, without lists in it")
        given["data"] = with_tokenizer(given["data"], given["model"])
        if given["model"].get("family") == "hf":
            given["model"] = described(given["model"], weights=weights)
        options = OmegaConf.to_object(OmegaConf.merge(schema, given))
    except OmegaConfBaseException as error:
        raise ValueError(conf.explain(error, ())) from error
    made = {f.name: getattr(options, f.name) for f in fields(Config)}
    if made["world_size"] is None:
        made["world_size"] = here().size
    if made["parallel"] is None:
        made["parallel"] = "none" if made["world_size"] == 1 else "ddp"
    rows = max(made["micro_batch_size"] * made["model"].block_size, 1)  # Config refuses fewer
    return Config(**made | {"method": make_method(made["method"], rows)})


@cache
def _schema(method: str) -> DictConfig:
    """The types of all options for OmegaConf: those of `Config`, with the options of `method`. To
    be merged from, which copies it.
    """
    hints = get_type_hints(Config) | {"method": method_schema(method)}
    hints |= {"parallel": str | None, "world_size": int | None}  # null: see `load`
    typed: list[Any] = [
        (f.name, hints[f.name], field(default=f.default, default_factory=f.default_factory))
        for f in fields(Config)
        if f.name != "method"
    ]
    typed.append(("method", hints["method"], field(default=OMEGACONF_MISSING)))
    schema = OmegaConf.structured(make_dataclass("Options", typed))
    schema.method = OmegaConf.structured(method_schema(method))
    # OmegaConf takes frozen dataclasses for values that must not be set; here they are the types.
    for name in schema:
        if OmegaConf.is_config(group := schema._get_node(name)):
            OmegaConf.set_readonly(group, None)
    return schema


def configuration(overrides: Sequence[str], *, weights: bool = True) -> Config:
    """What train.py would run under `overrides`. Raises ValueError in one line for what can't be,
    misspelt words too. weights: see `load`.
    """
    return load(conf.compose(overrides), weights=weights)
