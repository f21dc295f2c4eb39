"""Treatments of row tiles in torch: every method, and the reference of the compiled kernel."""

import copy
import math

import torch
from torch import Tensor

from fleetpress.compression.checkpoint.tiles import Tile, check_finite, shape_bytes
from fleetpress.compression.errors import QuantizationError
from fleetpress.compression.quantization import QUANTIZERS
from fleetpress.compression.quantization.compressed_tensors import stored_rows
from fleetpress.compression.quantization.weight import encoded, parameters
from fleetpress.compression.scheme import QuantScheme
from fleetpress.compression.sparsity import measuring_passes, start
from fleetpress.compression.treatment import SCALE, SHAPE, ZERO_POINT, Treatment, stored

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TorchRows:
    """One tensor's treatment, tile by tile; see `convert.Converter`."""

    def __init__(
        self, name: str, dtype: str, shape: tuple[int, ...], treatment: Treatment, *, check: bool
    ) -> None:
        self._name, self._dtype, self._shape, self._treatment = name, dtype, shape, treatment
        self._check = check
        parts = stored(name, dtype, shape, treatment)
        self._suffixes = [part.name.removeprefix(name) for part in parts]
        self._columns = math.prod(shape[1:]) if treatment.scheme or treatment.sparsity else 1
        options = dict(treatment.sparsity)
        self._zeroing = start(options, dtype, shape) if options else None
        self._passes_left = measuring_passes(options, dtype) if options else 0
        self._trial = None if self._passes_left else copy.deepcopy(self._zeroing)
        self._range = torch.zeros(2, dtype=_DTYPES[dtype]) if dtype in _DTYPES else None
        self._given: tuple[Tensor, Tensor | None] | None = None

    def measure(self, rows: memoryview) -> None:
        """See Converter: first what zeroing wants to know, then the range of what is left."""
        values = self._tensor(rows)
        if self._passes_left:
            assert self._zeroing is not None
            self._zeroing.measure(values)
            return
        assert self._range is not None
        if self._trial is not None:
            values = self._trial.apply(values.clone())
        if values.numel():
            self._range[0] = torch.minimum(self._range[0], values.amin())
            self._range[1] = torch.maximum(self._range[1], values.amax())
            if not self._range.isfinite().all():
                check_finite(self._name, self._dtype, rows)

    def end_pass(self) -> None:
        """See Converter."""
        if self._passes_left:
            assert self._zeroing is not None
            self._zeroing.end_pass()
            self._passes_left -= 1
            self._trial = None if self._passes_left else copy.deepcopy(self._zeroing)
            return
        assert self._range is not None
        assert self._treatment.scheme is not None
        try:
            # The smallest and the largest weight have the range of all.
            self._given = parameters(self._range.view(1, 2), self._treatment.scheme)
        except QuantizationError as error:
            raise QuantizationError(f"{self._name}: {error}") from None

    def convert(self, rows: memoryview) -> Tile:
        """See Converter."""
        if self._check:
            check_finite(self._name, self._dtype, rows)
        values = self._tensor(rows)
        original = values
        if self._zeroing is not None:
            values = self._zeroing.apply(values.clone())
        if self._treatment.scheme is None:
            return self._cast(original, values)
        try:
            parts, plain = self._quantized(values, self._treatment.scheme)
        except QuantizationError as error:
            raise QuantizationError(f"{self._name}: {error}") from None
        signal, noise = _squares(original, plain)
        return Tile(parts=tuple(map(_bytes_of, parts)), signal=signal, noise=noise)

    def tail(self) -> tuple[bytes, ...]:
        """See Converter."""
        scheme = self._treatment.scheme
        ends = {SHAPE: shape_bytes(self._shape)}
        if scheme is not None and scheme.strategy == "tensor":
            assert self._given is not None
            scale, zero_point = self._given
            ends[SCALE] = bytes(_bytes_of(scale))
            if zero_point is not None:
                ends[ZERO_POINT] = bytes(
                    _bytes_of((zero_point.to(torch.int16) - scheme.middle).to(torch.int8))
                )
        return (b"", *(ends.get(suffix, b"") for suffix in self._suffixes[1:]))

    def _tensor(self, rows: memoryview) -> Tensor:
        flat = torch.frombuffer(rows, dtype=_DTYPES[self._dtype])
        return flat.view(-1, self._columns)

    def _cast(self, original: Tensor, values: Tensor) -> Tile:
        cast = self._treatment.cast or self._dtype
        made = values.to(_DTYPES[cast])
        if self._check and not made.isfinite().all():
            raise QuantizationError(
                f"{self._name}: weights up to {float(values.abs().max()):.3g} overflow {cast}; "
                "add the layer to `ignore`"
            )
        signal, noise = _squares(original, made)
        return Tile(parts=(_bytes_of(made),), signal=signal, noise=noise)

    def _quantized(self, values: Tensor, scheme: QuantScheme) -> tuple[list[Tensor | None], Tensor]:
        """The tile's part of each stored tensor, and the weights that they stand for."""
        if self._given:
            weight = encoded(values, *self._given, scheme)
        else:
            weight = QUANTIZERS[self._treatment.method].quantize(values, scheme)
        codes, scale, zero_point = stored_rows(weight, self._treatment.layout)
        sides = {SCALE: scale, ZERO_POINT: zero_point}
        if scheme.strategy == "tensor":  # one for all rows: it comes at the end
            self._given = weight.scale, weight.zero_point
            sides = {}
        return [codes, *(sides.get(suffix) for suffix in self._suffixes[1:])], weight.dequantize()


def _squares(original: Tensor, made: Tensor) -> tuple[float, float]:
    """Sums of squares of the weights, and of what they lost."""
    exact = original.to(torch.promote_types(original.dtype, torch.float32))
    # The difference is taken in this dtype and squared in float64, as the compiled kernel does.
    error, weights = (exact - made.to(exact.dtype)).double().view(-1), exact.double().view(-1)
    return float(torch.dot(weights, weights)), float(torch.dot(error, error))


def _bytes_of(value: Tensor | None) -> memoryview:
    if value is None:
        return memoryview(b"")
    return value.contiguous().view(-1).view(torch.uint8).numpy().data
