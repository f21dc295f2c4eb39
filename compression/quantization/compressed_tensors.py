"""Quantized weights of checkpoints in compressed-tensors' pack-quantized layout, which transformers and vLLM load.

For a matrix `x.weight` [rows, columns] a checkpoint holds (compressed-tensors, compressors/pack_quantized):
`x.weight_packed` int32 [rows, ceil(columns * b / 32)], each row's codes as a dense stream, lowest bit first;
`x.weight_scale` [rows, groups] in the weight's dtype ([1] for strategy tensor); `x.weight_shape` int64 [2]; and, if not
symmetric, `x.weight_zero_point` int32 [ceil(rows * b / 32), groups], packed along the rows (int8 [1] for strategy
tensor, less 2^(b-1)). `config.json` says which layers these are.

Known limit: transformers 5.23 with compressed-tensors 0.20 refuses packed zero points (a size mismatch at loading)
unless it is called with `quantization_config=CompressedTensorsConfig(dequantize=True)`, which in turn knows one group
size only. Symmetric schemes load without it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fleetpress.compression.errors import MethodError, QuantizationError
from fleetpress.compression.quantization.packing import pack, unpack
from fleetpress.compression.quantization.weight import QuantizedWeight
from fleetpress.compression.scheme import QuantScheme, dividing_group_size

PACKED, SCALE, ZERO_POINT, SHAPE = "_packed", "_scale", "_zero_point", "_shape"
SUFFIXES = (PACKED, SCALE, ZERO_POINT, SHAPE)


def checkpoint_scheme(scheme: QuantScheme, columns: int) -> QuantScheme:
    """`scheme` with the largest group size up to its own that divides a row, as this layout needs it."""
    if scheme.group_size is None:
        return scheme
    return replace(scheme, group_size=dividing_group_size(columns, scheme.group_size))


def pack_checkpoint_weight(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds instead of the matrix `name`, by name.

    Raises MethodError for weights that are no matrices and for group sizes that do not divide the rows
    (`checkpoint_scheme` gives one that does).
    """
    bits = weight.scheme.num_bits
    _check_layout(name, weight.shape, weight.axis, weight.scheme)
    tensors = {
        name + PACKED: _pack_rows(weight.codes, bits),
        name + SCALE: weight.scale,
        name + SHAPE: torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.scheme.strategy == "tensor":
        tensors[name + SCALE] = weight.scale.reshape(1)
    if weight.zero_point is not None:
        if weight.scheme.strategy == "tensor":
            zero_point = (weight.zero_point.to(torch.int16) - weight.scheme.middle).to(torch.int8).reshape(1)
        else:
            zero_point = _pack_rows(weight.zero_point.T, bits).T.contiguous()
        tensors[name + ZERO_POINT] = zero_point
    return tensors


def unpack_checkpoint_weight(
    name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme
) -> QuantizedWeight:
    """The opposite of `pack_checkpoint_weight`, from a mapping that holds at least this weight's tensors.

    Raises QuantizationError for tensors that are missing or do not fit `scheme` and each other.
    """
    wanted = [name + suffix for suffix in SUFFIXES if suffix != ZERO_POINT or not scheme.symmetric]
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise QuantizationError(f"{missing[0]}: the checkpoint holds no such tensor; publish the model again")
    rows, columns = shape = _shape(name, tensors[name + SHAPE])
    scale = tensors[name + SCALE]
    expected = predicted_checkpoint_tensors(name, shape, scale.dtype, scheme)
    for key in wanted:
        found = (tensors[key].dtype, tuple(tensors[key].shape))
        if found != expected[key]:
            raise QuantizationError(f"{key}: {found[0]} {found[1]}, but {shape} weights have {expected[key]}")
    groups = scheme.groups(rows, columns)
    zero_point: Tensor | None = None
    if not scheme.symmetric:
        zero_point = tensors[name + ZERO_POINT]
        if scheme.strategy == "tensor":
            zero_point = (zero_point.to(torch.int16) + scheme.middle).to(torch.uint8).reshape(groups)
        else:
            zero_point = _unpack_rows(zero_point.T, scheme.num_bits, rows).T.contiguous()
    return QuantizedWeight(
        codes=_unpack_rows(tensors[name + PACKED], scheme.num_bits, columns),
        scale=scale.reshape(groups),
        zero_point=zero_point,
        scheme=scheme,
        shape=shape,
    )


def predicted_checkpoint_tensors(
    name: str, shape: Sequence[int], dtype: torch.dtype, scheme: QuantScheme
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor that `pack_checkpoint_weight` gives for a matrix `name` of this shape and dtype.

    Raises MethodError as that does.
    """
    _check_layout(name, tuple(shape), 0, scheme)
    rows, columns = shape
    groups = scheme.groups(rows, columns)
    per_tensor = scheme.strategy == "tensor"
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        name + PACKED: (torch.int32, (rows, _words(columns, scheme.num_bits))),
        name + SCALE: (dtype, (1,) if per_tensor else groups),
        name + SHAPE: (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        packed = (torch.int32, (_words(rows, scheme.num_bits), groups[1]))
        tensors[name + ZERO_POINT] = (torch.int8, (1,)) if per_tensor else packed
    return tensors


def quantization_config(
    scheme: QuantScheme,
    targets: Sequence[str],
    ignore: Iterable[str],
    *,
    exceptions: Mapping[int, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of `config.json` for weights packed by `pack_checkpoint_weight`.

    `targets` and `ignore` are module names, classes (Linear, Embedding) or `re:` patterns, the layers' names without
    `.weight`; `exceptions` names the modules that took another group size, by that size (names go before classes).
    """
    schemes = [(scheme, list(targets))]
    for size, names in sorted((exceptions or {}).items()):
        schemes.append((replace(scheme, strategy="group", group_size=size), list(names)))
    return {
        "config_groups": {
            f"group_{index}": {
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "targets": names,
                "weights": _weights_arguments(one),
            }
            for index, (one, names) in enumerate(schemes)
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def scheme_from_config(weights: Mapping[str, Any]) -> QuantScheme:
    """The scheme in the `weights` of one of `quantization_config`'s groups. Raises MethodError for any other kind."""
    if weights.get("type", "int") != "int" or weights.get("dynamic") or weights.get("actorder"):
        raise MethodError(
            f"weights of type {weights.get('type')} with these options are not supported: {dict(weights)}"
        )
    return QuantScheme(
        num_bits=weights.get("num_bits", 8),
        symmetric=weights.get("symmetric", True),
        strategy=weights.get("strategy") or ("group" if weights.get("group_size") else "tensor"),
        group_size=weights.get("group_size") or None,
    )


def _weights_arguments(scheme: QuantScheme) -> dict[str, Any]:
    return {
        "dynamic": False,
        "group_size": scheme.group_size,
        "num_bits": scheme.num_bits,
        "observer": "minmax",
        "strategy": scheme.strategy,
        "symmetric": scheme.symmetric,
        "type": "int",
    }


def _check_layout(name: str, shape: Sequence[int], axis: int, scheme: QuantScheme) -> None:
    if len(shape) != 2 or axis != 0:
        raise MethodError(
            f"{name}: shape {tuple(shape)} with its output units along axis {axis}; compressed-tensors stores matrices "
            "[output units, inputs] only; add the layer to `ignore`"
        )
    if scheme.group_size is not None and shape[1] % scheme.group_size:
        raise MethodError(
            f"{name}: group_size {scheme.group_size} does not divide rows of {shape[1]}, as compressed-tensors needs; "
            f"take {dividing_group_size(shape[1], scheme.group_size)}"
        )


def _shape(name: str, value: Tensor) -> tuple[int, int]:
    sizes = [int(size) for size in value.reshape(-1)]
    if len(sizes) != 2 or min(sizes) < 1:
        raise QuantizationError(f"{name}{SHAPE}: {sizes} is no shape of a matrix; publish the model again")
    return sizes[0], sizes[1]


def _words(count: int, num_bits: int) -> int:
    return -(-count * num_bits // 32)


def _pack_rows(codes: Tensor, num_bits: int) -> Tensor:
    """Each row as a stream of its own, in whole words."""
    rows, columns = codes.shape
    # 32 codes fill whole words, so that one stream of padded rows is the rows' streams one after the other.
    padded = functional.pad(codes, (0, -columns % 32))
    words = pack(padded, num_bits).view(torch.int32).view(rows, -1)
    return words[:, : _words(columns, num_bits)].contiguous()


def _unpack_rows(words: Tensor, num_bits: int, columns: int) -> Tensor:
    rows = words.shape[0]
    padded = columns + -columns % 32
    whole = functional.pad(words, (0, padded * num_bits // 32 - words.shape[1])).contiguous()
    codes = unpack(whole.view(torch.uint8).reshape(-1), num_bits, rows * padded)
    return codes.view(rows, padded)[:, :columns].contiguous()
