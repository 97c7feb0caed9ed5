"""examples/fine_tune_llama.py on a tiny checkpoint, as its first lines say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the cat sat on the mat and the dog sat on the cat . " * 40


def checkpoint(folder: Path) -> Path:
    """A Llama of one block with random weights, and a tokenizer of words."""
    words = {word: number for number, word in enumerate(["<unk>", *sorted(set(TEXT.split()))])}
    words_only = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    words_only.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_only, unk_token="<unk>"
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_it_trains_and_leaves_a_plain_model(tmp_path: Path) -> None:
    before = checkpoint(tmp_path / "before")
    text, after = tmp_path / "text.txt", tmp_path / "after"
    text.write_text(TEXT)
    program = ROOT / "examples/fine_tune_llama.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(before), str(text), str(after)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\d+\.\d+)", done.stdout)]
    assert losses
    assert "lm_head" in done.stdout  # of the report
    models = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (before, after)]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
