"""Train and eval mode of an exported program.

`torch.export` writes the mode of the day into the graph: dropout, batch normalization and recurrent layers carry it as
an argument. Here it is set again, operator by operator. What an eval-mode export left out cannot come back: the dropout
inside attention (`scaled_dot_product_attention` has a probability of 0 there).
"""

import operator

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fleetpress.compression.layers import RECURRENT_OPS
from fleetpress.compression.outputs import first_output
from fleetpress.compression.program import ProgramEditor, aliases, bind, inputs, tensors
from fleetpress.compression.smoke import smoke_inputs

aten = torch.ops.aten
MODE_ARGUMENTS = ("train", "training", "use_input_stats")
NORMALIZATIONS = {"batch_norm", "instance_norm", "_native_batch_norm_legit"}
HALVES = (torch.float16, torch.bfloat16)


def training_module(program: ExportedProgram) -> fx.GraphModule:
    """A module of its own with the graph in train mode: float16 and bfloat16 weights as float32, tied ones as one.

    Running statistics and batch counters are updated in the module's own buffers; the program stays as it is.
    """
    module = _own_module(program, widen=True)
    for graph_module in _graph_modules(module):
        set_mode(graph_module, train=True)
        graph_module.recompile()
    return module


def eval_module(program: ExportedProgram, *, widen: bool = False) -> fx.GraphModule:
    """A module of its own with the graph in eval mode, also when the archive was exported in train mode.

    `widen` computes in float32 where the program has float16 or bfloat16 (gradients need it).
    """
    module = _own_module(program, widen=widen)
    for graph_module in _graph_modules(module):
        set_mode(graph_module, train=False)
        graph_module.recompile()
    return module


def eval_program(program: ExportedProgram) -> ExportedProgram:
    """The program with its own graph in eval mode, so that whoever loads it gets what `eval_module` computes.

    A program exported in eval mode comes back as it is.
    """
    editor = ProgramEditor(program)
    changed = False
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if _counts_batches(node):
            editor.graph.erase_node(node)
            changed = True
            continue
        before = node.args, node.kwargs
        _set_operator(node, False)
        changed = changed or before != (node.args, node.kwargs)
    return editor.build() if changed else program


def state_of(module: nn.Module, program: ExportedProgram) -> dict[str, Tensor]:
    """The module's values by the program's state names, in its dtypes and memory; tied names share one tensor."""
    values: dict[str, Tensor] = {}
    stored = tensors(program)
    tied = aliases(stored)
    for name, original in stored.items():
        if name in tied:
            values[name] = values[tied[name]]
        else:
            value = _attribute(module, name)
            values[name] = value.detach().clone().to(original.device, original.dtype)
    return values


def fixed_batch(program: ExportedProgram) -> int | None:
    """The batch size that the program cannot do without, or None.

    A program exported with one batch size often works with any: it is taken at its word only after twice the batch
    gave, sample by sample, what the batches gave apart.
    """
    sizes = {item.shape[0] for item in inputs(program) if item.shape and item.shape[0] is not None}
    if not sizes:
        return None
    size = min(sizes)
    return None if len(sizes) == 1 and _takes_other_batches(program, size) else size


def _takes_other_batches(program: ExportedProgram, size: int) -> bool:
    if any(node.target in RECURRENT_OPS for node in program.graph.nodes):
        return False  # its first states are of this size, and torch does not look: more would be written beyond them
    module = _bare_module(program)
    set_mode(module, train=False)
    module.recompile()
    first = smoke_inputs(program)
    generator = torch.Generator().manual_seed(1)
    second = {
        name: torch.randn(value.shape, generator=generator).to(value.dtype)
        if value.is_floating_point()
        else torch.randint(0, 2, value.shape, generator=generator).to(value.dtype)
        for name, value in first.items()
    }
    both = {name: torch.cat([first[name], second[name]]) for name in first}
    odd = {name: value[: size + 1] for name, value in both.items()}
    try:
        with torch.no_grad():
            apart = [first_output(_call(module, program, batch)) for batch in (first, second)]
            together, partly = (first_output(_call(module, program, batch)) for batch in (both, odd))
    except (RuntimeError, IndexError, ValueError, AssertionError):
        return False
    expected = torch.cat(apart) if apart[0].dim() else apart[0]
    return all(
        got.shape == wanted.shape and torch.allclose(got.float(), wanted.float(), rtol=1e-3, atol=1e-4)
        for got, wanted in ((together, expected), (partly, expected[: size + 1]))
    )


def _call(module: nn.Module, program: ExportedProgram, batch: dict[str, Tensor]) -> object:
    args, kwargs = bind(program, batch)
    return module(*args, **kwargs)


def _own_module(program: ExportedProgram, *, widen: bool) -> fx.GraphModule:
    module = _bare_module(program) if _frees_batch(program) else _module(program)
    stored = tensors(program)
    tied = aliases(stored)
    own: dict[str, Tensor] = {}
    for name, value in stored.items():
        if name in tied:
            own[name] = own[tied[name]]
        else:
            plain = value.detach().clone()
            plain = plain.float() if widen and plain.dtype in HALVES else plain
            own[name] = nn.Parameter(plain) if isinstance(value, nn.Parameter) and _floats(plain) else plain
        _set_attribute(module, name, own[name])
    if widen:
        for graph_module in _graph_modules(module):
            _widen(graph_module)
    return module


