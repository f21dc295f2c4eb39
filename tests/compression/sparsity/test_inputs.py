"""Wanda and SparseGPT against what their papers say, done the slow and plain way."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fleetpress.compression import calibration
from fleetpress.compression.calibration import InputStatistics
from fleetpress.compression.errors import MethodError
from fleetpress.compression.layers import layers
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors
from fleetpress.compression.sparsity import reason_against, sparsegpt, wanda
from fleetpress.compression.sparsity.zero_layers import zero_layers


def statistics(x: Tensor, size: int | None = None) -> InputStatistics:
    """Those of input rows x [rows, columns], with products within blocks of `size` columns."""
    columns = x.shape[1]
    size = size or columns
    gram = torch.stack([part.T @ part for part in x.double().split(size, 1)])
    return InputStatistics(
        rows=x.shape[0],
        total=x.double().sum(0, keepdim=True),
        squares=x.double().square().sum(0, keepdim=True),
        gram=gram.float().unsqueeze(0),
        range=torch.stack([x.min(), x.max()]),
    )


def case(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and inputs whose columns depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(rows + columns)
    mix = torch.randn(columns, columns, generator=generator)
    x = torch.randn(4 * columns, columns, generator=generator) @ (mix / columns**0.5 + torch.eye(columns))
    x *= torch.rand(columns, generator=generator) * 3 + 0.1
    return torch.randn(rows, columns, generator=generator), x


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` lowest of all."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.sort(scores.flatten(), stable=True).indices[:count]] = True
    return mask.view(scores.shape)


def obs(weight: Tensor, x: Tensor, options: dict[str, Any]) -> Tensor:
    """SparseGPT (section 3.2 and algorithm 1 of the paper), every inverse anew from the columns that are left."""
    work, gram = weight.double().clone(), (x.double().T @ x.double()).float().double()
    rows, columns = work.shape
    gram += 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    going = torch.zeros(work.shape, dtype=torch.bool)
    inverses = [torch.linalg.inv(gram[j:, j:]) for j in range(columns)]
    costs = torch.stack([inverse[0, 0] for inverse in inverses])
    for j in range(columns):
        if "pattern" in options:
            kept, group = (int(part) for part in options["pattern"].split(":"))
            if j % group == 0:
                at = slice(j, j + group)
                for row in range(rows):
                    going[row, at] = lowest(work[row, at] ** 2 / costs[at], group - kept)
        elif j % 128 == 0:
            at = slice(j, min(j + 128, columns))
            count = int(options["sparsity"] * rows * min(j + 128, columns)) - int(
                options["sparsity"] * rows * j
            )
            going[:, at] = lowest(work[:, at] ** 2 / costs[at], count)
        for row in range(rows):
            if going[row, j]:
                work[row, j:] -= work[row, j] / inverses[j][0, 0] * inverses[j][0]
                work[row, j] = 0
    return work.masked_fill(going, 0).to(weight.dtype)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"sparsity": 0.5}, (5, 150)),  # the second block of columns is a short one
        ({"sparsity": 0.9}, (7, 40)),
        ({"pattern": "2:4"}, (5, 152)),
        ({"pattern": "1:3"}, (3, 150)),  # 128 is no multiple of 3
    ],
    ids=str,
)
def test_sparsegpt_is_the_papers(options: dict[str, Any], shape: tuple[int, int]) -> None:
    weight, x = case(*shape)
    found = sparsegpt.zero_rows(weight, options, statistics(x))
    expected = obs(weight, x, options)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"sparsity": 0.37}, {"pattern": "2:4"}, {"pattern": "1:8"}], ids=str)
def test_wanda_is_the_papers(options: dict[str, Any]) -> None:
    weight, x = case(6, 40)
    metric = weight.abs() * x.norm(p=2, dim=0)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    if "pattern" in options:
        kept, group = (int(part) for part in options["pattern"].split(":"))
        for start in range(0, 40, group):
            worst = torch.topk(metric[:, start : start + group], group - kept, dim=1, largest=False).indices
            mask.scatter_(1, start + worst, True)
    else:
        mask.scatter_(1, metric.sort(dim=1, stable=True).indices[:, : int(0.37 * 40)], True)
    assert torch.equal(wanda.zero_rows(weight, options, statistics(x)), weight.masked_fill(mask, 0))


def test_outputs_change_less_the_more_a_method_looks_at() -> None:
    torch.manual_seed(0)
    net, (_, x) = nn.Linear(64, 32), case(32, 64)
    program = torch.export.export(net, (x,))
    observed = calibrate(program, {"inputs": x}, 256).weights
    errors = []
    for method in ("magnitude_unstructured", "wanda", "sparsegpt"):
        made = zero_layers(layers(program), tensors(program), {"method": method, "sparsity": 0.6}, observed)
        change = made.weights["weight"].values - net.weight.detach()
        errors.append(float((x @ change.T).square().mean()))
    assert errors[0] > 1.1 * errors[1] > 1.1 * 1.1 * errors[2]


@pytest.mark.parametrize("method", [wanda, sparsegpt])
def test_inputs_that_are_always_zero_go_first(method: Any) -> None:
    weight, x = case(4, 20)
    x[:, ::5] = 0
    found = method.zero_rows(weight, {"sparsity": 0.4}, statistics(x))
    assert (found[:, ::5] == 0).all()
    assert int((found == 0).sum()) == 32


def test_very_long_rows_are_worked_on_in_blocks() -> None:
    assert (sparsegpt._WHOLE_COLUMNS, sparsegpt._PRODUCTS_COLUMNS) == (
        calibration.NARROW_COLUMNS,
        calibration.LEAST_BLOCK_COLUMNS,
    )
    weight, x = case(3, 60)
    found = sparsegpt.zero_rows(weight, {"sparsity": 0.5}, statistics(x, 20))
    for start in range(0, 60, 20):
        at = slice(start, start + 20)
        part = sparsegpt.zero_rows(weight[:, at], {"sparsity": 0.5}, statistics(x[:, at]))
        assert torch.equal(found[:, at], part)
    assert int((found == 0).sum()) == 90
    options = {"method": "sparsegpt", "pattern": "2:3"}
    assert reason_against(options, "F32", (8, 3072)) is None
    assert "blocks of 512, which groups of 3 do not divide" in str(reason_against(options, "F32", (8, 6144)))


def test_inputs_that_determine_nothing_are_damped_until_they_do() -> None:
    weight, x = case(4, 12)
    found = sparsegpt.zero_rows(weight, {"sparsity": 0.5}, statistics(x[:1] * 1e4))
    assert found.isfinite().all()
    assert int((found == 0).sum()) == 24


def test_products_that_are_no_numbers_say_what_helps() -> None:
    weight, x = case(3, 8)
    x[0, 0] = float("nan")
    with pytest.raises(MethodError, match="the products of the layer's inputs are no numbers"):
        sparsegpt.zero_rows(weight, {"sparsity": 0.5}, statistics(x))
