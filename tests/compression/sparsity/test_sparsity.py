"""Zeroed weights are exactly the ones they should be, whatever the blocks they come in."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune

from fleetpress.compression.errors import MethodError
from fleetpress.compression.sparsity import (
    SPARSIFIERS,
    is_sparsifier,
    magnitudes,
    measuring_passes,
    parse_pattern,
    reason_against,
    start,
    zeroed,
)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def n_m(pattern: str) -> dict[str, Any]:
    return {"method": "magnitude_n_m", "pattern": pattern}


def unstructured(sparsity: float) -> dict[str, Any]:
    return {"method": "magnitude_unstructured", "sparsity": sparsity}


def done(options: dict[str, Any], weight: Tensor, block_rows: int = 1 << 20) -> Tensor:
    """The weight zeroed in blocks of rows, as a checkpoint's tensor is."""
    dtype = NAMES[weight.dtype]
    state = start(options, dtype, weight.shape)
    for _ in range(measuring_passes(options, dtype)):
        for block in weight.split(block_rows):
            state.measure(block.clone())
        state.end_pass()
    return torch.cat([state.apply(block.clone()) for block in weight.split(block_rows)])


def smallest_first(values: Tensor, count: int) -> Tensor:
    """The last dimension with the `count` smallest magnitudes zeroed, by a stable sort."""
    order = values.double().abs().sort(dim=-1, stable=True).indices[..., :count]
    return values.clone().scatter_(-1, order, 0)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(magnitudes.integers(one.contiguous()), magnitudes.integers(other.contiguous()))


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Matrices, some with many equals and zeros of both signs, some of very different sizes."""
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 8)) * 12
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    if draw(st.booleans()):
        few = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-14, 3e-7, -2.5])
        values = few[torch.randint(len(few), (rows, columns), generator=generator)].double()
    else:
        values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        values *= 10.0 ** torch.randint(-6, 4, (rows, 1), generator=generator)
    return values.to(draw(st.sampled_from(list(DTYPES.values()))))


# ---- N:M


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (4, 8), (1, 2)])
def test_groups_are_those_of_torch(kept: int, group: int) -> None:
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(kept))
    layer = torch.nn.Linear(96, 48)
    layer.weight.data = weight.clone()
    sparsifier = WeightNormSparsifier(
        sparsity_level=1.0, sparse_block_shape=(1, group), zeros_per_block=group - kept
    )
    sparsifier.prepare(torch.nn.Sequential(layer), [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(done(n_m(f"{kept}:{group}"), weight, 7), layer.weight)


@settings(deadline=None, max_examples=150)
@given(
    weights(),
    st.sampled_from(["1:2", "2:3", "1:3", "2:4", "3:4", "3:6", "1:12", "11:12"]),
    st.integers(1, 12),
)
def test_n_of_m_stay_and_the_first_of_equals_goes(weight: Tensor, pattern: str, block_rows: int) -> None:
    kept, group = parse_pattern(pattern)
    found = done(n_m(pattern), weight, block_rows)
    expected = smallest_first(weight.view(-1, group), group - kept).view(weight.shape)
    assert same_bits(found, expected)
    assert zeroed(n_m(pattern), weight.shape) == weight.numel() * (group - kept) // group
    assert int((found == 0).sum()) >= zeroed(n_m(pattern), weight.shape)


def test_groups_may_be_of_32_and_tensors_of_experts() -> None:
    weight = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = smallest_first(weight.view(-1, 32), 31).view(weight.shape)
    assert same_bits(done(n_m("1:32"), weight, 2), expected)


def test_infinite_weights_and_nan_are_the_largest() -> None:
    nan, inf = float("nan"), float("inf")
    for dtype in DTYPES.values():
        weight = torch.tensor([[1.0, nan, 2.0, -inf], [-nan, 0.5, 1.0, inf]], dtype=dtype)
        for options in (n_m("2:4"), unstructured(0.5)):
            assert (done(options, weight) == 0).tolist() == [
                [True, False, True, False],
                [False, True, True, False],
            ]


def test_rows_that_do_not_divide_are_told_before() -> None:
    assert reason_against(n_m("2:4"), "BF16", (6, 96)) is None
    assert (
        reason_against(n_m("2:4"), "BF16", (6, 97))
        == "rows of 97 do not divide into groups of 4 (pattern 2:4)"
    )
    assert reason_against(unstructured(0.5), "BF16", (6, 97)) is None
    for options in (n_m("2:4"), unstructured(0.5)):
        assert reason_against(options, "I8", (4, 4)) == (
            "its dtype is I8; only BF16, F16, F32, F64 have magnitudes to compare"
        )
        with pytest.raises(MethodError, match=r"its dtype is I8.*add the layer to `ignore`"):
            start(options, "I8", (4, 4))
    with pytest.raises(MethodError, match="rows of 97 do not divide"):
        start(n_m("2:4"), "F32", (6, 97))


# ---- unstructured


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_the_smallest_are_those_of_torch(sparsity: float, dtype: torch.dtype) -> None:
    weight = torch.randn(37, 53, generator=torch.Generator().manual_seed(3)).to(dtype)
    layer = torch.nn.Linear(53, 37, dtype=dtype)
    layer.weight.data = weight.clone()
    prune.l1_unstructured(layer, "weight", amount=zeroed(unstructured(sparsity), weight.shape))
    assert torch.equal(done(unstructured(sparsity), weight, 5), layer.weight)


@settings(deadline=None, max_examples=200)
@given(weights(), st.integers(1, 99), st.integers(1, 12))
def test_the_share_is_exact_and_the_first_of_equals_goes(
    weight: Tensor, percent: int, block_rows: int
) -> None:
    options = unstructured(percent / 100)
    count = weight.numel() * percent // 100
    assert zeroed(options, weight.shape) == count
    found = done(options, weight, block_rows)
    assert same_bits(found, smallest_first(weight.view(-1), count).view(weight.shape))
    assert int((found == 0).sum()) == max(count, int((weight == 0).sum()))


def test_a_share_is_what_is_written() -> None:
    assert 0.29 * 100 < 29
    assert zeroed(unstructured(0.29), (10, 10)) == 29
    assert zeroed(unstructured(1e-12), (10, 10)) == 0
    assert zeroed(unstructured(0.7), (10**6, 10**4)) == 7 * 10**9


def test_nothing_goes_if_the_share_is_less_than_one_weight() -> None:
    weight = torch.tensor([[0.5, -0.0, 3.0]])
    assert same_bits(done(unstructured(0.3), weight), weight)


def test_each_digit_of_the_threshold_takes_a_pass() -> None:
    assert {name: measuring_passes(unstructured(0.5), name) for name in DTYPES} == {
        "F64": 4,
        "F32": 2,
        "F16": 1,
        "BF16": 1,
    }
    assert {measuring_passes(n_m("2:4"), name) for name in DTYPES} == {0}


# ---- both


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("options", [n_m("2:3"), unstructured(0.4)], ids=["n_m", "unstructured"])
def test_tiles_do_not_change_the_result(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randint(-9, 9, (31, 99), generator=torch.Generator().manual_seed(4)).to(dtype)
    expected = done(options, weight)
    monkeypatch.setattr(magnitudes, "TILE_ELEMENTS", 100)
    assert same_bits(done(options, weight, 6), expected)


def test_a_copy_goes_its_own_way() -> None:
    weight = torch.randint(-3, 3, (20, 8), generator=torch.Generator().manual_seed(5)).bfloat16()
    state = start(unstructured(0.5), "BF16", weight.shape)
    state.measure(weight)
    state.end_pass()
    trial = copy.deepcopy(state)
    first, second = (
        torch.cat([each.apply(block.clone()) for block in weight.split(3)]) for each in (trial, state)
    )
    assert same_bits(first, second)


def test_weights_are_zeroed_where_they_are() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(6))
    block = weight.clone()
    assert start(n_m("2:4"), "F32", weight.shape).apply(block).data_ptr() == block.data_ptr()
    assert int((block == 0).sum()) == 16


@pytest.mark.parametrize("pattern", ["4:2", "4:4", "0:4", "2:33", "2", "2:4:8", "a:b", "02:4", "-1:4", ""])
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(MethodError, match="is no pattern N:M with 1 <= N < M <= 32, such as 2:4"):
        parse_pattern(pattern)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magnitude_n_m"}, "takes a pattern such as 2:4"),
        ({"method": "magnitude_n_m", "pattern": "2:4", "sparsity": 0.5}, "and no sparsity"),
        ({"method": "magnitude_unstructured", "pattern": "2:4"}, "takes a sparsity such as 0.5"),
        ({"method": "magnitude_unstructured", "sparsity": 1.0}, "sparsity 1.0 is not between 0 and 1"),
        (
            {"method": "magnitude", "sparsity": 0.5},
            "'magnitude' zeroes no weights; methods that do: fisher_unstructured",
        ),
    ],
)
def test_options_that_do_not_fit_the_method(options: dict[str, Any], words: str) -> None:
    for ask in (
        lambda: reason_against(options, "F32", (4, 4)),
        lambda: measuring_passes(options, "F32"),
        lambda: zeroed(options, (4, 4)),
        lambda: start(options, "F32", (4, 4)),
    ):
        with pytest.raises(MethodError, match=words):
            ask()


def test_the_table_names_methods_by_their_names() -> None:
    assert all(
        name == method.name and method.paper and method.summary for name, method in SPARSIFIERS.items()
    )
    assert all(is_sparsifier(name) for name in SPARSIFIERS)
    assert not is_sparsifier("gradient_stability")


def test_plans_need_no_torch() -> None:
    code = (
        "import sys\nfrom fleetpress.compression.sparsity import *\n"
        "options = {'method': 'magnitude_n_m', 'pattern': '2:4'}\n"
        "assert reason_against(options, 'BF16', (4, 8)) is None and zeroed(options, (4, 8)) == 16\n"
        "assert measuring_passes(options, 'BF16') == 0\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "False", result.stderr
