"""Read and edit exported programs in place of exporting them again.

An `ExportedProgram` holds a lifted graph: every parameter, buffer and constant is a placeholder, and the signature maps
placeholder names to state names. Edits copy the graph, change placeholders and arguments, and propagate fake tensors
node by node, so symbolic batch sizes survive and an edit costs about a millisecond a node.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from fleetpress.compression.errors import DataMismatchError, ProgramError

STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True, kw_only=True)
class ProgramInput:
    """One user input; `None` in `shape` is a size that may change from call to call."""

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype


def tensors(program: ExportedProgram) -> dict[str, Tensor]:
    """Every stored tensor by its state name: parameters, buffers and constants, in the signature's order."""
    found: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in STORED and spec.target is not None:
            value = program.state_dict.get(spec.target)
            if value is None:
                value = program.constants[spec.target]
            found[spec.target] = value
    return found


def trainable(program: ExportedProgram) -> tuple[str, ...]:
    """State names of the floating-point parameters, in the signature's order."""
    return tuple(
        spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.PARAMETER
        and spec.target is not None
        and program.state_dict[spec.target].is_floating_point()
    )


def aliases(values: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that share one storage, mapped to the first of them: tied parameters are one parameter."""
    first: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, value in values.items():
        if value.numel() == 0:
            continue
        place = (
            value.untyped_storage().data_ptr(),
            value.storage_offset(),
            tuple(value.shape),
            value.stride(),
            value.dtype,
        )
        owner = first.setdefault(place, name)
        if owner != name:
            tied[name] = owner
    return tied


def inputs(program: ExportedProgram) -> tuple[ProgramInput, ...]:
    """The tensors that a caller passes, in the order of the flattened call."""
    names = {
        spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
    }
    found = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names and isinstance(node.meta.get("val"), Tensor):
            value = node.meta["val"]
            shape = tuple(size if isinstance(size, int) else None for size in value.shape)
            found.append(ProgramInput(name=node.name, shape=shape, dtype=value.dtype))
    return tuple(found)


def bind(program: ExportedProgram, values: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for `program.module()` from tensors named like the program's inputs.

    A program with one input also takes it under the name `inputs`.
    """
    known = inputs(program)
    flat: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT:
            continue
        if isinstance(spec.arg, ConstantArgument):
            flat.append(spec.arg.value)
        elif spec.arg.name in values:
            flat.append(values[spec.arg.name])
        elif len(known) == 1 and "inputs" in values:
            flat.append(values["inputs"])
        else:
            wanted = "inputs" if len(known) == 1 else ", ".join(item.name for item in known)
            raise DataMismatchError(
                f"the program's input {spec.arg.name!r} is not among the arrays {sorted(values)}; "
                f"name the arrays {wanted}"
            )
    args, kwargs = pytree.tree_unflatten(flat, program.call_spec.in_spec)
    return tuple(args), dict(kwargs)


def with_tensors(program: ExportedProgram, values: Mapping[str, Tensor]) -> ExportedProgram:
    """The same program over other values of the same shapes; names that are not given keep theirs."""
    editor = ProgramEditor(program)
    for name, value in values.items():
        if value.shape != editor.values[name].shape:
            raise ProgramError(
                f"{name}: shape {tuple(value.shape)} does not fit {tuple(editor.values[name].shape)} of the program"
            )
        editor.set(name, value)
    return editor.build()


class ProgramEditor:
    """A private copy of a program under change; `build` checks it and gives the new program.

    `values` holds the stored tensors by state name and `placeholders` their graph nodes. Tied names stay tied when they
    are set to the same tensor object.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self.graph: fx.Graph = copy.deepcopy(program.graph)
        for node, old in zip(self.graph.nodes, program.graph.nodes, strict=True):
            node.name = (
                old.name
            )  # a copy renames what is a builtin's name, such as `input`; the signature goes by names
        self.values = tensors(program)
        self._specs = list(program.graph_signature.input_specs)
        nodes = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        self.placeholders: dict[str, fx.Node] = {
            spec.target: nodes[spec.arg.name]
            for spec in self._specs
            if spec.kind in STORED and spec.target is not None
        }
        fake_mode = detect_fake_mode([node.meta["val"] for node in self.graph.nodes if "val" in node.meta])
        if fake_mode is None:
            raise ProgramError(
                "the program carries no tensor shapes; export it again with torch.export.export"
            )
        self._fake = fake_mode
        self._dirty: set[fx.Node] = set()

    def set(self, name: str, value: Tensor) -> None:
        """Give the stored tensor `name` another value, shape or dtype."""
        kept = self.values[name]
        node = self.placeholders[name]
        if isinstance(kept, torch.nn.Parameter) and not isinstance(value, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=kept.requires_grad)
        self.values[name] = value
        if value.shape != kept.shape or value.dtype != kept.dtype:
            node.meta["val"] = self._fake_like(value)
            self._dirty.add(node)

    def set_args(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        """Change a node's arguments; its shape and those after it are worked out again."""
        node.args = args
        if kwargs is not None:
            node.kwargs = dict(kwargs)
        self._dirty.add(node)

    def set_target(self, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
        """Replace a node's operator and arguments."""
        node.target = target
        self.set_args(node, args, {})

    def multiply(self, node: fx.Node, factor: float) -> None:
        """Multiply what the node gives before anyone reads it."""
        with self.graph.inserting_after(node):
            product = self.graph.call_function(torch.ops.aten.mul.Tensor, (node, factor))
        product.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)
        self._dirty.add(product)

    def replace(
        self,
        name: str,
        buffers: Mapping[str, Tensor],
        compute: Callable[[fx.Graph, dict[str, fx.Node]], fx.Node],
    ) -> None:
        """Store `buffers` instead of the tensor `name`, which `compute` derives from them inside the graph."""
        old = self.placeholders.pop(name)
        index = next(i for i, spec in enumerate(self._specs) if spec.target == name)
        added: dict[str, fx.Node] = {}
        specs = []
        with self.graph.inserting_before(old):
            for buffer_name, value in buffers.items():
                node = self.graph.placeholder("b_" + "".join(c if c.isalnum() else "_" for c in buffer_name))
                node.meta["val"] = self._fake_like(value)
                added[buffer_name] = node
                self.placeholders[buffer_name] = node
                self.values[buffer_name] = value
                specs.append(
                    InputSpec(InputKind.BUFFER, TensorArgument(node.name), buffer_name, persistent=True)
                )
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        before = set(self.graph.nodes)
        with self.graph.inserting_before(last.next):
            result = compute(self.graph, added)
        self._dirty.update(node for node in self.graph.nodes if node not in before)
        # The users keep their shapes if the computed tensor turns out to be like the stored one.
        result.meta.setdefault("val", old.meta["val"])
        old.replace_all_uses_with(result)
        self.graph.erase_node(old)
        del self.values[name]
        self._specs[index : index + 1] = specs

    def fold(self, node: fx.Node, name: str, value: Tensor, *, beside: str) -> None:
        """Store `value` as parameter `name` in front of the stored tensor `beside`, and use it instead of `node`."""
        node.replace_all_uses_with(self.store(name, value, beside=beside))

    def store(self, name: str, value: Tensor, *, beside: str) -> fx.Node:
        """Store `value` as parameter `name` in front of the stored tensor `beside`; its node in the graph."""
        if name in self.values:
            raise ProgramError(f"{name}: the program already stores a tensor of this name")
        with self.graph.inserting_before(self.placeholders[beside]):
            placeholder = self.graph.placeholder("p_" + "".join(c if c.isalnum() else "_" for c in name))
        placeholder.meta["val"] = self._fake.from_tensor(value, static_shapes=True)
        self.placeholders[name] = placeholder
        self.values[name] = torch.nn.Parameter(value)
        index = next(i for i, spec in enumerate(self._specs) if spec.target == beside)
        self._specs.insert(index, InputSpec(InputKind.PARAMETER, TensorArgument(placeholder.name), name))
        return placeholder

    def drop(self, name: str) -> None:
        """Store the tensor `name`, which nothing uses any more, no longer."""
        self.graph.erase_node(self.placeholders.pop(name))
        del self.values[name]
        self._specs = [spec for spec in self._specs if spec.target != name]

    def build(self) -> ExportedProgram:
        """The new program, its shapes worked out again and its graph verified."""
        self._propagate()
        self.graph.lint()
        replaced = tensors(self._program).keys() - self.values.keys()
        state = {}
        constants = {name: value for name, value in self._program.constants.items() if name not in replaced}
        for spec in self._specs:
            if spec.kind not in STORED or spec.target is None:
                continue
            value = self.values[spec.target]
            if spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent):
                state[spec.target] = value
            else:
                constants[spec.target] = value
        old = self._program
        return ExportedProgram(
            root=self._program.graph_module,
            graph=self.graph,
            graph_signature=ExportGraphSignature(self._specs, list(old.graph_signature.output_specs)),
            state_dict=state,
            range_constraints=dict(old.range_constraints),
            module_call_graph=old.module_call_graph,
            example_inputs=None,
            constants=constants,
            verifiers=old.verifiers,
        )

    def _fake_like(self, value: Tensor) -> Tensor:
        with self._fake:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    def _propagate(self) -> None:
        for node in self.graph.nodes:
            if node.op == "call_function" and (
                node in self._dirty or any(i in self._dirty for i in node.all_input_nodes)
            ):
                self._dirty.add(node)
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: item.meta["val"])
                try:
                    # Recurrent operators take symbolic sizes only in their Python form.
                    with self._fake, enable_python_dispatcher(), torch.no_grad():
                        value = node.target(*args, **kwargs)
                except (RuntimeError, TypeError, ValueError, KeyError) as error:
                    raise ProgramError(
                        f"{node.name} ({node.target}): does not fit its new inputs: {error}"
                    ) from error
                if _looks_like(node.meta.get("val"), value):
                    self._dirty.discard(node)
                node.meta["val"] = value
            # Traces and module stacks hold paths of the machine that exported the program.
            node.meta = {key: node.meta[key] for key in ("val",) if key in node.meta}


def _looks_like(old: object, new: object) -> bool:
    """Whether both are tensors of one shape and dtype; symbolic sizes are compared as written, without new guards."""
    return (
        isinstance(old, Tensor)
        and isinstance(new, Tensor)
        and old.dtype == new.dtype
        and str(old.shape) == str(new.shape)
    )
