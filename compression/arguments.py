"""Arguments of a node by the names in its operator's schema."""

from functools import cache
from typing import Any

import torch
from torch import fx


@cache
def _parameters(target: torch._ops.OpOverload) -> tuple[tuple[str, Any, bool], ...]:
    return tuple((arg.name, arg.default_value, arg.kwarg_only) for arg in target._schema.arguments)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of the operator, defaults filled in."""
    found: dict[str, Any] = {}
    for index, (name, default, _) in enumerate(_parameters(node.target)):
        found[name] = node.args[index] if index < len(node.args) else node.kwargs.get(name, default)
    return found


def operands(node: fx.Node) -> tuple[Any, ...]:
    """The node's positional arguments."""
    return node.args


def replaced(node: fx.Node, **changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's args and kwargs with some arguments changed."""
    values = arguments(node) | changes
    parameters = _parameters(node.target)
    last = max(
        [len(node.args), *(i + 1 for i, (name, _, kw) in enumerate(parameters) if name in changes and not kw)]
    )
    args = tuple(values[name] for name, _, _ in parameters[:last])
    names = {name for name, _, _ in parameters[last:]}
    kwargs = {name: values[name] for name in names if name in node.kwargs or name in changes}
    return args, dict(sorted(kwargs.items()))


def is_single(node: fx.Node, dim: int) -> bool:
    """Whether the dim has one entry, and so goes with any other size; one that may change does not count."""
    size = size_of(node, dim)
    return isinstance(size, int) and size == 1


def size_of(node: fx.Node, dim: int) -> int | torch.SymInt:
    """Size of one dim of the node's tensor."""
    size: int | torch.SymInt = node.meta["val"].shape[dim]
    return size
