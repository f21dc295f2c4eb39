"""Activation-aware scaling: columns that read large inputs are quantized as if they were larger."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fleetpress.compression.equalization.method import EqualizeContext, EqualizeMethod
from fleetpress.compression.equalization.pairs import Place, Reader
from fleetpress.compression.equalization.scaling import Equalization, Scaled, of_columns
from fleetpress.compression.quantization.output_error import output_squares
from fleetpress.compression.quantization.round_to_nearest import round_to_nearest
from fleetpress.compression.quantization.weight import to_rows

GRID = 20  # exponents from 0 to 1, as in the paper
_SMALLEST = 1e-4  # of a channel's size, as a share of the largest


def activation_aware(context: EqualizeContext) -> Equalization:
    """Scales s = x^a, and x^a / w^(1 - a), of the root mean squares x and w of the channels' inputs and weights.

    The exponent a is the one of the grid whose rounded weights change the readers' outputs least, by their Gram
    matrices; a place where no scale is better than none stays as it is, as does one whose readers' inputs were not
    observed.
    """
    scaled = Scaled(context.values)
    for place in context.places:
        readers = [
            reader
            for reader in place.readers
            if reader.weight in context.statistics and reader.weight in context.quantized
        ]
        if not readers:
            continue
        best: Tensor | None = None
        least = _error(context, scaled, readers, None)
        for scale in _candidates(context, scaled, place, readers):
            error = _error(context, scaled, readers, scale)
            if error < least:
                best, least = scale, error
        if best is not None:
            scaled.apply(place, best)
    return scaled.result()


def _candidates(
    context: EqualizeContext, scaled: Scaled, place: Place, readers: list[Reader]
) -> Iterator[Tensor]:
    squares = torch.zeros(place.channels, dtype=torch.float64)
    weights = torch.zeros(place.channels, dtype=torch.float64)
    for reader in readers:
        inputs = context.statistics[reader.weight].inputs
        squares += inputs.mean_square[0].view(place.channels, -1).mean(1)
        columns = scaled.value(reader.weight).movedim(reader.axis, 0).flatten(1).square()
        weights += columns.reshape(place.channels, -1).mean(1)
    size, weight = _positive(squares.sqrt()), _positive(weights.sqrt())
    for step in range(1, GRID + 1):
        share = step / GRID
        for scale in (size**share, size**share / weight ** (1 - share)):
            yield scale / (scale.max() * scale.min()).sqrt()


def _positive(sizes: Tensor) -> Tensor:
    """Sizes as shares of the largest, none of them zero."""
    most = sizes.max()
    return (sizes / most).clamp(min=_SMALLEST) if most > 0 else torch.ones_like(sizes)


def _error(context: EqualizeContext, scaled: Scaled, readers: list[Reader], scale: Tensor | None) -> float:
    """Squares that the readers' outputs change by when their weights are rounded under the scale."""
    total = 0.0
    for reader in readers:
        rows = to_rows(scaled.value(reader.weight), context.axes[reader.weight]).float()
        by_column = torch.ones(rows.shape[1])
        if scale is not None:
            by_column = of_columns(scale, reader, scaled.value(reader.weight)).float()
        wide = rows * by_column
        rounded = round_to_nearest(wide, context.quantized[reader.weight]).dequantize()
        change = (rounded - wide) / by_column
        total += float(output_squares(change, context.statistics[reader.weight].inputs).sum())
    return total


METHOD = EqualizeMethod(
    name="activation_aware",
    equalize=activation_aware,
    paper="Lin et al. 2023, AWQ, arXiv:2306.00978, with the Gram matrix in place of samples",
    summary="Makes columns that read large inputs larger before they are rounded; needs calibration data.",
    needs_inputs=True,
)
