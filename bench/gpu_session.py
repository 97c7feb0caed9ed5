"""Everything that only a GPU can show, in one command for a machine that is lent for minutes.

    scripts/gpu_session.sh --prepare carried          # before, where there is a network
    scripts/gpu_session.sh --minutes 8                # on the GPU; results in results/gpu
    scripts/gpu_session.sh --parts tests bench --minutes 5
    scripts/gpu_session.sh --device cpu --size tiny --minutes 2          # a rehearsal

| part | what | share of the time |
|---|---|---|
| tests | the tests marked gpu, without the slow ones | 15% |
| bench | bench_gpu: step, layer, head | 35% |
| paper | the six rows of the paper's Table 3 x three seeds, several processes at once | 30% |
| gpt2 | GPT-2 124M: exact, and the methods of --against, each as long | 20% |

Time that a part leaves goes to the later ones. A part is a process, or several, of its own: one
that fails or runs out of time is said, and the next goes on. What is found is in --out as it comes:
logs, tables, each run's metrics, and summary.md, written anew after each part (what ran, seconds,
exit codes, device, versions, commit). Runs keep their checkpoints in --work, which is not carried
home; the same command continues them there.

A GPU image has torch, numpy and Triton. The few other packages are carried (bench/carried.py) and
used where the image lacks them, without being installed; the tokens too, so nothing is downloaded.

Exit codes: 0 all parts did what they should, 1 some did not, 2 nothing could begin.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import carried
from bench.processes import Process, run_all
from bench.session_runs import gpt2_runs, paper_runs, write_runs

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"tests": 0.15, "bench": 0.35, "paper": 0.3, "gpt2": 0.2}
AGAINST = (
    "method=basis method.rank=64 method.include=['*'] activations=lean",
    "method=exact activations=checkpoint",
)
ASK = """
import importlib.util, json, sys, torch
cuda = torch.cuda.is_available()
print(json.dumps({"gpu": torch.cuda.get_device_name() if cuda else None, "torch": torch.__version__,
    "bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
    "python": sys.version.split()[0],
    "missing": [n for n in ("hydra", "pytest", "tqdm") if importlib.util.find_spec(n) is None]}))
"""


@dataclass
class Session:
    """One session: its options, the environment of its processes, and what has happened so far."""

    options: argparse.Namespace
    environment: dict[str, str]
    about: dict[str, object]
    ends: float
    parts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def out(self) -> Path:
        path: Path = self.options.out
        return path

    @property
    def data(self) -> list[str]:
        """Options of the text, whose tokens are those carried along."""
        return [
            *self.options.data.split(),
            f"data.cache_dir={self.options.carried / carried.CACHE}",
        ]

    @property
    def tiny(self) -> bool:
        return bool(self.options.size == "tiny")

    def process(self, words: list[str], log: str, **more: str) -> Process:
        """python `words` in the repository, its output in the file `log` of --out."""
        path = self.out / log
        path.parent.mkdir(parents=True, exist_ok=True)
        return Process([sys.executable, *words], path, ROOT, self.environment | more)

    def write(self) -> None:
        """summary.json and summary.md, of the parts so far."""
        text = json.dumps(self.about | {"parts": self.parts}, indent=1)
        (self.out / "summary.json").write_text(text + "\n")
        lines = ["| part | seconds | exit code | |", "|---|---|---|---|"]
        lines += ["| {part} | {seconds:.0f} | {code} | {said} |".format(**p) for p in self.parts]
        about = ", ".join(f"{name} {value}" for name, value in self.about.items())
        (self.out / "summary.md").write_text("\n".join([*lines, "", about, ""]))


def tests(session: Session, seconds: float) -> tuple[int, str]:
    """The tests marked gpu, without the slow ones; in a rehearsal a few of them, on the CPU."""
    workers = min(6, (os.cpu_count() or 1) // 2)  # most of their time is the host's
    words = ["-m", "pytest", f"-n{workers}", "-m", "gpu and not slow", "-rfE", "--tb=short"]
    words.append("tests/gpu")
    more = {}
    if session.options.device == "cpu":
        words[2] = "-n0"
        more["BASIS_REHEARSAL"] = "1"
    if session.tiny:
        words += ["-k", "published or the_watch_sees"]
    process = session.process(words, "tests/pytest.log", **more)
    run_all([process], seconds)
    lines = process.log.read_text(errors="replace").strip().splitlines()
    return process.code, f"{lines[-1] if lines else 'no output'}{late(process)}"


def bench(session: Session, seconds: float) -> tuple[int, str]:
    """The tables of bench_gpu."""
    out = str(session.out / "bench")
    words = ["-m", "scripts.bench_gpu", "--out", out, "--device", session.options.device]
    words += ["--seconds", f"{max(seconds - 20, 1):.0f}"]
    if session.tiny:
        words += ["--size", "tiny", "--turns", "2"]
    process = session.process(words, "bench/bench.log")
    run_all([process], seconds)
    made = sorted(path.name for path in (session.out / "bench").glob("*.csv"))
    return process.code, f"tables: {', '.join(made) or 'none'}{late(process)}"


def late(process: Process) -> str:
    return "; stopped for lack of time" if process.stopped else ""


def paper(session: Session, seconds: float) -> tuple[int, str]:
    """The paper's rows, `--jobs` at a time."""
    options = session.options
    runs = paper_runs(
        options.work,
        device=options.device,
        data=session.data,
        steps=options.steps,
        seeds=1 if session.tiny else options.seeds,
        tiny=session.tiny,
    )
    return train(session, "paper", runs, seconds, jobs=options.jobs)


