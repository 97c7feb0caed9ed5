"""HF: a causal language model of transformers, from a local folder, as a model of this project.

    python train.py model=hf model.path=my-llama

The folder holds what `save_pretrained` writes: config.json and weights as safetensors. Nothing is
downloaded and nothing in the folder is executed: pickled weights (.bin) are refused, and so is a
model that brings its own code. The weights are the starting point, in float32, whatever the seed.

What is exact: the model, and its loss. The loss is the model's own, given the same inputs and
targets. In training `basis.fuse_head` takes it without forming logits; evaluation forms them, of
eval.batch_size windows at once. Text is generated without a cache of keys, from whole logits.

What the folder says of its model: hf_config.py.

`blocks`, `wte` and `head` are looked up in the inner model; each parameter has one name, that of
transformers with `inner.` in front. Patterns of layers may say `blocks` and `head` (`names`).
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import basis
from basis.causal_lm import is_fused
from models.base import LanguageModel
from models.config import ModelConfig
from models.hf_config import blocks_of, files_of, settings, transformers


class HF(LanguageModel):
    """The model of a folder. weights: read them from there; False leaves them as drawn, for a
    state_dict to be loaded. On the device meta nothing is read either.

    Raises ValueError naming model.path if the folder is gone, or lacks a weight.
    """

    def __init__(self, config: ModelConfig, *, weights: bool = True) -> None:
        super().__init__(config)
        _know_windows()
        what = f"model.path={config.path}"
        found = settings(config)
        if weights and torch.get_default_device().type != "meta":
            self.inner = _loaded(config, found, what)
        else:
            auto = transformers().AutoModelForCausalLM
            self.inner = auto.from_config(found, dtype=torch.float32)
        self.inner.train()  # from_pretrained leaves it in eval()
        if self.inner.loss_type is None:  # the one that is taken then, with a warning at each call
            self.inner.loss_type = "ForCausalLM"
        blocks, found_blocks = blocks_of(self, config.n_layer)
        head = self.inner.get_output_embeddings()
        if not len(found_blocks) or not isinstance(head, nn.Linear):
            raise ValueError(f"{what}: {type(self.inner).__name__} has no layers or no dense head")
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
            logits: Tensor = self._called(tokens).logits
            return logits
        if self.training and torch.is_grad_enabled() and not is_fused(self.head):
            basis.unfuse_head(self.inner)  # of a head that was exchanged since
            basis.fuse_head(self.inner)
        targets = targets.contiguous()
        loss: Tensor = self._called(tokens, labels=targets, shift_labels=targets).loss
        return loss

    def _called(self, tokens: Tensor, **labels: Tensor) -> Any:
        global _in_windows
        _in_windows = True
        try:
            return self.inner(input_ids=tokens, use_cache=False, **labels)
        finally:
            _in_windows = False


_in_windows = False


def _know_windows() -> None:
    """Tell transformers, within a forward of HF, that each row of tokens is one sequence.

    It would look for the places where sequences begin in the positions, on the host. Where it may
    not look, in compiled graphs and on fake tensors, it makes a mask for what it might have found:
    T x T numbers, with which attention is slower and keeps repeated keys and values.
    """
    masks: Any = importlib.import_module("transformers.masking_utils")
    plain = masks.find_packed_sequence_indices
    if not hasattr(plain, "knows_windows"):

        @functools.wraps(plain)
        def find(position_ids: Tensor) -> Tensor | None:
            found: Tensor | None = None if _in_windows else plain(position_ids)
            return found

        find.knows_windows = True  # type: ignore[attr-defined]
        masks.find_packed_sequence_indices = find


def _loaded(config: ModelConfig, found: Any, what: str) -> Any:
    """The model with the weights of the folder."""
    assert config.path is not None
    folder = Path(config.path).expanduser()
    files_of(folder, what)
    try:
        model, told = transformers().AutoModelForCausalLM.from_pretrained(
            folder,
            config=found,
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
