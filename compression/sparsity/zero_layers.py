"""Zero weights of a program's layers: by what inputs or gradients say, by magnitude; each alone, or all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from fleetpress.compression.calibration import WeightStatistics
from fleetpress.compression.errors import MethodError, PruningError
from fleetpress.compression.program import aliases
from fleetpress.compression.quantization.weight import from_rows, to_rows
from fleetpress.compression.selection import Layer, check_names
from fleetpress.compression.sparsity import (
    SPARSIFIERS,
    measuring_passes,
    reason_against,
    start,
    without_data,
    zeroed,
)
from fleetpress.compression.sparsity.method import Options, Zeroing
from fleetpress.compression.sparsity.scored import zero_lowest, zero_lowest_of_all
from fleetpress.compression.weight_gradients import WeightMoments

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, kw_only=True)
class ZeroedWeight:
    """A weight after zeroing: `values` in its shape and dtype, its layer, and the method that chose the zeros.

    That is another than was asked for where a method needs inputs, or gradients, that are not known of the layer.
    """

    layer: str
    kind: str
    method: str
    values: Tensor

    @property
    def kept(self) -> Tensor:
        """Bool: what is not zero."""
        return self.values != 0


@dataclass(frozen=True, kw_only=True)
class ZeroedLayers:
    """Weights by state name (of tied ones the first), and why others of the chosen layers are as they were."""

    weights: Mapping[str, ZeroedWeight]
    skipped: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """A weight on its way in: rows of output units, and what its inputs and its gradients were."""

    name: str
    layer: Layer
    rows: Tensor
    shape: tuple[int, ...]
    statistics: WeightStatistics | None
    gradients: WeightMoments | None
    options: Options

    def scores(self) -> Tensor | None:
        """By the method's measure, [rows, columns]; None if it has none of single weights, or lacks the gradients."""
        score = SPARSIFIERS[self.options["method"]].score
        if score is None or self.gradients is None:
            return None
        mean, mean_square = (
            to_rows(value, self.layer.axis) for value in (self.gradients.mean, self.gradients.mean_square)
        )
        return score(self.rows, WeightMoments(mean=mean, mean_square=mean_square))


