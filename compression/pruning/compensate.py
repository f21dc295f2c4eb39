"""Make up for deleted units in the layers that read them: by their means, or by fitting the weights that are left.

Both look at what a layer reads on calibration data before anything is deleted (He et al. 2017, Channel Pruning for
Accelerating Very Deep Neural Networks, arXiv:1707.06168; Luo et al. 2017, ThiNet, arXiv:1707.06342). Layers are fitted
side by side, each to the inputs of the whole program. For a convolution the inputs are patches with their padding: a
mean is then one over all positions, and exact for each only where no padding is met.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.arguments import arguments, replaced
from fleetpress.compression.calibration import InputStatistics
from fleetpress.compression.errors import MethodError
from fleetpress.compression.factors import factor, pick
from fleetpress.compression.layers import layers
from fleetpress.compression.program import ProgramEditor, aliases, tensors
from fleetpress.compression.pruning.coupling import coupling
from fleetpress.compression.pruning.delete import leaving
from fleetpress.compression.pruning.labels import Labels, Mask
from fleetpress.compression.pruning.structure import reading
from fleetpress.compression.selection import Layer

COMPENSATIONS = ("none", "bias", "least_squares")
DAMPING = (
    0.01  # of the mean variance of the inputs that stay; keeps nearly equal inputs from getting huge weights
)


@dataclass(frozen=True, kw_only=True)
class Compensation:
    """`corrected`: by the name of each layer that loses inputs its new weight and bias, by state name, in their shapes
    before the deletion; biases that it did not have, too. `skipped` says why other layers keep what they hold.
    """

    corrected: Mapping[str, Mapping[str, Tensor]]
    skipped: Mapping[str, str]

    @property
    def values(self) -> dict[str, Tensor]:
        """All corrected tensors by state name."""
        return {name: value for mine in self.corrected.values() for name, value in mine.items()}


def compensate(
    program: ExportedProgram,
    removed: Mapping[str, Sequence[int]],
    inputs: Mapping[str, InputStatistics],
    how: str,
    structure: Sequence[str] = (),
) -> Compensation:
    """What the layers that read deleted units should hold instead; a function of its arguments alone.

    `structure` is the one that the units were chosen with.

    `bias`: b' = b + W[:, gone] mean(x[gone]), in a new bias where there is none. `least_squares`: W'[:, kept] = W[:,
    kept] + W[:, gone] C[gone, kept] (C[kept, kept] + damping)^-1, which fits W x by W' x[kept]. C is the covariance of
    the inputs x and the bias makes up for the means; for a layer without a bias C is the mean of x x^T.
    Raises MethodError for a word that is not in COMPENSATIONS.
    """
    if how not in COMPENSATIONS[1:]:
        raise MethodError(f"compensate {how!r} is unknown; it is {', '.join(COMPENSATIONS)}")
    found = coupling(program, reading(structure))
    gone = leaving(program, found, removed)
    stored = tensors(program)
    tied = aliases(stored)
    shared = {*tied, *tied.values()}
    corrected: dict[str, Mapping[str, Tensor]] = {}
    skipped: dict[str, str] = {}
    for layer in layers(program):
        lost = {name: _lost(found.stored[name], layer, gone) for name in layer.weights}
        if not any(mask is not None and mask.any() for mask in lost.values()):
            continue
        name = layer.weights[0]
        seen, mask = inputs.get(name), lost[name]
        result: dict[str, Tensor] | str
        if name in shared or any(bias in shared for bias in layer.biases):
            result = "its weight is tied to another layer's"
        elif len(layer.weights) > 1 or seen is None or mask is None:
            result = f"what a {layer.kind} layer reads is not known"
        else:
            result = _unfit(program, layer, how) or _corrected(layer, stored, seen, mask, how)
        if isinstance(result, str):
            skipped[layer.name] = result
        else:
            corrected[layer.name] = result
    return Compensation(corrected=corrected, skipped=skipped)


def with_compensation(program: ExportedProgram, values: Mapping[str, Tensor]) -> ExportedProgram:
    """The program over the corrected tensors, with a new bias in the graph where a layer had none."""
    editor = ProgramEditor(program)
    owners = {_bias_name(layer): layer for layer in layers(program) if not layer.biases}
    nodes = {node.name: node for node in editor.graph.nodes}
    for name, value in values.items():
        if name in editor.values:
            editor.set(name, value)
            continue
        layer = owners[name]
        bias = editor.store(name, value, beside=layer.weights[0])
        for node in (nodes[used] for used in layer.nodes):
            editor.set_args(node, *replaced(node, bias=bias))
    return editor.build()


def _bias_name(layer: Layer) -> str:
    return f"{layer.weights[0].removesuffix('weight').removesuffix('.')}.bias".removeprefix(".")


def _lost(labels: Labels, layer: Layer, gone: Mask) -> Mask | None:
    """Which columns of the weight's rows are multiplied with nothing any more; None if that cannot be said."""
    moved = [labels[layer.axis], *labels[: layer.axis], *labels[layer.axis + 1 :]]
    return None if moved[1] is None else gone[moved[1]]


