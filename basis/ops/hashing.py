"""Signed hashing of rows: which of R bins each of B rows goes into, and with which sign.

    S[r, b] = sign of b where r is the bin of b, else 0        S x: sums of signed rows by bin

*Drawn.* B distinct random integers are sorted, which gives a random permutation of the rows. Its
places are cut into R bins, one after the other: of equal size, or one off (balanced; BASIS,
Algorithm 1, line 3), or of the sizes that independent bins would have (uniform). Each place has a
sign.

*Shared.* All layers with B rows use one permutation in a micro-batch (shared_noise.py), so one sort
serves them all, at any R. Signs are not shared: that of place j in layer l is

    signs[j] flips[j + l]        two tables of random signs, B and B + L long for L layers

so each layer by itself has the hashing of the paper, and errors of different layers are
uncorrelated, as if each had drawn its own. (Proof: an error is a sum over pairs of rows that share
a bin, with the product of their signs. For pairs of places (a, b) in layer l and (c, d) in l', the
four `signs` have a mean other than zero only if {a, b} = {c, d}, the four `flips` only if {a + l, b
+ l} = {c + l', d + l'}; both at once only if l = l'.) With the same signs in all layers errors are
correlated, as the gradients of one row are.

*Kept.* The rows in the order of their places (int32), where bins begin and the tables: 12 bytes a
row and 4 a bin in float32, for all layers together. A layer that draws for itself keeps its
8-byte key and draws again in backward.

*Used.* In one of three ways, which agree to rounding:

- PyTorch's embedding_bag is sums of weighted rows by bag: X is read once, B N additions whatever R
  is, low precision summed in float32, the same order of additions every time.
- On CUDA, in a graph of torch.compile, S of up to 128 rows is made as a matrix, by pointwise work
  that the compiler fuses, and multiplied: 2 R B N FLOPs, less time than it takes to read X. Instead
  of the order that needs the place of each row (`slot`).
- On CUDA elsewhere, triton/bin_sums.py makes the sums and both norms in one read of X.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from basis.ops import kernels
from basis.ops.matrix import frobenius_norms, transposed
from basis.ops.noise import random_bits
from basis.ops.shared_noise import SharedNoise

MATRIX_RANK = 128
"""Up to which rank S is a matrix on the devices of MATRIX_DEVICES, if no kernel is at hand outside
of a graph. 2 R FLOPs a number take as long
as reading its 2 bytes at about 170 FLOPs a byte, an H100's 600 TFLOP/s by 3.5 TB/s.
"""
MATRIX_DEVICES = frozenset({"cuda"})

_BITS = 31  # of a random integer, those that a uniform bin is made of
_SIGNS, _FLIPS = 1 << 30, 1 << 31  # numbers of the first integers that tables are made of


def _multiplies(like: Tensor, rank: int) -> bool:
    """Whether S is used as a matrix."""
    small = like.device.type in MATRIX_DEVICES and rank <= MATRIX_RANK
    return small and (torch.compiler.is_compiling() or not kernels.usable(like))


@dataclass(frozen=True)
class Hashing:
    """A drawn hashing of B rows into R bins.

    places: (B,), int32: the rows in the order of their places; or int64: the place of each row.
    first: (R,) int32, the first place of each bin. signs, flips: (B,) of places, +1 or -1, floating
    point, whose products are the signs; flips None for all +1.
    """

    places: Tensor
    first: Tensor
    signs: Tensor
    flips: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What to keep of it: `Hashing(*tensors)` is the same one."""
        found = (self.places, self.first, self.signs)
        return found if self.flips is None else (*found, self.flips)

    def signs_of_places(self, dtype: torch.dtype) -> Tensor:
        """(B,), +1 or -1."""
        return (self.signs if self.flips is None else self.signs * self.flips).to(dtype)

    @property
    def by_row(self) -> bool:
        """Whether `places` says for each row where it is; a saved hashing says so by its dtype."""
        return self.places.dtype == torch.int64

    def sums(self, x: Tensor) -> Tensor:
        """S x, (R, N), for `x` (B, N), in its dtype.

        A transposed view, as a loss head gives, would be walked through across the grain; there a
        product with S does it, at 2 R B N FLOPs.
        """
        if transposed(x):
            return (x.t() @ self.matrix(x.dtype).t()).t()  # in the memory order of x
        if self.by_row:
            return self.matrix(x.dtype) @ x
        signs = self.signs_of_places(x.dtype)
        return F.embedding_bag(self.places, x, self.first, mode="sum", per_sample_weights=signs)

    def sums_and_norms(self, x: Tensor, *, balanced: bool) -> tuple[Tensor, Tensor, Tensor]:
        """S x as `sums`, and the Frobenius norms |x| and |S x|, in float32 at least.

        balanced: whether the bins are those of balanced hashing; a kernel then makes all three at
        once where kernels are used.
        """
        if not balanced or self.by_row or transposed(x) or x.dtype == torch.float64:
            return _plain(x, self)
        return kernels.attempt(_by_kernel, _plain, x, self)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """S (R, B)."""
        rows, rank = len(self.places), len(self.first)
        signs = self.signs_of_places(dtype)
        if self.by_row:
            slot, first = self.places[None], self.first[:, None]
            last = F.pad(self.first[1:], (0, 1), value=rows)[:, None]
            inside = (slot >= first) & (slot < last)
            return torch.where(inside, signs[self.places][None], 0.0)
        matrix = torch.zeros(rank * rows, dtype=dtype, device=signs.device)
        return matrix.scatter_(0, self._bins() * rows + self.places, signs).view(rank, rows)

    def _bins(self) -> Tensor:
        """The bin of each place, (B,) int64."""
        place = torch.arange(len(self.places), dtype=torch.int32, device=self.first.device)
        return torch.searchsorted(self.first, place, right=True) - 1

    def by_rows(self) -> tuple[Tensor, Tensor]:
        """The bin and the sign of each row, (B,) int64."""
        slot = self.places if self.by_row else self.places.argsort()
        return self._bins()[slot], self.signs_of_places(torch.int64)[slot]


