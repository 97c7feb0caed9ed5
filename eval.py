"""Rebuild the paper's tables and figures from finished runs.

    python eval.py runs=runs/paper/50000
    python eval.py runs=[runs/a,runs/b] out=somewhere
    python eval.py runs=runs/arena/2000                  # methods at equal bytes, ranked
    python eval.py runs=runs/arena/2000 times=step.csv   # with step times of scripts/bench_step.py
    python eval.py complexity=true out=runs/complexity   # Table 1, measured: needs no runs

Every run in or below the given folders that finished or diverged is used. The others are named with
the reason: still running, damaged, or holding files of another run. Of several copies of a run the
sound one with the most steps counts. Runs that differ in their seed alone are averaged. Models are
rebuilt from their checkpoints, and their validation losses are computed again.
Writes report.md with tables, sentences and figures, the same as report.json, each table as .csv,
each figure as .svg, into `out` (default: the first folder). What each number means stands in
report/ and in the folders of experiments/.
"""

from __future__ import annotations

import signal
import sys

from harness import terminal

if __name__ == "__main__":
    terminal.attach()
    # Until all libraries are loaded, Ctrl-C ends the process at once and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from pathlib import Path

import hydra
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from experiments.paper import complexity
from experiments.sections import studies
from harness import command_line
from harness.folder import disk
from report import write
from report.options import ReportOptions, check_writable, load


def evaluate(values: DictConfig) -> None:
    """Do what `values` asks for. Raises ValueError if that is nothing, if there is nothing to
    report on, or if the report can't be written.
    """
    options = load(values)
    made = not options.out.exists()
    check_writable(options.out, asked=values.out is not None)
    try:
        _report(options)
    except OSError as error:
        if (refused := disk.first_refusal(error)) is None:
            raise
        raise ValueError(disk.explain(refused, {"out": options.out})) from error
    finally:
        if made:
            command_line.remove_if_empty(options.out)


def _report(options: ReportOptions) -> None:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    if options.runs:
        report = write.gather(options.runs, studies(compare=options.arena, times=options.times))
        for complaint in report.complaints:
            print(complaint, file=sys.stderr)
        for table in report.tables[:2]:
            print(f"{table.title}\n\n{table.markdown()}")
        print("".join(f"- {sentence}\n" for sentence in report.sentences))
        print(
            "Written:",
            *write.write(report, options.out, command=command, metrics=options.metrics),
        )
    if options.complexity:
        slopes, written = complexity.report(options.out, command=command)
        print(f"{slopes.title}\n\n{slopes.markdown()}")
        print("Written:", *written)


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(values: DictConfig) -> None:
    try:
        evaluate(values)
    except ValueError as error:
        raise CompactHydraException(str(error)) from error


if __name__ == "__main__":
    code = command_line.run(main)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is done: again without a traceback
    sys.exit(code)
