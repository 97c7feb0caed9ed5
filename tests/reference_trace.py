"""Replay a golden trace: the published implementation's own training run, step for step, with its
bins and signs.

    python tests/reference_trace.py tests/golden/train_rank32.npz

A trace (.npz) holds `meta` (JSON: every size and hyperparameter), `tokens`, `bins`, `signs`,
`losses`, the weights at the start and at the end, named as in the reference's Flax modules. The
model here is models.GPT under basis.convert, fed with the trace's hashing through explicit noise
keys; every size is read from `meta`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import basis
from basis.ops.noise import encode_hashing
from models import GPT, GPTConfig

SKETCHED = ["blocks.*.mlp.*", "head"]


def parameters(arrays: dict[str, np.ndarray], prefix: str, n_layer: int) -> dict[str, Tensor]:
    """The reference's weights under `prefix` ("init", "grad0", "final") as a state_dict of
    models.GPT.
    """
    get = {
        key.removeprefix(f"{prefix}/"): torch.from_numpy(value)
        for key, value in arrays.items()
        if key.startswith(prefix)
    }
    dense = "SketchedDense" if "SketchedDense_0/kernel" in get else "Dense"
    state = {"wte.weight": get["Embed_0/embedding"], "wpe.weight": get["Embed_1/embedding"]}

    def put_norm(name: str, index: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            get[f"LayerNorm_{index}/scale"],
            get[f"LayerNorm_{index}/bias"],
        )

    for layer in range(n_layer):
        block, attention = f"blocks.{layer}", f"MultiHeadDotProductAttention_{layer}"
        put_norm(f"{block}.ln_1", 2 * layer)
        put_norm(f"{block}.ln_2", 2 * layer + 1)
        projections = [f"{attention}/{part}" for part in ("query", "key", "value")]
        # kernels (width, heads, head_dim) -> weight (out, in); the fused layer stacks q, k and v
        # along out
        state[f"{block}.attn.qkv.weight"] = torch.cat(
            [get[f"{p}/kernel"].flatten(1).t() for p in projections]
        )
        state[f"{block}.attn.qkv.bias"] = torch.cat(
            [get[f"{p}/bias"].flatten() for p in projections]
        )
        state[f"{block}.attn.proj.weight"] = get[f"{attention}/out/kernel"].flatten(0, 1).t()
        state[f"{block}.attn.proj.bias"] = get[f"{attention}/out/bias"]
        for name, index in (("fc", 2 * layer), ("proj", 2 * layer + 1)):
            state[f"{block}.mlp.{name}.weight"] = get[f"{dense}_{index}/kernel"].t()
            state[f"{block}.mlp.{name}.bias"] = get[f"{dense}_{index}/bias"]
    put_norm("ln_f", 2 * n_layer)
    state["head.weight"] = get[f"{dense}_{2 * n_layer}/kernel"].t()
    return {name: value.contiguous() for name, value in state.items()}


def relative_error(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected|, Frobenius, in float64."""
    return (
        (value.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    ).item()


def without_key_bias(name: str, value: Tensor) -> Tensor:
    """The bias of the keys has a true gradient of zero (softmax ignores it): only rounding noise is
    there to compare.
    """
    if not name.endswith("qkv.bias"):
        return value
    q, _, v = value.chunk(3)
    return torch.cat([q, v])


def replay(path: str | Path) -> tuple[list[float], float]:
    """Train as the trace at `path` did. Returns (losses, worst relative error of the final
    parameters).
    """
    losses, errors, _ = replay_in_full(path)
    return losses, max(errors.values())


def replay_in_full(path: str | Path) -> tuple[list[float], dict[str, float], dict[str, float]]:
    """Losses, relative error of each final parameter, relative error of each gradient of step 0."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays["meta"]))
    n_layer = meta["n_layer"]
    model = GPT(
        GPTConfig(
            **{k: meta[k] for k in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")}
        )
    )
    model.load_state_dict(parameters(arrays, "init", n_layer))
    if meta["rank"] is not None:
        basis.convert(
            model, basis.BalancedSketch(meta["rank"], shrinkage=meta["shrinkage"]), include=SKETCHED
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=meta["lr"], momentum=meta["momentum"])
    first_grads = parameters(arrays, "grad0", n_layer)
    losses: list[float] = []
    grad_errors: dict[str, float] = {}
    for step in range(meta["steps"]):
        for index, (_, layer) in enumerate(basis.sketched_layers(model)):
            bins, signs = (
                torch.from_numpy(arrays[name][step, index]) for name in ("bins", "signs")
            )
            layer.set_noise_key(encode_hashing(bins, signs))
        window = torch.from_numpy(arrays["tokens"][step]).long()  # (batch, T + 1)
        loss = model(window[:, :-1], window[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            grad_errors = errors({n: p.grad for n, p in model.named_parameters()}, first_grads)
        optimizer.step()
        losses.append(loss.item())
    return losses, errors(model.state_dict(), parameters(arrays, "final", n_layer)), grad_errors


def errors(values: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert values.keys() == expected.keys()
    return {
        name: relative_error(
            without_key_bias(name, values[name]), without_key_bias(name, expected[name])
        )
        for name in expected
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        losses, error = replay(argument)
        print(
            f"{argument}: last loss {losses[-1]:.6f}, worst relative error of the final parameters "
            f"{error:.1e}"
        )
