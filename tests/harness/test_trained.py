"""Models read back from runs of methods that have state of their own in the layers."""

from pathlib import Path

import pytest
from hydra.errors import CompactHydraException
from tiny import train_here

from harness.folder import rundir
from harness.trained import load_trained
from report import write


@pytest.mark.parametrize("method", ["subspace", "transform", "ema_sketch"])
def test_what_a_method_learned_is_left_out(method: str, data: Path, tmp_path: Path) -> None:
    train_here(data, tmp_path / "run", f"method={method}", "micro_batch_size=4")
    trained = load_trained(tmp_path / "run")
    assert not [name for name in trained.model.state_dict() if "estimator_" in name]
    report = write.gather([tmp_path])
    assert report.complaints == []  # the loss computed again is the logged one


def test_a_run_does_not_need_its_text_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    constant = "optim.schedule=constant"
    train_here(here, tmp_path / "run", "data.path=text.txt", constant)
    expected = load_trained(tmp_path / "run").prepared
    monkeypatch.chdir(there)
    (here / "text.txt").rename(there / "moved.txt")
    assert load_trained(tmp_path / "run").prepared == expected
    assert write.gather([tmp_path / "run"]).complaints == []

    (here / "text.txt").write_text("another text " * 400)
    for steps in ("steps=20", "steps=30"):  # finished, and to be continued
        with pytest.raises(CompactHydraException, match="not the text that the run in"):
            train_here(here, tmp_path / "run", f"data.path={here / 'text.txt'}", constant, steps)
    (here / "text.txt").unlink()
    (here / "text.txt").symlink_to(there / "moved.txt")
    for path, steps in (("gone.txt", 25), (str(there / "moved.txt"), 30)):
        train_here(here, tmp_path / "run", f"data.path={path}", constant, f"steps={steps}")
        assert rundir.read_summary(tmp_path / "run")["step"] == steps
