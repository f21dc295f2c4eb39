"""What a weight is quantized to: bits, symmetry, and how many weights share a scale; or the dtype it is cast to.

Nothing here imports torch: plans are made, and plain checkpoints converted, without it.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Literal, get_args

from fleetpress.compression.errors import MethodError

Strategy = Literal["tensor", "channel", "group"]
CodeType = Literal["int", "float", "codebook"]
Codebook = Literal["learned", "nf4", "mxfp4", "ternary", "binary"]
DEFAULT_GROUP_SIZE = 128
# Codebooks that every weight shares: bits of a code.
FIXED_CODEBOOKS: dict[Codebook, int] = {"nf4": 4, "mxfp4": 4, "ternary": 2, "binary": 1}
MX_GROUP_SIZE = 32  # weights that share an exponent: part of the microscaling formats
_TRITS = 5  # ternary codes in a byte: 3^5 = 243


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """Affine quantization of weights to `num_bits` unsigned codes: `weight ~ (code - zero_point) * scale`.

    A scale (and, if not symmetric, a zero point) belongs to the whole tensor, to an output unit (channel), or to
    `group_size` neighbours in an output unit's row. Codes of type float are 8-bit floats (e4m3),
    `weight ~ code * scale`, without groups. Codes of type codebook are indices: `weight ~ codebook[code] * scale`, with
    a `codebook` that each weight learns for itself (then strategy tensor needs no scale), or a fixed one. With
    `activation_bits` (8) the layer's inputs become integers, too, on a grid fixed by calibration, and integer kernels
    multiply them. Raises MethodError for options that do not go together.
    """

    num_bits: int
    symmetric: bool = True
    strategy: Strategy = "channel"
    group_size: int | None = None
    type: CodeType = "int"
    codebook: Codebook | None = None
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        if self.type not in get_args(CodeType):
            raise MethodError(f"type is {self.type!r}; give one of {', '.join(get_args(CodeType))}")
        if self.type == "float":
            self._check_float()
        if self.type == "codebook":
            self._check_codebook()
        elif self.codebook is not None:
            raise MethodError(f"codebook is {self.codebook!r}, but codes of type {self.type} have none")
        elif isinstance(self.num_bits, bool) or self.num_bits not in range(2, 9):
            raise MethodError(f"num_bits is {self.num_bits}; give a whole number from 2 to 8")
        if self.activation_bits is not None:
            self._check_activations()
        if self.strategy not in get_args(Strategy):
            raise MethodError(f"strategy is {self.strategy!r}; give one of {', '.join(get_args(Strategy))}")
        if self.strategy == "group":
            if (
                isinstance(self.group_size, bool)
                or not isinstance(self.group_size, int)
                or self.group_size < 1
            ):
                raise MethodError(
                    f"group_size is {self.group_size}; strategy group takes a whole number from 1"
                )
        elif self.group_size is not None:
            raise MethodError(
                f"group_size is {self.group_size}, but strategy {self.strategy} has no groups; "
                "leave group_size out or give strategy group"
            )

    def _check_float(self) -> None:
        if self.num_bits != 8:
            raise MethodError(f"num_bits is {self.num_bits}, but FP8 codes have 8; leave num_bits out")
        if not self.symmetric:
            raise MethodError("symmetric is false, but FP8 codes have no zero points; leave symmetric out")
        if self.strategy == "group":
            raise MethodError("FP8 has one scale per channel or tensor; leave group_size out")

    def _check_activations(self) -> None:
        if (self.activation_bits, self.type, self.num_bits, self.symmetric) != (8, "int", 8, True):
            raise MethodError(
                "integer kernels multiply symmetric integers of 8 bits; take scheme W8A8 without num_bits or symmetric"
            )
        if self.strategy != "channel":
            raise MethodError("integer kernels take one scale per channel; leave group_size and strategy out")

    def _check_codebook(self) -> None:
        if self.codebook is None or self.codebook not in get_args(Codebook):
            raise MethodError(f"codebook is {self.codebook!r}; give one of {', '.join(get_args(Codebook))}")
        fixed = FIXED_CODEBOOKS.get(self.codebook)
        name = self.codebook.upper()
        if fixed is None and (isinstance(self.num_bits, bool) or self.num_bits not in range(1, 9)):
            raise MethodError(f"num_bits is {self.num_bits}; a learned codebook takes 1 to 8")
        if fixed not in (None, self.num_bits):
            raise MethodError(
                f"num_bits is {self.num_bits}, but {name} codes have {fixed}; leave num_bits out"
            )
        if not self.symmetric:
            raise MethodError("symmetric is false, but codebooks have no zero points; leave symmetric out")
        if self.codebook == "mxfp4" and (self.strategy, self.group_size) != ("group", MX_GROUP_SIZE):
            raise MethodError(
                f"{name} shares an exponent among {MX_GROUP_SIZE} weights; leave group_size and strategy out"
            )

    @property
    def middle(self) -> int:
        """The integer code that a symmetric scheme maps to zero."""
        return 1 << (self.num_bits - 1)

    @property
    def has_scale(self) -> bool:
        """Whether weights are multiplied with a scale that is stored: a learned codebook has room for one's effect."""
        return self.codebook != "learned" or self.strategy != "tensor"

    @property
    def codebook_entries(self) -> int:
        """Entries that are stored with every weight: 0 where formulas give them."""
        return 1 << self.num_bits if self.codebook in ("learned", "nf4", "mxfp4") else 0

    def scale_bits(self, weight_bits: int) -> int:
        """Bits of a stored scale of a weight whose dtype has `weight_bits`."""
        return 8 if self.codebook == "mxfp4" else weight_bits

    def code_bytes(self, count: int) -> int:
        """Bytes that so many codes take in a program."""
        return -(-count // _TRITS) if self.codebook == "ternary" else -(-count * self.num_bits // 8)

    def groups(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales of a weight of `rows` output units with `columns` entries each."""
        if self.strategy == "tensor":
            return 1, 1
        if self.group_size is None:
            return rows, 1
        return rows, math.ceil(columns / self.group_size)


def _per_channel(num_bits: int, *, symmetric: bool) -> QuantScheme:
    return QuantScheme(num_bits=num_bits, symmetric=symmetric)


def _grouped(num_bits: int, *, symmetric: bool) -> QuantScheme:
    return QuantScheme(
        num_bits=num_bits, symmetric=symmetric, strategy="group", group_size=DEFAULT_GROUP_SIZE
    )


def _fixed(codebook: Codebook, group_size: int | None = None) -> QuantScheme:
    return QuantScheme(
        num_bits=FIXED_CODEBOOKS[codebook],
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
        type="codebook",
        codebook=codebook,
    )


# 8 bits need no groups; fewer bits take those of compressed-tensors' presets of the same names.
SCHEMES: dict[str, QuantScheme] = {
    "W8A16": _per_channel(8, symmetric=True),
    "W8A16_ASYM": _per_channel(8, symmetric=False),
    "W7A16": _grouped(7, symmetric=True),
    "W7A16_ASYM": _grouped(7, symmetric=False),
    "W6A16": _grouped(6, symmetric=True),
    "W6A16_ASYM": _grouped(6, symmetric=False),
    "W5A16": _grouped(5, symmetric=True),
    "W5A16_ASYM": _grouped(5, symmetric=False),
    "W4A16": _grouped(4, symmetric=True),
    "W4A16_ASYM": _grouped(4, symmetric=False),
    "W3A16": _grouped(3, symmetric=True),
    "W3A16_ASYM": _grouped(3, symmetric=False),
    "W2A16": _grouped(2, symmetric=True),
    "W2A16_ASYM": _grouped(2, symmetric=False),
    "W8A8": QuantScheme(num_bits=8, activation_bits=8),
    "FP8": QuantScheme(num_bits=8, type="float"),
    "NF4": _fixed("nf4", 64),
    "MXFP4": _fixed("mxfp4", MX_GROUP_SIZE),
    "TERNARY": _fixed("ternary"),
    "BINARY": _fixed("binary"),
}
# Names that stand beside the schemes and mean a plain cast, without codes and scales: to which dtype of safetensors.
CASTS: dict[str, str] = {"BF16": "BF16", "FP16": "F16"}
DEFAULT_BITS = 8
DEFAULT_METHOD = "round_to_nearest"
LEARNING_METHODS = ("k_means", "weighted_k_means")  # of quantization: they learn a codebook of `num_bits`
DEFAULT_CODEBOOK_BITS = 4


def cast_of(name: str | None) -> str | None:
    """The dtype, as safetensors calls it, that a scheme's name casts weights to; None if the name is no cast."""
    return None if name is None else CASTS.get(name)


def resolve(
    scheme: str | None = None,
    num_bits: int | None = None,
    symmetric: bool | None = None,
    group_size: int | EllipsisType | None = ...,
    strategy: Strategy | None = None,
    *,
    learned: bool = False,
) -> QuantScheme:
    """The named scheme with what is given besides it put in its place.

    Without a name the base is `num_bits` (8 if not given either), symmetric, one scale per channel; with `learned` a
    codebook of `num_bits` (4 if not given) without scales. `group_size=None` means one scale per channel; a number
    means groups of that size. Raises MethodError for an unknown name (with the nearest known one), for options that
    contradict each other, and for casts: `cast_of` tells them.
    """
    if scheme in CASTS:
        options = {"num_bits": num_bits, "symmetric": symmetric, "strategy": strategy}
        given = [name for name, value in options.items() if value is not None]
        given += ["group_size"] if group_size is not ... else []
        remedy = f"leave out {', '.join(given)}" if given else "take a scheme such as W8A16 here"
        raise MethodError(f"{scheme} is a plain cast of checkpoints, without codes and scales; {remedy}")
    if learned and scheme is not None:
        raise MethodError(
            f"scheme {scheme} has its own codes, but the method learns a codebook; give num_bits only"
        )
    if learned:
        bits = DEFAULT_CODEBOOK_BITS if num_bits is None else num_bits
        base = QuantScheme(num_bits=bits, strategy="tensor", type="codebook", codebook="learned")
    elif scheme is None:
        base = QuantScheme(num_bits=DEFAULT_BITS if num_bits is None else num_bits)
    elif scheme in SCHEMES:
        base = SCHEMES[scheme]
    else:
        known = [*SCHEMES, *CASTS]
        near = difflib.get_close_matches(scheme.upper(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known schemes: {', '.join(known)}"
        raise MethodError(f"unknown scheme {scheme!r}; {hint}")
    size = base.group_size if group_size is ... else group_size
    if strategy is None:
        strategy = base.strategy if group_size is ... else "channel" if group_size is None else "group"
    elif group_size is ...:
        size = (base.group_size or DEFAULT_GROUP_SIZE) if strategy == "group" else None
    return replace(
        base,
        num_bits=base.num_bits if num_bits is None else num_bits,
        symmetric=base.symmetric if symmetric is None else symmetric,
        strategy=strategy,
        group_size=size,
    )


def dividing_group_size(columns: int, group_size: int) -> int:
    """The largest size up to `group_size` that divides `columns`, for formats without a shorter last group."""
    return next(size for size in range(min(group_size, columns), 0, -1) if columns % size == 0)


def rows_and_columns(shape: Sequence[int], axis: int) -> tuple[int, int]:
    """How many output units a weight has along `axis`, and how many entries each of them has."""
    return shape[axis], math.prod(shape) // max(shape[axis], 1)


def bits_per_weight(scheme: QuantScheme, shape: Sequence[int], scale_bits: int, *, axis: int = 0) -> float:
    """Exact bits per weight of a quantized tensor: codes, scales of `scale_bits`, any zero points and codebook entries.

    Zero points have `num_bits`, entries 32, what corrects for the zero point of the inputs 32 a unit.
    """
    rows, columns = rows_and_columns(shape, axis)
    weights = rows * columns
    groups = math.prod(scheme.groups(rows, columns)) if scheme.has_scale else 0
    per_group = scheme.scale_bits(scale_bits) + (0 if scheme.symmetric else scheme.num_bits)
    inputs = 32 * rows if scheme.activation_bits else 0
    codes = scheme.num_bits if scheme.codebook != "ternary" else 8 * scheme.code_bytes(weights) / weights
    return codes + (groups * per_group + scheme.codebook_entries * 32 + inputs) / weights
