"""The typed configuration of a run: what conf/*.yaml and the command line may say, and what is refused.

conf/ holds values, this module holds types. Hydra composes the values; `load` puts them into the dataclasses below before
anything is allocated or written, so that a misspelt key, a wrong type or an impossible combination ends the program in a few
lines that name the option. Each group's checks stand in its own `__post_init__`, next to the declaration; combinations of
groups are checked in `Config.__post_init__`.

The options of a method are the fields of its estimator's dataclass (basis/estimators/), plus the scope: which layers. So a
new estimator needs no line here. Zeroth order is no estimator of a layer's dW, it replaces backward (zeroth_order.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from basis import ESTIMATORS, Estimator
from basis.budget import parse_share
from data.options import DataOptions
from harness.activations import ActivationsOptions
from harness.adaptive_rank import AdaptiveRankOptions
from harness.attention import AttentionOptions
from harness.device import DEVICES, PRECISIONS
from harness.optim import OptimOptions
from harness.tracker import TrackerOptions
from harness.zeroth_order import ZerothOrder
from models import GPTConfig

# For values that follow from others: ${product:${micro_batch_size},${model.block_size}}.
OmegaConf.register_new_resolver("product", lambda *factors: math.prod(factors), replace=True)

ZEROTH_ORDER = "zeroth_order"
WHOLE_MODEL = ("exact", ZEROTH_ORDER)
"""Methods that have no choice of layers and no budget."""
ALLOCATIONS = ("uniform", "variance")


@dataclass
class MethodOptions:
    """How dW is formed (`name`, one of basis.ESTIMATORS or zeroth_order) and in which dense layers (shell patterns of names).

    budget: a share such as 1/24: each layer's knob (rank, rows, bits) is set so that it keeps this share of the bytes of its
    input; the option of that name is then not looked at. null: as the options say. allocation: how a budget is divided:
    uniform, the same share for every layer, or variance, as many bytes in all, by the error of dW in the first batches.
    """

    name: str = "exact"
    budget: str | None = None
    allocation: str = "uniform"
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)


@dataclass
class EvalOptions:
    """Every `every` steps the loss of the first batches * batch_size windows of the validation file; 0: only at the end."""

    every: int = 100
    batches: int = 8
    batch_size: int = 8

    def __post_init__(self) -> None:
        _at_least(0, "eval", every=self.every)
        _at_least(1, "eval", batches=self.batches, batch_size=self.batch_size)


@dataclass
class CheckpointOptions:
    """Every `every` steps (0: only at the end); the last `keep` and, if `best`, the one of lowest validation loss stay."""

    every: int = 1000
    keep: int = 2
    best: bool = True

    def __post_init__(self) -> None:
        _at_least(0, "checkpoint", every=self.every)
        _at_least(1, "checkpoint", keep=self.keep)


@dataclass
class LogOptions:
    """A row of metrics every `every` steps; `progress`: a bar on a terminal."""

    every: int = 20
    progress: bool = True

    def __post_init__(self) -> None:
        _at_least(1, "log", every=self.every)


@dataclass
class DiagnosticsOptions:
    """Every `every` steps (0: never) exact dW beside the estimate, per sketched layer, and over `masks` further noises; with
    attention=sus also the entries of a row that it keeps.

    monitor: with every row of metrics, of each dense layer the gradient's norm and the activations' energy, from sketches.
    """

    every: int = 0
    masks: int = 0
    monitor: bool = False

    def __post_init__(self) -> None:
        _at_least(0, "diagnostics", every=self.every, masks=self.masks)
        if self.masks == 1:
            raise ValueError("diagnostics.masks=1: must be 0, or at least 2 to tell bias from variance")


@dataclass
class Config:
    """One run. Raises ValueError naming the dotted option; see the groups' own classes for theirs."""

    steps: int = 2000
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    compile: bool | None = None
    deterministic: bool = False
    micro_batch_size: int = 1
    tokens_per_step: int | None = None
    experiment_name: str = "default"
    model: GPTConfig = field(default_factory=GPTConfig)
    method: MethodOptions = field(default_factory=MethodOptions)
    adaptive_rank: AdaptiveRankOptions = field(default_factory=AdaptiveRankOptions)
    activations: ActivationsOptions = field(default_factory=ActivationsOptions)
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    log: LogOptions = field(default_factory=LogOptions)
    diagnostics: DiagnosticsOptions = field(default_factory=DiagnosticsOptions)
    tracker: TrackerOptions = field(default_factory=TrackerOptions)

    def __post_init__(self) -> None:
        _at_least(1, "", steps=self.steps, micro_batch_size=self.micro_batch_size)
        _at_least(0, "", seed=self.seed)
        if self.seed >= 1 << 63:
            raise ValueError(f"seed={self.seed}: must be less than 2^63")
        if self.method.name in WHOLE_MODEL and (self.method.include or self.method.exclude):
            kind = "exact backpropagation" if self.method.name == "exact" else self.method.name
            raise ValueError(f"method.include, method.exclude: {kind} concerns all layers; leave them empty")
        if self.method.budget is not None:
            if self.method.name in WHOLE_MODEL:
                keeps = "exact backpropagation keeps everything" if self.method.name == "exact" else "it keeps nothing"
                raise ValueError(f"method.budget={self.method.budget}: {keeps}; leave it null")
            share_of(self.method)
        if self.method.allocation not in ALLOCATIONS:
            raise ValueError(f"method.allocation={self.method.allocation!r}: must be one of {', '.join(ALLOCATIONS)}")
        if self.method.allocation != "uniform" and self.method.budget is None:
            raise ValueError(
                f"method.allocation={self.method.allocation}: divides a budget; give method.budget, such as 1/8"
            )
        self.adaptive_rank.check_method(self.method.name, self.method.budget)
        if self.diagnostics.monitor and self.method.name == ZEROTH_ORDER:
            raise ValueError("diagnostics.monitor=true: zeroth_order has no backward, and so no gradients to watch")
        if self.device not in DEVICES:
            raise ValueError(f"device={self.device!r}: must be one of {', '.join(DEVICES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: must be one of {', '.join(PRECISIONS)}")
        if self.optim.warmup_steps > self.steps:
            raise ValueError(f"optim.warmup_steps={self.optim.warmup_steps}: must not exceed steps={self.steps}")
        if self.attention.name == "sus" and self.model.dropout:
            raise ValueError(
                f"model.dropout={self.model.dropout}: must be 0 with attention=sus, which knows no dropout of attention"
            )
        per_micro_batch = self.micro_batch_size * self.model.block_size
        tokens = self.tokens_per_step
        if tokens is not None and (tokens < 1 or tokens % per_micro_batch):
            below = max(tokens // per_micro_batch, 1) * per_micro_batch
            raise ValueError(
                f"tokens_per_step={tokens}: must be a multiple of micro_batch_size * model.block_size = "
                f"{self.micro_batch_size} * {self.model.block_size} = {per_micro_batch}; "
                f"nearest are {below} and {below + per_micro_batch}"
            )

    @property
    def micro_batches(self) -> int:
        """Forward-backward passes per step."""
        return self.step_tokens // (self.micro_batch_size * self.model.block_size)

    @property
    def step_tokens(self) -> int:
        """Tokens per optimiser step."""
        return self.tokens_per_step or self.micro_batch_size * self.model.block_size

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, lists and scalars."""
        return dataclasses.asdict(self)


def _at_least(least: int, group: str, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{group + '.' if group else ''}{name}={value}: must be at least {least}")


@functools.cache
def method_schema(name: str) -> type[MethodOptions]:
    """MethodOptions with the fields of the estimator `name`: the typed form of conf/method/<name>.yaml.

    Raises ValueError for a name that is not registered.
    """
    if name not in ESTIMATORS and name != ZEROTH_ORDER:
        raise ValueError(f"method.name={name!r}: must be one of {', '.join([*ESTIMATORS, ZEROTH_ORDER])}")
    kind = _kind(name)
    hints = get_type_hints(kind)
    options = [
        (f.name, hints[f.name], field(default=f.default) if f.default is not dataclasses.MISSING else field())
        for f in dataclasses.fields(kind)
    ]
    return dataclasses.make_dataclass(f"{name}_options", options, bases=(MethodOptions,), kw_only=True)


def _kind(name: str) -> Any:
    """The dataclass whose fields are the options of the method `name`."""
    return ZerothOrder if name == ZEROTH_ORDER else ESTIMATORS[name]


def make_method(method: MethodOptions) -> Estimator | ZerothOrder:
    """What `method` describes. Raises ValueError naming the dotted option (`method.rank=0: ...`)."""
    kind = _kind(method.name)
    try:
        made: Estimator | ZerothOrder = kind(**{f.name: getattr(method, f.name) for f in dataclasses.fields(kind)})
    except ValueError as error:
        raise ValueError(f"method.{error}") from None
    return made


def make_estimator(method: MethodOptions) -> Estimator:
    """`make_method` of a method that estimates dW layer by layer."""
    estimator = make_method(method)
    assert isinstance(estimator, Estimator), method.name
    return estimator


def share_of(method: MethodOptions) -> float:
    """`method.budget` as a number. Raises ValueError naming the option."""
    assert method.budget is not None
    try:
        return parse_share(method.budget)
    except ValueError as error:
        raise ValueError(f"method.{error}") from None


def load(values: DictConfig) -> Config:
    """Typed, checked configuration from composed values. Raises ValueError in the words of the user's options."""
    try:
        name = OmegaConf.select(values, "method.name")
        schema = OmegaConf.structured(Config)
        schema.method = OmegaConf.structured(method_schema(str(name)))
        config = OmegaConf.to_object(OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{key}{str(error.msg).splitlines()[0]}") from error
    assert isinstance(config, Config)
    make_method(config.method)  # its options are checked by making it once
    return config
