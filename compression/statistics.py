"""Mean and spread of every neuron's gradients over mini-batches, collected in one pass and merged exactly.

A neuron is an output unit of a layer: its row of the weight and its bias, n entries. Kept are, in float64, the sum of
the gradients entry by entry (the mean may cancel) and the sum of their squares unit by unit (the variance, averaged
over the entries of a unit, needs no more). Beside them, unit by unit, two sums of products of a weight and its gradient
in the same batch: where weights move from batch to batch, each product is that of its own batch.

The gradient by a gate on a unit's output (a factor that is 1) is the sum of its products weight times gradient, bias
included. Where a normalization follows, the gate stands behind it: its scale and shift give the sum (Molchanov et al.
2019). In front of a batch normalization in train mode it would always be 0, as the normalization undoes every factor.

Of a recurrent layer every row of its weight matrices is kept by the matrix's name, if that is asked for. Instead of
neurons the moments of every single weight may be asked for (`weight_gradients`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression import weight_gradients
from fleetpress.compression.affine_norms import norm_after
from fleetpress.compression.device import CPU
from fleetpress.compression.errors import DataMismatchError
from fleetpress.compression.layers import RECURRENT_KINDS, layers, matrices
from fleetpress.compression.program import aliases, tensors, trainable
from fleetpress.compression.selection import Layer
from fleetpress.compression.weight_gradients import WeightCollector, WeightMoments, WeightSums

UNIT_KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
_GROUPS_ARGUMENT = 6
_BATCHES = "batches"


@dataclass(frozen=True, kw_only=True)
class NeuronStatistics:
    """`mean_square` [units]: mean over a unit's entries of the squared mean gradient; `variance` [units]: mean over
    them of the gradient's variance. `gate_square` [units]: mean over batches of the squared gradient by the unit's
    gate; `product_square` [units]: mean over batches of the sum over its entries of (weight times gradient) squared;
    both None if products were not collected. All float64, all >= 0. `entries` is n, `batches` is T.
    """

    mean_square: Tensor
    variance: Tensor
    entries: int
    batches: int
    gate_square: Tensor | None = None
    product_square: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LayerSums:
    """Sums over batches: of gradients, `weight` [units, entries of a row] and `bias` [units]; of `squares` [units];
    of squared gradients by the gates, `gates` [units], and of squared products with the weights, `products` [units];
    these two are None if they were not asked for.
    """

    weight: Tensor
    bias: Tensor | None
    squares: Tensor
    gates: Tensor | None = None
    products: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class GradientStatistics:
    """Sums by layer name over `batches` mini-batches. Layers that share one tied weight appear once, as the first.

    `weights` are those of single weights by state name, if they were collected instead: then there are no `layers`.
    """

    layers: Mapping[str, LayerSums]
    batches: int
    weights: Mapping[str, WeightSums] = field(default_factory=dict)

    def merge(self, other: "GradientStatistics") -> "GradientStatistics":
        """The statistics over both sets of batches, which must be disjoint and of the same program."""
        if shapes(self) != shapes(other):
            raise DataMismatchError(
                "gradient statistics of different programs cannot be merged; collect them again"
            )
        return GradientStatistics(
            layers={name: _added(sums, other.layers[name]) for name, sums in self.layers.items()},
            batches=self.batches + other.batches,
            weights=weight_gradients.merged(self.weights, other.weights),
        )

    def neurons(self) -> dict[str, NeuronStatistics]:
        """Mean and variance of each layer's units; needs at least one batch."""
        self._check_any()
        return {name: _neurons(sums, self.batches) for name, sums in self.layers.items()}

    def moments(self) -> dict[str, WeightMoments]:
        """Moments of the gradients of single weights; needs at least one batch."""
        self._check_any()
        return {name: sums.over(self.batches) for name, sums in self.weights.items()}

    def _check_any(self) -> None:
        if self.batches < 1:
            raise DataMismatchError("gradient statistics over no batch; collect at least one")

    def to_tensors(self) -> dict[str, Tensor]:
        """Plain tensors by name, for a file."""
        found = {_BATCHES: torch.tensor([self.batches], dtype=torch.int64)}
        for name, sums in self.layers.items():
            found[f"{name}|weight"] = sums.weight
            found[f"{name}|squares"] = sums.squares
            optional = {"bias": sums.bias, "gates": sums.gates, "products": sums.products}
            found |= {f"{name}|{what}": value for what, value in optional.items() if value is not None}
        return found | weight_gradients.as_tensors(self.weights)

    @classmethod
    def from_tensors(cls, values: Mapping[str, Tensor]) -> "GradientStatistics":
        """What `to_tensors` gave."""
        names = [key.removesuffix("|squares") for key in values if key.endswith("|squares")]
        try:
            return cls(
                layers={
                    name: LayerSums(
                        weight=values[f"{name}|weight"],
                        bias=values.get(f"{name}|bias"),
                        squares=values[f"{name}|squares"],
                        gates=values.get(f"{name}|gates"),
                        products=values.get(f"{name}|products"),
                    )
                    for name in names
                },
                batches=int(values[_BATCHES]),
                weights=weight_gradients.from_tensors(values),
            )
        except KeyError as error:
            raise DataMismatchError(f"gradient statistics lack {error}; collect them again") from error


