"""Where the noise of a training step comes from: one number, from which each module makes its own.

`basis.set_noise_key(model, seed=, step=, ...)` folds these numbers into one integer on the host,
the base key. All that follows is arithmetic of tensors where the model is, about thirty operations
for all modules together: nothing is copied from the host, and a CUDA graph that has recorded
`assign_keys` draws new noise once its base key is filled with another number. A module's key mixes
the base key with its name, so its noise does not depend on which other modules there are. (Sketched
layers that read one tensor keep one sketch, by the key of the first: shared_input.py.)

Modules whose noise can be fixed are sketched layers, and lean and SUS ones that round or choose at
random. `noise_key` decides the noise; while it is None, each training forward draws a key from
PyTorch's default generator. It is no buffer: it is not saved, and DistributedDataParallel does not
overwrite it with rank 0's.

Sketched layers may also share noise (ops/shared_noise.py): what is drawn for all of them is a
function of the base key too.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor, nn

from basis.checks import whole_number
from basis.exchange import plainly_named
from basis.ops.noise import combine, draw_key, fold
from basis.ops.shared_noise import SharedNoise

NOISE_VERSION = 4
"""Changes whenever other noise follows from the same numbers: a run is then not continued."""


class HasNoiseKey(nn.Module):
    """Mixin of modules that draw noise in a training forward."""

    _noise_key: Tensor | None = None
    _fixed_noise: tuple[SharedNoise, int] | None = None
    """What layers share under the present `noise_key`, and this one's place among them."""

    @property
    def noise_key(self) -> Tensor | None:
        """int64, 0-dimensional, or a hashing (`encode_hashing`); None: each forward draws one."""
        return self._noise_key

    @noise_key.setter
    def noise_key(self, key: Tensor | None) -> None:
        self._noise_key = key
        self._fixed_noise = None

    def set_noise_key(self, key: int | Tensor, device: torch.device | None = None) -> None:
        """Fix the noise: an integer in [0, 2^63) is a seed, a tensor of B codes an explicit hashing
        (`encode_hashing`).
        """
        # A new tensor each time: a compiled graph may keep the one it was given until backward.
        if isinstance(key, Tensor):
            self.noise_key = key if device is None else key.to(device)
        else:
            self.noise_key = torch.full((), key, dtype=torch.int64, device=device)

    def fixed_or_fresh_key(self, device: torch.device) -> Tensor:
        """`noise_key` on `device`, or a new one."""
        return draw_key(device) if self.noise_key is None else self.noise_key.to(device)

    def pass_without_grad(self, device: torch.device) -> None:
        """For a forward without grad mode: move PyTorch's generator on, in training.

        A reentrant checkpoint runs its first forward so, and restores the generator for the
        recomputation, which draws the key. Had the generator not moved in between, all steps would
        draw the same noise. In eval() nothing is drawn; use `basis.set_noise_key` there, or
        checkpoints that are not reentrant.
        """
        if self.training and self.noise_key is None and not torch.is_grad_enabled():
            draw_key(device)


def base_key(*, seed: int, step: int, micro_batch: int = 0, process: int = 0) -> int:
    """The integer in [0, 2^62) from which all noise of a micro-batch follows.

    Raises ValueError, beginning with the name, for what is no whole number from 0 on.
    """
    given = {"seed": seed, "step": step, "micro_batch": micro_batch, "process": process}
    return fold(*(whole_number(name, value, least=0) for name, value in given.items()))


def _identities(names: tuple[str, ...], device: torch.device) -> Tensor:
    """A number for each name, int64 on `device`."""
    return torch.tensor([fold(name) for name in names], dtype=torch.int64).to(device)


_known_identities = functools.lru_cache(maxsize=64)(_identities)  # no copies after the first


def assign_keys(model: nn.Module, base: Tensor, *, step: int, micro_batch: int = 0) -> None:
    """Give every sketched, lean and SUS module of `model` its key, by arithmetic on `base`, a
    0-dimensional int64 tensor.

    step, micro_batch: they decide which layers learn in the next forward: those whose method learns
    at `step`, in its first micro-batch. Modules on another device than `base` get copies.
    """
    from basis.layers.attention import is_attention
    from basis.layers.conv1d import is_conv1d
    from basis.layers.spread import mesh_of
    from basis.sketched import Sketched

    modules: list[HasNoiseKey] = []
    names: list[str] = []
    places: dict[str, int] = {}  # of dense layers, sketched or not: their noise is the same then
    for name, module in plainly_named(model):
        if isinstance(module, nn.Linear) or is_conv1d(module) or is_attention(module):
            places.setdefault(name, len(places))
        if isinstance(module, HasNoiseKey):
            modules.append(module)
            names.append(name)
    if not modules:
        return
    with torch.no_grad():
        identify = _known_identities if type(base) is Tensor else _identities  # fake tensors
        identities = identify((*names, "shared by layers"), base.device)
        *keys, shared_key = combine(base, identities).unbind()
    shared = SharedNoise(shared_key, len(places))
    for module, name, key in zip(modules, names, keys, strict=True):
        fixed = None
        if isinstance(module, Sketched):
            if len(places) > 1 and name in places:
                fixed = (shared, places[name])
            module.learning = (
                micro_batch == 0
                and not module.frozen
                and module.estimator.learns_at(step - module.first_step)
            )
            if module.learning and module._state_names:
                module.shared_by = mesh_of(module.weight) or module.shared_by
        own = next((p for p in module._parameters.values() if p is not None), base)
        key = key if own.device == base.device else key.to(own.device)
        # Not by nn.Module's assignment, which takes as long as all the rest.
        vars(module).update(_noise_key=key, _fixed_noise=fixed)


def set_noise_key(
    model: nn.Module,
    *,
    seed: int,
    step: int,
    micro_batch: int = 0,
    process: int = 0,
    rank: int | None = None,
) -> None:
    """Fix the noise of every sketched, lean and SUS module as a function of seed, step,
    micro_batch, process and the module's name.

    Call it before each forward of a training step. Recomputing or resuming with the same numbers
    draws the same noise, and a layer's noise does not depend on which other layers are sketched,
    unless they read the same tensor: then it is the first one's. It also decides which layers
    learn in that forward: those whose method learns at `step`, in its first micro-batch. process:
    the number of this process where several train one model, so that each has noise of its own.
    rank: the older name of `process`, deprecated.

    Raises ValueError, beginning with the name, for what is no whole number from 0 on.
    """
    if rank is not None:
        warnings.warn("set_noise_key: rank is now called process", DeprecationWarning, stacklevel=2)
        process = rank
    key = base_key(seed=seed, step=step, micro_batch=micro_batch, process=process)
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    base = torch.full((), key, dtype=torch.int64, device=device)
    assign_keys(model, base, step=int(step), micro_batch=int(micro_batch))
