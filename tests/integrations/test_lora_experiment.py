"""LoRA after `basis.apply` keeps a fifth, through the real command."""

import csv
import random
from pathlib import Path

import pytest

from experiments.lora import Row, main, table

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_a_fifth_of_the_bytes_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices("abc de\n", k=60_000)))
    assert (
        main(["--text", str(text), "--out", str(tmp_path), "--seeds", "2", "--steps", "2", "2"])
        == 0
    )
    with (tmp_path / "rows.csv").open() as file:
        rows = [
            Row(
                int(r["seed"]),
                r["precision"],
                r["variant"],
                *(float(r[name]) for name in ("loss", "kept", "seconds")),
            )
            for r in csv.DictReader(file)
        ]
    assert len(rows) == 12
    factors = {
        r.precision: plain.kept / r.kept for plain, r in zip(rows[::2], rows[1::2], strict=True)
    }
    # Few letters, so few logits: the least that there can be to spare.
    assert factors["float32"] >= 5
    assert factors["mixed"] >= 4.5
    assert factors["bfloat16"] >= 3.5
    mean = sum(r.loss for r in rows if r.precision == "float32" and r.variant == "plain") / 2
    assert f"{mean:.4f}" in table(rows)
    assert table(rows) in capsys.readouterr().out
