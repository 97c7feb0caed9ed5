"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a wrong run.

A checkpoint is one directory, `step_00001000/`, with two files: `state.pt` (what `torch.save` makes
of the state) and `manifest.json` (step, validation loss, and the size and SHA-256 of `state.pt`).
Three things are promised.

*It is whole or it is not there.* Both files are written into a temporary directory beside the final
one and flushed to the disk; only then does one rename give the directory its name. A process killed
at any instant leaves either no new checkpoint or a whole one, and perhaps a temporary directory
that the next save removes. One case needs more than a rename: saving a step that exists already,
since a directory cannot be renamed over a full one. The old directory first moves to a reserved
name (`.old-step_...`), and while the final name is missing the reserved one is read in its place.

*Damage is noticed.* `torch.load` reads a file with a flipped byte in a tensor without complaint,
and training would go on from wrong weights. So sizes and hashes are compared before anything is
unpickled (`manifest.py`). `load_latest` reports a damaged checkpoint by name and turns to the one
before; that is why two are kept by default.

*It can be read by anyone, safely.* Files are opened with `weights_only=True`, which runs no code
from the file. That mode refuses most types, and would do so at load time, hours after the mistake;
here they are refused when saving, with the path of the offending key. What may be stored: tensors,
parameters, numbers, strings, None, torch's dtype, device and Size, and dict, OrderedDict, list,
tuple and set of those.

Kept are the newest `keep` checkpoints and the one with the lowest validation loss. Saving step s
also removes checkpoints of *later* steps: they can only be there because the run was restarted
before them (they were damaged, say), and the next resume must not jump onto a history that this run
has left.

Cost: a save writes the state once and reads it back once for its hash (from the page cache), a load
reads it twice. Disk space: `keep` + 1 states, one more during a save. One process writes to a
folder (rank 0); any number may read, also while it writes: a checkpoint that is replaced or removed
between the listing and the reading is looked for again.
"""

import logging
import math
import os
import re
import secrets
import shutil
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data.storage import fsync_directory, naming
from harness.folder.manifest import DamagedError, read_manifest, verify, write_manifest

STATE_FILE = "state.pt"

_FINAL = re.compile(r"step_(\d{8,})")
_RESERVED = re.compile(r"\.(tmp|old)-step_(\d{8,})-[0-9a-f]{8}")
_LEAVES = (type(None), bool, int, float, complex, str, torch.Size, torch.dtype, torch.device)

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used. The message names the directory and says what is wrong."""


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint: `state` as it was given to `save`, with every tensor on the CPU."""

    step: int
    state: dict[str, Any]
    path: Path
    val_loss: float | None


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` and the best by validation loss
    stay on the disk.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Nothing is read or created before the first call. Raises ValueError if `keep` is less
        than 1.
        """
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint must be kept")
        self.folder = Path(folder)
        self.keep = keep

    def save(
        self,
        step: int,
        state: dict[str, Any],
        *,
        val_loss: float | None = None,
        run_id: str | None = None,
    ) -> Path:
        """Write the checkpoint of `step` and drop those no longer needed; returns its directory,
        durable on the disk.

        `val_loss` (nats per token) takes part in the choice of the best; None or NaN does not.
        `run_id` is noted in the manifest, for whoever looks whether the folder holds one run.
        Raises TypeError, naming the key, for a type that could not be loaded again, and OSError
        naming the file if the disk is full; the checkpoints of before are then untouched.
        """
        check_state(state)
        final = self.folder / f"step_{step:08d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean_up()
        temporary = self._reserve("tmp", final)
        temporary.mkdir()
        try:
            loss = None if val_loss is None else float(val_loss)
            _write(temporary, state, {"step": step, "val_loss": loss, "run_id": run_id})
            self._move_into_place(temporary, final)
        finally:
            if temporary.exists():  # something failed: give the space back, the disk may be full
                shutil.rmtree(temporary)
        self._prune(step)
        return final

    def load_latest(self) -> Loaded | None:
        """The newest checkpoint that is whole, or None if there is none at all.

        A damaged one is reported through `logging` and the one before is tried. Raises
        CheckpointError if all are.
        """
        complaints: list[str] = []
        waiting = list(self._existing().values())
        while waiting:
            path = waiting.pop()
            try:
                return self.load(path)
            except CheckpointError as error:
                if not path.exists():  # the run goes on meanwhile, and has newer ones
                    complaints, waiting = [], list(self._existing().values())
                    continue
                complaints.append(str(error))
                log.warning("%s; trying the one before it", error)
        if complaints:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used:\n  "
                + "\n  ".join(complaints)
                + "\nRestore one of them from a copy, or delete the folder to start over from step "
                "0."
            )
        return None

    def best(self) -> Path | None:
        """The checkpoint with the lowest validation loss (the earlier of equals), or None if none
        has one.

        Only manifests are read; `load` verifies the state.
        """
        losses = {
            path: loss
            for path in self._existing().values()
            if (loss := _val_loss(path)) is not None
        }
        return min(
            losses, key=losses.__getitem__, default=None
        )  # min takes the first of equals, and steps ascend

    def load_best(self) -> Loaded | None:
        """The checkpoint of `best`, verified, or None. Raises CheckpointError if it is damaged."""
        while (path := self.best()) is not None:
            try:
                return self.load(path)
            except CheckpointError:
                if path.exists():
                    raise  # else the run goes on meanwhile, and has another best
        return None

    def run_ids(self) -> dict[Path, str]:
        """The run that each checkpoint is of, where its manifest is sound and says it."""
        ids = {path: _fact(path, "run_id") for path in self._existing().values()}
        return {path: id for path, id in ids.items() if id is not None}

    def steps(self) -> list[int]:
        """The steps for which there is a checkpoint, ascending; they are not verified."""
        return list(self._existing())

    @staticmethod
    def load(path: Path) -> Loaded:
        """Verify and load one checkpoint directory. Raises CheckpointError if it is damaged or
        missing.
        """
        try:
            manifest = verify(Path(path))
            state = torch.load(Path(path) / STATE_FILE, weights_only=True, map_location="cpu")
        except (DamagedError, FileNotFoundError) as error:
            raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from error
        return Loaded(
            step=manifest["step"], state=state, path=Path(path), val_loss=manifest["val_loss"]
        )

    def _existing(self) -> dict[int, Path]:
        """Step -> directory, ascending. One set aside by a replacement counts while the final name
        is missing.
        """
        if not self.folder.is_dir():
            return {}
        found: dict[int, Path] = {}
        for path in sorted(
            self.folder.iterdir()
        ):  # ".old-..." sorts before "step_...", so the final name wins
            reserved = _RESERVED.fullmatch(path.name)
            if reserved and reserved[1] == "old":
                found[int(reserved[2])] = path
            elif final := _FINAL.fullmatch(path.name):
                found[int(final[1])] = path
        return dict(sorted(found.items()))

    def _reserve(self, kind: str, final: Path) -> Path:
        return self.folder / f".{kind}-{final.name}-{secrets.token_hex(4)}"

    def _move_into_place(self, temporary: Path, final: Path) -> None:
        replaced = None
        if final.exists():
            replaced = self._reserve("old", final)
            final.rename(replaced)
        temporary.rename(final)
        fsync_directory(self.folder)
        if replaced is not None:
            shutil.rmtree(replaced)

    def _clean_up(self) -> None:
        """Settle what a killed save left: finish or undo its replacement, remove what it was
        writing, nothing else.
        """
        existing = self._existing()
        for path in sorted(self.folder.iterdir()):
            reserved = _RESERVED.fullmatch(path.name)
            if reserved is None:
                continue
            if (
                existing.get(int(reserved[2])) == path
            ):  # killed between the two renames: the only copy of its step
                path.rename(self.folder / f"step_{reserved[2]}")
            else:
                shutil.rmtree(path)

    def _prune(self, saved: int) -> None:
        existing = self._existing()
        for step in [step for step in existing if step > saved]:
            log.warning(
                "removing checkpoint %s: the run now continues from step %d", existing[step], saved
            )
            self._remove(existing.pop(step))
        kept = {*list(existing.values())[-self.keep :], self.best()}
        for path in existing.values():
            if path not in kept:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        # Under a temporary name first: killed half-way, a half-removed directory must not look like
        # a checkpoint.
        doomed = self._reserve("tmp", path)
        path.rename(doomed)
        shutil.rmtree(doomed)


