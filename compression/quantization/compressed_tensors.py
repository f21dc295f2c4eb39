"""Quantized weights in compressed-tensors' layouts and back; `checkpoint.treatment` says which tensors these are."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fleetpress.compression.errors import MethodError, QuantizationError
from fleetpress.compression.quantization.packing import pack, unpack
from fleetpress.compression.quantization.weight import QuantizedWeight
from fleetpress.compression.scheme import QuantScheme
from fleetpress.compression.treatment import (
    FLOAT,
    INT,
    PACK,
    SCALE,
    SHAPE,
    ZERO_POINT,
    Treatment,
    matrix_shape,
    stored,
    words,
)

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()} | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}


def stored_rows(weight: QuantizedWeight, layout: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points of rows of a matrix as the layout stores them.

    Rows of a larger matrix give the bytes that belong to them, if they start and end at multiples of 32 rows.
    """
    bits, middle = weight.scheme.num_bits, weight.scheme.middle
    per_tensor = weight.scheme.strategy == "tensor"
    scale = weight.scale.reshape(1) if per_tensor else weight.scale
    zero_point = weight.zero_point
    if layout == FLOAT:
        return weight.codes, scale, None
    codes = _signed(weight.codes, middle) if layout == INT else _pack_rows(weight.codes, bits)
    if zero_point is not None:
        if layout == INT or per_tensor:
            zero_point = _signed(zero_point, middle)
            zero_point = zero_point.reshape(1) if per_tensor else zero_point
        else:
            zero_point = _pack_rows(zero_point.T, bits).T.clone(memory_format=torch.contiguous_format)
    return codes, scale, zero_point


def pack_checkpoint_weight(name: str, weight: QuantizedWeight, layout: str = PACK) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds instead of the matrix `name`, by name.

    Raises MethodError for weights that are no matrices and for group sizes that do not divide the rows
    (`treatment.fitted` gives one that does).
    """
    treatment = Treatment(scheme=weight.scheme, layout=layout)
    if weight.axis != 0:
        raise MethodError(
            f"{name}: its output units lie along axis {weight.axis}; compressed-tensors stores matrices "
            "[output units, inputs] only; add the layer to `ignore`"
        )
    names = [part.name for part in stored(name, _NAMES[weight.dtype], weight.shape, treatment)]
    codes, scale, zero_point = stored_rows(weight, layout)
    values = {SCALE: scale, ZERO_POINT: zero_point, SHAPE: torch.tensor(weight.shape, dtype=torch.int64)}
    made = {names[0]: codes}
    for part in names[1:]:
        value = values[part.removeprefix(name)]
        assert value is not None
        made[part] = value
    return made


def unpack_checkpoint_weight(
    name: str, tensors: Mapping[str, Tensor], treatment: Treatment
) -> QuantizedWeight:
    """The opposite of `pack_checkpoint_weight`, from a mapping that holds at least this weight's tensors.

    Raises QuantizationError for tensors that are missing or do not fit `treatment` and each other.
    """
    scheme = treatment.scheme
    assert scheme is not None
    if name + SCALE not in tensors:
        raise QuantizationError(
            f"{name}{SCALE}: the checkpoint holds no such tensor; publish the model again"
        )
    scale = tensors[name + SCALE]
    if treatment.layout == PACK:
        if name + SHAPE not in tensors:
            raise QuantizationError(
                f"{name}{SHAPE}: the checkpoint holds no such tensor; publish the model again"
            )
        shape = matrix_shape(name, tensors[name + SHAPE].reshape(-1).tolist())
    else:
        shape = matrix_shape(name, tuple(tensors[name].shape) if name in tensors else ())
    for part in stored(name, _NAMES.get(scale.dtype, "F32"), shape, treatment):
        found = tensors.get(part.name)
        if found is None:
            raise QuantizationError(
                f"{part.name}: the checkpoint holds no such tensor; publish the model again"
            )
        if (found.dtype, tuple(found.shape)) != (_DTYPES[part.dtype], part.shape):
            raise QuantizationError(
                f"{part.name}: {found.dtype} {tuple(found.shape)}, but {shape} weights have "
                f"{_DTYPES[part.dtype]} {part.shape}; publish the model again"
            )
    codes = tensors[stored(name, "F32", shape, treatment)[0].name]
    return loaded_rows(codes, scale, tensors.get(name + ZERO_POINT), treatment, shape)


def loaded_rows(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, treatment: Treatment, shape: tuple[int, int]
) -> QuantizedWeight:
    """The opposite of `stored_rows` for rows of a matrix: `shape` is theirs, [rows, columns]."""
    scheme = treatment.scheme
    assert scheme is not None
    rows, columns = shape
    groups = scheme.groups(rows, columns)
    if treatment.layout == INT:
        codes = _unsigned(codes, scheme)
    elif treatment.layout == PACK:
        codes = _unpack_rows(codes, scheme.num_bits, columns)
    if scheme.symmetric:
        zero_point = None
    elif zero_point is not None:
        if treatment.layout == INT or scheme.strategy == "tensor":
            zero_point = _unsigned(zero_point, scheme).reshape(groups)
        else:
            zero_point = _unpack_rows(zero_point.T, scheme.num_bits, rows).T.contiguous()
    return QuantizedWeight(
        codes=codes, scale=scale.reshape(groups), zero_point=zero_point, scheme=scheme, shape=shape
    )


def _signed(codes: Tensor, middle: int) -> Tensor:
    return (codes.to(torch.int16) - middle).to(torch.int8)


def _unsigned(codes: Tensor, scheme: QuantScheme) -> Tensor:
    return (codes.to(torch.int16) + scheme.middle).to(torch.uint8)


def _pack_rows(codes: Tensor, num_bits: int) -> Tensor:
    """Each row as a stream of its own, in whole words."""
    rows, columns = codes.shape
    # 32 codes fill whole words, so that one stream of padded rows is the rows' streams one after the other.
    padded = functional.pad(codes, (0, -columns % 32))
    packed = pack(padded, num_bits).view(torch.int32).view(rows, -1)
    return packed[:, : words(columns, num_bits)].contiguous()


def _unpack_rows(packed: Tensor, num_bits: int, columns: int) -> Tensor:
    rows = packed.shape[0]
    padded = columns + -columns % 32
    whole = functional.pad(packed, (0, padded * num_bits // 32 - packed.shape[1])).contiguous()
    codes = unpack(whole.view(torch.uint8).reshape(-1), num_bits, rows * padded)
    return codes.view(rows, padded)[:, :columns].contiguous()
