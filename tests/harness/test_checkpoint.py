"""Checkpoints: what is saved comes back bit for bit, the right ones are kept, and damage never
makes a wrong state come back.
"""

import hashlib
import json
import logging
import math
import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_checks import assert_is_step, filled, names
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.folder.checkpoint import CheckpointError, Checkpoints
from harness.folder.manifest import write_manifest

# --- what is saved comes back
# -----------------------------------------------------------------------------------------


class Trainer:
    """Two weights, two optimisers (SGD with momentum, AdamW) and dropout, so that every kind of
    state matters.
    """

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(8, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(16, 1),
        )
        self.momentum = torch.optim.SGD(self.model[0].parameters(), lr=0.05, momentum=0.9)
        self.adam = torch.optim.AdamW(
            [*self.model[1].parameters(), *self.model[3].parameters()], lr=0.01
        )

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            x = torch.randn(32, 8)
            loss = (self.model(x).squeeze(1) - x.sum(1)).square().mean()
            self.momentum.zero_grad()
            self.adam.zero_grad()
            loss.backward()
            self.momentum.step()
            self.adam.step()
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "momentum": self.momentum.state_dict(),
            "adam": self.adam.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "python": random.getstate()},
            "tracker_id": "k3v9x2m4q1",
            "config": {
                "method": {"name": "basis", "R": 32},
                "optim": {"betas": [0.9, 0.95], "clip": None},
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.momentum.load_state_dict(state["momentum"])
        self.adam.load_state_dict(state["adam"])
        torch.set_rng_state(state["rng"]["torch"])
        random.setstate(state["rng"]["python"])


def test_training_goes_on_from_a_checkpoint_to_the_last_bit(tmp_path):
    straight = Trainer()
    straight.steps(5)
    Checkpoints(tmp_path).save(5, straight.state(), val_loss=1.25)
    python_random = random.random()
    expected = straight.steps(10)
    final = {name: value.clone() for name, value in straight.model.state_dict().items()}

    resumed = Trainer()
    resumed.steps(3)  # history that must leave no trace
    loaded = Checkpoints(tmp_path).load_latest()
    assert loaded is not None
    assert (loaded.step, loaded.val_loss, loaded.path) == (5, 1.25, tmp_path / "step_00000005")
    assert loaded.state["config"] == straight.state()["config"]
    assert loaded.state["tracker_id"] == "k3v9x2m4q1"
    resumed.restore(loaded.state)
    assert random.random() == python_random
    assert resumed.steps(10) == expected
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, final[name]), name


def test_layout_and_manifest(tmp_path):
    path = Checkpoints(tmp_path / "a" / "checkpoints").save(1000, filled(1000), val_loss=2.5)
    assert path == tmp_path / "a" / "checkpoints" / "step_00001000"
    assert names(path) == {"state.pt", "manifest.json"}
    assert names(path.parent) == {"step_00001000"}
    manifest = json.loads((path / "manifest.json").read_text())
    content = (path / "state.pt").read_bytes()
    assert (manifest["format"], manifest["step"], manifest["val_loss"]) == (1, 1000, 2.5)
    assert manifest["files"] == {
        "state.pt": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
    }


def test_nothing_saved_is_not_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path / "absent")
    assert checkpoints.load_latest() is None
    assert checkpoints.best() is None
    assert checkpoints.steps() == []
    assert not (tmp_path / "absent").exists()
    with pytest.raises(
        CheckpointError, match=r"step_00000007 cannot be used: manifest\.json cannot be read"
    ):
        checkpoints.load(tmp_path / "absent" / "step_00000007")
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


# --- which checkpoints are kept
# ---------------------------------------------------------------------------------------


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    expected = {
        # step: (val_loss, steps kept after it, step of the best)
        10: (3.0, [10], 10),
        20: (1.0, [10, 20], 20),
        30: (2.0, [20, 30], 20),
        40: (1.0, [20, 30, 40], 20),  # equal: the earlier stays the best
        50: (None, [20, 40, 50], 20),
        60: (math.nan, [20, 50, 60], 20),  # a diverged run has no best in it
        70: (0.5, [60, 70], 70),
    }
    for step, (val_loss, kept, best) in expected.items():
        checkpoints.save(step, filled(step), val_loss=val_loss)
        assert checkpoints.steps() == kept
        assert checkpoints.best() == tmp_path / f"step_{best:08d}"
        assert names(tmp_path) == {f"step_{step:08d}" for step in kept}
    best_path = checkpoints.best()
    assert best_path is not None
    assert_is_step(checkpoints.load(best_path).state, 70)


@settings(max_examples=25, deadline=None)
@given(
    losses=st.lists(
        st.none() | st.sampled_from([1.0, 2.0, 3.0, math.inf, math.nan]), min_size=1, max_size=7
    ),
    keep=st.integers(1, 3),
)
def test_retention_against_a_second_formulation(losses, keep):
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), keep=keep)
        for step, loss in enumerate(losses):
            checkpoints.save(step, {}, val_loss=loss)
        ranked = sorted(
            (loss, step) for step, loss in enumerate(losses) if loss is not None and loss == loss
        )
        newest = set(range(len(losses))[-keep:])
        assert set(checkpoints.steps()) == newest | {step for _, step in ranked[:1]}


