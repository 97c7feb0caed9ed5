"""model=hf: models of transformers from a local folder, through the harness."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import composed
from hydra.errors import CompactHydraException
from tiny import QUICK, losses, overrides

import basis
import train
from data.hf_tokenizer import HFTokenizer
from harness.build import build_model
from harness.compose import load
from harness.config import Config
from harness.folder.checkpoint import Checkpoints
from harness.trained import load_trained
from scripts import export_hf, sample

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}


VARIANCE = ["method.budget=1/4", "method.allocation=variance"]
RESTLESS = [  # the rank falls at each look
    *("adaptive_rank.every=2", "adaptive_rank.patience=1"),
    *("adaptive_rank.low=2", "adaptive_rank.high=3"),
]


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    )


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **SIZES,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=16,
        )
    )


def saved(make: Callable[[], Any], folder: Path) -> Path:
    torch.manual_seed(0)
    make().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(llama, tmp_path_factory.mktemp("models") / "llama")


def words(tmp_path: Path, model: Path, *more: str) -> list[str]:
    data = [word for word in overrides(tmp_path) if word.startswith("data")]
    quick = [*QUICK, "steps=6", "eval.every=3", "checkpoint.every=3", "log.every=1"]
    optim = ["optim=adamw", "optim.lr=1e-3", "optim.warmup_steps=0", "micro_batch_size=4"]
    given = ["model=hf", f"model.path={model}", "tracker.mode=disabled"]
    return [*data, *quick, *optim, *given, *more]


def config_of(tmp_path: Path, model: Path, *more: str) -> Config:
    return load(composed(*words(tmp_path, model, *more)))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_loss_before_training_is_that_of_transformers(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    path = saved(make, tmp_path / "model")
    config = config_of(tmp_path, path, "method=exact", "model.dropout=0")
    model, _ = build_model(config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    tokens = torch.randint(64, (3, 16))
    wanted = theirs(input_ids=tokens, labels=tokens).loss
    assert all(module.training for module in model.modules())
    loss = model(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    loss.backward()
    wanted.backward()
    found = {name.removeprefix("inner."): p.grad for name, p in model.named_parameters()}
    assert found.keys() == {name for name, _ in theirs.named_parameters()}
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[:, :-1]), theirs(tokens[:, :-1]).logits)
    assert config.model.n_layer == len(model.blocks) == 2
    assert config.model.parameters <= model.parameter_count()


@pytest.mark.parametrize(
    "options",
    [
        ["method=exact", "activations=checkpoint"],
        ["method=quantized", "method.budget=1/4", "activations=lean"],
        ["method=basis", "method.rank=4"],
        [*VARIANCE, "method=quantized"],
        ["method=low_rank", "method.rank=4", *RESTLESS, "method.include=['*']"],
    ],
    ids=lambda options: options[0],
)
def test_it_trains_and_resumes_bit_for_bit(
    options: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = composed(*words(tmp_path, folder, *options))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.execute(values, whole)
    rows = losses(whole)
    first, last = (r["train/loss"] for r in (rows[1], rows[-1]))
    assert last < first
    saves: list[int] = []

    def stop_after_the_first(run: Any) -> None:
        save(run)
        if run.step == 3 and not saves:
            saves.append(run.step)
            raise KeyboardInterrupt

    save = train.save
    monkeypatch.setattr(train, "save", stop_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        train.execute(values, parts)
    train.execute(values, parts)
    assert losses(parts) == rows


@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_a_budget_follows_the_error_of_each_layer(make: Callable[[], Any], tmp_path: Path) -> None:
    """With a fused head, Conv1D or experts, whose names in the model are those of no module."""
    path = saved(make, tmp_path / "model")
    options = ["method=quantized", *VARIANCE, "method.include=['*']", "steps=2"]
    train.execute(composed(*words(tmp_path, path, *options)), tmp_path / "run")
    loaded = Checkpoints(tmp_path / "run" / "checkpoints").load_latest()
    assert loaded is not None
    knobs = loaded.state["knobs"]
    model, sketched = build_model(config_of(tmp_path, path, *options))
    layers = dict(basis.sketched_layers(model))
    assert knobs.keys() == layers.keys() - {model.names["head"]}
    assert len(set(knobs.values())) > 1
    if make is mixtral:
        assert "inner.model.layers.0.mlp.experts.gate_up_sketch" in knobs
        assert "inner.model.layers.0.mlp.experts" in sketched


@pytest.mark.parametrize(("make", "widths"), [(llama, 3 * 32 + 48), (gpt2, 3 * 32 + 4 * 32)])
def test_inputs_count_once_and_the_monitor_sees_every_dense_layer(
    make: Callable[[], Any], widths: int, tmp_path: Path
) -> None:
    """Llama's q, k and v read one tensor, so do gate and up; GPT-2's layers are Conv1D."""
    path = saved(make, tmp_path / "model")
    options = ["method=quantized", "method.budget=1/4", "method.include=['blocks.*']", "steps=1"]
    given = words(tmp_path, path, *options, "diagnostics.monitor=true", "model.dropout=0")
    if make is llama:
        given.remove("model.dropout=0")
    train.execute(composed(*given), tmp_path / "run")
    first, *_, last = losses(tmp_path / "run")
    assert first["mem/input_bytes"] == 2 * widths * 4 * 16 * 4
    watched = {name.split("/")[1] for name in last if name.startswith("monitor/")}
    layers = 7 if make is llama else 4
    assert len(watched) == 2 * layers + 1


def test_a_rank_follows_the_error_under_a_fused_head(folder: Path, tmp_path: Path) -> None:
    options = ["method=low_rank", "method.rank=4", *RESTLESS, "method.include=['*']"]
    train.execute(composed(*words(tmp_path, folder, *options)), tmp_path / "run")
    rows = losses(tmp_path / "run")
    ranks = [row["rank/estimator"] for row in rows if "rank/estimator" in row]
    assert ranks == [4, 3, 2, 1]
    kept = [row["mem/saved_bytes/sketches"] for row in rows if "mem/saved_bytes/sketches" in row]
    assert kept == sorted(kept, reverse=True)
    assert len(kept) == len(ranks)


def test_what_the_folder_must_be(folder: Path, tmp_path: Path) -> None:
    def refused(path: Path | str, *more: str) -> str:
        with pytest.raises(ValueError, match=r"^\w") as error:
            config_of(tmp_path, path, *more)  # type: ignore[arg-type]
        return str(error.value)

    assert "model.path=null" in refused("null")
    assert "never downloaded" in refused("gpt2")
    assert "at most 16" in refused(folder, "model.block_size=17")
    assert "model.n_layer=3" in refused(folder, "model.n_layer=3")
    assert "attention=sus" in refused(folder, "attention=sus")
    assert "recompute" in refused(folder, "activations=recompute")
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refused(pickled)
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    values = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(values | {"model_type": "of_my_own"}))
    assert "model_type='of_my_own'" in refused(own)


def test_another_model_in_the_same_place_is_refused(folder: Path, tmp_path: Path) -> None:
    run, path = tmp_path / "run", tmp_path / "moved"
    train.execute(composed(*words(tmp_path, folder, "method=exact", "steps=3")), run)
    shutil.copytree(folder, path)
    train.execute(composed(*words(tmp_path, path, "method=exact", "steps=3")), run)  # moved
    torch.manual_seed(1)
    llama().save_pretrained(path)
    with pytest.raises(CompactHydraException, match=r"model\.sha256: "):
        train.execute(composed(*words(tmp_path, path, "method=exact", "steps=3")), run)


def tokenizer_in(folder: Path, text: str, *, without: str = "") -> None:
    """A byte-pair tokenizer of 60 ids, trained on `text`, which knows no letter of `without`."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    made.train_from_iterator([text.translate(str.maketrans("", "", without))], trainer)
    made.enable_truncation(3)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')


