"""One matrix of a checkpoint treated as a whole, with what its layer reads: what is stored in its place."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fleetpress.compression.calibration import InputStatistics, WeightStatistics
from fleetpress.compression.checkpoint.data_free import without_inputs
from fleetpress.compression.errors import CompressionError
from fleetpress.compression.quantization import QUANTIZERS, method_for, quantize_weight
from fleetpress.compression.quantization.compressed_tensors import pack_checkpoint_weight
from fleetpress.compression.quantization.sparse_weight import zeros_kept
from fleetpress.compression.sparsity import SPARSIFIERS, measuring_passes, start
from fleetpress.compression.sparsity.method import Options
from fleetpress.compression.treatment import Treatment

_ROWS = 128  # that are doubles at once
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, kw_only=True)
class SolvedMatrix:
    """What stands for a matrix: `tensors` by name in the order of `treatment.stored`, and `plain`, what they mean.

    `signal` is the sum of squares of the weights, `noise` that of what they lost. `methods` are those that were used:
    others than were asked for where the layer read nothing that could be looked at.
    """

    tensors: Mapping[str, Tensor]
    plain: Tensor
    signal: float
    noise: float
    methods: tuple[str, ...]


def solved(name: str, weight: Tensor, treatment: Treatment, inputs: InputStatistics | None) -> SolvedMatrix:
    """The matrix `name` [output units, inputs], zeroed, quantized or both, in its own dtype.

    Raises CompressionError naming the matrix for values that cannot be treated.
    """
    own = treatment if inputs is not None else without_inputs(treatment)
    values, methods = weight, []
    if own.sparsity:
        options = dict(own.sparsity)
        methods.append(options["method"])
        try:
            values = _zeroed(weight, options, inputs)
        except CompressionError as error:
            raise type(error)(f"{name}: {error}") from None
    if own.scheme is None:
        tensors = {name: values}
        plain = values
    else:
        statistics = None if inputs is None else WeightStatistics(inputs=inputs)
        method = QUANTIZERS[own.method]
        coded = quantize_weight(name, values, 0, own.scheme, method, statistics=statistics)
        coded = zeros_kept(coded, values) if own.sparsity else coded
        methods.append(method_for(method, statistics).name)
        tensors = pack_checkpoint_weight(name, coded, own.layout)
        plain = coded.dequantize()
    signal, noise = _squares(weight, plain)
    return SolvedMatrix(tensors=tensors, plain=plain, signal=signal, noise=noise, methods=tuple(methods))


def _squares(weight: Tensor, plain: Tensor) -> tuple[float, float]:
    """Sums of squares of the weights and of what they lost, some rows at a time: doubles take much memory."""
    signal = noise = 0.0
    for exact, made in zip(torch.split(weight, _ROWS), torch.split(plain, _ROWS), strict=True):
        wide = exact.double()
        signal += float(wide.square().sum())
        noise += float(wide.sub_(made.double()).square_().sum())
    return signal, noise


def _zeroed(weight: Tensor, options: Options, inputs: InputStatistics | None) -> Tensor:
    method = SPARSIFIERS[options["method"]]
    if method.zero_rows is not None:
        assert inputs is not None, "its place is taken by one that needs none"
        return method.zero_rows(weight, options, inputs)
    rows = weight.clone().contiguous()
    dtype = _NAMES[rows.dtype]
    state = start(options, dtype, tuple(rows.shape))
    for _ in range(measuring_passes(options, dtype)):
        state.measure(rows)
        state.end_pass()
    return state.apply(rows)