def test_steps_beyond_eight_digits_are_in_numerical_order(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(99_999_999, filled(1))
    checkpoints.save(100_000_000, filled(2))
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded.step == 100_000_000


def test_saving_after_a_restart_further_back_removes_the_abandoned_future(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20, 30):
        checkpoints.save(step, filled(step), val_loss=1.0 / step)
    (tmp_path / "step_00000030" / "state.pt").unlink()
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded.step == 20
    caplog.clear()
    checkpoints.save(25, filled(25), val_loss=1.0)
    assert checkpoints.steps() == [20, 25]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "step_00000030" in caplog.text


# --- damage
# ------------------------------------------------------------------------------------------


def flip(path: Path, offset: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def flip_in_tensor(folder: Path) -> None:
    path = folder / "state.pt"
    pattern = torch.full((64,), 2000.0).numpy().tobytes()
    flip(path, path.read_bytes().index(pattern) + 101)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES = {
    "flipped byte in a tensor": (flip_in_tensor, r"state\.pt is damaged \(its SHA-256"),
    "truncated state": (
        lambda folder: cut(folder / "state.pt", 700),
        r"state\.pt is damaged \(700 bytes instead of",
    ),
    "empty state": (
        lambda folder: cut(folder / "state.pt", 0),
        r"state\.pt is damaged \(0 bytes instead of",
    ),
    "missing state": (
        lambda folder: (folder / "state.pt").unlink(),
        r"state\.pt cannot be read \(No such file",
    ),
    "missing manifest": (
        lambda folder: (folder / "manifest.json").unlink(),
        r"manifest\.json cannot be read",
    ),
    "cut manifest": (
        lambda folder: cut(folder / "manifest.json", 30),
        r"manifest\.json is damaged",
    ),
    "manifest not UTF-8": (
        lambda folder: flip(folder / "manifest.json", 5, 0x80),
        r"manifest\.json is damaged",
    ),
    "manifest not an object": (
        lambda folder: (folder / "manifest.json").write_text("[]"),
        r"its own checksum",
    ),
    "changed loss in the manifest": (
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"val_loss": 1.5', '"val_loss": 0.5')
        ),
        r"manifest\.json is damaged \(it does not match its own checksum",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, caplog, kind):
    damage, message = DAMAGES[kind]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1000, filled(1000), val_loss=2.5)
    newest = checkpoints.save(2000, filled(2000), val_loss=1.5)
    damage(newest)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(newest)
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded.step == 1000
    assert_is_step(loaded.state, 1000)
    assert [(record.levelno, record.name) for record in caplog.records] == [
        (logging.WARNING, "harness.folder.checkpoint")
    ]
    assert str(newest) in caplog.text

    checkpoints.save(
        2000, filled(2000), val_loss=1.5
    )  # the resumed run comes to the same step and replaces it
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert_is_step(loaded.state, 2000)


def test_torch_alone_would_not_notice_a_flipped_byte(tmp_path):
    path = Checkpoints(tmp_path).save(2000, filled(2000))
    flip_in_tensor(path)
    state = torch.load(path / "state.pt", weights_only=True)
    assert (state["weights"] != 2000.0).sum() == 1


def test_no_flipped_byte_anywhere_yields_a_wrong_state(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(3, filled(3), val_loss=1.5)
    random_source = random.Random(0)
    noticed = 0
    for name in ("state.pt", "manifest.json"):
        file = path / name
        intact = file.read_bytes()
        for _ in range(400):
            flip(file, random_source.randrange(len(intact)), 1 << random_source.randrange(8))
            try:
                loaded = checkpoints.load(path)
            except CheckpointError:
                noticed += 1
            else:  # possible between tokens of the manifest: one white space for another
                assert (loaded.step, loaded.val_loss) == (3, 1.5)
                assert_is_step(loaded.state, 3)
            file.write_bytes(intact)
    assert noticed >= 790


def test_if_all_are_damaged_the_error_names_them_and_says_what_to_do(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    first, second = checkpoints.save(1, filled(1)), checkpoints.save(2, filled(2))
    cut(first / "state.pt", 10)
    (second / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load_latest()
    for part in (
        str(first),
        str(second),
        "state.pt",
        "manifest.json",
        "delete the folder to start over",
    ):
        assert part in str(caught.value)


class Intruder:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code from the file was run",))


def test_no_code_from_a_checkpoint_is_run(tmp_path, capsys):
    path = Checkpoints(tmp_path).save(1, filled(1))
    torch.save({"weights": Intruder()}, path / "state.pt")
    write_manifest(
        path, {"step": 1, "val_loss": None}, ["state.pt"]
    )  # a manifest is no proof of good will
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        Checkpoints.load(path)
    assert capsys.readouterr().out == ""


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    path = Checkpoints(tmp_path).save(1, filled(1))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksum"]
    manifest["format"] = 2
    manifest["checksum"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="has format 2, this program reads format 1"):
        Checkpoints.load(path)
