import pytest
import torch

from fleetpress.compression.quantization import values
from fleetpress.compression.quantization.affine import dequantize
from fleetpress.compression.quantization.values import fresh
from fleetpress.compression.scheme import resolve


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("large_bytes", [1, 1 << 30], ids=["numpy", "torch"])
def test_fresh_memory_is_torch_s_in_all_but_its_pages(
    dtype: torch.dtype, large_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "_LARGE_BYTES", large_bytes)
    for shape in ((3, 5), (7,), (2, 0), ()):
        found = fresh(shape, dtype)
        assert (found.shape, found.dtype, found.is_contiguous()) == (shape, dtype, True)
        assert found.data_ptr() % 64 == 0
        assert found.untyped_storage().nbytes() == found.numel() * dtype.itemsize
        assert torch.equal(found.fill_(2), torch.full(shape, 2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "columns", [48, 50]
)  # whole groups, which are worked out in place, and a shorter last one
def test_weights_are_the_same_wherever_they_are_worked_out(
    columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = resolve("W4A16_ASYM", group_size=16)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (6, columns), dtype=torch.uint8, generator=generator)
    scale = torch.rand(6, 4 if columns > 48 else 3, generator=generator).to(dtype)
    zero = torch.randint(0, 16, scale.shape, dtype=torch.uint8, generator=generator)
    group = torch.arange(columns) // 16
    expected = ((codes.float() - zero[:, group].float()) * scale[:, group].float()).to(dtype)
    assert torch.equal(dequantize(codes, scale, zero, scheme), expected)
    monkeypatch.setattr(values, "_LARGE_BYTES", 1)
    assert torch.equal(dequantize(codes, scale, zero, scheme), expected)
