"""An MLP on images by exact backpropagation, EMA sketches, BASIS and a tracked subspace: accuracy,
bytes, rank over time.

    python scripts/mlp_digits.py  # scikit-learn's digits, two settings, SGD and Adam: minutes
    python scripts/mlp_digits.py --data mnist --steps 2000 --seeds 3
    python scripts/mlp_digits.py --data cifar10 --hidden 512 512 --settings relu --optimizers adam

Handwritten digits are the 1,797 images of 8 x 8 that scikit-learn brings along (a fifth held out);
MNIST and CIFAR-10 come from the Hugging Face hub, at pinned commits. Every step has a batch of new
samples, in the order of a permutation per epoch.

What EMA sketches lose depends on what the rows of an input have in common
(basis/estimators/ema_sketch.py): an average over batches keeps the mean over samples and loses what
tells them apart. So there are two settings:

    relu    pixels in [0, 1] and ReLU: every feature has a positive mean
    tanh    pixels standardised over the training set, and tanh: features have a mean near zero

and two optimisers: SGD takes steps as large as the gradient that is left, Adam hides how large it
is.

Variants, budget and what is measured: experiments/ema/task.py. Written to --out: mlp.csv, mlp.md,
mlp.svg and mlp_looks.csv, every look at every training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from experiments.ema import task as small
from experiments.ema.arguments import adaptive_of, add_arguments
from experiments.ema.tables import write
from experiments.ema.task import Adaptive, Options, Setting, Task

SETTINGS = ("relu", "tanh")
RATES = {"sgd": 0.05, "adam": 1e-3}
HUB = {  # repository, commit, column of images
    "mnist": ("ylecun/mnist", "77f3279092a1c1579b2250db8eafed0ad422088c", "image"),
    "cifar10": ("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", "img"),
}
DATA = ("digits", *HUB)


@dataclass(frozen=True)
class Images:
    """Pixels in [0, 1], one image a row, and classes."""

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor

    def standardised(self) -> Images:
        """Each pixel with mean 0 and deviation 1 over the training images; pixels that never change
        become 0.
        """
        mean, deviation = self.train.mean(0), self.train.std(0)
        deviation = torch.where(deviation > 0, deviation, torch.inf)
        return Images(
            (self.train - mean) / deviation,
            self.train_classes,
            (self.test - mean) / deviation,
            self.test_classes,
        )


def digits() -> Images:
    """scikit-learn's digits. Raises ValueError if it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "--data digits: needs scikit-learn; pip install -c constraints.txt scikit-learn"
        ) from None
    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 16.0
    y = torch.tensor(found.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[len(x) // 5 :], order[: len(x) // 5]
    return Images(x[train], y[train], x[test], y[test])


def from_rows(images: list[object], classes: list[int]) -> tuple[Tensor, Tensor]:
    """Pictures of 8 bits a channel as rows of numbers in [0, 1], and their classes."""
    pixels = np.stack([np.asarray(image, dtype=np.uint8).reshape(-1) for image in images])
    return torch.from_numpy(pixels).float() / 255.0, torch.tensor(classes, dtype=torch.int64)


def from_hub(name: str) -> Images:
    """MNIST or CIFAR-10. Raises ConnectionError if the hub can't be reached."""
    from datasets import load_dataset

    repository, revision, column = HUB[name]
    parts: list[Tensor] = []
    for split in ("train", "test"):
        rows = load_dataset(repository, split=split, revision=revision)
        parts += from_rows(rows[column], rows["label"])
    return Images(*parts)


def network(widths: list[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Dense layers of these widths with the activation between them; weights from PyTorch's default
    generator.
    """
    parts: list[nn.Module] = []
    for width, following in pairwise(widths):
        parts += [nn.Linear(width, following), activation()]
    return nn.Sequential(*parts[:-1])


def make_task(images: Images, setting: str, hidden: list[int], batch: int, seed: int) -> Task:
    """A fresh network; its batches are functions of seed and step, of whole batches only. Raises
    ValueError for `batch`.
    """
    if not 1 <= batch <= min(len(images.train), len(images.test)):
        raise ValueError(
            f"--batch {batch}: must be in [1, {min(len(images.train), len(images.test))}], the "
            "images held out"
        )
    data = images.standardised() if setting == "tanh" else images
    torch.manual_seed(seed)
    widths = [data.train.shape[1], *hidden, int(data.train_classes.max()) + 1]
    model = network(widths, nn.Tanh if setting == "tanh" else nn.ReLU)
    per_epoch = len(data.train) // batch

    def loss(step: int) -> Tensor:
        epoch, place = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        chosen = torch.randperm(len(data.train), generator=generator)[
            place * batch : (place + 1) * batch
        ]
        return F.cross_entropy(model(data.train[chosen]), data.train_classes[chosen])

    @torch.no_grad()
    def accuracy() -> float:
        return float((model(data.test).argmax(1) == data.test_classes).float().mean())

    return Task(model, loss, accuracy, lambda: model(data.test[:batch]), rows=batch)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument(
        "--optimizers", nargs="+", choices=small.OPTIMIZERS, default=list(small.OPTIMIZERS)
    )
    parser.add_argument(
        "--hidden", type=int, nargs="+", default=[128, 128], help="widths (default: 128 128)"
    )
    parser.add_argument("--batch", type=int, default=128, help="samples a step (default: 128)")
    parser.add_argument(
        "--lr",
        type=float,
        help=f"(default: {', '.join(f'{rate} of {name}' for name, rate in RATES.items())})",
    )
    add_arguments(parser, steps=400, look=40, adaptive=Adaptive(every=20, low=0.1, high=0.3))
    parser.set_defaults(out=Path("runs/mlp"))
    options = parser.parse_args(argv)
    try:
        rates = RATES if options.lr is None else dict.fromkeys(RATES, options.lr)
        loops = {
            name: Options(
                options.steps,
                rates[name],
                name,
                look=options.look,
                share=options.share,
            )
            for name in options.optimizers
        }
        adaptive = adaptive_of(options)
        if min(options.hidden) < 1:
            raise ValueError(
                f"--hidden {' '.join(map(str, options.hidden))}: widths must be at least 1"
            )
        images = digits() if options.data == "digits" else from_hub(options.data)
        results = []
        cells = list(product(options.settings, options.optimizers))
        variants = small.variants(options.batch, adaptive)
        with tqdm(
            total=len(cells) * len(variants) * options.seeds, unit="training", disable=None
        ) as progress:
            for setting, name in cells:
                result = Setting(f"{options.data}, {setting}, {name}")
                for variant, seed in product(variants, range(options.seeds)):
                    task = make_task(images, setting, options.hidden, options.batch, seed)
                    result.outcomes.append(small.train(task, variant, loops[name], seed))
                    progress.update()
                results.append(result)
    except (ValueError, ConnectionError) as error:
        print(f"mlp_digits: {error}", file=sys.stderr)
        return 1
    write(
        results,
        options.out,
        "mlp",
        "An MLP on images",
        "accuracy on images held out",
        digits=3,
        log=False,
    )
    return 0