def gpt2(session: Session, seconds: float) -> tuple[int, str]:
    """GPT-2, exactly and otherwise, one after the other for as long as there is time."""
    options = session.options
    runs = gpt2_runs(
        options.work,
        ["method=exact", *options.against],
        device=options.device,
        data=session.data,
        tiny=session.tiny,
    )
    codes, said = [], ""
    for name in runs:
        each = {name: runs[name]}
        code, said = train(session, "gpt2", each, seconds / len(runs), names=list(runs))
        codes.append(code)
    return max(codes), said


def train(
    session: Session,
    part: str,
    runs: dict[str, list[str]],
    seconds: float,
    *,
    jobs: int = 1,
    names: list[str] | None = None,
) -> tuple[int, str]:
    """Runs of train.py by name, with their metrics in --out after each; the tables have those of
    `names`. To be stopped for lack of time is no failure.
    """
    folder = session.options.work / part
    processes = {
        name: session.process(["train.py", *words], f"{part}/{name}.log", OMP_NUM_THREADS="1")
        for name, words in runs.items()
    }

    def write(_: Process | None = None) -> str:
        return write_runs(folder, names or list(runs), session.out / part)

    run_all(list(processes.values()), seconds, jobs=jobs, after=write)
    said = write()
    codes = [process.code for process in processes.values() if not process.stopped]
    wrong = [name for name, process in processes.items() if process.code and not process.stopped]
    return max(codes, default=0), said + (f"; failed: {', '.join(wrong)}" if wrong else "")


PARTS: dict[str, Callable[[Session, float], tuple[int, str]]] = {
    "tests": tests,
    "bench": bench,
    "paper": paper,
    "gpt2": gpt2,
}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.prepare:
        return carried.prepare(options.prepare, options.data.split(), options.python)
    began = time.monotonic()
    site = carried.unpack(options.carried / carried.WHEELS, options.work / "site")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([str(site)] if site else [])]),
        "HYDRA_FULL_ERROR": "0",
    }
    asked = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True
    )
    if asked.returncode:
        return refuse(f"PYTHON={sys.executable}: {asked.stderr.strip().splitlines()[-1]}")
    found = json.loads(asked.stdout.splitlines()[-1])
    if options.device == "cuda" and found["gpu"] is None:
        return refuse("--device cuda: no CUDA device; --device cpu --size tiny rehearses")
    if missing := found.pop("missing"):
        return refuse(f"--carried {options.carried}: {', '.join(missing)} not there; see --prepare")
    options.out.mkdir(parents=True, exist_ok=True)
    about = {
        "command": " ".join(["scripts/gpu_session.sh", *(sys.argv[1:] if argv is None else argv)]),
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **found,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "commit": carried.commit(options.carried),
    }
    session = Session(options, environment, about, began + 60 * options.minutes)
    session.write()
    shares = {name: SHARES[name] for name in options.parts}
    for name in options.parts:
        start = time.monotonic()
        left = session.ends - start
        seconds = left * shares.pop(name) / (SHARES[name] + sum(shares.values()))
        print(f"{name}: {seconds:.0f} of {left:.0f} s", flush=True)
        code, said = PARTS[name](session, seconds)
        took = time.monotonic() - start
        session.parts.append({"part": name, "seconds": took, "code": code, "said": said})
        session.write()
        print(f"{name}: exit code {code} after {took:.0f} s: {said}", flush=True)
    return 1 if any(part["code"] for part in session.parts) else 0


def refuse(reason: str) -> int:
    print(f"gpu_session: {reason}", file=sys.stderr)
    return 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_session",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results/gpu", help="results/gpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts (default: 8)")
    parser.add_argument("--parts", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument(
        "--carried", type=Path, default=ROOT / "carried", help="what --prepare made (carried)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "basis-gpu", help="checkpoints"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    parser.add_argument("--steps", type=int, help="of the paper's runs (default: 50000)")
    parser.add_argument("--seeds", type=int, default=3, help="of the paper's rows (default: 3)")
    cores = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cores, help="paper runs at once (cores)")
    parser.add_argument(
        "--against", nargs="*", default=list(AGAINST), help="GPT-2's other methods: options of each"
    )
    parser.add_argument(
        "--data", default="data=shakespeare", help="options of the text (data=shakespeare)"
    )
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="make DIR, to be carried along")
    parser.add_argument("--python", default="3.12", help="the GPU's, for --prepare (3.12)")
    options = parser.parse_args(argv)
    if options.minutes <= 0 or options.jobs < 1 or options.seeds < 1:
        parser.error("--minutes must be positive, --jobs and --seeds at least 1")
    for name in ("out", "carried", "work"):
        setattr(options, name, getattr(options, name).resolve())
    return options


if __name__ == "__main__":
    sys.exit(main())
