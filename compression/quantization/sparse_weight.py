"""Weights with many zeros: a bit mask of what is not zero, and only that as codes or as floats.

Of n weights k are not zero; they take n / 8 bytes of mask and k packed codes instead of n. Nothing is rounded. The form
is chosen for the file, whose members are DEFLATE-compressed: that makes dense codes with many zeros smaller, too, but
to 11 to 42 % above their entropy, where mask and codes come to 2 to 29 % (benchmarks/sparse_storage.py).
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fleetpress.compression.errors import QuantizationError
from fleetpress.compression.quantization.packing import pack, packed_bytes
from fleetpress.compression.quantization.weight import (
    QuantizedWeight,
    pack_codes,
    predicted_bytes,
    to_rows,
)
from fleetpress.compression.scheme import QuantScheme, rows_and_columns

# From so many codes that are not zero on the form with a mask is smaller in a file, too, if it takes this much less.
_MANY = 1 << 14
_SHARE = 0.85
NODES_BYTES = 640  # what the mask's entry and its nodes in the graph add to a file (measured: 480 to 750)


@dataclass(frozen=True, kw_only=True)
class SparseWeight(QuantizedWeight):
    """A quantized weight of which only the codes that do not mean zero are stored, behind a mask."""

    @property
    def nonzero(self) -> Tensor:
        """Bool [rows, columns]: which codes do not mean zero."""
        entries = self.entries
        if entries is not None:
            return (entries != 0)[self.codes.int()]
        if self.scheme.type == "float":
            return self.codes.float() != 0
        return self.codes != _zero_codes(self)

    @property
    def mask(self) -> Tensor:
        """`nonzero` as a bit stream, uint8."""
        return pack(self.nonzero.byte(), 1)

    @property
    def packed(self) -> Tensor:
        """The bit stream of the codes that are not zero, row by row, uint8."""
        return pack_codes(self.codes[self.nonzero], self.scheme)

    def stored_bytes(self) -> int:
        """Bytes of mask, codes, scales and zero points in a program."""
        return sparse_bytes(self.shape, self.axis, self.scheme, self.dtype, int(self.nonzero.sum()))


@dataclass(frozen=True, kw_only=True)
class SparseFloats:
    """A weight that is not quantized: the values that are not zero, in memory order, and where they are (bits)."""

    values: Tensor
    mask: Tensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype."""
        return self.values.dtype

    def stored_bytes(self) -> int:
        """Bytes of mask and values."""
        return self.mask.nbytes + self.values.nbytes


def sparse_form(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight with a mask, if that is smaller; else as it was."""
    sparse = SparseWeight(**vars(weight))
    sizes = sparse.stored_bytes(), weight.stored_bytes()
    if int(sparse.nonzero.sum()) >= _MANY:
        return sparse if _is_much_less(*sizes) else weight
    if sizes[0] >= sizes[1]:
        return weight
    dense = pack_codes(weight.codes, weight.scheme)
    return sparse if _is_smaller_in_a_file((sparse.mask, sparse.packed), dense) else weight


def sparse_floats(weight: Tensor) -> SparseFloats | None:
    """The mask and the values of a floating-point weight, None if they are not smaller."""
    weight = weight.detach()
    kept = weight != 0
    count = int(kept.sum())
    size = packed_bytes(kept.numel(), 1) + count * weight.itemsize
    if size >= weight.nbytes or (count >= _MANY and not _is_much_less(size, weight.nbytes)):
        return None
    sparse = SparseFloats(values=weight[kept], mask=pack(kept.byte(), 1), shape=tuple(weight.shape))
    if count >= _MANY or _is_smaller_in_a_file((sparse.mask, sparse.values), weight):
        return sparse
    return None


def zeros_kept(weight: QuantizedWeight, original: Tensor) -> QuantizedWeight:
    """The weight with the code that means zero wherever `original`, in its shape, is zero.

    Rounding to nearest gives it by itself; a method that moves an error from one weight to others does not. In a
    learned codebook the entry nearest to zero becomes zero. Raises QuantizationError for a codebook without one.
    """
    weight = _with_zero(weight)
    zero = to_rows(original.detach(), weight.axis) == 0
    codes = torch.where(zero, _zero_codes(weight), weight.codes)
    return replace(weight, codes=codes)


def sparse_bytes(
    shape: Sequence[int], axis: int, scheme: QuantScheme, dtype: torch.dtype, nonzeros: int
) -> int:
    """Bytes of mask, codes of so many weights that are not zero, scales and zero points."""
    rows, columns = rows_and_columns(shape, axis)
    codes = packed_bytes(rows * columns, 1) + scheme.code_bytes(nonzeros)
    dense = scheme.code_bytes(rows * columns)
    return predicted_bytes(tuple(shape), axis, scheme, dtype) - dense + codes


def most_bytes(shape: Sequence[int], axis: int, scheme: QuantScheme, dtype: torch.dtype, zeros: int) -> int:
    """Bytes that a weight with at least so many zeros has at most.

    Codes may round to more zeros, and the form of a small weight depends on what they are.
    """
    dense = predicted_bytes(tuple(shape), axis, scheme, dtype)
    rows, columns = rows_and_columns(shape, axis)
    left = rows * columns - zeros
    sparse = sparse_bytes(shape, axis, scheme, dtype, left)
    return sparse if left >= _MANY and _is_much_less(sparse, dense) else dense


def _is_much_less(sparse_size: int, dense_size: int) -> bool:
    return sparse_size <= _SHARE * dense_size


def _is_smaller_in_a_file(sparse: Sequence[Tensor], dense: Tensor) -> bool:
    return sum(map(deflated_bytes, sparse)) + NODES_BYTES <= deflated_bytes(dense)


def deflated_bytes(stream: Tensor) -> int:
    """Bytes of the stream in a file whose members are DEFLATE-compressed; kept as it is where that is less."""
    data = stream.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return min(len(data), len(zlib.compress(data, 9)))


def _zero_codes(weight: QuantizedWeight) -> Tensor:
    """The code that means zero: of all weights [1, 1], or of each [rows or 1, columns or 1].

    Raises QuantizationError for a codebook that has no zero.
    """
    entries = weight.entries
    if entries is not None:
        zeros = (entries == 0).nonzero()
        if not len(zeros):
            raise QuantizationError(
                "its codebook has no zero, so pruned weights would come back; take a scheme with one, such as NF4, "
                "or leave prune out"
            )
        return zeros[:1].to(weight.codes.dtype)
    if weight.scheme.type != "int" or weight.zero_point is None:
        code = weight.scheme.middle if weight.scheme.type == "int" else 0
        return torch.full((1, 1), code, dtype=torch.uint8).to(weight.codes.dtype)
    size = weight.group_size
    if size is None:
        return weight.zero_point
    return weight.zero_point.repeat_interleave(size, 1)[:, : weight.codes.shape[1]]


def _with_zero(weight: QuantizedWeight) -> QuantizedWeight:
    """A learned codebook whose entry nearest to zero is zero; everything else as it is."""
    if weight.codebook is None or (weight.codebook == 0).any():
        return weight
    codebook = weight.codebook.clone()
    codebook[codebook.abs().argmin()] = 0
    return replace(weight, codebook=codebook)
