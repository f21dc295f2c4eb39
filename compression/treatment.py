"""What is done to a tensor of a checkpoint, and which tensors take its place. Pure arithmetic on names and shapes.

Layouts are those of compressed-tensors (its README, and `compressors/`), which transformers and vLLM load. For a matrix
`x.weight` [rows, columns] in b bits with its scales [rows, groups] ([1] for strategy tensor):

pack-quantized   `x.weight_packed` int32 [rows, ceil(columns * b / 32)], each row's codes as a dense stream, lowest bit
                 first; `x.weight_scale` in the weight's dtype; `x.weight_shape` int64 [2]; and, if not symmetric,
                 `x.weight_zero_point` int32 [ceil(rows * b / 32), groups], packed along the rows (int8 [1] for strategy
                 tensor, less 2^(b-1)).
int-quantized    `x.weight` int8 [rows, columns], `x.weight_scale`, and, if not symmetric, `x.weight_zero_point` int8.
float-quantized  `x.weight` float8 e4m3 [rows, columns], `x.weight_scale`.
dense            `x.weight` in its own dtype, or in the one it is cast to.

Known limit: transformers 5.23 with compressed-tensors 0.20 refuses packed zero points (a size mismatch at loading)
unless it is called with `quantization_config=CompressedTensorsConfig(dequantize=True)`, which in turn knows one group
size only. Symmetric schemes load without it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fleetpress.compression.errors import MethodError, QuantizationError
from fleetpress.compression.scheme import QuantScheme, dividing_group_size

PACKED, SCALE, ZERO_POINT, SHAPE = "_packed", "_scale", "_zero_point", "_shape"
PACK, INT, FLOAT, DENSE = "pack-quantized", "int-quantized", "float-quantized", "dense"
ROWS_PER_WORD = 32  # as many rows of zero points fill whole words, whatever the bits
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4} | dict.fromkeys(
    ("F16", "BF16", "I16", "U16"), 2
)  # dtypes of one byte and less are moved as bytes


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What is done to a matrix, in this order: zero weights (`sparsity`: method and options), quantize, or cast.

    `layout` is the form that quantized codes are stored in; `method` chooses their range. A `calibrated` one is done to
    the matrix as a whole, by a task that knows what its layer reads.
    """

    sparsity: tuple[tuple[str, Any], ...] = ()
    scheme: QuantScheme | None = None
    method: str = "round_to_nearest"
    layout: str = DENSE
    cast: str | None = None
    calibrated: bool = False

    @property
    def is_measured(self) -> bool:
        """Whether weights lose something that is worth a number."""
        return self.scheme is not None or bool(self.sparsity)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        scheme = None if self.scheme is None else dict(vars(self.scheme))
        return {**vars(self), "sparsity": [list(item) for item in self.sparsity], "scheme": scheme}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Treatment":
        """The opposite of `as_dict`."""
        scheme = fields["scheme"]
        return cls(
            **{
                **fields,
                "sparsity": tuple((name, value) for name, value in fields["sparsity"]),
                "scheme": None if scheme is None else QuantScheme(**scheme),
            }
        )