def shapes(statistics: GradientStatistics) -> dict[str, tuple[tuple[int, ...], bool, bool]]:
    """Shape of each layer's sums, whether it has a bias, and whether products were collected."""
    return {
        name: (tuple(sums.weight.shape), sums.bias is not None, sums.products is not None)
        for name, sums in statistics.layers.items()
    }


def _added(left: LayerSums, right: LayerSums) -> LayerSums:
    return LayerSums(
        weight=left.weight + right.weight,
        bias=_sum(left.bias, right.bias),
        squares=left.squares + right.squares,
        gates=_sum(left.gates, right.gates),
        products=_sum(left.products, right.products),
    )


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return None if left is None or right is None else left + right


def _neurons(sums: LayerSums, batches: int) -> NeuronStatistics:
    entries = sums.weight.shape[1] + (sums.bias is not None)
    mean_squares = torch.linalg.vector_norm(sums.weight, dim=1).square()
    if sums.bias is not None:
        mean_squares = mean_squares + sums.bias.square()
    mean_square = mean_squares / entries / batches**2
    return NeuronStatistics(
        mean_square=mean_square,
        variance=(sums.squares / entries / batches - mean_square).clamp(min=0),
        gate_square=None if sums.gates is None else sums.gates / batches,
        product_square=None if sums.products is None else sums.products / batches,
        entries=entries,
        batches=batches,
    )


class GradientCollector:
    """Adds up the gradients of a program's layers, batch by batch, on the device where they are computed.

    Each entry is converted to float64, added and squared once. With `products` it is multiplied with its weight, too,
    in the gradient's own dtype, and the products are added up unit by unit: nothing in them cancels over the batches.
    `benchmarks/collect_cost.py` measures what both cost. With `weights` the moments of every single weight of every
    layer are kept, and nothing of neurons.
    """

    def __init__(
        self,
        program: ExportedProgram,
        device: torch.device = CPU,
        *,
        products: bool = False,
        recurrent: bool = False,
        weights: bool = False,
    ) -> None:
        self._weights = WeightCollector(program, device) if weights else None
        kinds = UNIT_KINDS + (RECURRENT_KINDS if recurrent else ())
        stored = tensors(program)
        self._owners = aliases(stored)
        self._parts: list[_Part] = []
        self._batches = 0
        learned, seen = set(trainable(program)), set[str]()
        for layer in () if weights else (part for whole in layers(program) for part in matrices(whole)):
            weight = self._owners.get(layer.weights[0], layer.weights[0])
            if layer.kind in kinds and weight in learned and weight not in seen:
                seen.add(weight)
                self._parts.append(
                    _part(
                        program,
                        layer,
                        weight,
                        stored=stored,
                        learned=learned,
                        owners=self._owners,
                        device=device,
                        products=products,
                    )
                )
        largest = max((part.sums.weight.numel() for part in self._parts), default=0)
        self._scratch = torch.empty(largest, dtype=torch.float64, device=device)

    @property
    def names(self) -> tuple[str, ...]:
        """State names of the parameters whose gradients `update` takes; tied ones by their first name."""
        if self._weights is not None:
            return self._weights.names
        names = (name for part in self._parts for name in (part.weight, part.bias, *part.norm))
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def update(self, gradients: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None) -> None:
        """Count one batch: the gradient of its mean loss by state name; products need the `values` it was taken at."""
        for part in self._parts:
            rows, sums = part.rows(gradients[part.weight]), part.sums
            wide = self._scratch[: rows.numel()].view(rows.shape).copy_(rows)
            sums.weight.add_(wide)
            _add_squares(sums.squares, torch.linalg.vector_norm(wide, dim=1))
            if part.bias is not None:
                assert sums.bias is not None
                wide = gradients[part.bias].double()
                sums.bias.add_(wide)
                _add_squares(sums.squares, wide)
            if sums.gates is not None:
                assert values is not None, "products were asked for"
                with torch.no_grad():
                    _count_products(part, rows, gradients, values)
        if self._weights is not None:
            self._weights.update(gradients)
        self._batches += 1

    def statistics(self) -> GradientStatistics:
        """The sums so far, in the processor's memory; later updates leave them as they are."""
        return GradientStatistics(
            layers={
                part.layer: LayerSums(
                    weight=part.sums.weight.clone().to(CPU),
                    bias=None if part.sums.bias is None else part.sums.bias.clone().to(CPU),
                    squares=part.sums.squares.clone().to(CPU),
                    gates=None if part.sums.gates is None else part.sums.gates.clone().to(CPU),
                    products=None if part.sums.products is None else part.sums.products.clone().to(CPU),
                )
                for part in self._parts
            },
            batches=self._batches,
            weights={} if self._weights is None else self._weights.sums(),
        )


