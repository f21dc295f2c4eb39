"""Narrower ranges: never a larger squared error than the full range, and the best one of those that are tried."""

import pytest
import torch
from torch.nn import functional

from fleetpress.compression.quantization import QUANTIZERS, affine, range_search
from fleetpress.compression.scheme import QuantScheme, resolve

SCHEMES = {
    "groups": resolve(scheme="W4A16", group_size=32),
    "ragged_groups": resolve(num_bits=3, group_size=48),
    "asymmetric": resolve(scheme="W4A16_ASYM"),
    "channels": resolve(num_bits=4, strategy="channel"),
    "tensor": resolve(num_bits=4, strategy="tensor"),
}


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights with a few large ones, as trained nets have them."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(24, 130, generator=generator)
    weights[::5, ::17] *= 4
    weights[3] = 0
    return weights.to(dtype)


def squared_error(method: str, weights: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    found = QUANTIZERS[method].quantize(weights, scheme)
    return (found.dequantize().double() - weights.double()).square().sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_error_is_smaller_and_in_no_row_larger(scheme: QuantScheme, dtype: torch.dtype) -> None:
    weights = rows(dtype)
    plain, fitted = (squared_error(name, weights, scheme) for name in ("round_to_nearest", "smallest_error"))
    assert fitted.sum() < 0.97 * plain.sum()
    if scheme.strategy != "tensor":
        assert bool((fitted <= plain * (1 + 1e-6)).all())


def test_one_group_gets_the_best_share_of_its_range() -> None:
    scheme = resolve(num_bits=4, strategy="channel")
    weights = rows()[:1]
    full = QUANTIZERS["round_to_nearest"].quantize(weights, scheme).scale
    errors = {}
    for share in [step / 100 for step in range(100, 48, -2)]:
        codes = (weights / (full * share)).round().clamp(-8, 7)
        errors[share] = float((codes * full * share - weights).square().sum())
    best = min(errors, key=lambda share: errors[share])
    found = QUANTIZERS["smallest_error"].quantize(weights, scheme)
    assert best < 1
    assert float(found.scale / full) == pytest.approx(best, rel=1e-6)


def by_the_definition(weights: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """The scales that a search over whole tensors finds."""
    full, zero_point = affine.quantization_parameters(weights, scheme)
    rows, columns = weights.shape
    best, least = full, torch.tensor(float("inf"))
    for share in [step / 100 for step in range(100, 48, -2)]:
        scale = full if share == 1 else torch.where(full * share == 0, full, full * share)
        codes = affine.quantize(weights, scale, zero_point, scheme)
        noise = affine.dequantize(codes, scale, zero_point, scheme) - weights
        squares = noise.to(torch.promote_types(noise.dtype, torch.float32)).square()
        group = min(scheme.group_size or columns, columns)
        error = functional.pad(squares, (0, -columns % group)).view(rows, -1, group).sum(-1)
        error = error.sum().view(1, 1) if scheme.strategy == "tensor" else error
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_tiles_do_not_change_the_result(
    scheme: QuantScheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.cat([rows(dtype), rows(dtype)[:1] * 1e-3])  # a last tile of one row
    expected = by_the_definition(weights, scheme)
    assert torch.equal(QUANTIZERS["smallest_error"].quantize(weights, scheme).scale, expected)
    monkeypatch.setattr(range_search, "_TILE_ELEMENTS", 4 * 130)
    again = QUANTIZERS["smallest_error"].quantize(weights, scheme)
    assert torch.equal(again.scale, expected)
    assert torch.equal(again.codes, affine.quantize(weights, expected, again.zero_point, scheme))


def test_rows_may_come_in_blocks() -> None:
    weights = rows(torch.bfloat16)
    whole, _ = range_search.best_scales(weights, SCHEMES["groups"])
    blocks = [range_search.best_scales(block, SCHEMES["groups"])[0] for block in weights.split(5)]
    assert torch.equal(torch.cat(blocks), whole)


def test_weights_stay_as_they_are() -> None:
    weights = rows()
    QUANTIZERS["smallest_error"].quantize(weights, SCHEMES["groups"])
    assert torch.equal(weights, rows())
