"""What the report of an arena can't read from its runs: what contenders could not reach, and how
many runs shared the machine. One file beside the runs, arena.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.storage import write_atomic
from experiments.arena.plan import Contender

LEDGER = "arena.json"


def write_ledger(out: Path, everyone: Sequence[Contender], **facts: Any) -> None:
    """What the report can't read from the runs, into out/arena.json; refusals noted there before
    stay, of contenders not here.
    """
    out.mkdir(parents=True, exist_ok=True)
    before = {
        (line["method"], line["budget"]): line for line in read_ledger(out).get("refused", [])
    }
    now = {
        (c.method, c.budget): {"method": c.method, "budget": c.budget, "reason": c.refused}
        for c in everyone
    }
    ledger = {**facts, "refused": [line for line in (before | now).values() if line["reason"]]}
    write_atomic(out / LEDGER, json.dumps(ledger, indent=1) + "\n")


def read_ledger(out: Path) -> dict[str, Any]:
    """out/arena.json, or an empty dict."""
    path = out / LEDGER
    ledger: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return ledger
