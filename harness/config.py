"""The typed configuration of a run: what conf/*.yaml and the command line may say, and what is
refused.

conf/ holds values, this module holds types. Hydra composes the values; `load` puts them into the
dataclasses below before anything is allocated or written, so that a misspelt key, a wrong type or
an impossible combination ends the program in a few lines that name the option. Each group's checks
stand in its own `__post_init__`, next to the declaration; combinations of groups are checked in
`Config.__post_init__`.

The options of a method stand in method.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import (
    asdict,
    dataclass,
    field,
    fields,
    is_dataclass,
    replace,
)
from typing import Any

from data.options import DataOptions
from harness.activations import ActivationsOptions
from harness.attention import OF_SUS, AttentionOptions
from harness.device import DEVICES, PRECISIONS, launch_bound
from harness.method import Method
from harness.optim import OptimOptions
from harness.options import (
    CheckpointOptions,
    DiagnosticsOptions,
    EvalOptions,
    LogOptions,
    ResumeOptions,
    at_least,
)
from harness.parallel import KINDS
from harness.profile import ProfileOptions
from harness.rank_control import AdaptiveRankOptions
from harness.tracker import TrackerOptions
from models import ModelConfig

PURPOSES = ("training", "tuning")
"""training: a result. tuning: it serves to choose options, and enters no average."""


@dataclass(frozen=True)
class Config:
    """One run. Raises ValueError naming the dotted option; each group's class checks its own."""

    steps: int = 2000
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    compile: bool | None = None
    cuda_graph: bool | None = None
    deterministic: bool = False
    micro_batch_size: int = 1
    tokens_per_step: int | None = None
    experiment_name: str = "default"
    purpose: str = "training"
    parallel: str = "none"
    world_size: int = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    method: Method = field(default_factory=Method)
    adaptive_rank: AdaptiveRankOptions = field(default_factory=AdaptiveRankOptions)
    activations: ActivationsOptions = field(default_factory=ActivationsOptions)
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    log: LogOptions = field(default_factory=LogOptions)
    diagnostics: DiagnosticsOptions = field(default_factory=DiagnosticsOptions)
    profile: ProfileOptions = field(default_factory=ProfileOptions)
    resume: ResumeOptions = field(default_factory=ResumeOptions)
    tracker: TrackerOptions = field(default_factory=TrackerOptions)

    def __post_init__(self) -> None:
        at_least(
            1,
            "",
            steps=self.steps,
            micro_batch_size=self.micro_batch_size,
            world_size=self.world_size,
        )
        at_least(0, "", seed=self.seed)
        if self.seed >= 1 << 63:
            raise ValueError(f"seed={self.seed}: must be less than 2^63")
        self.adaptive_rank.check_method(self.method)
        if self.method.zeroth_order is not None:
            self._check_without_backward()
        self._check_parallel()
        if self.device not in DEVICES:
            raise ValueError(f"device={self.device!r}: must be one of {', '.join(DEVICES)}")
        if self.purpose not in PURPOSES:
            raise ValueError(f"purpose={self.purpose!r}: must be one of {', '.join(PURPOSES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision={self.precision!r}: must be one of {', '.join(PRECISIONS)}"
            )
        if self.cuda_graph and (why := self._not_captured()):
            raise ValueError(f"cuda_graph=true: {why}; give cuda_graph=null or false")
        if self.optim.warmup_steps > self.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps}: must not exceed "
                f"steps={self.steps}; for so few give it too"
            )
        if self.attention.name == "sus" and self.model.dropout:
            raise ValueError(
                f"model.dropout={self.model.dropout}: must be 0 with attention=sus, which knows no "
                "dropout of attention"
            )
        if self.model.family == "llama":
            self._check_llama()
        elif self.model.family == "hf":
            self._check_hf()
        least, tokens = self._least_tokens, self.tokens_per_step
        if tokens is not None and (tokens < 1 or tokens % least):
            below = max(tokens // least, 1) * least
            sizes = {
                "micro_batch_size": self.micro_batch_size,
                "model.block_size": self.model.block_size,
            }
            if self.world_size > 1:
                sizes["world_size"] = self.world_size
            raise ValueError(
                f"tokens_per_step={tokens}: must be a multiple of {' * '.join(sizes)} = "
                f"{' * '.join(map(str, sizes.values()))} = {least}; nearest are {below} and "
                f"{below + least}"
            )

    def _check_llama(self) -> None:
        """What would be without effect there, or is for equal heads only."""
        if self.activations.name == "recompute":
            raise ValueError(
                "activations=recompute: makes outputs of LayerNorm and GELU again, which "
                "model.family=llama does not have; give plain, lean, checkpoint or budget"
            )
        if self.attention.name == "sus" and self.model.kv_heads != self.model.n_head:
            raise ValueError(
                f"attention=sus: needs as many heads of keys as of queries; give model.n_kv_head="
                f"{self.model.n_head} or null"
            )

    def _check_hf(self) -> None:
        """What changes classes of this project's own models."""
        kept = self.activations
        if kept.name == "recompute" or kept.boundary is not None:
            option = (
                "activations=recompute"
                if kept.name == "recompute"
                else (f"activations.boundary={kept.boundary}")
            )
            raise ValueError(
                f"{option}: not with model=hf; give activations=plain, lean, budget, or checkpoint "
                "without a boundary"
            )
        if self.attention.name == "sus":
            raise ValueError("attention=sus: not with model=hf; give attention=exact")

    def _check_parallel(self) -> None:
        """Several processes: what can't be had with them."""
        kind = self.parallel
        if kind not in KINDS:
            raise ValueError(f"parallel={kind!r}: must be one of {', '.join(KINDS)}")
        if kind == "none":
            if self.world_size > 1:
                raise ValueError(
                    f"parallel=none: world_size={self.world_size} processes would each train a "
                    "model of their own; give parallel=ddp or parallel=fsdp"
                )
            return
        refused = {
            "method=zeroth_order": self.method.zeroth_order is not None,
            "cuda_graph=true": bool(self.cuda_graph),
        }
        if kind == "fsdp":
            refused |= {
                f"adaptive_rank.every={self.adaptive_rank.every}": self.adaptive_rank.every > 0,
                f"diagnostics.every={self.diagnostics.every}": self.diagnostics.every > 0,
                "diagnostics.monitor=true": self.diagnostics.monitor,
            }
        for option, given in refused.items():
            if given:
                others = "none or ddp" if kind == "fsdp" and "." in option else "none"
                raise ValueError(
                    f"{option}: not with parallel={kind}; it can be had with parallel={others}"
                )

    def _check_without_backward(self) -> None:
        """Zeroth order: what is about backward would be without effect."""
        if self.diagnostics.monitor:
            raise ValueError(
                "diagnostics.monitor=true: zeroth_order has no backward, and so no gradients to "
                "watch"
            )
        for option, value, neutral in (
            ("attention", self.attention.name, "exact"),
            ("activations", self.activations.name, "plain"),
        ):
            if value != neutral:
                raise ValueError(
                    f"{option}={value}: method=zeroth_order has no backward, so it changes "
                    f"nothing; give {option}={neutral}"
                )

    def _not_captured(self) -> str | None:
        """Why no CUDA graph can hold a step, None if one can."""
        if self.method.zeroth_order is not None:
            return "method=zeroth_order draws its directions by numbers of the host, step by step"
        if getattr(self.method.estimator, "energy", None) is not None:
            return "method.energy asks the device at each step how many directions to use"
        return None

    @property
    def captured_by_default(self) -> bool:
        """Whether cuda_graph=null is true on CUDA: where a step is launch-bound, not under a budget
        that torch.compile keeps.
        """
        rows = self.micro_batch_size * self.model.block_size
        return (
            self._not_captured() is None
            and self.parallel == "none"
            and self.activations.name != "budget"
            and launch_bound(self.model, rows)
        )

    @property
    def micro_batches(self) -> int:
        """Forward-backward passes per step, of each process."""
        return self.step_tokens // self._least_tokens

    @property
    def _least_tokens(self) -> int:
        """Tokens of one micro-batch in each process."""
        return self.micro_batch_size * self.model.block_size * self.world_size

    @property
    def step_tokens(self) -> int:
        """Tokens per optimiser step, over all processes."""
        return self.tokens_per_step or self._least_tokens

    def resolved(self, vocab_size: int) -> Config:
        """This configuration with the data's vocabulary, where model.vocab_size leaves it open."""
        if self.model.vocab_size is not None:
            return self
        return replace(self, model=replace(self.model, vocab_size=vocab_size))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, lists and scalars: the form of config.yaml."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, Method):  # the options that made it
                values[name] = value.to_dict()
            elif is_dataclass(value):
                values[name] = asdict(value)  # type: ignore[arg-type]
        return values

    def flat(self) -> dict[str, Any]:
        """Every option by dotted name: the one view that runs are compared and labelled by."""
        return flat_options(self.to_dict())


def flat_options(nested: Mapping[str, Any]) -> dict[str, Any]:
    """A run's options by dotted name, from the nested form of config.yaml.

    An option that the version which wrote it did not have is at its default. Exact attention has
    none of the options of attention=sus: older versions wrote their defaults there, or values that
    were given and not used.
    """
    given = flattened(nested)
    options = flattened(Config().to_dict()) | given
    if "purpose" not in given and str(options["experiment_name"]).endswith("_tuning"):
        options["purpose"] = "tuning"  # how versions without the option said it
    if options["attention.name"] == "exact":
        for option in OF_SUS:
            del options[f"attention.{option}"]
    return options


def flattened(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
