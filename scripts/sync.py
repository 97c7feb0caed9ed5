"""Rebuild the wandb mirror of finished runs from their run directories.

    python scripts/sync.py runs/rank_sweep/*   # offline: for `wandb leet`, or `wandb sync` later
    python scripts/sync.py runs/rank_sweep/* --mode online    # upload them

`metrics.jsonl` is the truth about a run and wandb its mirror, so a mirror can always be made again:
for a run trained with `tracker.mode=disabled`, into another project, or without the doubled points
that an interrupted and resumed run leaves. Read are `config.yaml` (the resolved configuration),
`metrics.jsonl`, `summary.json`, and from `run.json` id and labels.

The id stays the run's own unless `--new-id` is given. A server *adds* points to an id that it
knows, and gives out the id of a deleted run no more, so use `--new-id` wherever the run was
uploaded before. The times of day in a rebuilt run are those of the rebuilding; `step` and `tokens`
are the axes that mean something.

The files of a folder are read and not carried out: what looks like `${oc.env:...}` in a config.yaml
goes to wandb as these very letters.

A run whose `summary.json` does not say "finished" is marked as failed. A folder that misses a file
is reported and skipped, and the exit code is then 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import terminal
from harness.folder.metrics import read_metrics
from harness.folder.run_id import new_run_id, read_run_file, run_id
from harness.folder.rundir import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, read_config, read_summary
from harness.tracker import TrackerOptions, open_tracker


def main(argv: Sequence[str] | None = None) -> int:
    """Rebuild the mirror of every folder in `argv`; returns 0, or 1 if any of them could not be
    done.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="run directories")
    parser.add_argument(
        "--mode", choices=["offline", "online"], default="offline", help="default: offline"
    )
    parser.add_argument("--project", help="default: the project that the run was made for")
    parser.add_argument("--entity", help="default: the entity that the run was made for")
    parser.add_argument(
        "--new-id", action="store_true", help="give the mirror an id of its own, not the run's"
    )
    parser.add_argument(
        "--unfinished", action="store_true", help=f"take runs without a {SUMMARY_FILE} too"
    )
    arguments = parser.parse_args(argv)

    failed = 0
    for folder in arguments.folders:
        try:
            rebuild(folder, arguments)
        except (OSError, ValueError) as error:
            print(f"{folder}: {error}", file=sys.stderr)
            failed += 1
    if failed:
        print(f"{failed} of {len(arguments.folders)} folders not done", file=sys.stderr)
    return 1 if failed else 0


def rebuild(folder: Path, arguments: argparse.Namespace) -> None:
    """Make the mirror of one run directory.

    Raises FileNotFoundError naming what is missing, ValueError for a file that cannot be read or a
    name that is not allowed.
    """
    needed = (
        [CONFIG_FILE, METRICS_FILE]
        if arguments.unfinished
        else [CONFIG_FILE, METRICS_FILE, SUMMARY_FILE]
    )
    if missing := [name for name in needed if not (folder / name).is_file()]:
        hint = (
            " (an interrupted run? continue it, or give --unfinished)"
            if missing == [SUMMARY_FILE]
            else ""
        )
        raise FileNotFoundError(f"no {', no '.join(missing)} in this folder{hint}")
    config, summary = read_config(folder), read_summary(folder)
    rows = read_metrics(folder / METRICS_FILE)

    known = read_run_file(folder)
    options = TrackerOptions(  # which checks them, whoever wrote them down
        mode=arguments.mode,
        project=arguments.project or known.get("project") or TrackerOptions.project,
        entity=arguments.entity or known.get("entity"),
        group=known.get("group"),
        name=known.get("name") or folder.resolve().name,
        tags=known.get("tags") or [],
    )
    identity = new_run_id() if arguments.new_id else run_id(folder)
    if earlier := list(folder.glob(f"wandb/*run-*-{identity}*")):
        print(
            f"{folder}: note: wandb/ has {len(earlier)} part(s) of id {identity} already; a server "
            "that gets all"
        )
        print("    will show every point twice: remove them, or give --new-id")
    with open_tracker(
        options.mode,
        run_dir=folder,
        run_id=identity,
        config=config,
        project=options.project,
        entity=options.entity,
        name=options.name,
        group=options.group,
        job_type=known.get("job_type") or "train",
        tags=options.tags,
    ) as tracker:
        for row in rows:
            tracker.log(row)
        tracker.summary(summary)
        tracker.finish(0 if summary.get("status") == "finished" else 1)
    print(f"{folder}: {len(rows)} rows -> {tracker.url or tracker.folder} (id {identity})")


if __name__ == "__main__":
    terminal.attach()
    sys.exit(main())
