"""Compare finished runs: a table and the validation curves.

    python eval.py runs=runs/demo
    python eval.py runs=[runs/a,runs/b] out=somewhere

Takes folders; every run in or below them that is finished is used, the others are named with the reason. Runs that differ in
their seed alone are averaged. Writes table.md, table.csv and validation_loss.png and .svg into `out` (default: the
first folder) and prints the table.
"""

from __future__ import annotations

import csv
import io
import statistics
import sys
from pathlib import Path

import hydra
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from harness import figures
from harness.files import write_atomic
from harness.memory import format_bytes
from harness.results import Group, find_runs, format_mean, group_runs, setting

COLUMNS = (
    "method",
    "seeds",
    "steps",
    "train loss",
    "val loss",
    "above exact",
    "kept: dense layers",
    "kept: all",
    "step",
    "run ids",
)


def table(groups: list[Group]) -> list[dict[str, str]]:
    """A row per group. Losses in nats per token, mean ± half a 95% interval over seeds; times are medians over rows."""
    exact = {(setting(run), run.seed): run for group in groups if group.method == "exact" for run in group.runs}
    rows = []
    for group in groups:
        runs = group.runs
        dense = ("mem/saved_bytes/linear inputs", "mem/saved_bytes/sketches")
        pairs = [(run, exact.get((setting(run), run.seed))) for run in runs]
        paired = [run.last("val/loss") - partner.last("val/loss") for run, partner in pairs if partner is not None]
        milliseconds = [1000 * value for run in runs for value in run.series("step_seconds")[1]]
        rows.append(
            {
                "method": group.label,
                "seeds": str(len(runs)),
                "steps": f"{runs[0].summary['step']:,}",
                "train loss": format_mean([run.last("train/loss") for run in runs]),
                "val loss": format_mean([run.last("val/loss") for run in runs]),
                "above exact": "" if group.method == "exact" or not paired else format_mean(paired),
                "kept: dense layers": format_bytes(sum(runs[0].last(name) for name in dense)),
                "kept: all": format_bytes(runs[0].last("mem/saved_bytes")),
                "step": f"{statistics.median(milliseconds):.0f} ms",
                "run ids": " ".join(run.summary["run_id"] for run in runs),
            }
        )
    return rows


def as_markdown(rows: list[dict[str, str]]) -> str:
    """The rows as an aligned Markdown table."""
    cells = [list(COLUMNS), *([row[name] for name in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines) + "\n"


def as_csv(rows: list[dict[str, str]]) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def report(folders: list[Path], out: Path | None) -> None:
    """Write and print everything. Raises ValueError if there is nothing to report on."""
    runs, complaints = find_runs(folders)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if not runs:
        raise ValueError(f"runs={[str(folder) for folder in folders]}: no finished run in these folders")
    groups = group_runs(runs)
    out = out or folders[0]
    out.mkdir(parents=True, exist_ok=True)
    rows = table(groups)
    write_atomic(out / "table.md", as_markdown(rows))
    write_atomic(out / "table.csv", as_csv(rows))
    pictures = figures.validation_curves(groups, out / "validation_loss")
    print(as_markdown(rows))
    if all(len(group.runs) == 1 for group in groups):
        print("One seed each: no interval can be given.")
    print("Written:", *(str(path) for path in [out / "table.md", out / "table.csv", *pictures]))


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(values: DictConfig) -> None:
    try:
        if OmegaConf.is_missing(values, "runs"):
            raise ValueError("runs=???: give a folder or a list of folders, as in `python eval.py runs=runs/demo`")
        folders = values.runs if isinstance(values.runs, ListConfig) else [values.runs]
        report([Path(str(folder)) for folder in folders], Path(values.out) if values.out else None)
    except ValueError as error:
        raise CompactHydraException(str(error)) from error


if __name__ == "__main__":
    main()
