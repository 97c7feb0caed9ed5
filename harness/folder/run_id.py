"""What a run is called: an id that stays with it, and the labels by which people find it among
others.

Both live in `run.json` in the run directory, whether or not a tracker is used. The id is drawn
once; the same command, started again after an interruption, finds it there and continues the same
run in the tracker instead of opening a second. The labels are noted beside it, so that
`scripts/sync.py` can rebuild the run in wandb without asking the program that made it.

`run_labels` makes the labels from plain values so that a sweep reads well without clicking. wandb's
default view puts runs of equal group and job type together and draws one curve for them, mean and
spread. So the group is the experiment and the job type what is compared in it, "basis R=32"; runs
are named "basis R=32 seed=0", with tags "basis" and "R=32" to filter by.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from basis.estimator import Estimator
from data.storage import write_atomic
from harness.folder.bounded import json_object

if TYPE_CHECKING:
    from harness.config import Config

RUN_FILE = "run.json"
TAG_LIMIT = 64  # characters, the limit of wandb


@dataclass(frozen=True)
class Labels:
    """How a run is shown among others."""

    name: str
    group: str | None
    job_type: str
    tags: list[str]


def run_labels(
    *,
    method: str,
    seed: int,
    settings: Mapping[str, object] | None = None,
    experiment: str | None = None,
    job_type: str | None = None,
    tags: Sequence[str] = (),
) -> Labels:
    """The labels of a run: `run_labels(method="basis", settings={"R": 32}, seed=0,
    experiment="rank_sweep")`.

    `settings` are the few values that tell this run from its neighbours in a sweep. Those that are
    None do not apply to the method and are left out; floats are shortened to six digits. A setting
    too long for a tag is in the name only.
    """
    pairs = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in (settings or {}).items()
        if value is not None
    ]
    fitting = [tag for tag in (method, *pairs) if 1 <= len(tag) <= TAG_LIMIT]
    return Labels(
        name=" ".join([method, *pairs, f"seed={seed}"]),
        group=experiment,
        job_type=job_type or " ".join([method, *pairs])[:TAG_LIMIT],
        tags=list(dict.fromkeys([*fitting, *tags])),
    )


def label_options(config: Config) -> dict[str, object]:
    """The few options that tell runs of one method apart in a sweep, for `run_labels`.

    These are the options of the method that have no default (R first among them), those at another
    value than their default, the budget in place of the knob that it sets, and what adaptive rank
    and attention add. Numbers with a default (shrinkage, eps) are left out, and so is an option
    that the size of a batch decides (rows).
    """
    method = config.method
    made = cast(Any, method.estimator if method.zeroth_order is None else method.zeroth_order)
    knob = method.estimator.knob
    found: dict[str, object] = {}
    rows = config.micro_batch_size * config.model.block_size
    for option in dataclasses.fields(made):
        value = getattr(made, option.name)
        if method.budget is not None and option.name == knob:
            found["budget"] = method.budget.text
        elif option.default is dataclasses.MISSING or (
            value != _default(made, option, rows) and not isinstance(value, float)
        ):
            found["R" if option.name == "rank" else option.name] = value
    if method.varies_by_layer:
        found["allocation"] = "variance"
    return found | config.adaptive_rank.label_options() | config.attention.label_options()


def _default(made: Any, option: dataclasses.Field[Any], rows: int) -> Any:
    """The value of `option` in the method `made` if it isn't given, for inputs of `rows` rows."""
    plain = dataclasses.replace(made, **{option.name: option.default})
    return getattr(plain.for_inputs(rows) if isinstance(plain, Estimator) else plain, option.name)


def new_run_id() -> str:
    """Ten characters that wandb, a shell, YAML and Hydra all read as plain text: a letter, then
    letters and digits.
    """
    rest = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(9))
    return secrets.choice(string.ascii_lowercase) + rest


def run_id(run_dir: Path, known: str | None = None) -> str:
    """The id of the run in `run_dir`, drawn at the first call and kept in `run.json` (a wandb sweep
    agent brings one).

    known: the id that other files of the run have, for a `run.json` that is lost.

    Call it from one process (rank 0). Raises ValueError naming the file if it is not what this
    module wrote.
    """
    written = read_run_file(run_dir).get("id")
    known = known if written is None else written
    if known is None:
        agent = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
        known = agent or new_run_id()
    if not isinstance(known, str) or not re.fullmatch(r"[\w-]{1,64}", known):
        raise ValueError(
            f"{Path(run_dir) / RUN_FILE}: id {known!r} must be 1 to 64 letters, digits, _ or -"
        )
    if written is None:
        update_run_file(run_dir, {"id": known})
    return known


def read_run_file(run_dir: Path) -> dict[str, Any]:
    """What `run.json` says, {} if there is none. Raises ValueError naming the file if it is not a
    JSON object.
    """
    path = Path(run_dir) / RUN_FILE
    if not path.exists():
        return {}
    return json_object(path)


def update_run_file(run_dir: Path, values: Mapping[str, object]) -> None:
    """Set some keys of `run.json` and keep the others; the directory is created if absent."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    write_atomic(
        Path(run_dir) / RUN_FILE, json.dumps(read_run_file(run_dir) | dict(values), indent=2) + "\n"
    )
