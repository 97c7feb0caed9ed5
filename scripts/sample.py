"""Text from a trained model.

    python scripts/sample.py runs/default --prompt "ROMEO:" --tokens 200 --top-k 50 --seed 1

Takes a run folder; uses the checkpoint of lowest validation loss, or the newest with --latest. The
tokenizer is the one the run's data was prepared with.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from harness import terminal
from harness.folder.checkpoint import CheckpointError
from harness.trained import load_trained


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a newline)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add (default: 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)"
    )
    parser.add_argument(
        "--top-k", type=int, default=200, help="draw from the k likeliest tokens (default: 200)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--latest", action="store_true", help="the newest checkpoint instead of the best"
    )
    options = parser.parse_args(argv)
    if options.temperature < 0 or options.top_k < 1 or options.tokens < 1:
        parser.error("--temperature must be at least 0, --top-k and --tokens at least 1")
    try:
        sample(options)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"sample: {error}", file=sys.stderr)
        return 1
    return 0


def sample(options: argparse.Namespace) -> None:
    """Load, continue the prompt, print token by token. Raises ValueError or CheckpointError if
    something is missing.
    """
    trained = load_trained(options.run, best=not options.latest)
    model, tokenizer = trained.model.eval(), trained.prepared.tokenizer
    prompt = [int(token) for token in tokenizer.encode(options.prompt)]
    if not prompt:
        raise ValueError("--prompt is empty; give at least one character")
    print(f"step {trained.step}, val/loss {trained.val_loss}", file=sys.stderr)
    generator = torch.Generator().manual_seed(options.seed)
    text = options.prompt
    print(text, end="", flush=True)
    ids = prompt
    columns = model.generate(
        torch.tensor([prompt]),
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        vocab_size=tokenizer.vocab_size,
        generator=generator,
    )
    for column in columns:
        # A character can span tokens: print what the whole text has more than before, once it is
        # complete.
        ids.append(int(column))
        whole = tokenizer.decode(ids)
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):
            print(whole[len(text) :], end="", flush=True)
            text = whole
    print()


if __name__ == "__main__":
    terminal.attach()
    sys.exit(main())
