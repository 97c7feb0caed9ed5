"""What apply does to a family is told apart: same, refused, not tried; through the real command."""

import csv
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_three_families_and_their_outcomes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments.every_family import DIFFERS, REFUSED, SAME, UNTRIED, Row, main, summary

    # ProphetNet transposes its logits; Reformer wants to be told that it is a decoder.
    names = ["gpt2", "llama", "prophetnet", "reformer"]
    assert main(["--out", str(tmp_path), "--only", *names]) == 0
    with (tmp_path / "families.csv").open() as file:
        rows = {row["family"]: row for row in csv.DictReader(file)}
    assert {name: rows[name]["outcome"] for name in names} == dict(
        zip(names, (SAME, SAME, REFUSED, UNTRIED), strict=True)
    )
    assert "transpose" in rows["prophetnet"]["why"]
    for name in ("gpt2", "llama"):
        row = rows[name]
        assert float(row["loss"]) == pytest.approx(6.24, abs=0.1)  # ln 512, and a little more
        assert 0.95 < float(row["cosine"]) < 0.9999
        assert float(row["before"]) > 3.5 * float(row["after"])
    assert "- same: 2\n- differs: 0\n- refused: 1\n- not tried: 1" in capsys.readouterr().out
    wrong = Row("x", "XForCausalLM", DIFFERS, 6.0, 0.1, 0.0, 0.5, 2.0, 1.0)
    assert "relative difference of the loss: 1.7e-02" in summary([wrong])
