"""Kernels that the interpreter runs may still not compile: here they do, for two generations of
cards, of which none need be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_kernels_of_the_codecs_compile(tmp_path: Path) -> None:
    program = Path(__file__).with_name("compile_kernels.py")
    root = str(program.parents[2])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": root, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
