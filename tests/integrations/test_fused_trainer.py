"""A model with a fused head in the Trainer of transformers: accumulation, evaluation with metrics
and bfloat16 give what the plain model gives. So does the Trainer's own label smoothing, for which
it takes whole logits.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import basis

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the Trainer's own parts

VOCABULARY, LENGTH = 97, 12


def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def examples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (16, LENGTH), generator=generator)
    labels = tokens.clone()
    for row in range(16):  # few targets in some
        labels[row, : row % 10] = -100
    return [{"input_ids": one, "labels": other} for one, other in zip(tokens, labels, strict=True)]


def trained(folder: Path, fused: bool, **options: Any) -> tuple[Any, dict[str, float], list[tuple]]:
    """The trained model, its evaluation, and the shapes of logits that the metrics were given."""
    tiny, shapes = model(), []

    def metrics(found: Any) -> dict[str, float]:
        shapes.append(found.predictions.shape)
        return {"hits": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    if fused:
        basis.fuse_head(tiny)
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=3,
        learning_rate=0.5,
        optim="sgd",  # Adam would turn the noise of a small gradient into a whole step
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = transformers.Trainer(
        tiny, arguments, train_dataset=examples(), eval_dataset=examples(), compute_metrics=metrics
    )
    trainer.train()
    return tiny, trainer.evaluate(), shapes


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"label_smoothing_factor": 0.1}], ids=str)
def test_it_trains_and_evaluates_as_the_plain_model(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    plain, scores, shapes = trained(tmp_path, False, **options)
    fused, found, seen = trained(tmp_path, True, **options)
    tolerance = {"rtol": 0.1, "atol": 0.01} if "bf16" in options else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), **tolerance)
    assert not torch.equal(fused.lm_head.weight, model().lm_head.weight)
    assert found["eval_loss"] == pytest.approx(scores["eval_loss"], rel=1e-3)
    assert seen == shapes == [(16, LENGTH, VOCABULARY)]
    fused.save_pretrained(tmp_path / "saved")
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(other.state_dict(), fused.state_dict())
