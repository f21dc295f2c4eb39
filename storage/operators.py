"""Which operators a program from a stranger may call.

torch resolves a node's target by `getattr` from `torch`, `operator` or `math`, so without a list a node could call
`torch.load`, or ATen's own readers and writers of files.
"""

import re

_ATEN = re.compile(
    r"torch\.ops\.aten\.(?P<name>[A-Za-z0-9]\w*|_[A-Za-z]\w*|__(and|or|xor|lshift|rshift|iand|ior|ixor|ilshift|irshift)__)"
    r"\.(?P<overload>[A-Za-z]\w*)",
    re.ASCII,
)
_FORBIDDEN_ATEN = frozenset({"from_file", "save", "_print", "warn", "set_", "set_data"})
# Methods of torch's operator objects, which are no overloads.
_FORBIDDEN_OVERLOADS = frozenset({"op", "overloads", "op_overloads"})
_HIGHER_ORDER = re.compile(
    r"torch\.ops\.higher_order\.(associative_scan|cond|flex_attention|invoke_subgraph|map|map_impl|out_dtype|scan"
    r"|strict_mode|tag_activation_checkpoint|while_loop|wrap|wrap_with_autocast|wrap_with_set_grad_enabled)"
)
_PYTHON = re.compile(
    r"_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lshift|lt|mod|mul|ne|neg|or_|pos|pow|rshift|sub|truediv)"
    r"|math\.(ceil|floor|trunc)"
    r"|torch\.(sym_(float|int|ite|max|min|not|sum)|_sym_sqrt)"
    # what torch.vmap becomes in an exported graph
    r"|torch\._functorch\.predispatch\.(_add_batch_dim|_remove_batch_dim|_vmap_increment_nesting"
    r"|_vmap_decrement_nesting|lazy_load_decompositions)"
)


def is_safe_target(target: str) -> bool:
    """Whether `target` (as in the graph's JSON) is an ATen overload, known control flow or size arithmetic."""
    if _PYTHON.fullmatch(target) or _HIGHER_ORDER.fullmatch(target):
        return True
    match = _ATEN.fullmatch(target)
    return (
        match is not None
        and match["name"] not in _FORBIDDEN_ATEN
        and match["overload"] not in _FORBIDDEN_OVERLOADS
    )
