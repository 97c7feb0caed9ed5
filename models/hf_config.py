"""What a folder of transformers says of its model: config.json read once, before a run starts.

`described` fills in the sizes that the options leave open. It adds the file itself (`architecture`)
and a sha256 of config.json and of the weights. So a checkpoint says which model it continues:
another model under the same path is refused, a folder that was moved is not, and a run can be read
back without the folder.

Without weights the folder need not hold any: to plan a model's memory config.json is enough.
`shallower` is the same model with fewer blocks, for plans that go through a few of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.config import ModelConfig

MOST_TOKENS = 2048
"""Of a window, where model.block_size is null and the model could take more."""
SIZES = {
    "vocab_size": ("vocab_size",),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_embd": ("hidden_size",),
}
"""By option, what transformers calls it."""
MORE_SIZES = {
    "n_kv_head": ("num_key_value_heads",),
    "n_inner": ("intermediate_size", "n_inner", "ffn_dim"),
    "layer_norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "tie_head": ("tie_word_embeddings",),
}
"""The same; not every model has these."""
MOST_POSITIONS = ("max_position_embeddings",)
DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout",
            "dropout", "activation_dropout")  # fmt: skip


def transformers() -> Any:
    """The package. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError:
        raise ValueError(
            "model.path: model=hf needs the package transformers; "
            "pip install basis-sketch[integrations]"
        ) from None


def described(options: Mapping[str, Any], *, weights: bool = True) -> dict[str, Any]:
    """The options of model=hf, complete: null is filled in from the config.json of `path`. weights:
    False leaves those of the folder alone, if it has any.

    Raises ValueError naming the option: no folder with config.json and safetensors at `path`, a
    model that transformers does not know, a size that is not the model's.
    """
    given = options.get("path")
    if not given:
        raise ValueError(
            "model.path=null: model=hf needs a local folder with config.json and safetensors"
        )
    folder, what = Path(str(given)).expanduser(), f"model.path={given}"
    files = files_of(folder, what) if weights else [_config_file(folder, what)]
    try:
        raw = json.loads((folder / "config.json").read_text())
        assert isinstance(raw, dict)
    except (AssertionError, ValueError):
        raise ValueError(f"{what}: its config.json is no JSON object") from None
    config = settings_of(raw, what).get_text_config()
    found = {name: _first(config, theirs) for name, theirs in (SIZES | MORE_SIZES).items()}
    if missing := [name for name in SIZES if not isinstance(found[name], int)]:
        raise ValueError(f"{what}: its config.json does not say model.{missing[0]}")
    found["tie_head"] = bool(found["tie_head"])
    if found["layer_norm_eps"] is None:
        found["layer_norm_eps"] = 1e-6
    filled = dict(options)
    for name, value in found.items():
        if filled.get(name) not in (None, value):
            raise ValueError(
                f"model.{name}={filled[name]}: the config.json of {what} says {value}; leave it "
                "null"
            )
        filled[name] = value
    most = _first(config, MOST_POSITIONS)
    if filled.get("block_size") is None:
        filled["block_size"] = min(most or MOST_TOKENS, MOST_TOKENS)
    elif most is not None and filled["block_size"] > most:
        raise ValueError(
            f"model.block_size={filled['block_size']}: the config.json of {what} allows at most "
            f"{most} (max_position_embeddings)"
        )
    dropouts = [name for name in DROPOUTS if isinstance(getattr(config, name, None), int | float)]
    if filled.get("dropout") is None:
        filled["dropout"] = float(max((getattr(config, name) for name in dropouts), default=0.0))
    else:
        if filled["dropout"] and not dropouts:
            raise ValueError(f"model.dropout={filled['dropout']}: {what} has no dropout; give 0")
        raw |= dict.fromkeys(dropouts, filled["dropout"])
    return filled | {"architecture": json.dumps(raw, sort_keys=True), "sha256": _sha256(files)}


def files_of(folder: Path, what: str) -> list[Path]:
    """What decides the model: config.json and the weights."""
    config = _config_file(folder, what)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(
            path.name for end in ("bin", "pt", "pth") for path in folder.glob(f"*.{end}")
        )
        why = f"; {pickles[0]} is a pickle, which can run code when it is read" if pickles else ""
        raise ValueError(
            f"{what}: holds no *.safetensors{why}; save_pretrained(...) of transformers writes them"
        )
    return [config, *sorted(folder.glob("*.safetensors.index.json")), *weights]


def _config_file(folder: Path, what: str) -> Path:
    if not folder.is_dir():
        raise ValueError(
            f"{what}: no such folder; a model is read from a local folder, and never downloaded"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{what}: holds no config.json")
    return folder / "config.json"


def _sha256(files: list[Path]) -> str:
    """Of the names and contents of `files`."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(
                f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return whole.hexdigest()


def settings_of(raw: Mapping[str, Any], what: str) -> Any:
    """The config object of transformers. Raises ValueError for a model that it doesn't know."""
    package = transformers()
    kind = raw.get("model_type")
    try:
        return type(package.AutoConfig.for_model(kind)).from_dict(dict(raw))
    except ValueError as error:
        raise ValueError(
            f"{what}: model_type={kind!r}: transformers {package.__version__} has no such "
            f"model, and code of a folder's own is not run ({str(error).splitlines()[0][:100]})"
        ) from None


def _first(config: Any, names: tuple[str, ...]) -> Any:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if value is not None), None)


def settings(config: ModelConfig) -> Any:
    """The config object of transformers for the model of `config`."""
    assert config.architecture is not None
    return settings_of(json.loads(config.architecture), f"model.path={config.path}")


def most_tokens(config: ModelConfig) -> int | None:
    """Tokens that the model can take at most; None: any number."""
    most: int | None = _first(settings(config).get_text_config(), MOST_POSITIONS)
    return most


def shallower(config: ModelConfig, n_layer: int) -> ModelConfig:
    """The model of `config` with its first `n_layer` blocks only. What config.json lists block by
    block is cut.
    """
    assert config.architecture is not None
    raw = json.loads(config.architecture)
    text = settings(config).get_text_config()
    # The names of config.json, which are the model's own, at the level where the language model is.
    inner = next((v for v in raw.values() if _is_of(v, text)), raw)
    for name, value in inner.items():
        if isinstance(value, list) and len(value) == config.n_layer:
            inner[name] = value[:n_layer]
    inner[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = n_layer
    return dataclasses.replace(config, n_layer=n_layer, architecture=json.dumps(raw))


def _is_of(value: Any, text: Any) -> bool:
    """Whether `value`, a part of config.json, is that of the language model `text` within it."""
    return isinstance(value, dict) and value.get("model_type") == text.model_type


def kinds_of_blocks(config: ModelConfig) -> list[Any]:
    """Of each block of the model what tells it from others: the sizes of its parameters, and its
    entries in lists of config.json, such as layer_types.
    """
    text = settings(config).get_text_config()
    lists = [v for v in vars(text).values() if isinstance(v, list) and len(v) == config.n_layer]
    with torch.device("meta"):
        model = transformers().AutoModelForCausalLM.from_config(settings(config))
    blocks = blocks_of(model, config.n_layer)[1]
    return [
        ([(name, p.shape) for name, p in block.named_parameters()], [of[i] for of in lists])
        for i, block in enumerate(blocks)
    ]


def blocks_of(model: nn.Module, n_layer: int) -> tuple[str, nn.ModuleList]:
    """The list of blocks in a model of transformers, and its name; an empty one if it has none."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    return max(
        lists.items(),
        key=lambda pair: (len(pair[1]) == n_layer, len(pair[1])),
        default=("", nn.ModuleList()),
    )
