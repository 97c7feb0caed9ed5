"""Rebuild the paper's tables and figures from finished runs.

    python eval.py runs=runs/paper/50000
    python eval.py runs=[runs/a,runs/b] out=somewhere
    python eval.py runs=runs/arena/2000                  # methods at equal bytes, ranked
    python eval.py runs=runs/arena/2000 times=step.csv   # with step times of scripts/bench_step.py
    python eval.py complexity=true out=runs/complexity   # Table 1, measured: needs no runs

Every run in or below the given folders that finished or diverged is used. The others are named with
the reason. Of several copies of a run the sound one with the most steps counts. Runs that differ in
their seed alone are averaged. Models are rebuilt from their checkpoints, and their validation
losses are computed again.
Writes report.md with tables, sentences and figures, the same as report.json, each table as .csv,
each figure as .svg, into `out` (default: the first folder). What each number means stands in
report/ and in the folders of experiments/.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    # Until all libraries are loaded, Ctrl-C ends the process at once and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from pathlib import Path

import hydra
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, ListConfig

from experiments.paper import complexity
from experiments.sections import studies
from harness import command_line
from report import write


def evaluate(values: DictConfig) -> None:
    """Do what `values` asks for. Raises ValueError if that is nothing, or if there is nothing to
    report on.
    """
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    out = Path(values.out) if values.out else None
    if values.runs is None and not values.complexity:
        raise ValueError(
            "runs=null: give a folder or a list of folders, as in `python eval.py runs=runs/demo`"
        )
    if values.runs is None and out is None:
        raise ValueError("out=null: complexity=true measures no run; give a folder to write to")
    folders: list[Path] = []
    if values.runs is not None:
        folders = [
            Path(str(folder))
            for folder in (values.runs if isinstance(values.runs, ListConfig) else [values.runs])
        ]
        times = Path(str(values.times)) if values.times else None
        report = write.gather(folders, studies(compare=values.arena, times=times))
        for complaint in report.complaints:
            print(complaint, file=sys.stderr)
        for table in report.tables[:2]:
            print(f"{table.title}\n\n{table.markdown()}")
        print("".join(f"- {sentence}\n" for sentence in report.sentences))
        print(
            "Written:",
            *write.write(report, out or folders[0], command=command, metrics=values.metrics),
        )
    if values.complexity:
        slopes, written = complexity.report(out or folders[0], command=command)
        print(f"{slopes.title}\n\n{slopes.markdown()}")
        print("Written:", *written)


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(values: DictConfig) -> None:
    try:
        evaluate(values)
    except ValueError as error:
        raise CompactHydraException(str(error)) from error


if __name__ == "__main__":
    sys.exit(command_line.run(main))
