"""The deleted program computes what the original computes with the deleted units held at zero."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fleetpress.compression import cost
from fleetpress.compression.errors import PruningError
from fleetpress.compression.program import aliases, tensors
from fleetpress.compression.pruning import PruneOptions, delete, prune
from fleetpress.compression.pruning.coupling import coupling
from fleetpress.compression.pruning.labels import Coupling
from fleetpress.compression.pruning.units import output_axis, unit_layers

aten = torch.ops.aten
Exported = Callable[[str, bool], tuple[nn.Module, ExportedProgram]]

# The dim of the first operand that an operator sums over.
READ_DIMS = {
    aten.linear.default: -1,
    aten.matmul.default: -1,
    aten.scaled_dot_product_attention.default: -1,
    aten.conv1d.default: 1,
    aten.conv2d.default: 1,
    aten.conv_transpose2d.input: 1,
    aten.lstm.input: -1,
    aten.gru.input: -1,
    aten.sum.dim_IntList: -1,
}


class Silenced(fx.Interpreter):
    """Runs the original graph; whoever sums over deleted units reads zeros instead of them."""

    def __init__(self, program: ExportedProgram, found: Coupling, gone: Any) -> None:
        super().__init__(program.graph_module)
        self.found, self.gone = found, gone

    def run_node(self, n: fx.Node) -> Any:
        dim = READ_DIMS.get(n.target)
        value = self.found.values.get(n.args[0].name) if dim is not None else None
        if isinstance(value, tuple) and value[dim] is not None:
            silent = torch.from_numpy(self.gone[value[dim]]).nonzero().flatten()
            self.env[n.args[0]] = self.env[n.args[0]].index_fill(dim, silent, 0.0)
        return super().run_node(n)


def silenced(program: ExportedProgram, removed: dict[str, tuple[int, ...]], sample: Tensor) -> Tensor:
    found = coupling(program)
    known = unit_layers(program)
    classes = [found.classes(output_axis(found, known[name]))[list(units)] for name, units in removed.items()]
    gone = found.among(torch.cat([torch.from_numpy(item) for item in classes]).numpy())
    stored = list(tensors(program).values())
    assert len(stored) + 1 == sum(node.op == "placeholder" for node in program.graph.nodes)
    with torch.no_grad():
        (result,) = Silenced(program, found, gone).run(*stored, sample)
    return result


@pytest.mark.parametrize(
    ("dynamic", "sparsity"), [(False, 0.7), (True, 0.5)], ids=["batch-fixed", "batch-free"]
)
def test_deleted_is_silenced(
    architecture: str, dynamic: bool, sparsity: float, architectures: dict[str, Any], exported: Exported
) -> None:
    model, program = exported(architecture, dynamic)
    result = prune(program, PruneOptions(method="random", sparsity=sparsity), seed=1)
    assert len(result.removed) == architectures[architecture].reached
    smaller = delete(program, result.removed)
    sample = architectures[architecture].inputs(5 if dynamic else 3)

    expected = silenced(program, result.removed, sample)
    original = model(sample)
    found = smaller.module()(sample)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert (found - original).abs().max() > 1e-4, "the units had no effect: the test shows nothing"

    assert cost.parameters(smaller) < cost.parameters(program)
    assert cost.macs(smaller) < cost.macs(program)
    for name, units in result.removed.items():
        layer = unit_layers(smaller)[name]
        size = tensors(smaller)[layer.weights[0]].shape[layer.axis]
        assert size == result.units[name] - len(units)


# Who reads the units of a layer: module and how many of its inputs belong to a unit. Written by hand, not by analysis.
READERS: dict[str, dict[str, list[tuple[str, int]]]] = {
    "article_cnn": {"conv1": [("conv2", 1)], "conv2": [("fc1", 16)], "fc1": [("fc2", 1)]},
    "mlp": {"0": [("3", 1)], "3": [("5", 1)]},
    "vgg": {"features.3": [("features.7", 1)], "features.10": [("classifier.0", 4)]},
    "resnet": {
        "blocks.0.conv1": [("blocks.0.conv2", 1)],
        "conv": [("blocks.0.conv1", 1), ("blocks.1.conv1", 1), ("blocks.1.down.0", 1)],
        "blocks.1.conv2": [("blocks.2.conv1", 1), ("fc", 1)],
    },
    "mobilenet": {
        "3.body.0": [("3.body.6.reduce", 1), ("3.body.7", 1)],
        "0": [("3.body.0", 1), ("4.body.0", 1)],
        "4.body.6.reduce": [("4.body.6.expand", 1)],
    },
    "convnext": {"1.up": [("1.down", 1)]},
    "bert": {"layers.0.intermediate": [("layers.0.output", 1)], "pooler": [("classifier", 1)]},
    "unet": {"down2": [("up", 1)], "join": [("shuffle", 1)], "shuffle": [("last", 0)]},
    "lstm": {"before": [("rnn", 1)], "after": [("head", 1)]},
}
CASES = [(name, layer) for name, readers in READERS.items() for layer in readers]


@pytest.mark.parametrize(("name", "layer"), CASES, ids=["-".join(case) for case in CASES])
def test_same_as_masks_set_by_hand(
    name: str, layer: str, architectures: dict[str, Any], exported: Exported
) -> None:
    model, program = exported(name, True)
    options = PruneOptions(method="random", sparsity=0.4)
    chosen = prune(program, options, seed=5).removed[layer]
    sample = architectures[name].inputs(4)
    hooks = []
    for reader, width in READERS[name][layer]:
        # width 0: the pixel shuffle turned four channels into one
        units = sorted({unit // 4 for unit in chosen}) if width == 0 else chosen
        inputs = [unit * max(width, 1) + k for unit in units for k in range(max(width, 1))]
        module = model.get_submodule(reader)
        dim = 1 if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) else -1

        def mask(_: nn.Module, args: tuple[Tensor, ...], dim: int = dim, inputs: list[int] = inputs) -> Any:
            return (args[0].index_fill(dim, torch.tensor(inputs), 0.0), *args[1:])

        hooks.append(module.register_forward_pre_hook(mask))
    try:
        expected = model(sample)
    finally:
        for hook in hooks:
            hook.remove()
    found = delete(program, {layer: chosen}).module()(sample)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert (found - model(sample)).abs().max() > 1e-6


def test_same_removal_same_program(architecture: str, exported: Exported) -> None:
    _, program = exported(architecture, True)
    removed = prune(program, PruneOptions(method="magnitude", sparsity=0.5)).removed
    before = {name: value.clone() for name, value in tensors(program).items()}
    graph = str(program.graph)
    one, other = delete(program, removed), delete(program, dict(reversed(removed.items())))
    assert str(one.graph) == str(other.graph)
    assert {n: v.shape for n, v in tensors(one).items()} == {n: v.shape for n, v in tensors(other).items()}
    assert all(torch.equal(value, tensors(other)[name]) for name, value in tensors(one).items())
    assert str(program.graph) == graph, "the input was changed"
    assert all(torch.equal(value, before[name]) for name, value in tensors(program).items())


def test_survives_storage_and_trains(
    architecture: str, architectures: dict[str, Any], exported: Exported
) -> None:
    _, program = exported(architecture, True)
    smaller = delete(program, prune(program, PruneOptions(method="random", sparsity=0.5), seed=3).removed)
    sample = architectures[architecture].inputs(2)
    buffer = io.BytesIO()
    torch.export.save(smaller, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    expected = smaller.module()(sample)
    torch.testing.assert_close(loaded(sample), expected, rtol=0, atol=0)
    loaded(sample).square().sum().backward()
    # Of tied names torch's graph uses one, and gives only that one a gradient.
    tied = aliases(tensors(program))
    gradients = [
        value.grad for name, value in loaded.named_parameters() if name not in {*tied, *tied.values()}
    ]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_tied_weights_stay_tied(exported: Exported) -> None:
    _, program = exported("gpt", False)
    smaller = delete(program, prune(program, PruneOptions(method="random", sparsity=0.5)).removed)
    values = tensors(smaller)
    assert values["head.weight"].data_ptr() == values["tokens.weight"].data_ptr()
    tied = TiedTower().double()
    program = torch.export.export(tied, (torch.randn(2, 4, dtype=torch.float64),))
    smaller = delete(program, {"layers.0": [1, 4]})
    values = tensors(smaller)
    assert values["layers.1.weight"].shape == (4, 4)
    assert values["layers.1.weight"].data_ptr() == values["layers.2.weight"].data_ptr()


class TiedTower(nn.Module):
    """Two layers with one weight: its rows and its columns are the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
        self.layers[2].weight = self.layers[1].weight

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.layers[0](x))
        return self.layers[3](y + self.layers[2](torch.relu(self.layers[1](y))))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"nowhere": [0]}, "nowhere: is no layer"),
        ({"conv1": [8]}, "not all among its 8 units"),
        ({"conv1": [-1]}, "not all among its 8 units"),
        ({"fc2": [3]}, "fc2: unit 3 must stay; output: an output of the model"),
        ({"conv1": list(range(8))}, "nothing would be left of conv1.weight"),
    ],
)
def test_refuses(removed: dict[str, list[int]], message: str, exported: Exported) -> None:
    with pytest.raises(PruningError, match=message):
        delete(exported("article_cnn", True)[1], removed)


def test_refuses_half_of_a_unit(exported: Exported) -> None:
    _, program = exported("resnet", True)
    with pytest.raises(PruningError, match=r"blocks.0.conv2: units \[2\] go together"):
        delete(program, {"conv": [1, 2], "blocks.0.conv2": [1]})