def _frees_batch(program: ExportedProgram) -> bool:
    """Whether the guards forbid batch sizes that the program can do."""
    static = any(item.shape and item.shape[0] is not None for item in inputs(program))
    return static and fixed_batch(program) is None


def _module(program: ExportedProgram) -> fx.GraphModule:
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    return module


def _bare_module(program: ExportedProgram) -> fx.GraphModule:
    """The program's module without the guards on input shapes."""
    module = _module(program)
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            module.graph.erase_node(node)
    module._forward_pre_hooks.clear()
    module.recompile()
    return module


def _graph_modules(module: nn.Module) -> list[fx.GraphModule]:
    return [part for part in module.modules() if isinstance(part, fx.GraphModule)]


def set_mode(module: fx.GraphModule, *, train: bool) -> None:
    """Put every operator that knows train and eval mode into one of them; the code is not yet recompiled."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not train and _counts_batches(node):
            module.graph.erase_node(node)
            continue
        learns = train and not _has_fixed_statistics(node)
        _set_operator(node, learns)
        if learns and _name(node) in NORMALIZATIONS:
            _count_batches(module, node)


def _set_operator(node: fx.Node, train: bool) -> None:
    if node.target is aten._native_batch_norm_legit_no_training.default and train:
        x, weight, bias, mean, variance, momentum, eps = node.args
        node.target = aten._native_batch_norm_legit.default
        node.args = (x, weight, bias, mean, variance, True, momentum, eps)
        return
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name in MODE_ARGUMENTS and not _keeps_no_statistics(node):
            _set_argument(node, position, train)
        elif argument.name == "dropout_p" and not train:
            _set_argument(node, position, 0.0)


def _keeps_no_statistics(node: fx.Node) -> bool:
    """Normalization without running statistics uses those of the batch in both modes."""
    return _name(node) in NORMALIZATIONS and node.args[3] is None


def _has_fixed_statistics(node: fx.Node) -> bool:
    """With momentum 0 running statistics never move: training on those of the batch would fit another net."""
    if _name(node) == "_native_batch_norm_legit_no_training":
        return bool(node.args[5] == 0)
    return _name(node) in NORMALIZATIONS and len(node.args) > 6 and bool(node.args[6] == 0)


def _set_argument(node: fx.Node, position: int, value: object) -> None:
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    name = arguments[position].name
    if name in node.kwargs:
        node.kwargs = {**node.kwargs, name: value}  # type: ignore[dict-item]
        return
    if arguments[position].kwarg_only:
        node.kwargs = {**node.kwargs, name: value}  # type: ignore[dict-item]
        return
    args = list(node.args) + [argument.default_value for argument in arguments[len(node.args) : position + 1]]
    args[position] = value
    node.args = tuple(args)


def _counts_batches(node: fx.Node) -> bool:
    counter = node.args[0] if node.args else None
    return (
        node.target is aten.add_.Tensor
        and isinstance(counter, fx.Node)
        and counter.op in ("get_attr", "placeholder")
        and str(counter.target).endswith("num_batches_tracked")
        and not node.users
    )


def _count_batches(module: fx.GraphModule, node: fx.Node) -> None:
    """Let the layer count its batches as it does in train mode (eval-mode exports leave the counter unused)."""
    mean = node.args[3]
    if not isinstance(mean, fx.Node) or mean.op != "get_attr":
        return
    target = str(mean.target).removesuffix("running_mean") + "num_batches_tracked"
    counters = [one for one in module.graph.nodes if one.op == "get_attr" and one.target == target]
    if counters and not any(_counts_batches(user) for counter in counters for user in counter.users):
        with module.graph.inserting_before(node):
            module.graph.call_function(aten.add_.Tensor, (counters[0], 1))


def _name(node: fx.Node) -> str:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target._schema.name.partition("::")[2]


def _widen(module: fx.GraphModule) -> None:
    """Compute in float32 where the graph says float16 or bfloat16."""
    for node in module.graph.nodes:
        node.args = _widened(node.args)
        node.kwargs = {name: _widened(value) for name, value in node.kwargs.items()}


def _widened(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(_widened(item) for item in value)
    if isinstance(value, list):
        return [_widened(item) for item in value]
    return torch.float32 if value in HALVES else value


def _floats(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _attribute(module: nn.Module, name: str) -> Tensor:
    value = operator.attrgetter(name)(module)
    assert isinstance(value, Tensor)
    return value


def _set_attribute(module: nn.Module, name: str, value: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        if isinstance(value, nn.Parameter):
            owner._parameters[leaf] = value
        else:
            del owner._parameters[leaf]
            owner.register_buffer(leaf, value)
    elif leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        setattr(owner, leaf, value)