def test_own_text_is_tuned_sampled_and_exported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run, out = tmp_path / "llama", tmp_path / "run", tmp_path / "out"
    shutil.copytree(folder, path)
    given = words(tmp_path, path, "method=quantized", "method.budget=1/4", "steps=3")
    given = [w for w in given if w != "data.tokenizer=char"] + ["data.tokenizer=hf"]
    text = (tmp_path / "text.txt").read_text()
    with pytest.raises(CompactHydraException, match="holds no tokenizer"):
        train.execute(composed(*given), run)
    tokenizer_in(path, text, without="q")
    with pytest.raises(CompactHydraException, match=r"'q'.* is not in its vocabulary"):
        train.execute(composed(*given), run)
    tokenizer_in(path, text)
    train.execute(composed(*given), run)
    prepared = load_trained(run).prepared
    assert prepared.metadata["tokenizer_sha256"] == HFTokenizer(path).sha256
    ids = prepared.tokenizer.encode(text)
    assert prepared.tokenizer.decode(ids.tolist()) == text
    assert prepared.tokenizer.eot == 1
    assert "</s>" in prepared.tokenizer.decode([1])
    whole = [*prepared.train.read(0, prepared.train.count)]
    assert whole[:50] == ids[:50].tolist()

    path.rename(tmp_path / "gone")  # a run is read back without the folder that it began from
    assert sample.main([str(run), "--prompt", "to be", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("to be")
    assert export_hf.main([str(run), str(out)]) == 0
    assert export_hf.main([str(run), str(out)]) == 1
    assert "give a new folder" in capsys.readouterr().err
    assert HFTokenizer(out).sha256 == HFTokenizer(tmp_path / "gone").sha256
    trained = load_trained(run, best=True).model.eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.randint(60, (2, 16))
    assert torch.equal(theirs(tokens).logits, trained(tokens))
    start = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(theirs.lm_head.weight, start.lm_head.weight)
    assert sorted(p.name for p in out.glob("*.safetensors")) == ["model.safetensors"]
