"""A converted model in other people's training loops: it trains, goes on from a checkpoint where it
was, and is saved as the plain model is.

The Trainer of transformers and accelerate save PyTorch's generators, from which layers draw their
noise while no key is set: a resumed run is the straight one. Lightning does not; there
`basis.set_noise_key` in each step makes it so.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import basis
from basis.estimator import Estimator

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
load_file = pytest.importorskip("safetensors.torch").load_file
pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers' own parts

LENGTH = 16
TEXT = "the cat sat on the mat and the dog sat on the cat and ran. " * 9
LETTERS = sorted(set(TEXT))
CODES = torch.tensor([LETTERS.index(letter) for letter in TEXT])
EXAMPLES = [{"input_ids": part, "labels": part} for part in CODES.split(LENGTH)[:32]]
LEARNING = basis.Transform(bits=3.0)  # keeps what it has learned in buffers


@pytest.fixture(autouse=True)
def _settings_of_its_own() -> Iterator[None]:
    """accelerate remembers, also in the environment, how a Trainer was set up."""
    with mock.patch.dict(os.environ):
        yield
    accelerate.state.AcceleratorState._reset_state(True)


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def converted(method: Estimator | None = None) -> Any:
    model = llama()
    basis.apply(model, method or "8x", lean=True, head=True)
    assert len(list(basis.sketched_layers(model))) >= 7
    return model


def stacked(some: slice) -> dict[str, Tensor]:
    rows = torch.stack([one["input_ids"] for one in EXAMPLES[some]])
    return {"input_ids": rows, "labels": rows}


def same(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-7)


class Stop(transformers.TrainerCallback):
    """Ends a run in the middle, after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def trainer(model: Any, folder: Path, stop: int | None = None, **options: Any) -> Any:
    arguments = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        "save_steps": 5,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **options,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **arguments),
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES,
        callbacks=[] if stop is None else [Stop(stop)],
    )


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", [None, LEARNING], ids=["8x", "learning"])
def test_a_run_of_two_epochs_stopped_and_resumed_is_the_straight_one(
    tmp_path: Path, method: Estimator | None
) -> None:
    straight = trainer(converted(method), tmp_path / "straight")
    straight.train()
    wanted = losses(straight)
    assert len(wanted) == 16
    assert wanted[-1] < 0.85 * wanted[0]
    stopped = trainer(converted(method), tmp_path / "parts", stop=5)
    stopped.train()
    assert losses(stopped) == pytest.approx(wanted[:5], rel=1e-5)
    torch.manual_seed(99)
    resumed = trainer(converted(method), tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == pytest.approx(wanted, rel=1e-5)
    same(resumed.model, straight.model)
    found = resumed.evaluate()["eval_loss"]
    assert found == pytest.approx(straight.evaluate()["eval_loss"], rel=1e-5)
    assert found < 0.85 * wanted[0]


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow
        ),
    ],
    ids=["bf16", "accumulation", "compiled"],
)
def test_options_of_the_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    """The first loss is the plain model's, and it falls as that one's does."""
    found = {}
    for name, model in (("plain", llama()), ("converted", converted())):
        more = {} if name == "plain" and "torch_compile" in options else options
        run = trainer(model, tmp_path / name, max_steps=12, save_strategy="no", **more)
        run.train()
        found[name] = losses(run)
    precise = 2e-2 if "bf16" in options else 1e-5
    assert found["converted"][0] == pytest.approx(found["plain"][0], rel=precise)
    assert found["converted"] == pytest.approx(found["plain"], rel=0.05)
    assert found["converted"][-1] < 0.9 * found["converted"][0]


@pytest.mark.parametrize("method", [None, LEARNING], ids=["8x", "learning"])
def test_accelerate_goes_on_from_a_saved_state(tmp_path: Path, method: Estimator | None) -> None:
    def loop(steps: range, load: Path | None = None, save: Path | None = None) -> nn.Module:
        model = converted(method)
        helper = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        model, optimizer = helper.prepare(model, optimizer)
        torch.manual_seed(1 if load is None else 2)
        if load is not None:
            helper.load_state(str(load))
        for step in steps:
            with helper.accumulate(model):
                helper.backward(model(**stacked(slice(4 * step, 4 * step + 4))).loss)
                optimizer.step()
                optimizer.zero_grad()
        if save is not None:
            helper.save_state(str(save))
        return helper.unwrap_model(model)

    straight = loop(range(8))
    loop(range(4), save=tmp_path / "state")
    same(loop(range(4, 8), load=tmp_path / "state"), straight)
    assert not torch.equal(straight.lm_head.weight, llama().lm_head.weight)


