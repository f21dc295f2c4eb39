"""Size expressions and operator names: what torch writes passes, anything that could do more does not."""

import pytest

from fleetpress.storage.expressions import is_safe_expression
from fleetpress.storage.operators import is_safe_target


@pytest.mark.parametrize(
    "text",
    [
        "s77",
        "2*s77 + 1",
        "Symbol('s77', positive=True, integer=True)",
        "Add(Mul(Integer(2), Symbol('s0', integer=True)), Integer(-1))",
        "FloorDiv(s0, 2) % 3 // 4",
        "Pow(Symbol('s77', positive=True, integer=True), Integer(2))",
        "Eq(u0, 3) & ~Ne(s1, 2)",
        "Max(1, s0) <= 7",
        "Float('0.5', precision=53)",
        "Rational(1, 3)",
    ],
)
def test_sizes_that_torch_writes(text: str) -> None:
    assert is_safe_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "open('x')",
        "__import__('os')",
        "s0.__class__",
        "(lambda: 1)()",
        "[s0]",
        "s0 if s0 else s1",
        "exec",
        "Symbol('s0); open(1)')",
        "Symbol('s0', open('x'))",
        "Symbol('s0', integer=open('x'))",
        "Symbol(open('x'))",
        "9**9**9",
        "Pow(Integer(9), Integer(99999999))",
        "s0**99999999",
        "Float('1e999999999')",
        "Integer(open('x'))",
        "sympify('1')",
        "s0\nopen",
        "s0 #",
        "\uff530",
        "(" * 3000,
        "s0" + "+s0" * 3000,
        "FloorDiv(" * 33 + "s0" + "+1,2)" * 33,
        "(" * 33 + "s0" + "+1)%s1" * 33,
        f"Max({', '.join(f's{i}' for i in range(17))})",
        "",
    ],
)
def test_sizes_that_are_more_than_arithmetic(text: str) -> None:
    assert not is_safe_expression(text)


def test_operators_of_ordinary_models_are_known() -> None:
    assert is_safe_target("torch.ops.aten.__and__.Tensor")
    assert is_safe_target("torch.ops.aten._native_batch_norm_legit.no_stats")
    assert is_safe_target("torch.ops.higher_order.cond")
    assert is_safe_target("_operator.getitem")