def _plain(x: Tensor, hashing: Hashing) -> tuple[Tensor, Tensor, Tensor]:
    sums = hashing.sums(x)
    return sums, *frobenius_norms(x, sums)


def _by_kernel(x: Tensor, hashing: Hashing) -> tuple[Tensor, Tensor, Tensor]:
    from basis.ops.triton.bin_sums import bin_sums

    return bin_sums(x, hashing.places, hashing.signs_of_places(x.dtype), len(hashing.first))


def _permutation(key: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Sorted random integers (rows,) and a random permutation, int64."""
    values, slot = random_bits(key, rows).sort()
    return values, slot


def _rows_in_order(slot: Tensor) -> Tensor:
    """The inverse of a permutation, int32."""
    rows = torch.arange(len(slot), dtype=torch.int32, device=slot.device)
    return torch.empty_like(rows).scatter_(0, slot, rows)


def _begin(values: Tensor, rank: int, hashing: str) -> Tensor:
    """Where bins begin, (rank,) int32, for the sorted random integers of the rows."""
    rows = len(values)
    bins = torch.arange(rank, device=values.device)
    if hashing == "uniform":  # as many as independent bins have, which sorting does not change
        uniform = ((values >> 1) * rank) >> _BITS
        return torch.searchsorted(uniform, bins, out_int32=True)
    assert hashing == "balanced", hashing
    size, larger = rows // rank, rows % rank  # the first bins have one row more
    return (bins * size + bins.clamp_max(larger)).to(torch.int32)


def _sign_table(key: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
    return (1 - 2 * (random_bits(key, count, start=start) & 1)).to(dtype)


def _tables(key: Tensor, rows: int, layers: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    signs = _sign_table(key, _SIGNS, rows, dtype)
    return signs, _sign_table(key, _FLIPS, rows + layers, dtype)


def shared_hashing(
    shared: SharedNoise, place: int, rows: int, like: Tensor, rank: int, hashing: str
) -> Hashing:
    """The hashing of `rows` rows into `rank` bins of the layer at `place`, with signs in the dtype
    and on the device of `like`.
    """
    device, dtype = like.device, like.dtype
    values, slot = shared.once(("slot", rows), device, lambda key: _permutation(key, rows))
    (first,) = shared.once(
        ("first", rows, rank, hashing), device, lambda _: (_begin(values, rank, hashing),)
    )
    signs, flips = shared.once(
        ("signs", rows, dtype), device, lambda key: _tables(key, rows, shared.layers, dtype)
    )
    places = slot
    if not _multiplies(like, rank):
        (places,) = shared.once(("order", rows), device, lambda _: (_rows_in_order(slot),))
    return Hashing(places, first, signs, flips.narrow(0, place, rows))


def own_hashing(key: Tensor, rows: int, like: Tensor, rank: int, hashing: str) -> Hashing:
    """The hashing of a layer that draws by its own `key`, otherwise as `shared_hashing`.

    A key of one dimension is the hashing, one code per row (`encode_hashing`); `hashing` is then
    not looked at.
    """
    if key.ndim == 0:
        return shared_hashing(SharedNoise(key, 0), 0, rows, like, rank, hashing)
    bins, order = (key >> 1).sort(stable=True)
    first = torch.searchsorted(bins, torch.arange(rank, device=key.device), out_int32=True)
    signs = (1 - 2 * (key[order] & 1)).to(like.dtype)
    return Hashing(order.to(torch.int32), first, signs)


def draw_hashing(key: Tensor, rows: int, rank: int, hashing: str) -> tuple[Tensor, Tensor]:
    """Bins (rows, int64 in [0, rank)) and signs (rows, int64, +1 or -1) that belong to `key`, for
    who wants to see them.
    """
    like = torch.empty(0, device=key.device)
    return own_hashing(key, rows, like, rank, hashing).by_rows()


_NAMES = ("places", "first", "signs", "flips")


def as_state(hashing: Hashing) -> dict[str, Tensor]:
    """A hashing as what `Estimator.shared_noise` returns."""
    return dict(zip(_NAMES, hashing.tensors, strict=True))


def from_state(state: Mapping[str, Tensor]) -> Hashing | None:
    """What `as_state` made; None for a layer that draws by its own key."""
    return Hashing(*(state[name] for name in _NAMES)) if _NAMES[0] in state else None
