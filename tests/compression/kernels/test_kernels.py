"""The compiled kernel gives the bits of the torch code, on every processor, and says no where it must."""

import ctypes
import os
import platform
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fleetpress.compression import kernels
from fleetpress.compression.errors import MethodError, QuantizationError
from fleetpress.compression.quantization.compressed_tensors import stored_rows
from fleetpress.compression.quantization.round_to_nearest import round_to_nearest
from fleetpress.compression.scheme import SCHEMES, QuantScheme

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
INTEGERS = {"BF16": torch.int16, "F16": torch.int16, "F32": torch.int32}
LARGEST_BITS = {"BF16": 0x7E7F, "F16": 0x73FF, "F32": 0x7E7FFFFF}
EXTREME_BITS = {  # of weights: the smallest, the largest without a leading one, the first with one, the largest allowed
    "BF16": (0x0001, 0x007F, 0x0080, 0x7E7F),
    "F16": (0x0001, 0x03FF, 0x0400, 0x73FF),
    "F32": (0x00000001, 0x007FFFFF, 0x00800000, 0x7E7FFFFF),
}
KINDS = ("normal", "any bits", "tiny", "grid", "constant", "extremes")


def as_bytes(tensor: Tensor) -> np.ndarray:
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().reshape(-1)


def make_rows(kind: str, dtype: str, rows: int, columns: int, seed: int) -> Tensor:
    """Weights that are hard to quantize in one way; some rows have one sign, some are zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, columns)
    random = torch.randn(shape, generator=generator, dtype=torch.float64)
    signs = torch.where(random < 0, -1, 1)
    match kind:
        case "any bits":
            bits = torch.randint(0, LARGEST_BITS[dtype] + 1, shape, generator=generator)
            weight = bits.to(INTEGERS[dtype]).view(DTYPES[dtype]) * signs
        case "tiny":
            bits = torch.randint(0, EXTREME_BITS[dtype][2] * 2, shape, generator=generator)
            weight = bits.to(INTEGERS[dtype]).view(DTYPES[dtype]) * signs
        case "extremes":
            choices = torch.tensor(EXTREME_BITS[dtype], dtype=INTEGERS[dtype])
            weight = choices[torch.randint(0, 4, shape, generator=generator)].view(DTYPES[dtype]) * signs
        case "grid":  # halves of whole numbers: ties, if the scale comes out whole
            weight = torch.randint(-255, 256, shape, generator=generator) / 2
        case "constant":
            weight = random[:, :1].expand(shape)
        case _:
            weight = random * 10.0 ** torch.randint(-4, 3, (rows, 1), generator=generator)
    weight = weight.to(DTYPES[dtype]).clone()
    which = torch.randint(0, 6, (rows,), generator=generator)
    weight[which == 0] = weight[which == 0].abs()
    weight[which == 1] = -weight[which == 1].abs()
    weight[which == 2] = torch.where(random < 0, -0.0, 0.0).to(weight.dtype)[which == 2]
    return weight


def by_kernel(
    weight: Tensor, dtype: str, scheme: QuantScheme, layout: str = "pack-quantized"
) -> kernels.QuantizedRows:
    return kernels.quantize_rows(as_bytes(weight), dtype, tuple(weight.shape), scheme, layout=layout)


def check_equal(weight: Tensor, dtype: str, scheme: QuantScheme, layout: str = "pack-quantized") -> None:
    quantized = round_to_nearest(weight, scheme)
    packed, scale, zero_point = stored_rows(quantized, layout)
    found = by_kernel(weight, dtype, scheme, layout)
    np.testing.assert_array_equal(found.scale, as_bytes(scale))
    np.testing.assert_array_equal(found.packed, as_bytes(packed))
    assert (found.zero_point is None) == (zero_point is None)
    if zero_point is not None:
        np.testing.assert_array_equal(found.zero_point, as_bytes(zero_point))
    original = weight.double()
    assert found.signal == pytest.approx(float(original.square().sum()), rel=1e-12)
    noise = (quantized.dequantize().double() - original).square().sum()
    assert found.noise == pytest.approx(float(noise), rel=1e-7)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, str, QuantScheme, str]:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    strategy = draw(st.sampled_from(["channel", "group"]))
    size = (
        draw(st.one_of(st.integers(1, 70), st.sampled_from([32, 64, 96, 128, 160])))
        if strategy == "group"
        else None
    )
    columns = size * draw(st.integers(1, 6)) if size else draw(st.integers(1, 300))
    scheme = QuantScheme(
        num_bits=draw(st.integers(2, 8)), symmetric=draw(st.booleans()), strategy=strategy, group_size=size
    )
    kind, rows, seed = draw(st.sampled_from(KINDS)), draw(st.integers(1, 40)), draw(st.integers(0, 2**30))
    layout = draw(st.sampled_from(["pack-quantized", "int-quantized"]))
    return make_rows(kind, dtype, rows, columns, seed), dtype, scheme, layout


def test_the_library_was_built() -> None:
    """Never skipped: without the library everything below would pass by the fallback, and the speed be lost unseen."""
    assert kernels.available(), "install with a C compiler at hand: pip install -e ."


@settings(deadline=None, max_examples=400)
@given(cases())
@example((torch.full((1, 1), -0.0), "F32", QuantScheme(num_bits=2, symmetric=False), "pack-quantized"))
def test_bits_equal_the_torch_code(case: tuple[Tensor, str, QuantScheme, str]) -> None:
    check_equal(*case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_longer_than_every_buffer(dtype: str, num_bits: int, symmetric: bool) -> None:
    """Groups as long as a row, and groups that lie across the ends of the kernel's buffers."""
    scheme = QuantScheme(num_bits=num_bits, symmetric=symmetric)
    check_equal(make_rows("normal", dtype, 3, 12_301, num_bits), dtype, scheme)
    for size in (3, 9, 1367, 4101):
        grouped = replace(scheme, strategy="group", group_size=size)
        check_equal(make_rows("normal", dtype, 3, 12_303, num_bits), dtype, grouped)
        check_equal(make_rows("normal", dtype, 3, 12_303, num_bits), dtype, grouped, "int-quantized")


