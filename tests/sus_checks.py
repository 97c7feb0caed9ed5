"""What the tests of SUS attention share: the variant that must fail, D formed from the sample."""

from torch import Tensor

from basis.sus.blocks import Heads, causal_probabilities
from basis.sus.dense import Gradients, dense_gradients
from basis.sus.masks import Noise, independent_mask


def delta_from_sample(
    heads: Heads, output: Tensor, grad_output: Tensor, key: Tensor, c: float
) -> Gradients:
    """As `dense_gradients`, but with D_i = sum_j W~_ij V_j . G_i in place of O_i . G_i: W~ stands
    in a product with itself.
    """
    whole = slice(0, heads.q.shape[2])
    q = heads.rows_of(heads.q, slice(None), whole) * heads.scale
    weights = causal_probabilities(q, heads.k.float(), 0, heads.q.shape[1])
    masked = independent_mask(weights, c, Noise.of(key, heads).part(slice(None), whole))
    return dense_gradients(heads, (masked @ heads.v.float()).view_as(output), grad_output, key, c)