def test_muon_updates_the_matrices_of_a_converted_model() -> None:
    model = converted()
    block = [p for p in model.model.layers.parameters() if p.ndim == 2]
    taken = {id(p) for p in block}
    rest = [p for p in model.parameters() if id(p) not in taken]
    optimizers = [torch.optim.Muon(block, lr=0.02), torch.optim.AdamW(rest, lr=3e-3)]
    before = [p.detach().clone() for p in block]
    found = []
    for step in range(16):
        loss = model(**stacked(slice(step % 4 * 8, step % 4 * 8 + 8))).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < 0.85 * found[0]
    assert not any(torch.equal(p, old) for p, old in zip(block, before, strict=True))


def test_an_averaged_model_has_the_mean_of_the_weights() -> None:
    model = converted(LEARNING)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=False)
    states = []
    for step in range(3):
        model(**stacked(slice(8 * step, 8 * step + 8))).loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        average.update_parameters(model)
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    mean = {name: sum(state[name] for state in states) / 3 for name in states[0]}
    torch.testing.assert_close(dict(average.module.named_parameters()), mean)
    given = stacked(slice(0, 4))
    plain = llama()
    plain.load_state_dict(mean)
    for one in (average, plain):
        one.eval()
    with torch.no_grad():
        torch.testing.assert_close(average(**given).loss, plain(**given).loss)
    again = torch.optim.swa_utils.AveragedModel(converted(LEARNING))
    again.load_state_dict(average.state_dict())
    same(again, average)
    basis.revert(average)
    assert list(average.module.state_dict()) == list(plain.state_dict())


def test_scaled_losses_give_the_gradients_of_others() -> None:
    model = converted()
    basis.set_noise_key(model, seed=0, step=0)
    given = stacked(slice(0, 8))
    model(**given).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler.scale(model(**given).loss).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, wanted)
    scaler.step(optimizer)
    scaler.update()
    after = {name: before[name] - 0.1 * grad for name, grad in wanted.items()}
    torch.testing.assert_close(dict(model.named_parameters()), after)
    # A step whose gradients overflow is left out.
    scaler.scale(model(**given).loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(dict(model.named_parameters()), after)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("method", [None, LEARNING], ids=["8x", "learning"])
def test_saved_as_the_plain_model_is(tmp_path: Path, method: Estimator | None) -> None:
    """What a layer has learned is saved besides, and a plain model leaves it out."""
    model = converted(method)
    model(**stacked(slice(0, 8))).loss.backward()
    model.save_pretrained(tmp_path / "converted")
    llama().save_pretrained(tmp_path / "plain")
    found, plain = (
        load_file(tmp_path / name / "model.safetensors") for name in ("converted", "plain")
    )
    learned = {name for name in found if ".estimator_" in name}
    assert bool(learned) == (method is LEARNING)
    torch.testing.assert_close({n: t for n, t in found.items() if n not in learned}, plain)
    configs = [(tmp_path / name / "config.json").read_text() for name in ("converted", "plain")]
    assert configs[0] == configs[1]
    back, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "converted", output_loading_info=True
    )
    torch.testing.assert_close(back.state_dict(), plain)
    assert set(info["unexpected_keys"]) == learned
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    basis.revert(model)
    model.save_pretrained(tmp_path / "reverted")
    torch.testing.assert_close(load_file(tmp_path / "reverted/model.safetensors"), plain)


def test_lightning_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = converted(LEARNING)

        def training_step(self, given: dict[str, Tensor], _: int) -> Tensor:
            basis.set_noise_key(self.model, seed=0, step=self.global_step)
            return self.model(**given).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def fitted(epochs: int, load: str | None = None) -> tuple[Module, Any]:
        module = Module()
        run = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        batches = torch.utils.data.DataLoader(EXAMPLES, batch_size=8)
        run.fit(module, batches, ckpt_path=load)
        return module, run

    straight, _ = fitted(2)
    _, run = fitted(1)
    run.save_checkpoint(tmp_path / "middle.ckpt")
    torch.manual_seed(9)
    resumed, _ = fitted(2, str(tmp_path / "middle.ckpt"))
    same(resumed, straight)
    assert not torch.equal(straight.model.lm_head.weight, llama().lm_head.weight)