def test_ties_go_to_the_even_code() -> None:
    weight = torch.tensor([[7.5, -7.5, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    scheme = QuantScheme(num_bits=4)
    found = by_kernel(weight, "F32", scheme)
    assert found.scale.view(np.float32).tolist() == [1.0]
    codes = [(int(found.packed.view(np.uint32)[0]) >> 4 * place & 15) - 8 for place in range(8)]
    assert codes == [7, -8, 0, 2, 2, 0, -2, -2]
    check_equal(weight, "F32", scheme)


@pytest.mark.parametrize(
    ("num_bits", "layout"), [(3, "pack-quantized"), (4, "pack-quantized"), (8, "int-quantized")]
)
def test_blocks_of_rows_join_up(num_bits: int, layout: str) -> None:
    scheme = QuantScheme(num_bits=num_bits, symmetric=False, strategy="group", group_size=48)
    weight = make_rows("normal", "BF16", 77, 96, 5)
    whole = by_kernel(weight, "BF16", scheme, layout)
    parts = [by_kernel(weight[at : at + 32], "BF16", scheme, layout) for at in range(0, 77, 32)]
    for name in ("packed", "scale", "zero_point"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, name))
    assert sum(part.signal for part in parts) == pytest.approx(whole.signal, rel=1e-12)
    assert sum(part.noise for part in parts) == pytest.approx(whole.noise, rel=1e-12)


# ---- buffers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_buffers_may_lie_at_odd_addresses_and_are_filled_to_their_ends(
    dtype: str, layout: str, num_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = QuantScheme(num_bits=num_bits, symmetric=False, strategy="group", group_size=35)
    weight = make_rows("normal", dtype, 33, 105, 1)
    expected = by_kernel(weight, dtype, scheme, layout)
    data = as_bytes(weight)
    shifted = np.zeros(data.size + 1, np.uint8)
    shifted[1:] = data
    fresh, guarded = np.empty, []

    def odd(size: int, kind: type) -> np.ndarray:
        if kind is not np.uint8:
            return fresh(size, kind)
        guarded.append(np.full(size + 2, 0xEE, np.uint8))
        return guarded[-1][1:-1]

    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", odd)
        found = kernels.quantize_rows(memoryview(shifted)[1:], dtype, (33, 105), scheme, layout=layout)
    for name in ("packed", "scale", "zero_point"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert len(guarded) == 3
    assert all(one[0] == one[-1] == 0xEE for one in guarded), "written beyond the buffer"


def test_rows_of_a_wrong_size_are_refused() -> None:
    with pytest.raises(QuantizationError, match="rows have 512 bytes where the shape needs 768"):
        kernels.quantize_rows(bytes(512), "BF16", (3, 128), SCHEMES["W4A16"])


# ---- bad weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "value", [float("nan"), -float("nan"), float("inf"), -float("inf"), "large", "-large"]
)
def test_bad_weights_are_refused_in_the_words_of_the_torch_code(
    dtype: str, symmetric: bool, value: float | str
) -> None:
    scheme = QuantScheme(num_bits=4, symmetric=symmetric, strategy="group", group_size=50)
    if isinstance(value, str):
        above = torch.tensor(LARGEST_BITS[dtype] + 1, dtype=INTEGERS[dtype]).view(DTYPES[dtype])
        value = float(-above if value[0] == "-" else above)
    for places in ([(0, 0)], [(2, 99)], [(1, 50), (1, 51)], [(0, 33)]):
        weight = make_rows("normal", dtype, 3, 100, 1)
        for place in places:
            weight[place] = value
        with pytest.raises(QuantizationError) as expected:
            round_to_nearest(weight, scheme)
        with pytest.raises(QuantizationError) as found:
            by_kernel(weight, dtype, scheme)
        assert str(found.value) == str(expected.value)


# ---- what there is a kernel for


def test_supports() -> None:
    w4, shape = SCHEMES["W4A16"], (8, 256)
    for dtype in DTYPES:
        assert kernels.supports(dtype, w4, shape)
    assert kernels.supports("BF16", QuantScheme(num_bits=8), (1, 1))
    assert not kernels.supports("F64", w4, shape)
    assert not kernels.supports("F8_E4M3", w4, shape)
    assert not kernels.supports("BF16", w4, (8, 200)), "a shorter last group"
    assert not kernels.supports("BF16", w4, (8, 64)), "a row shorter than a group"
    assert not kernels.supports("BF16", w4, (2, 4, 128))
    assert not kernels.supports("BF16", w4, (0, 128))
    assert not kernels.supports("BF16", QuantScheme(num_bits=8, strategy="tensor"), shape)
    assert not kernels.supports("BF16", QuantScheme(num_bits=8, type="float"), shape)
    with pytest.raises(MethodError, match="use the torch code"):
        kernels.quantize_rows(bytes(8 * 200 * 2), "BF16", (8, 200), w4)
    with pytest.raises(MethodError, match="use the torch code"):
        kernels.quantize_rows(bytes(8), "BF16", (1, 4), QuantScheme(num_bits=8, strategy="tensor"))
    with pytest.raises(MethodError, match="layout is 'dense'; the kernel writes pack-quantized and int-"):
        kernels.quantize_rows(bytes(256), "BF16", (1, 128), w4, layout="dense")


def test_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETPRESS_NO_KERNELS", "1")
    assert not kernels.available()
    assert not kernels.supports("BF16", SCHEMES["W4A16"], (1, 128))
    with pytest.raises(RuntimeError, match="the compiled kernel is missing"):
        kernels.quantize_rows(bytes(256), "BF16", (1, 128), SCHEMES["W4A16"])
    monkeypatch.setenv("FLEETPRESS_NO_KERNELS", "0")
    assert kernels.available()


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_VERSION", 0)
    with pytest.raises(ImportError, match=r"version 2, wanted is 0; install fleetpress again"):
        kernels._library.__wrapped__()


def test_a_library_for_another_system_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    assert kernels._library.__wrapped__() is None
    (tmp_path / "_quantize.abi3.so").write_bytes(b"\x7fELF of elsewhere")
    assert kernels._library.__wrapped__() is None


TORCH_FREE = """
import sys
from fleetpress.compression import kernels
from fleetpress.compression.scheme import SCHEMES
kernels.quantize_rows(bytes(256), "BF16", (1, 128), SCHEMES["W4A16"])
assert "torch" not in sys.modules
"""


def test_torch_is_not_imported(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", TORCH_FREE], cwd=tmp_path, check=True)


# ---- one source, the same bits on every processor


def processors() -> list[str]:
    """Flags for versions of the library that this processor can run; the installed one chooses among them by itself."""
    flags = [""]
    cpu = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and cpu.exists() and "avx2" in cpu.read_text():
        flags.append("-march=x86-64-v3")
    return flags


@pytest.mark.parametrize("flag", processors())
def test_every_processor_gives_the_same_bits(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, built = Path(__file__).parents[3] / "compression/kernels/quantize.c", tmp_path / "one.so"
    compiler = [*(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split(), "-DONE_VERSION"]
    options = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-shared", "-fPIC"]
    strict = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run([*compiler, *options, *strict, *flag.split(), source, "-o", built], check=True)
    other = ctypes.CDLL(str(built))
    for dtype in DTYPES:
        for num_bits in (2, 3, 4, 5, 8):
            for size in (7, 32, 64, 128, None):
                scheme = QuantScheme(
                    num_bits=num_bits,
                    symmetric=num_bits % 2 == 0,
                    strategy="group" if size else "channel",
                    group_size=size,
                )
                for kind in KINDS:
                    weight = make_rows(kind, dtype, 9, 896, num_bits)
                    expected = by_kernel(weight, dtype, scheme)
                    with monkeypatch.context() as patch:
                        patch.setattr(kernels, "_library", lambda: other)
                        found = by_kernel(weight, dtype, scheme)
                    assert found.packed.tobytes() == expected.packed.tobytes()
                    assert found.scale.tobytes() == expected.scale.tobytes()
                    assert scheme.symmetric or np.array_equal(found.zero_point, expected.zero_point)
                    assert (found.signal, found.noise) == (expected.signal, expected.noise)
