"""What a quantized weight takes in a file: a `.pt2`, whose members are deflated, or an archive, which codes entropy."""

import torch

from fleetpress.compression.quantization.sparse_weight import (
    NODES_BYTES,
    SparseWeight,
    deflated_bytes,
    sparse_form,
)
from fleetpress.compression.quantization.weight import QuantizedWeight, pack_codes


def deflated_weight_bytes(weight: QuantizedWeight) -> int:
    """Bytes in a `.pt2`, in the form that is taken for it: codes, or a mask and the codes that are not zero."""
    form = sparse_form(weight)
    if isinstance(form, SparseWeight):
        return deflated_bytes(form.mask) + deflated_bytes(form.packed) + NODES_BYTES + _scale_bytes(weight)
    return deflated_bytes(pack_codes(weight.codes, weight.scheme)) + _scale_bytes(weight)


def coded_weight_bytes(weight: QuantizedWeight) -> int:
    """About the bytes in an archive: the entropy of the codes (Shannon 1948), each alone; scales as they are."""
    counts = torch.bincount(weight.codes.view(torch.uint8).flatten())
    counts = counts[counts > 0].double()
    shares = counts / counts.sum()
    bits = float(-(counts * shares.log2()).sum())
    return int(-(-bits // 8)) + _scale_bytes(weight)


def _scale_bytes(weight: QuantizedWeight) -> int:
    """Scales, zero points and codebooks."""
    dense = QuantizedWeight(**vars(weight))
    return dense.stored_bytes() - weight.scheme.code_bytes(weight.codes.numel())
