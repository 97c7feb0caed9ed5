"""A model that a run of model=hf has trained, as a folder of transformers.

    python scripts/export_hf.py runs/default my-tuned-llama

Takes a run folder; uses the checkpoint of lowest validation loss, or the newest with --latest.
OUT gets config.json and the weights as safetensors (float32), written by save_pretrained, and with
data.tokenizer=hf the tokenizer's files. What a method has learned for itself stays behind, and a
sketched layer is a plain one there: `AutoModelForCausalLM.from_pretrained(OUT)` is the trained
model. The folder that the run began from need not be there any more; if it is, its tokenizer and
generation_config.json are copied.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from data.hf_tokenizer import HFTokenizer
from harness.folder.checkpoint import CheckpointError
from harness.trained import load_trained
from models import HF

BESIDE = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "generation*.json")
"""Files of a model's folder that training does not change."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, help="folder to write; must be new or empty")
    parser.add_argument(
        "--latest", action="store_true", help="the newest checkpoint instead of the best"
    )
    options = parser.parse_args(argv)
    try:
        export(options.run, options.out, best=not options.latest)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"export_hf: {error}", file=sys.stderr)
        return 1
    return 0


def export(run: Path, out: Path, *, best: bool = True) -> None:
    """Write the trained model of `run` to `out`. Raises ValueError if it is of another family, or
    `out` holds files.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there already; give a new folder")
    trained = load_trained(run, best=best)
    model = trained.model
    if not isinstance(model, HF):
        raise ValueError(f"{run}: its model.family={model.config.family}; only hf can be exported")
    model.inner.save_pretrained(out)
    folder = Path(model.config.path or "").expanduser()
    for pattern in BESIDE:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and not (out / path.name).exists():
                shutil.copyfile(path, out / path.name)
    if (
        isinstance(trained.prepared.tokenizer, HFTokenizer)
        and not (out / "tokenizer.json").exists()
    ):
        trained.prepared.tokenizer.save(out)
    print(f"{out}: step {trained.step}, val/loss {trained.val_loss}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