@dataclass(frozen=True, kw_only=True)
class _Part:
    layer: str
    weight: str
    bias: str | None
    norm: tuple[str, ...]  # scale and shift of the normalization behind the layer, if its gate lies there
    rows: Callable[[Tensor], Tensor]
    sums: LayerSums


def _add_squares(sums: Tensor, values: Tensor) -> None:
    sums.addcmul_(values, values)


def _count_products(
    part: _Part, rows: Tensor, gradients: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> None:
    """Products of weights and gradients of one batch: squared, and added up to the gradient by the unit's gate."""
    sums = part.sums
    assert sums.gates is not None
    assert sums.products is not None
    products = rows * part.rows(values[part.weight])
    _add_squares(sums.products, torch.linalg.vector_norm(products, dim=1).double())
    own = [products.sum(1).double()]
    if part.bias is not None:
        own.append(gradients[part.bias].double() * values[part.bias])
        _add_squares(sums.products, own[1])
    behind = [gradients[name].double() * values[name] for name in part.norm]
    gate = torch.stack(behind or own).sum(0)
    _add_squares(sums.gates, gate)


def _part(
    program: ExportedProgram,
    layer: Layer,
    weight: str,
    *,
    stored: Mapping[str, Tensor],
    learned: set[str],
    owners: Mapping[str, str],
    device: torch.device,
    products: bool,
) -> _Part:
    rows = _rows(program, layer)
    units, entries = rows(stored[weight]).shape
    bias = owners.get(layer.biases[0], layer.biases[0]) if layer.biases else None
    # A bias of another shape (one number for all units) belongs to no unit.
    if bias is not None and (bias not in learned or stored[bias].shape != (units,)):
        bias = None
    norm = (norm_after(program, layer) or ()) if products else ()
    if any(name not in learned or name in owners or stored[name].shape != (units,) for name in norm):
        norm = ()
    return _Part(
        layer=layer.name,
        weight=weight,
        bias=bias,
        norm=norm,
        rows=rows,
        sums=LayerSums(
            weight=torch.zeros(units, entries, dtype=torch.float64, device=device),
            bias=None if bias is None else torch.zeros(units, dtype=torch.float64, device=device),
            squares=torch.zeros(units, dtype=torch.float64, device=device),
            gates=torch.zeros(units, dtype=torch.float64, device=device) if products else None,
            products=torch.zeros(units, dtype=torch.float64, device=device) if products else None,
        ),
    )


def _rows(program: ExportedProgram, layer: Layer) -> Callable[[Tensor], Tensor]:
    """How a weight becomes one row per output unit."""
    if layer.kind.startswith("ConvTranspose"):
        groups = _groups(program, layer)
        # [in, out / groups, ...]: unit o of group g has the inputs of group g.
        return lambda weight: (
            weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
            .transpose(1, 2)
            .reshape(groups * weight.shape[1], -1)
        )
    if layer.axis == 0:
        return lambda weight: weight.flatten(1)
    return lambda weight: weight.movedim(layer.axis, 0).flatten(1)


def _groups(program: ExportedProgram, layer: Layer) -> int:
    node = next(node for node in program.graph.nodes if node.name == layer.nodes[0])
    groups = (
        node.args[_GROUPS_ARGUMENT] if len(node.args) > _GROUPS_ARGUMENT else node.kwargs.get("groups", 1)
    )
    assert isinstance(groups, int)
    return groups
