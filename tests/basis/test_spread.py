"""Sketched layers under fully_shard (FSDP2), tensor parallel and distributed checkpoints."""

import socket
from pathlib import Path

import pytest


@pytest.mark.slow
def test_layers_whose_weights_are_spread_over_two_processes(tmp_path: Path) -> None:
    import spread_checks

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spread_checks.on_two_processes(port, tmp_path)
