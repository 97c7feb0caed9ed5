"""models/hf.py without transformers: what is said."""

import sys
from pathlib import Path

import pytest

from models.hf_config import described


def test_without_transformers_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model\.path=.*: holds no \*\.safetensors"):
        described({"path": str(tmp_path)})
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.path: .*basis-sketch\[integrations\]"):
        described({"path": str(tmp_path)})