KEPT = Treatment()


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor as a file holds it; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one entry, what its place in a file should be a multiple of."""
        return ITEM_BYTES.get(self.dtype, 1)


def fitted(scheme: QuantScheme, columns: int) -> QuantScheme:
    """`scheme` with the largest group size up to its own that divides a row, as these layouts need it."""
    if scheme.group_size is None:
        return scheme
    return replace(scheme, group_size=dividing_group_size(columns, scheme.group_size))


def stored(name: str, dtype: str, shape: Sequence[int], treatment: Treatment) -> tuple[Stored, ...]:
    """The tensors that stand for `name` of this dtype and shape once it is treated; the first one holds its weights.

    Raises MethodError for what the layout cannot hold: other than matrices, groups that do not divide the rows.
    """
    shape = tuple(shape)
    scheme = treatment.scheme
    if scheme is None:
        return (Stored(name=name, dtype=treatment.cast or dtype, shape=shape),)
    _check_layout(name, shape, scheme)
    rows, columns = shape
    groups = scheme.groups(rows, columns)
    per_tensor = scheme.strategy == "tensor"
    scale = Stored(name=name + SCALE, dtype=dtype, shape=(1,) if per_tensor else groups)
    if treatment.layout == FLOAT:
        return Stored(name=name, dtype="F8_E4M3", shape=shape), scale
    zero_shape = (1,) if per_tensor else groups
    if treatment.layout == INT:
        codes = Stored(name=name, dtype="I8", shape=shape)
        zero_point = Stored(name=name + ZERO_POINT, dtype="I8", shape=zero_shape)
        return (codes, scale) if scheme.symmetric else (codes, scale, zero_point)
    packed = Stored(name=name + PACKED, dtype="I32", shape=(rows, words(columns, scheme.num_bits)))
    size = Stored(name=name + SHAPE, dtype="I64", shape=(2,))
    if scheme.symmetric:
        return packed, scale, size
    zero_point = Stored(name=name + ZERO_POINT, dtype="I8", shape=zero_shape)
    if not per_tensor:
        zero_point = replace(zero_point, dtype="I32", shape=(words(rows, scheme.num_bits), groups[1]))
    return packed, scale, zero_point, size


def words(count: int, num_bits: int) -> int:
    """32-bit words that hold `count` codes."""
    return -(-count * num_bits // 32)


def quantization_config(
    groups: Sequence[tuple[Treatment, Sequence[str]]], ignore: Iterable[str]
) -> dict[str, Any]:
    """The `quantization_config` of `config.json`: treatments with their targets, and the layers left alone.

    Targets and `ignore` are module names, classes (Linear, Embedding) or `re:` patterns, the layers' names without
    `.weight`; names go before classes.
    """
    layouts = {treatment.layout for treatment, _ in groups}
    return {
        "config_groups": {
            f"group_{index}": {
                "format": treatment.layout,
                "input_activations": None,
                "output_activations": None,
                "targets": list(targets),
                "weights": _weights_arguments(treatment),
            }
            for index, (treatment, targets) in enumerate(groups)
        },
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def treatment_from_config(group: Mapping[str, Any], layout: str) -> Treatment:
    """What one of the groups of a `quantization_config` says. Raises MethodError for what is not read here."""
    weights = group["weights"]
    if weights.get("dynamic") or weights.get("actorder"):
        raise MethodError(f"weights with these options are not supported: {dict(weights)}")
    scheme = QuantScheme(
        num_bits=weights.get("num_bits", 8),
        symmetric=weights.get("symmetric", True),
        strategy=weights.get("strategy") or ("group" if weights.get("group_size") else "tensor"),
        group_size=weights.get("group_size") or None,
        type=weights.get("type", "int"),
    )
    found = group.get("format") or layout
    if found not in (PACK, INT, FLOAT):
        raise MethodError(f"weights in the format {found!r} are not supported, only {PACK}, {INT}, {FLOAT}")
    return Treatment(scheme=scheme, layout=found)


def _weights_arguments(treatment: Treatment) -> dict[str, Any]:
    scheme = treatment.scheme
    assert scheme is not None
    return {
        "dynamic": False,
        "group_size": scheme.group_size,
        "num_bits": scheme.num_bits,
        "observer": "minmax",
        "strategy": scheme.strategy,
        "symmetric": scheme.symmetric,
        "type": scheme.type,
    }


def _check_layout(name: str, shape: Sequence[int], scheme: QuantScheme) -> None:
    if len(shape) != 2:
        raise MethodError(
            f"{name}: shape {tuple(shape)}; compressed-tensors stores matrices [output units, inputs] only; "
            "add the layer to `ignore`"
        )
    if scheme.group_size is not None and shape[1] % scheme.group_size:
        raise MethodError(
            f"{name}: group_size {scheme.group_size} does not divide rows of {shape[1]}, as compressed-tensors needs; "
            f"take {dividing_group_size(shape[1], scheme.group_size)}"
        )


def matrix_shape(name: str, sizes: Sequence[int]) -> tuple[int, int]:
    """The entries of a `weight_shape`. Raises QuantizationError if they are no shape of a matrix."""
    if len(sizes) != 2 or min(sizes) < 1:
        raise QuantizationError(
            f"{name}{SHAPE}: {list(sizes)} is no shape of a matrix; publish the model again"
        )
    return sizes[0], sizes[1]


def stored_bits(name: str, dtype: str, shape: Sequence[int], treatment: Treatment) -> int:
    """Bits of everything that stands for a tensor, `weight_shape` left out: a constant, not a weight."""
    parts = stored(name, dtype, shape, treatment)
    return sum(8 * part.item_bytes * math.prod(part.shape) for part in parts if not part.name.endswith(SHAPE))
