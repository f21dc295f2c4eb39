"""Which symbolic size expressions of an exported program may be handed to sympy.

`torch.export.load` gives them to `sympy.sympify`, which is Python's `eval` with sympy's names in scope. Only what the
serializer itself writes (sympy's `srepr`, or plain arithmetic on symbols) is let through, so nothing else is evaluated.
"""

import ast
import re
from functools import lru_cache

SYMBOL = re.compile(r"[a-z]{1,3}[0-9]{1,5}")  # s77, u0, zf3: what torch's ShapeEnv names

_ALPHABET = re.compile(r"[A-Za-z0-9_+\-*/%(),. '<>=&|~]*")
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,40})?(e[+-]?[0-9]{1,3})?")
_FUNCTION = re.compile(
    r"Abs|Add|And|CeilDiv|CeilToInt|CleanDiv|Eq|Equality|FloatTrueDiv|FloorDiv|FloorToInt|Ge|GreaterThan|"
    r"Gt|Identity|IntTrueDiv|IsNonOverlappingAndDenseIndicator|Le|LessThan|Lt|Max|Min|Mod|ModularIndexing|"
    r"Mul|Ne|Not|Or|PythonMod|RShift|RoundDecimal|RoundToInt|StrictGreaterThan|StrictLessThan|ToFloat|"
    r"TruncToFloat|TruncToInt|Unequality|Where|ceiling|floor"
)
_POWERS = frozenset({"FloatPow", "LShift", "Pow", "PowByNatural"})
_CONSTANTS = frozenset({"true", "false", "int_oo"})
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.BitOr)
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_MAX_LENGTH = 4_000
# What sympy simplifies as it builds, at a cost that grows fast: in all, these bounds keep it below some seconds.
_ARITHMETIC = frozenset({"Add", "Float", "Integer", "Mul", "Pow", "Rational", "Symbol"})
_MAX_NESTING = 32  # of the other functions: 48 divisions in one another take a second, 150 take minutes
_EXTREMA = ("Max", "Min")
_MAX_EXTREMA = 16  # arguments: forty take a second, too
_MAX_EXPONENT = 16  # a power of a symbol is fine; towers of numbers would eat all memory before any check


def is_safe_expression(text: str) -> bool:
    """Whether `text` is arithmetic on symbols and numbers and nothing more."""
    if len(text) > _MAX_LENGTH or not _ALPHABET.fullmatch(text):
        return False
    try:
        return _parsed_is_safe(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


@lru_cache(256)  # a graph says the same few sizes hundreds of times
def _parsed_is_safe(text: str) -> bool:
    tree = ast.parse(text, mode="eval")
    return _safe(tree.body) and _extrema(tree) <= _MAX_EXTREMA and _nesting(tree) <= _MAX_NESTING


def _safe(node: ast.expr) -> bool:  # noqa: PLR0911 - one return a node type
    match node:
        case ast.Constant(value=value):
            return type(value) is float or (type(value) is int and abs(value) < 2**64)
        case ast.Name(id=name):
            return name in _CONSTANTS or SYMBOL.fullmatch(name) is not None
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Invert(), operand=operand):
            return _safe(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(left, right)
        case ast.BinOp(left=left, op=operator, right=right):
            return isinstance(operator, _OPERATORS) and _safe(left) and _safe(right)
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            return isinstance(operator, _COMPARISONS) and _safe(left) and _safe(right)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            return _call(name, args, keywords)
    return False


def _call(name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> bool:
    if name == "Symbol":
        assumptions = all(_is(k.value, bool) and k.arg in _ASSUMPTIONS for k in keywords)
        return len(args) == 1 and _text(args[0], SYMBOL) and assumptions
    if name == "Float":
        precision = all(k.arg == "precision" and _small(k.value, 128) for k in keywords)
        return len(args) == 1 and _text(args[0], _NUMBER) and precision
    if keywords:
        return False
    if name in ("Integer", "Rational"):
        return 1 <= len(args) <= 2 and all(_literal(arg) for arg in args)
    if name in _POWERS:
        return len(args) == 2 and _power(args[0], args[1])
    return _FUNCTION.fullmatch(name) is not None and all(_safe(arg) for arg in args)


_ASSUMPTIONS = frozenset(
    {"integer", "positive", "nonnegative", "real", "negative", "nonzero", "commutative", "finite"}
)


def _power(base: ast.expr, exponent: ast.expr) -> bool:
    if isinstance(exponent, ast.Call) and len(exponent.args) == 1 and _call_name(exponent) == "Integer":
        exponent = exponent.args[0]
    is_symbol = isinstance(base, ast.Name) or _call_name(base) == "Symbol"
    return is_symbol and _safe(base) and _small(exponent, _MAX_EXPONENT)


def _extrema(tree: ast.AST) -> int:
    """The arguments of all maxima and minima."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and _call_name(node) in _EXTREMA)
    return sum(len(call.args) for call in calls)


def _nesting(node: ast.AST) -> int:
    """How many functions that are more than arithmetic stand in one another; `//` and `%` are such, too."""
    inner = max(map(_nesting, ast.iter_child_nodes(node)), default=0)
    if isinstance(node, ast.Call):
        return inner + (_call_name(node) not in _ARITHMETIC)
    return inner + (isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mod))


def _call_name(node: ast.expr) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _literal(node: ast.expr) -> bool:
    number = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else node
    return isinstance(number, ast.Constant) and type(number.value) is int and number.value < 2**64


def _small(node: ast.expr, limit: int) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value <= limit


def _is(node: ast.expr, kind: type) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is kind


def _text(node: ast.expr, pattern: re.Pattern[str]) -> bool:
    return (
        isinstance(node, ast.Constant)
        and type(node.value) is str
        and pattern.fullmatch(node.value) is not None
    )
