"""That the files in a run folder are of one run, and that its history is whole.

Run folders are copied, synced and tidied by hand. A checkpoint of another run in the folder has the
right shapes, so training would go on from it without complaint; a metrics.jsonl that was emptied
would be written on from the middle. Neither can be seen in a loss.

*One run.* run.json holds the id of a run, drawn once. summary.json and each checkpoint (in its
manifest, and in its state) repeat it. `check_ids` compares all that are there. run.json alone may
be lost: the others know the id, and the labels in it are made again.

*A whole history.* A checkpoint holds a mark: the length and the SHA-256 of metrics.jsonl when it
was saved. The file only grows from there, so its beginning must still have that hash
(`check_history`). Checkpoints of older versions hold no mark; of those the first row and the
evaluation that the checkpoint knows are looked for.

Cost: reading the manifests and metrics.jsonl once, at a start.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from harness.folder.checkpoint import Checkpoints, Loaded
from harness.folder.metrics import digest_of, read_metrics
from harness.folder.run_id import RUN_FILE, read_run_file
from harness.folder.rundir import CHECKPOINT_FOLDER, METRICS_FILE, SUMMARY_FILE, read_summary

log = logging.getLogger(__name__)

START_AGAIN = "give another hydra.run.dir, or delete the folder to start over from step 0"


def check(folder: Path, loaded: Loaded | None) -> str | None:
    """The id of the run in `folder`, None if it has none yet. loaded: what it continues from.

    Raises ValueError if files are missing or of another run.
    """
    known = check_ids(folder, loaded)
    check_saved(folder, loaded)
    if loaded:
        check_history(folder, loaded)
    return known


def check_ids(folder: Path, loaded: Loaded | None = None) -> str | None:
    """The id of the run in `folder`, None if no file holds one yet. loaded: a checkpoint of it,
    whose state is looked at too.

    Raises ValueError, naming each file with its id, if they are of several runs.
    """
    checkpoints = Checkpoints(folder / CHECKPOINT_FOLDER)
    found: dict[str, Any] = {
        RUN_FILE: read_run_file(folder).get("id"),
        SUMMARY_FILE: read_summary(folder).get("run_id"),
    } | {f"{CHECKPOINT_FOLDER}/{path.name}": id for path, id in checkpoints.run_ids().items()}
    if loaded is not None:
        found[f"{CHECKPOINT_FOLDER}/{loaded.path.name}"] = loaded.state.get("run_id")
    known = {name: id for name, id in found.items() if id is not None}
    if len(set(map(repr, known.values()))) > 1:
        files = "\n  ".join(f"{name}: run {id}" for name, id in known.items())
        raise ValueError(
            f"{folder} holds files of more than one run:\n  {files}\n"
            f"Move what is not of this run out of the folder, {START_AGAIN}."
        )
    return next((str(id) for id in known.values()), None)


def check_saved(folder: Path, loaded: Loaded | None) -> None:
    """Raise ValueError if summary.json knows of a checkpoint and there is none; name one that is
    gone where an older one is there.
    """
    summary = read_summary(folder)
    saved = summary.get("saved_step")
    if saved is None and summary.get("status") == "finished":
        saved = summary.get("step")  # as older versions wrote it
    if saved is None:
        return
    if loaded is None:
        raise ValueError(
            f"{folder / CHECKPOINT_FOLDER}: the run was saved at step {saved} and holds no "
            f"checkpoint any more; bring one back from a copy, {START_AGAIN}"
        )
    if loaded.step < saved:
        log.warning(
            "%s: the checkpoint of step %d can't be used or is gone; the steps after %d are "
            "computed again",
            folder,
            saved,
            loaded.step,
        )


def check_history(folder: Path, loaded: Loaded) -> None:
    """Raise ValueError, naming metrics.jsonl, if rows are missing or changed that were there when
    `loaded` was saved.
    """
    file = folder / METRICS_FILE
    mark = loaded.state.get("metrics")
    if not file.exists():
        wrong = "is gone"
    elif mark is None:
        wrong = _without_mark(file, loaded)
    else:
        size, digest = file.stat().st_size, digest_of(file, mark["bytes"])
        if size < mark["bytes"]:
            wrong = f"has {size:,} bytes of the {mark['bytes']:,} that it had then"
        else:
            wrong = "" if digest == mark["sha256"] else "does not hold the same rows any more"
    if wrong:
        raise ValueError(
            f"{file}: {wrong}; the checkpoint of step {loaded.step} was saved with a whole one, "
            "and the run's curves would have a hole. Bring the file back from a copy, "
            f"{START_AGAIN}."
        )


def _without_mark(file: Path, loaded: Loaded) -> str:
    """What is wrong with the rows, as far as a checkpoint without a mark can say."""
    rows = read_metrics(file)
    if not rows or rows[0]["step"] != 0:
        return "does not begin at step 0"
    step, loss = loaded.state.get("val_step"), loaded.state.get("val_loss")
    if step is not None and not any(
        row["step"] == step and repr(row.get("val/loss")) == repr(loss) for row in rows
    ):
        return f"has no row with the evaluation of step {step}"
    return ""
