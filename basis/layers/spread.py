"""Sketched layers whose weight is spread over several processes as a DTensor (tensor parallel).

A product that is cut has a sketch in each process, of the input that the process has:

| weight | input | output | the process's dW |
|---|---|---|---|
| by rows of W, `ColwiseParallel` | whole | its features | its rows of dW, from X |
| by columns of W, `RowwiseParallel` | its features | a summand | its columns of dW, from its X |
| whole | its tokens, or whole | likewise | a summand, from its X |

So nothing travels that does not travel without sketches, each process draws by itself, and each
part of dW is what the method makes of its own input: outputs and dX are exact, dW as before. Norms
that a method restores are those of the part. Layers that read one input keep a sketch each.

A method that learns is refused: its state is of the layer's whole width, and no process has that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from basis.sketched import Sketched


def mesh_of(weight: Tensor) -> DeviceMesh | None:
    """The processes over which `weight` is spread as a DTensor; None if it is not. Nothing of
    torch.distributed is imported for it.
    """
    return getattr(weight, "device_mesh", None)


def spread_product(layer: Sketched, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`layer.product` where `weight` (M, N) is a DTensor.

    Raises ValueError for an input that is no DTensor, meshes of more dimensions than one, and a
    method that learns.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    assert isinstance(weight, DTensor)
    if not isinstance(input, DTensor):
        raise ValueError(
            "sketched layer: its weight is in parts on several processes, its input is not; under "
            "fully_shard call the module that was given to it, which gathers the weight"
        )
    mesh = weight.device_mesh
    if mesh.ndim > 1:
        raise ValueError(
            f"sketched layer: its weight is spread over a mesh of {mesh.ndim} dimensions "
            f"({weight.placements}); one is supported"
        )
    if layer.state:
        raise ValueError(
            f"sketched layer: {type(layer.estimator).__name__} learns from whole inputs, and this "
            "layer is spread over several processes; exclude it from convert, or choose a method "
            "that does not learn"
        )
    (by,), (cut,) = weight.placements, input.placements
    assert bias is None or isinstance(bias, DTensor)
    last = input.ndim - 1
    if by == Shard(0):
        x = input.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        b = None if bias is None else bias.redistribute(placements=[by]).to_local()
        y = layer.product(x, weight.to_local(), b)
        return cast(Tensor, DTensor.from_local(y, mesh, [Shard(last)], run_check=False))
    if by == Shard(1):
        x = input.redistribute(placements=[Shard(last)]).to_local()
        y = layer.product(x, weight.to_local(), None)
        parts = DTensor.from_local(y, mesh, [Partial()], run_check=False)
        return parts if bias is None else parts + bias
    whole = cut.is_replicate() or cut == Shard(last) or cut.is_partial()
    if whole:
        input, cut = input.redistribute(placements=[Replicate()]), Replicate()
    grads = [Replicate() if whole else Partial()]
    w = weight.to_local(grad_placements=grads)
    b = None if bias is None else bias.to_local(grad_placements=grads)
    y = layer.product(input.to_local(), w, b)
    return cast(Tensor, DTensor.from_local(y, mesh, [cut], run_check=False))
