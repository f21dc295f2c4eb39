"""Codes column by column: what methods work on that look at one input of a layer after the other, for all units."""

import torch
from torch import Tensor

from fleetpress.compression.quantization.values import compute_dtype
from fleetpress.compression.scheme import QuantScheme


class ColumnGrid:
    """The values that a unit's codes can mean, column by column, in the arithmetic of `affine`.

    `scale` and `zero_point` are shaped as by `affine.quantization_parameters` for `rows` units. Tensors of a column
    hold one entry per unit [rows].
    """

    def __init__(self, rows: int, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> None:
        self._dtype = scale.dtype
        self.compute = compute_dtype(scale.dtype)
        self._size = scheme.group_size if scheme.strategy == "group" else None
        self._low, self._high = -scheme.middle, scheme.middle - 1
        self.middle = scheme.middle
        # Group by group, so that what a column needs lies together.
        self._scale = scale.to(self.compute).expand(rows, -1).t().contiguous()
        self._zero = None
        if zero_point is not None:
            signed = zero_point.to(self.compute) - scheme.middle
            self._zero = signed.expand(rows, -1).t().contiguous()

    def group(self, column: int) -> int:
        """The group that a column is in."""
        return column // self._size if self._size else 0

    def nearest(self, target: Tensor, column: int, code: Tensor, value: Tensor) -> None:
        """Write the signed code next to the `target` of a column, and what it means; all are [rows]."""
        group = self.group(column)
        scale = self._scale[group]
        torch.div(target, scale, out=code)
        if self._zero is not None:
            zero = self._zero[group]
            code.add_(zero).clamp_(self._low, self._high).round_()
            torch.sub(code, zero, out=value)
            value.mul_(scale)
        else:
            code.clamp_(self._low, self._high).round_()
            torch.mul(code, scale, out=value)
        if self._dtype != self.compute:
            value.copy_(
                value.to(self._dtype)
            )  # what the weight becomes, and therefore what an error is made of

    def meaning(self, codes: Tensor, group: int) -> Tensor:
        """Signed `codes` [columns, rows] of one group in steps of its scale, from its zero point on; a new tensor."""
        steps = codes.to(self.compute, copy=True)
        return steps if self._zero is None else steps.sub_(self._zero[group])

    def scale(self, group: int) -> Tensor:
        """The scales [rows] of a group, in the dtype of the arithmetic."""
        return self._scale[group]

    def set_scale(self, group: int, scale: Tensor) -> None:
        """Give a group other scales [rows], which must be values of the weight's dtype."""
        self._scale[group] = scale

    def stored(self, value: Tensor) -> Tensor:
        """The values as the weight's dtype has them."""
        return value if self._dtype == self.compute else value.to(self._dtype).to(self.compute)

    def scales(self) -> Tensor:
        """All scales as they are stored [rows, groups]."""
        return self._scale.t().to(self._dtype).contiguous()
