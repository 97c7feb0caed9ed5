"""The loop of the small experiments and the MLP on digits: who competes, at which bytes, from which
weights; files, refusals.
"""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import basis
from basis.diagnostics.budget import fit_budget
from experiments.ema import mlp_digits
from experiments.ema import tables as report
from experiments.ema import task as small
from experiments.ema.task import Adaptive, Options, Task

ROWS = 32


def images() -> mlp_digits.Images:
    """Two blobs of 24 pixels, the last of which never changes."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(160) % 2
    pixels = 0.2 * torch.rand(160, 24, generator=generator) + 0.5 * classes[:, None] * (
        torch.arange(24) % 3 == 0
    )
    pixels[:, -1] = 0.5
    return mlp_digits.Images(pixels[:120], classes[:120], pixels[120:], classes[120:])


def make(seed: int = 0, setting: str = "relu") -> Task:
    return mlp_digits.make_task(images(), setting, [16], ROWS, seed)


@pytest.mark.parametrize("variant", small.variants(ROWS, Adaptive(every=4)), ids=lambda c: c.label)
def test_every_contender_learns_within_its_bytes(variant: small.Variant) -> None:
    outcome = small.train(make(), variant, Options(steps=30, lr=0.02, look=10, share="1/2"), seed=0)
    assert [seen["step"] for seen in outcome.looks] == [0, 10, 20, 30]
    assert outcome.diverged is None
    assert outcome.score > 0.9
    assert outcome.bytes_exact == 4 * ROWS * (24 + 16)
    budgeted = outcome.bytes_kept + (outcome.bytes_state if variant.label.startswith("ema") else 0)
    share = 1.0 if variant.adaptive or variant.estimator is None else 0.5
    assert 0 < budgeted <= share * outcome.bytes_exact + 8 * 4  # keys and counters
    assert math.isnan(outcome.mean("cosine")) == (variant.estimator is None)


def test_all_start_from_the_same_weights_and_see_the_same_batches() -> None:
    first, second = make(3), make(3)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True)
    )
    assert float(first.loss(7).detach()) == float(second.loss(7).detach())
    assert float(first.loss(7).detach()) != float(first.loss(8).detach())
    looks = [
        small.train(
            make(),
            small.Variant("exact"),
            Options(steps=6, lr=0.1, optimizer="sgd", look=look),
            0,
        ).looks[-1]
        for look in (1, 6)
    ]
    assert looks[0] == looks[1]  # looking changes nothing


def test_looking_changes_nothing_of_a_method_that_learns() -> None:
    for label in ("ema_sketch beta=0.9", "basis", "subspace"):
        (variant,) = (c for c in small.variants(ROWS, Adaptive()) if c.label == label)
        scores = []
        for look in (1, 12):
            task = make()
            small.train(
                task,
                variant,
                Options(steps=12, lr=0.1, optimizer="sgd", look=look, share="1/2"),
                0,
            )
            scores.append([p.detach().clone() for p in task.model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*scores, strict=True))


def test_adaptive_rank_rises_to_its_cap_and_no_further() -> None:
    greedy = Adaptive(every=1, low=0.0, high=1e-9, start=1)
    (variant,) = (c for c in small.variants(ROWS, greedy) if c.adaptive)
    outcome = small.train(make(), variant, Options(steps=20, lr=0.01, look=1), 0)
    ranks = [seen["rank"] for seen in outcome.looks]
    assert ranks[:3] == [1, 2, 2]
    assert (
        ranks[-1] == fit_budget(basis.EMASketch(1, rows=ROWS), 1.0, ROWS, 16).rank
    )  # the narrower layer decides
    assert outcome.bytes_state <= outcome.bytes_exact


def test_a_diverging_training_is_a_result() -> None:
    outcome = small.train(
        make(), small.Variant("exact"), Options(steps=40, lr=1e30, optimizer="sgd"), 0
    )
    assert outcome.diverged is not None
    assert math.isnan(outcome.score)
    good = small.train(make(), small.Variant("exact"), Options(steps=4, lr=0.1, optimizer="sgd"), 1)
    found = report.table([small.Setting("s", [outcome, good])], "t", "T", "score", 3)
    assert found.rows[0]["diverged"] == 1
    assert found.rows[0]["score"].count == 1


def test_standardised_images_and_rows_of_pictures() -> None:
    found = images().standardised()
    assert float(found.train[:, :-1].mean(0).abs().max()) < 1e-5
    assert found.train[:, :-1].std(0).sub(1).abs().max() < 1e-5
    assert not found.train[:, -1].any()
    pictures = [np.full((2, 2, 3), 255, dtype=np.uint8), np.zeros((2, 2, 3), dtype=np.uint8)]
    x, y = mlp_digits.from_rows(pictures, [3, 1])
    assert x.tolist() == [[1.0] * 12, [0.0] * 12]
    assert y.tolist() == [3, 1]


def test_images_of_the_hub_are_read_by_their_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(repository: str, *, split: str, revision: str) -> datasets.Dataset:
        asked.append((repository, split, len(revision)))
        pictures = [np.full((2, 2), value, dtype=np.uint8) for value in (0, 51, 255)]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
        )
        return datasets.Dataset.from_dict(
            {"image": pictures, "label": [1, 2, 3]}, features=features
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = mlp_digits.from_hub("mnist")
    assert asked == [("ylecun/mnist", "train", 40), ("ylecun/mnist", "test", 40)]
    assert found.train.shape == (3, 4)
    assert found.test[:, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert found.train_classes.tolist() == [1, 2, 3]


def test_command_and_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    options = [
        "--settings",
        "tanh",
        "--optimizers",
        "sgd",
        "--steps",
        "4",
        "--look",
        "2",
        "--seeds",
        "2",
        "--hidden",
        "16",
    ]
    options += ["--batch", "64", "--share", "1/2"]
    assert mlp_digits.main([*options, "--out", str(tmp_path)]) == 0
    with (tmp_path / "mlp_looks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 * 2 * 3
    assert {p.name for p in tmp_path.iterdir()} == {
        f"mlp.{kind}" for kind in ("csv", "md", "svg")
    } | {"mlp_looks.csv"}
    for wrong, named in (
        (["--batch", "5000"], "--batch 5000"),
        (["--seeds", "0"], "--seeds 0"),
        (["--adapt-every", "0"], "--adapt-every 0"),
        (["--look", "0"], "--look 0"),
        (["--steps", "0"], "--steps 0"),
    ):
        assert mlp_digits.main([*options, *wrong, "--out", str(tmp_path / "no")]) == 1
        assert named in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_without_scikit_learn_the_option_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert mlp_digits.main(["--seeds", "1"]) == 1
    assert "--data digits: needs scikit-learn" in capsys.readouterr().err


def test_layers_are_left_as_they_were() -> None:
    task = make()
    layers = small.chosen_layers(task)
    assert [layer.in_features for layer in layers] == [24, 16]
    assert all(type(layer) is nn.Linear for layer in layers)
