"""HF: a causal language model of transformers, from a local folder, as a model of this project.

    python train.py model=hf model.path=my-llama

The folder holds what `save_pretrained` writes: config.json and weights as safetensors. Nothing is
downloaded and nothing in the folder is executed: pickled weights (.bin) are refused, and so is a
model that brings its own code. The weights are the starting point, in float32, whatever the seed.

What is exact: the model, and its loss. The loss is the model's own, given the same inputs and
targets. In training `basis.fuse_head` takes it without forming logits; evaluation forms them, of
eval.batch_size windows at once. Text is generated without a cache of keys, from whole logits.

`described` reads config.json once, before a run starts, and fills in the sizes that the options
leave open. It adds the file itself (`architecture`) and a sha256 of config.json and of the weights.
So a checkpoint says which model it continues: another model under the same path is refused, a
folder that was moved is not, and a run can be read back without the folder.

`blocks`, `wte` and `head` are looked up in the inner model; each parameter has one name, that of
transformers with `inner.` in front. Patterns of layers may say `blocks` and `head` (`names`).
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import basis
from basis.causal_lm import is_fused
from models.base import LanguageModel
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
DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout",
            "dropout", "activation_dropout")  # fmt: skip


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError:
        raise ValueError(
            "model.path: model=hf needs the package transformers; "
            "pip install basis-sketch[integrations]"
        ) from None


def described(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of model=hf, complete: null is filled in from the config.json of `path`.

    Raises ValueError naming the option: no folder with config.json and safetensors at `path`, a
    model that transformers does not know, a size that is not the model's.
    """
    given = options.get("path")
    if not given:
        raise ValueError(
            "model.path=null: model=hf needs a local folder with config.json and safetensors"
        )
    folder, what = Path(str(given)).expanduser(), f"model.path={given}"
    files = _files(folder, what)
    try:
        raw = json.loads((folder / "config.json").read_text())
        assert isinstance(raw, dict)
    except (AssertionError, ValueError):
        raise ValueError(f"{what}: its config.json is no JSON object") from None
    config = _config(raw, what).get_text_config()
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
    most = _first(config, ("max_position_embeddings",))
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


def _files(folder: Path, what: str) -> list[Path]:
    """What decides the model: config.json and the weights."""
    if not folder.is_dir():
        raise ValueError(
            f"{what}: no such folder; a model is read from a local folder, and never downloaded"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{what}: holds no config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(
            path.name for end in ("bin", "pt", "pth") for path in folder.glob(f"*.{end}")
        )
        why = f"; {pickles[0]} is a pickle, which can run code when it is read" if pickles else ""
        raise ValueError(
            f"{what}: holds no *.safetensors{why}; save_pretrained(...) of transformers writes them"
        )
    return [folder / "config.json", *sorted(folder.glob("*.safetensors.index.json")), *weights]


def _sha256(files: list[Path]) -> str:
    """Of the names and contents of `files`."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(
                f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return whole.hexdigest()


def _config(raw: Mapping[str, Any], what: str) -> Any:
    """The config object of transformers. Raises ValueError for a model that it doesn't know."""
    transformers = _transformers()
    kind = raw.get("model_type")
    try:
        return type(transformers.AutoConfig.for_model(kind)).from_dict(dict(raw))
    except ValueError as error:
        raise ValueError(
            f"{what}: model_type={kind!r}: transformers {transformers.__version__} has no such "
            f"model, and code of a folder's own is not run ({str(error).splitlines()[0][:100]})"
        ) from None


def _first(config: Any, names: tuple[str, ...]) -> Any:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if value is not None), None)


class HF(LanguageModel):
    """The model of a folder. weights: read them from there; False leaves them as drawn, for a
    state_dict to be loaded. On the device meta nothing is read either.

    Raises ValueError naming model.path if the folder is gone, or lacks a weight.
    """

    def __init__(self, config: ModelConfig, *, weights: bool = True) -> None:
        super().__init__(config)
        assert config.architecture is not None
        what = f"model.path={config.path}"
        settings = _config(json.loads(config.architecture), what)
        if weights and torch.get_default_device().type != "meta":
            self.inner = _loaded(config, settings, what)
        else:
            auto = _transformers().AutoModelForCausalLM
            self.inner = auto.from_config(settings, dtype=torch.float32)
        self.inner.train()  # from_pretrained leaves it in eval()
        lists = {n: m for n, m in self.named_modules() if isinstance(m, nn.ModuleList)}
        head = self.inner.get_output_embeddings()
        if not lists or not isinstance(head, nn.Linear):
            raise ValueError(f"{what}: {type(self.inner).__name__} has no layers or no dense head")
        blocks = max(lists, key=lambda name: (len(lists[name]) == config.n_layer, len(lists[name])))
        name = next(n for n, m in self.named_modules() if m is head)
        self._names = {"blocks": blocks, "head": name}

    @property
    def names(self) -> dict[str, str]:
        return self._names

    @property
    def wte(self) -> nn.Embedding:  # type: ignore[override]
        return cast(nn.Embedding, self.inner.get_input_embeddings())

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return cast(nn.ModuleList, self.get_submodule(self._names["blocks"]))

    @property
    def head(self) -> nn.Linear:  # type: ignore[override]
        return cast(nn.Linear, self.inner.get_output_embeddings())

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        self.check_length(tokens)
        if targets is None:
            logits: Tensor = self.inner(input_ids=tokens, use_cache=False).logits
            return logits
        if self.training and torch.is_grad_enabled() and not is_fused(self.head):
            basis.unfuse_head(self.inner)  # of a head that was exchanged since
            basis.fuse_head(self.inner)
        targets = targets.contiguous()
        loss: Tensor = self.inner(
            input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False
        ).loss
        return loss


def _loaded(config: ModelConfig, settings: Any, what: str) -> Any:
    """The model with the weights of the folder."""
    assert config.path is not None
    folder = Path(config.path).expanduser()
    _files(folder, what)
    try:
        model, told = _transformers().AutoModelForCausalLM.from_pretrained(
            folder,
            config=settings,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{what}: {str(error).splitlines()[0]}") from error
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"{what}: the weights lack {missing[0]} ({len(missing)} in all)")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the file's pages: the file may change
    return model
