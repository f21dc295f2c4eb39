"""The layers of a program: operators that own weights, found in its graph whatever code it came from."""

from dataclasses import dataclass

import torch
from torch import fx
from torch.export import ExportedProgram

from fleetpress.compression.program import STORED
from fleetpress.compression.selection import Layer

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class LayerOp:
    """Where an operator keeps its weight and bias, and along which axis of the weight its output units lie."""

    kind: str
    weight: int
    bias: int | None
    axis: int

    @property
    def input(self) -> int:
        """Which argument is multiplied with the weight."""
        return 1 if self.bias == 0 else 0


LAYER_OPS = {
    aten.linear.default: LayerOp(kind="Linear", weight=1, bias=2, axis=0),
    aten.addmm.default: LayerOp(kind="Linear", weight=2, bias=0, axis=1),
    aten.matmul.default: LayerOp(kind="Linear", weight=1, bias=None, axis=1),
    aten.mm.default: LayerOp(kind="Linear", weight=1, bias=None, axis=1),
    aten.conv1d.default: LayerOp(kind="Conv1d", weight=1, bias=2, axis=0),
    aten.conv1d.padding: LayerOp(kind="Conv1d", weight=1, bias=2, axis=0),
    aten.conv2d.default: LayerOp(kind="Conv2d", weight=1, bias=2, axis=0),
    aten.conv2d.padding: LayerOp(kind="Conv2d", weight=1, bias=2, axis=0),
    aten.conv3d.default: LayerOp(kind="Conv3d", weight=1, bias=2, axis=0),
    aten.conv3d.padding: LayerOp(kind="Conv3d", weight=1, bias=2, axis=0),
    aten.conv_transpose1d.default: LayerOp(kind="ConvTranspose1d", weight=1, bias=2, axis=1),
    aten.conv_transpose2d.input: LayerOp(kind="ConvTranspose2d", weight=1, bias=2, axis=1),
    aten.conv_transpose3d.input: LayerOp(kind="ConvTranspose3d", weight=1, bias=2, axis=1),
    aten.embedding.default: LayerOp(kind="Embedding", weight=0, bias=None, axis=0),
}
RECURRENT_OPS = {
    aten.lstm.input: "LSTM",
    aten.gru.input: "GRU",
    aten.rnn_tanh.input: "RNN",
    aten.rnn_relu.input: "RNN",
}
RECURRENT_KINDS = tuple(dict.fromkeys(RECURRENT_OPS.values()))
KINDS = (*dict.fromkeys(op.kind for op in LAYER_OPS.values()), *RECURRENT_KINDS)


def layers(program: ExportedProgram) -> tuple[Layer, ...]:
    """The program's layers in the order of their first use. A weight that is computed in the graph belongs to none."""
    stored = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind in STORED and spec.target is not None
    }
    found: dict[tuple[str, ...], Layer] = {}
    for node in program.graph.nodes:
        layer = _layer_of(node, stored)
        if layer is None:
            continue
        seen = found.get((layer.kind, *layer.weights))
        nodes = (*seen.nodes, node.name) if seen else layer.nodes
        found[(layer.kind, *layer.weights)] = Layer(**{**vars(layer), "nodes": nodes})
    return tuple(found.values())


def matrices(layer: Layer) -> tuple[Layer, ...]:
    """A layer whose rows are its units: a recurrent layer gives one for every weight matrix, named by it."""
    if layer.kind not in RECURRENT_KINDS:
        return (layer,)
    biases = layer.biases or ("",) * len(layer.weights)
    return tuple(
        Layer(
            name=weight,
            kind=layer.kind,
            weights=(weight,),
            biases=(bias,) if bias else (),
            axis=0,
            nodes=layer.nodes,
        )
        for weight, bias in zip(layer.weights, biases, strict=True)
    )


def _layer_of(node: fx.Node, stored: dict[str, str]) -> Layer | None:
    if node.op != "call_function":
        return None
    if node.target in RECURRENT_OPS:
        params = node.args[2]
        names = [stored.get(item.name) for item in params if isinstance(item, fx.Node)]  # type: ignore[union-attr]
        if None in names:
            return None
        known = [name for name in names if name is not None]
        weights = tuple(name for name in known if _dims(params, name, stored) == 2)
        return Layer(
            name=known[0].rpartition(".")[0] or known[0],
            kind=RECURRENT_OPS[node.target],
            weights=weights,
            biases=tuple(name for name in known if name not in weights),
            axis=0,
            nodes=(node.name,),
        )
    op = LAYER_OPS.get(node.target)  # type: ignore[call-overload]
    if op is None or len(node.args) <= op.weight:
        return None
    weight = node.args[op.weight]
    if not isinstance(weight, fx.Node) or weight.name not in stored or weight.meta["val"].dim() < 2:
        return None
    bias = node.args[op.bias] if op.bias is not None and len(node.args) > op.bias else None
    bias_name = stored.get(bias.name) if isinstance(bias, fx.Node) else None
    name = stored[weight.name]
    return Layer(
        name=name.removesuffix(".weight"),
        kind=op.kind,
        weights=(name,),
        biases=(bias_name,) if bias_name else (),
        axis=op.axis,
        nodes=(node.name,),
    )


def _dims(params: object, name: str, stored: dict[str, str]) -> int:
    assert isinstance(params, (list, tuple))
    return next(int(item.meta["val"].dim()) for item in params if stored.get(item.name) == name)