def _corrected(
    layer: Layer,
    stored: Mapping[str, Tensor],
    seen: InputStatistics,
    lost: Mask,
    how: str,
) -> dict[str, Tensor] | str:
    """New tensors of one layer, or why there are none."""
    weight = stored[layer.weights[0]].detach()
    rows = weight.movedim(layer.axis, 0).flatten(1).double()
    columns = torch.from_numpy(np.repeat(lost, rows.shape[1] // len(lost)))
    bias = stored[layer.biases[0]].detach() if layer.biases else None
    if bias is not None and bias.shape != (len(rows),):
        return "its bias is not one number for every unit"
    if how == "least_squares" and not seen.is_whole:
        return f"rows of {rows.shape[1]} entries are too long to fit; take compensate: bias"
    fitted, shifts = [], []
    for index, part in enumerate(rows.chunk(seen.groups)):
        mean = seen.mean[index]
        new = part.clone()
        if how == "least_squares":
            new[:, ~columns] += part[:, columns] @ _regression(seen.group(index), columns, bias is not None)
        new[:, columns] = 0
        fitted.append(new)
        shifts.append((part - new) @ mean)
    result: dict[str, Tensor] = {}
    if how == "least_squares":
        kept = torch.cat(fitted).reshape(weight.movedim(layer.axis, 0).shape).movedim(0, layer.axis)
        result[layer.weights[0]] = kept.to(weight.dtype).contiguous()
    if bias is not None:
        result[layer.biases[0]] = (bias.double() + torch.cat(shifts)).to(bias.dtype)
    elif how == "bias":
        result[_bias_name(layer)] = torch.cat(shifts).to(weight.dtype)
    return result


def _unfit(program: ExportedProgram, layer: Layer, how: str) -> str | None:
    """Why the operators that use the layer's weight cannot all be given the same new bias."""
    found = [arguments(node) for node in program.graph.nodes if node.name in layer.nodes]
    if any(told.get("bias") is not found[0].get("bias") for told in found):
        return "its weight is used with several biases"
    if how == "bias" and not layer.biases and "bias" not in found[0]:
        return "its operator takes no bias"
    return None


def _regression(seen: InputStatistics, lost: Tensor, centred: bool) -> Tensor:
    """The inputs that are lost as combinations of those that stay: C[lost, kept] (C[kept, kept] + damping)^-1."""
    kept, gone = torch.nonzero(~lost).flatten(), torch.nonzero(lost).flatten()
    for power in range(12):  # products in float32 of inputs that hardly vary may need more
        inside = _products(seen, kept, kept, centred)
        damping = DAMPING * 10.0**power * float(inside.diagonal().mean())
        if not damping > 0:
            break  # inputs that never vary tell nothing
        inside.diagonal().add_(damping)
        if factor(inside):
            return torch.cholesky_solve(_products(seen, kept, gone, centred), inside).T
    return torch.zeros(len(gone), len(kept), dtype=torch.float64)


def _products(seen: InputStatistics, rows: Tensor, columns: Tensor, centred: bool) -> Tensor:
    """Means of products of some columns with others, float64, about their means if `centred`."""
    found = torch.empty(len(rows), len(columns), dtype=torch.float64)
    pick(seen.gram[0, 0], rows, columns, found)
    found.div_(seen.counted[0])
    return found.addr_(seen.mean[0, rows], seen.mean[0, columns], alpha=-1) if centred else found
