"""Attention of transformers' models, by way of its registry of attention functions.

A module of attention there projects, rotates queries and keys, and calls the function that
`config._attn_implementation` names in `ALL_ATTENTION_FUNCTIONS`. Its stand-in has a configuration
of its own, a copy that names `NAME`, which is registered when the first stand-in is made; nothing
of transformers is imported for it. So the model's configuration, its masks and all other modules
stay as they were, and `basis.revert` gives the module its configuration back.

The function is PyTorch's attention with q, k, v and the output in 8 bits (sdpa.py): after rotation,
k and v with the heads that they have. Rotation itself keeps cosines and sines, which all layers
share. Taken are modules whose model was loaded with `attn_implementation="sdpa"`, the default; it
stays as it is, in bytes too, where a position bias is learned (T5).

What is exact: the output, bit by bit where PyTorch would take the same kernel. Kept and errors:
sdpa.py. A forward with `use_cache=True`, the default of transformers, puts keys and values into a
cache that lives as long as what the model returns: train with `use_cache=False`.
"""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from basis.lean.sdpa import lean_sdpa
from basis.lean.subclass import LeanSubclass, plain_class
from basis.noise_key import HasNoiseKey
from basis.ops.matrix import cast_for_autocast

NAME = "basis_sdpa"
REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_SPECIAL = ("position_bias", "softcap")
"""What PyTorch's attention is given otherwise, or not at all."""
_READERS = ("o_proj", "out_proj", "c_proj", "dense")
"""What the dense layer that reads the output may be called."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """The attention function: q (b, h, T, d), k and v (b, g, S, d) -> the output (b, T, h, d).

    As transformers' own of PyTorch's attention, which is called where nothing can be gained.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = query.shape[2] > 1 and attention_mask is None and causal
    assert isinstance(module, LeanRegistered)
    special = any(more.get(name) is not None for name in _SPECIAL)
    if module.rounds(query, key, value) and not special:
        q, k, v = (cast_for_autocast(x) for x in (query, key, value))
        if causal and k.shape[2] > q.shape[2]:
            k, v = (x[:, :, : q.shape[2]] for x in (k, v))
        noise_key = module.fixed_or_fresh_key(q.device)
        output = lean_sdpa(
            q,
            k,
            v,
            attention_mask,
            noise_key,
            causal=causal,
            dropout=dropout,
            scale=scaling,
            whole=module.output_is_kept(),
        )
        if output is not None:
            return output.transpose(1, 2).contiguous(), None
    module.pass_without_grad(query.device)
    more |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    plain = _registry(module)["sdpa"]
    result: tuple[Tensor, None] = plain(module, query, key, value, attention_mask, **more)
    return result


class LeanRegistered(LeanSubclass, HasNoiseKey):
    """Mixin of modules of attention that call `attend`."""

    lean_config: Any

    @property
    def own_names(self) -> frozenset[str]:
        return frozenset({"lean_config"})

    @classmethod
    def from_attention(cls, module: nn.Module) -> LeanRegistered:
        """The same module with the same children, hooks and attributes but `config`."""
        plain = module.original() if isinstance(module, LeanRegistered) else module
        new = cls.of(plain)
        new._use_own_config()
        return new

    def _use_own_config(self) -> None:
        _registry(self).register(NAME, attend)
        self.lean_config = self.config
        config = copy.copy(self.lean_config)
        vars(config)["_attn_implementation_internal"] = NAME  # of this one alone, no part of it
        vars(self)["config"] = config

    def original(self) -> nn.Module:
        plain = super().original()
        vars(plain)["config"] = self.lean_config
        return plain

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _registry(self).register(NAME, attend)  # in a process that loads it

    def rounds(self, *tensors: Tensor) -> bool:
        """Whether a forward now is to be trained on, from these tensors."""
        if self.for_inference() or not torch.is_grad_enabled():
            return False
        return any(x.requires_grad for x in tensors)

    def output_is_kept(self) -> bool:
        """Whether a dense layer of this module keeps the output as it is."""
        readers = (getattr(self, name, None) for name in _READERS)
        return any(type(r) is nn.Linear and r.weight.requires_grad for r in readers)


def _registry(module: nn.Module) -> Any:
    """transformers' registry, as the file of the module's class knows it."""
    return getattr(sys.modules[plain_class(module).__module__], REGISTRY)


def is_registered(module: nn.Module) -> bool:
    """Whether `module` is one that calls an attention function by name, and PyTorch's now."""
    if isinstance(module, LeanRegistered):
        return True
    if getattr(getattr(module, "config", None), "_attn_implementation", None) != "sdpa":
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and REGISTRY in code.co_names
