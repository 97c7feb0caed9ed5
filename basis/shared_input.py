"""One sketch for all layers that read the same tensor.

q, k and v of an attention, gate and up of a SwiGLU, the adapters of LoRA: they read one tensor. An
exact step keeps it once, since autograd keeps references. Layers that each make a sketch of their
own would keep three, and 8 bits a number would then save nothing of 16. So the first layer that
reads a tensor says how it is kept (`Reading`), and whoever reads it later in the same forward keeps
the same: they are to the method what one layer of all their outputs would be.

What is exact: what was exact before. What is estimated: each dW as before, without bias where the
method has none; the errors of layers with one input now belong together, as the rows of one dW do.
What is kept: one sketch for each distinct input. What it costs: a look into a dictionary.

The same tensor means the same object, not written to since (by its version), read with an equal
method in the same precision, in the same pass through the model (ops/shared_noise.py), so that a
batch that comes round again gets new noise. A view of it, or a copy, is another tensor. The table
refers to inputs weakly: an entry goes when its input does. Layers whose key was set by hand keep to
it and share nothing.

PEFT casts the input of each adapter to float32 where the model is in bfloat16, so that q, k and v
read three copies of one tensor, one after the other. A copy that a cast made names the operation
behind it (`_origin`). For adapters, two casts in turn of one result to one precision are one
reading. Elsewhere they are not: a write under no_grad between two casts is not to be seen from the
copies, and code that does so is the user's to write.

Under torch.compile nothing can be kept in a table. There the first layer leaves its key on the
tensor, as an attribute that lives while the graph is traced, and the others take it: they then
compute the same from the same, and the compiler does it once. It is left only on results of
differentiable operations, and not on views: what is given to a graph from outside may come again,
and would bring an old key with it.

Some inputs are kept by whoever made them, sketch or no sketch: attention keeps its output, which is
what o_proj reads, and so do tanh, ReLU, sigmoid and softmax. A sketch of such an input adds bytes.
A layer with `exact_if_kept` keeps the input itself there, for no bytes and with an exact dW
(`is_kept_anyway`). A compiled graph does not say who keeps what; under torch.compile such layers
sketch.

A method that learns uses what the first reader has learned; the others go on learning by
themselves, so that each has a state of its own to be saved.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from basis.estimator import Estimator, State
from basis.ops.shared_noise import SharedNoise
from basis.state import pack_state, unpack_state


@dataclass(eq=False)
class Reading:
    """How a tensor is kept: `estimator.compress(x, key, state)`, and what that gave, once it was
    asked for (None: the tensor itself).
    """

    estimator: Estimator
    key: Tensor
    state: State
    is_kept: bool = False
    kept: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class _Entry:
    input: weakref.ref[Tensor]
    version: int
    dtype: torch.dtype
    reading: Reading


class _Origin:
    """Stands for one result of an operation, as long as the operation is in a graph."""


@dataclass(eq=False)
class _Cast:
    """The last cast that was read. dtypes: what it was cast to, and what that was read in."""

    origin: weakref.ref[_Origin]
    dtypes: tuple[torch.dtype, torch.dtype]
    reading: Reading


def can_share(x: Tensor) -> bool:
    """Whether a table may know `x`: it is an ordinary tensor, or a fake one, and no transform or
    compiler looks on.
    """
    return (
        not torch.compiler.is_compiling()
        and (type(x) is Tensor or isinstance(x, FakeTensor))
        and torch._C._functorch.maybe_current_level() is None
        and not x.is_inference()
    )


IN_FEW_BITS = "basis: its result is kept in few bits"
"""Noted on an operation that keeps something else in the place of its result, by hooks on what it
saves, which the operation does not know of.
"""
VIEWS = frozenset(
    f"{name}Backward0"
    for name in (
        *("View", "UnsafeView", "ReshapeAlias", "Alias", "T", "Transpose", "Permute"),
        *("Unsqueeze", "Squeeze", "Expand"),
    )
)


def is_kept_anyway(x: Tensor) -> bool:
    """Whether the operation that made `x`, or the tensor that `x` is a view of, keeps its result
    for its own backward. Eager mode only.
    """
    node, output = x.grad_fn, x.output_nr
    while node is not None and node.name() in VIEWS:
        node, output = node.next_functions[0]
    if node is None or output != 0 or IN_FEW_BITS in cast(Any, node.metadata):
        return False
    # Named so in PyTorch's derivatives.yaml; the raw ones, since a look at the tensor itself would
    # run the unpack hook of a checkpoint.
    return any(hasattr(node, name) for name in ("_raw_saved_result", "_raw_saved_output"))


def _origin(x: Tensor) -> _Origin | None:
    """What `x` was cast from, if a cast made it from the result of an operation."""
    node = x.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return None
    source, output = node.next_functions[0]
    # A leaf has no operation of its own: it may be written to from one step to the next.
    if source is None or source.name() == "torch::autograd::AccumulateGrad":
        return None
    return cast(Any, source.metadata).setdefault(("basis: a result", output), _Origin())


def find(
    input: Tensor,
    dtype: torch.dtype,
    estimator: Estimator,
    noise: SharedNoise | None,
    casts: bool = False,
) -> Reading | None:
    """How an earlier reader of `input` keeps it, if `estimator` may keep the same.

    dtype: the precision in which the input is read (autocast). noise: what is shared in this pass.
    casts: whether another cast of the same result is the same input.
    """
    if torch.compiler.is_compiling():
        left = getattr(input, "_basis_reading", None)
        if left is None or left[0] is not estimator:
            return None
        _, key, *packed = left
        return Reading(estimator, key, unpack_state(*packed))
    if noise is None or not can_share(input):
        return None
    entry: _Entry | None = noise.readings.get(id(input))
    if (
        entry is not None
        and entry.input() is input
        and entry.version == input._version
        and entry.dtype == dtype
        and entry.reading.estimator == estimator
    ):
        return entry.reading
    last: _Cast | None = noise.cast
    if (
        casts
        and last is not None
        and input._version == 0
        and last.dtypes == (input.dtype, dtype)
        and last.reading.estimator == estimator
        and last.origin() is _origin(input)
    ):
        return last.reading
    return None


def note(
    input: Tensor,
    dtype: torch.dtype,
    reading: Reading,
    noise: SharedNoise | None,
    casts: bool = False,
) -> None:
    """Let later readers of `input` find `reading`; arguments as for `find`."""
    if torch.compiler.is_compiling():
        # Only the result of an operation with one result takes an attribute in a graph; results of
        # chunk, split and unbind are views.
        takes_one = input._base is None and input.output_nr == 0
        if input.requires_grad and not input.is_leaf and takes_one:
            left = (reading.estimator, reading.key, *pack_state(reading.state))
            input._basis_reading = left  # type: ignore[attr-defined]
        return
    if noise is None or not can_share(input):
        return
    readings, place = noise.readings, id(input)

    def forget(gone: weakref.ref[Tensor]) -> None:
        entry = readings.get(place)
        if entry is not None and entry.input is gone:
            del readings[place]

    readings[place] = _Entry(weakref.ref(input, forget), input._version, dtype, reading)

    def forget_cast(gone: weakref.ref[_Origin]) -> None:
        if noise.cast is not None and noise.cast.origin is gone:
            noise.cast = None

    origin = _origin(input) if casts and input._version == 0 else None
    if origin is not None:
        noise.cast = _Cast(weakref.ref(origin, forget_cast), (input.dtype, dtype), reading)
