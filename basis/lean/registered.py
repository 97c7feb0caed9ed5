"""Attention of transformers' models, by way of its registry of attention functions.

A module of attention there projects, rotates queries and keys, and calls the function that
`config._attn_implementation` names in `ALL_ATTENTION_FUNCTIONS`. Its stand-in has a configuration
of its own, a copy that names `NAME`, which is registered when the first stand-in is made; nothing
of transformers is imported for it. So the model's configuration, its masks and all other modules
stay as they were, and `basis.revert` gives the module its configuration back.

The function is PyTorch's attention with q, k, v and the output in 8 bits (sdpa.py): after rotation,
k and v with the heads that they have. Rotation itself keeps cosines and sines, which all layers
share. A position bias (T5), a cap of the scores (Gemma 2) and sinks (gpt-oss) take part in scores
that backward forms again (scores.py, sinks.py).

Taken are modules whose model was loaded with `attn_implementation="sdpa"`, the default; or "eager",
the default where scores are capped or have sinks, which PyTorch's attention can't do: if the
function for it, in the file of the class, computes what scores.py (`_caps`) or sinks.py does. A
forward that is trained on returns no probabilities, as with "sdpa", unless `output_attentions` is
asked for.

What is exact: the output, bit by bit where PyTorch would take the same kernel. Kept and errors:
sdpa.py, scores.py, sinks.py. A forward with `use_cache=True`, the default of transformers, puts
keys and values into a cache that lives as long as what the model returns: train with
`use_cache=False`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from basis.lean.scores import Scores, attended, lean_scores
from basis.lean.sdpa import lean_sdpa
from basis.lean.sinks import has_sinks, lean_sinks, sinks_of
from basis.lean.subclass import LeanSubclass
from basis.noise_key import HasNoiseKey
from basis.ops.matrix import cast_for_autocast
from basis.trial import agree, plain_class, real_numbers

NAME = "basis_sdpa"
REGISTRY = "ALL_ATTENTION_FUNCTIONS"
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
    bias = more.get("position_bias")
    trains = module.rounds(query, key, value, *(() if bias is None else (bias,)))
    if trains and not more.get("output_attentions"):
        q, k, v = (cast_for_autocast(x) for x in (query, key, value))
        if causal and k.shape[2] > q.shape[2] and not module.is_written_out:
            k, v = (x[:, :, : q.shape[2]] for x in (k, v))
            bias = None if bias is None else bias[..., : q.shape[2]]
        noise_key = module.fixed_or_fresh_key(q.device)
        if module.is_written_out:
            output = _written_out(
                module, q, k, v, attention_mask, noise_key, dropout, scaling, more
            )
        elif more.get("softcap") is not None:
            output = None  # which PyTorch's attention refuses
        elif bias is not None:
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            how = Scores(scale, 0.0, causal, dropout, learned=bias.requires_grad)
            output = lean_scores(q, k, v, bias, attention_mask, noise_key, how)
        else:
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
    more |= {"dropout": dropout, "scaling": scaling}
    if not module.is_written_out:
        more["is_causal"] = is_causal
    plain = module.plain_function()
    result: tuple[Tensor, None] = plain(module, query, key, value, attention_mask, **more)
    return result


def _written_out(
    module: LeanRegistered,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key: Tensor,
    dropout: float,
    scaling: float | None,
    more: dict[str, Any],
) -> Tensor | None:
    """Attention as `_caps` or `has_sinks` know it, with masks of numbers; None for others."""
    if mask is not None and mask.dtype == torch.bool:
        return None
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if (sinks := sinks_of(module)) is not None:
        if dropout:
            return None
        return lean_sinks(module.plain_function(), q, k, v, sinks, mask, key, scale)
    how = Scores(scale, more.get("softcap") or 0.0, False, dropout, written_out=True)
    return lean_scores(q, k, v, None, mask, key, how)


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

    @property
    def is_written_out(self) -> bool:
        """Whether the plain module has attention in single operations."""
        return bool(self.lean_config._attn_implementation == "eager")

    def plain_function(self) -> Callable[..., Any]:
        """What the plain module calls."""
        if self.is_written_out:
            return _eager(plain_class(self))
        plain: Callable[..., Any] = _registry(self)["sdpa"]
        return plain

    def output_is_kept(self) -> bool:
        """Whether a dense layer of this module keeps the output as it is."""
        readers = (getattr(self, name, None) for name in _READERS)
        return any(type(r) is nn.Linear and r.weight.requires_grad for r in readers)


def _registry(module: nn.Module) -> Any:
    """transformers' registry, as the file of the module's class knows it."""
    return getattr(sys.modules[plain_class(module).__module__], REGISTRY)


def _eager(cls: type[nn.Module]) -> Callable[..., Any]:
    """The function that the file of `cls` has for attention in single operations."""
    found: Callable[..., Any] = sys.modules[cls.__module__].eager_attention_forward
    return found


@functools.cache
def _caps(eager: Callable[..., Any]) -> bool:
    """Whether a function for attention in single operations takes a cap of the scores, and computes
    what `attended` does.
    """
    if "softcap" not in inspect.signature(eager).parameters:
        return False
    module = SimpleNamespace(num_key_value_groups=2, head_dim=8, training=False)
    with real_numbers():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 8, 5, 8, generator=generator)
        mask = torch.randn(2, 1, 5, 5, generator=generator)
        for softcap in (0.0, 1.5):
            how = Scores(0.3, softcap, written_out=True)

            def found(x: Tensor, softcap: float = softcap) -> Tensor:
                q, k, v = x.split((4, 2, 2), 1)
                cap = softcap or None
                y = eager(module, q, k, v, mask.to(x.dtype), scaling=0.3, softcap=cap)[0]
                return y.transpose(1, 2)

            def formula(x: Tensor, how: Scores = how) -> Tensor:
                q, k, v = x.split((4, 2, 2), 1)
                return attended(q, k, v, None, mask.to(x.dtype), how)[0]

            if not agree(found, formula, x, x.bfloat16()):
                return False
    return True


def is_registered(module: nn.Module) -> bool:
    """Whether `module` is one that calls an attention function by name, and one that is known."""
    if isinstance(module, LeanRegistered):
        return True
    called = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if called not in ("sdpa", "eager"):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or REGISTRY not in code.co_names:
        return False
    if called == "sdpa":
        return True
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    known = _caps if sinks_of(module) is None else has_sinks
    return eager is not None and known(eager)