def check_state(value: Any, path: str = "state") -> None:
    """Raise TypeError, naming the key path, if `value` holds a type that
    `torch.load(weights_only=True)` would refuse.

    Types are compared exactly: `np.float64` is a float to `isinstance` and a stranger to the
    unpickler.
    """
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            check_state(key, f"{path}, key {key!r}")
            check_state(item, f"{path}[{key!r}]")
    elif kind in (list, tuple, set):
        for index, item in enumerate(value):
            check_state(item, f"{path}[{index}]")
    elif kind not in (torch.Tensor, torch.nn.Parameter, *_LEAVES):
        raise TypeError(
            f"{path}: a {kind.__module__}.{kind.__qualname__} cannot be stored, "
            "torch.load(weights_only=True) would refuse it; store tensors and plain Python "
            "numbers, strings, lists and dicts"
        )
    # Attributes travel with their object: `_metadata` of a module's state_dict, a flag that
    # somebody hung on a tensor.
    if kind in (OrderedDict, torch.Tensor, torch.nn.Parameter):
        for name, item in vars(value).items():
            check_state(item, f"{path}.{name}")


def _write(folder: Path, state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write and flush both files of a checkpoint, and the directory that holds them."""
    path = folder / STATE_FILE
    with naming(path), path.open("wb") as file:
        target: Any = _Target(file)
        try:
            torch.save(state, target)
        except RuntimeError:
            if target.refused is None:
                raise
            raise target.refused from None  # torch's own words are of positions in the file
        file.flush()
        os.fsync(file.fileno())
    write_manifest(folder, facts | {"torch": str(torch.__version__)}, [STATE_FILE])


class _Target:
    """A file for torch.save, which makes a RuntimeError of its own of what the disk refused."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.refused: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.refused = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _val_loss(path: Path) -> float | None:
    """The validation loss with which a checkpoint competes: None if it has none, or NaN, or a
    damaged manifest.
    """
    loss: float | None = _fact(path, "val_loss")
    return None if loss is None or math.isnan(loss) else loss


def _fact(path: Path, name: str) -> Any:
    """What the manifest of a checkpoint says, None if it does not, or is damaged: `load` reports
    that.
    """
    try:
        return read_manifest(path).get(name)
    except DamagedError:
        return None
