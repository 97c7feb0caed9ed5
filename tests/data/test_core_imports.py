"""A machine that has only torch and numpy can train on token files made elsewhere."""

import subprocess
import sys
from pathlib import Path

from data.options import REPOSITORY

PROGRAM = """
import sys
from pathlib import Path
import numpy, torch
sys.modules.update(dict.fromkeys(
    ["hydra", "omegaconf", "tiktoken", "datasets", "pyarrow", "filelock", "tqdm", "wandb"]
))  # importing one of them fails from here on
import data
file = data.write_tokens(Path(sys.argv[1]), [range(100)], 100)
inputs, targets = data.Sampler(file, block_size=4, batch_size=2, order="paper", seed=0).batch(3)
print(inputs.tolist(), targets.tolist(), len(data.validation_windows(
    file, block_size=4, batch_size=2, batches=3)))
import data.files, data.hub, data.options, data.prepare, data.shards, data.sources, data.tokenizers
"""


def test_the_core_needs_torch_and_numpy_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "x.bin")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # Step 3 of two windows of five tokens: windows 6 and 7.
    assert done.stdout.strip() == (
        "[[30, 31, 32, 33], [35, 36, 37, 38]] [[31, 32, 33, 34], [36, 37, 38, 39]] 3"
    )