def zero_layers(
    layers: Sequence[Layer],
    values: Mapping[str, Tensor],
    options: Options,
    statistics: Mapping[str, WeightStatistics] | None = None,
    gradients: Mapping[str, WeightMoments] | None = None,
) -> ZeroedLayers:
    """The weights of `layers` (not their biases) with zeros, from the tensors in `values`, by state name.

    `options` are those of a recipe's `prune` step: `method`, `sparsity` or `pattern`, `scope`. A row is a unit's
    entries in memory order, a convolution's channels first. `layers` gives single ones a `sparsity` of their own; if
    there is none for the others, they are left out. `statistics` and `gradients` are by state name, too; where a method
    needs them and they lack a weight (embeddings, transposed convolutions), magnitudes decide, or in scope global it is
    left out. Raises MethodError for options that do not fit the method, and PruningError when nothing can be zeroed.
    """
    found, skipped = _chosen(layers, values, options, statistics or {}, gradients or {})
    if options.get("scope") == "global":
        made = _ranked_together(found, options, skipped)
    else:
        made = {item.name: _zeroed_alone(item) for item in found}
    if all(weight.kept.all() for weight in made.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise PruningError(
            f"no weight can be zeroed: {reasons}"
            if not made
            else f"sparsity {options.get('sparsity')} is too small to zero any weight; raise it"
        )
    return ZeroedLayers(weights=made, skipped=skipped)


def least_zeros(
    layers: Sequence[Layer], values: Mapping[str, Tensor], options: Options
) -> tuple[dict[str, int], dict[str, str]]:
    """How many zeros each weight of `layers` will have at least, by state name, and reasons against others, by layer.

    Told from shapes and dtypes alone. In which tensors the zeros of scope global lie depends on the weights: 0 each.
    """
    found, skipped = _chosen(layers, values, options, {}, {})
    together = options.get("scope") == "global"
    return {item.name: 0 if together else zeroed(item.options, item.rows.shape) for item in found}, skipped


def _chosen(
    layers: Sequence[Layer],
    values: Mapping[str, Tensor],
    options: Options,
    statistics: Mapping[str, WeightStatistics],
    gradients: Mapping[str, WeightMoments],
) -> tuple[list[_Chosen], dict[str, str]]:
    owners = aliases(values)
    found: dict[str, _Chosen] = {}
    skipped: dict[str, str] = {}
    check_names(layers, options.get("layers", {}))
    for layer in layers:
        own = _own(options, layer)
        if own is None:
            skipped[layer.name] = "has no share of zeros"
            continue
        for name in layer.weights:
            owner, weight = owners.get(name, name), values[name].detach()
            rows = to_rows(weight, layer.axis)
            reason = reason_against(own, _NAMES.get(weight.dtype, str(weight.dtype)), rows.shape)
            if reason is not None:
                skipped.setdefault(layer.name, reason if len(layer.weights) == 1 else f"{name}: {reason}")
            elif weight.numel():
                item = _Chosen(
                    name=owner,
                    layer=layer,
                    rows=rows,
                    shape=tuple(weight.shape),
                    statistics=statistics.get(owner),
                    gradients=gradients.get(owner),
                    options=own,
                )
                found.setdefault(owner, item)
    return list(found.values()), skipped


def _own(options: Options, layer: Layer) -> Options | None:
    """The options for one layer; None if they leave it alone."""
    shares = options.get("layers", {})
    if layer.name in shares:
        return {**options, **shares[layer.name]} if shares[layer.name]["sparsity"] else None
    return options if not shares or options.get("sparsity") is not None else None


def _zeroed_alone(item: _Chosen) -> ZeroedWeight:
    method, scores = SPARSIFIERS[item.options["method"]], item.scores()
    try:
        if scores is not None:
            return _result(item, method.name, zero_lowest(item.rows, scores, item.options))
        if method.zero_rows is not None and item.statistics is not None:
            inputs = item.statistics.inputs
            parts = enumerate(item.rows.chunk(inputs.groups))
            rows = [method.zero_rows(part, item.options, inputs.group(index)) for index, part in parts]
            return _result(item, method.name, torch.cat(rows))
    except MethodError as error:
        raise MethodError(f"{item.name}: {error}") from None
    own = without_data(item.options)
    block = item.rows.clone().contiguous()
    _pass_over(start(own, _NAMES[block.dtype], block.shape), own, [block])
    return _result(item, own["method"], block)


def _ranked_together(
    found: Sequence[_Chosen], options: Options, skipped: dict[str, str]
) -> dict[str, ZeroedWeight]:
    """All weights by one measure; `skipped` gets layers of whose weights it is not known."""
    method = SPARSIFIERS[options["method"]]
    if not method.compares_tensors:
        raise MethodError(
            f"scope global has no meaning for {method.name}: its measure is one within a tensor"
        )
    if method.score is None:
        return _under_one_threshold(found, options)
    scored = []
    for item in found:
        scores = item.scores()
        if scores is None:
            skipped.setdefault(item.layer.name, f"the gradients of {item.name} are not known")
        else:
            scored.append((item, scores))
    if not scored:
        return {}
    made = zero_lowest_of_all([(item.rows, scores) for item, scores in scored], options)
    return {item.name: _result(item, method.name, rows) for (item, _), rows in zip(scored, made, strict=True)}


def _under_one_threshold(found: Sequence[_Chosen], options: Options) -> dict[str, ZeroedWeight]:
    """Weights pass as blocks of one long tensor, in the widest of their dtypes."""
    if not found:
        return {}
    widest = reduce(torch.promote_types, (item.rows.dtype for item in found))
    blocks = [item.rows.to(widest).clone().contiguous() for item in found]
    state = start(options, _NAMES[widest], (sum(block.numel() for block in blocks),))
    _pass_over(state, options, blocks)
    return {
        item.name: _result(item, options["method"], block.to(item.rows.dtype))
        for item, block in zip(found, blocks, strict=True)
    }


def _pass_over(state: Zeroing, options: Options, blocks: Sequence[Tensor]) -> None:
    """Zero in place, as a checkpoint's tensor is zeroed block by block."""
    for _ in range(measuring_passes(options, _NAMES[blocks[0].dtype])):
        for block in blocks:
            state.measure(block)
        state.end_pass()
    for block in blocks:
        state.apply(block)


def _result(item: _Chosen, method: str, rows: Tensor) -> ZeroedWeight:
    values = from_rows(rows, item.shape, item.layer.axis)
    return ZeroedWeight(layer=item.layer.name, kind=item.layer.kind, method=method, values=values)
