"""Tensors converted tile by tile are the tensors converted whole, with the compiled kernel and without it."""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fleetpress.compression.checkpoint import convert
from fleetpress.compression.checkpoint.convert import converter, geometry, needs_torch
from fleetpress.compression.checkpoint.tiles import tiles
from fleetpress.compression.errors import NotFiniteError, QuantizationError
from fleetpress.compression.quantization import QUANTIZERS, quantize_weight
from fleetpress.compression.quantization.compressed_tensors import stored_rows
from fleetpress.compression.quantization.weight import QuantizedWeight
from fleetpress.compression.scheme import SCHEMES, QuantScheme, resolve
from fleetpress.compression.sparsity import measuring_passes, start
from fleetpress.compression.treatment import (
    FLOAT,
    INT,
    KEPT,
    PACK,
    SCALE,
    SHAPE,
    ZERO_POINT,
    Treatment,
    fitted,
    stored,
)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
N_M = (("method", "magnitude_n_m"), ("pattern", "2:4"))
UNSTRUCTURED = (("method", "magnitude_unstructured"), ("sparsity", 0.4))
ALL_ON_TORCH = {"FLEETPRESS_NO_KERNELS": "1"}
Made = tuple[dict[str, bytes], float, float]  # stored tensors by name, signal, noise


def raw(value: Tensor) -> bytes:
    return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def in_tiles(weight: Tensor, treatment: Treatment, block_tiles: int = 1, *, check: bool = True) -> Made:
    """What is stored for the weight, read in blocks of so many tiles."""
    dtype, shape, data = NAMES[weight.dtype], tuple(weight.shape), bytearray(raw(weight))
    cut = geometry(dtype, shape, len(data), treatment)
    block_bytes = block_tiles * cut.tile_rows * cut.row_bytes
    blocks = [memoryview(data)[at : at + block_bytes] for at in range(0, len(data), block_bytes)]
    working = converter("a.weight", dtype, shape, treatment, check=check)
    for _ in range(cut.passes):
        for block in blocks:
            for tile in tiles(block, cut):
                working.measure(tile)
        working.end_pass()
    parts = stored("a.weight", dtype, shape, treatment)
    found, signal, noise = [b""] * len(parts), 0.0, 0.0
    for block in blocks:
        for tile in tiles(block, cut):
            made = working.convert(tile)
            signal, noise = signal + made.signal, noise + made.noise
            found = [before + bytes(part) for before, part in zip(found, made.parts, strict=True)]
    found = [before + end for before, end in zip(found, working.tail(), strict=True)]
    assert bytes(data) == raw(weight), "the source is left as it is"
    return {part.name: data for part, data in zip(parts, found, strict=True)}, signal, noise


def whole(weight: Tensor, treatment: Treatment) -> Made:
    """The same by the functions for whole tensors."""
    values = weight.clone()
    if treatment.sparsity:
        options, dtype = dict(treatment.sparsity), NAMES[weight.dtype]
        zeroing = start(options, dtype, weight.shape)
        for _ in range(measuring_passes(options, dtype)):
            zeroing.measure(values)
            zeroing.end_pass()
        values = zeroing.apply(values)
    scheme = treatment.scheme
    if scheme is None:
        back = values.to(DTYPES[treatment.cast or NAMES[weight.dtype]])
        return {"a.weight": raw(back)}, *squares(weight, back)
    quantized = quantized_whole(values, scheme, treatment.method)
    codes, scale, zero_point = stored_rows(quantized, treatment.layout)
    sides = {SCALE: scale, ZERO_POINT: zero_point, SHAPE: torch.tensor(weight.shape)}
    first, *others = stored("a.weight", NAMES[weight.dtype], tuple(weight.shape), treatment)
    made = {part.name: sides[part.name.removeprefix("a.weight")] for part in others}
    return {first.name: raw(codes)} | {name: raw(part) for name, part in made.items()}, *squares(
        weight, quantized.dequantize()
    )


def quantized_whole(values: Tensor, scheme: QuantScheme, method: str) -> QuantizedWeight:
    if scheme.type == "float":
        return QUANTIZERS[method].quantize(values, scheme)
    return quantize_weight("a.weight", values, 0, scheme, QUANTIZERS[method])


def squares(weight: Tensor, back: Tensor) -> tuple[float, float]:
    """Of the weights and of their errors, which are differences in float32 at least."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return float(exact.double().square().sum()), float((exact - back.to(exact.dtype)).double().square().sum())


def assert_same(found: Made, expected: Made) -> None:
    assert found[0] == expected[0]
    assert found[1:] == pytest.approx(expected[1:], rel=1e-9, abs=0)


@st.composite
def weights(draw: st.DrawFn, dtypes: Sequence[str] = tuple(DTYPES), most_columns: int = 18) -> Tensor:
    """Matrices of rows of very different sizes, some of one sign, some zero, with many equal entries."""
    rows, columns = draw(st.integers(1, 150)), 4 * draw(st.integers(1, most_columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    values *= 10.0 ** torch.randint(-3, 2, (rows, 1), generator=generator)
    kind = torch.randint(0, 8, (rows,), generator=generator)
    values[kind == 0] = values[kind == 0].abs()
    values[kind == 1] = 0
    values[kind == 2] = (values[kind == 2] * 2).round() / 2
    return values.to(DTYPES[draw(st.sampled_from(dtypes))])


KINDS = [{"group_size": 16}, {"strategy": "channel"}, {"strategy": "tensor"}]


@st.composite
def integer_treatments(draw: st.DrawFn) -> Treatment:
    """Every way to integer codes; groups are fitted to the row later."""
    layout = draw(st.sampled_from([PACK, PACK, INT]))
    scheme = resolve(
        num_bits=draw(st.integers(2, 8)), symmetric=draw(st.booleans()), **draw(st.sampled_from(KINDS))
    )
    method = draw(st.sampled_from(["round_to_nearest", "round_to_nearest", "smallest_error"]))
    return Treatment(
        sparsity=draw(st.sampled_from([(), (), N_M, UNSTRUCTURED])),
        scheme=scheme,
        layout=layout,
        method=method,
    )


@st.composite
def other_treatments(draw: st.DrawFn) -> Treatment:
    """8-bit floats, casts, and zeroes alone."""
    sparsity = draw(st.sampled_from([(), N_M, UNSTRUCTURED]))
    if draw(st.booleans()):
        scheme = resolve("FP8", strategy=draw(st.sampled_from(["channel", "tensor"])))
        return Treatment(sparsity=sparsity, scheme=scheme, layout=FLOAT)
    return Treatment(sparsity=sparsity, cast=draw(st.sampled_from([None, "BF16", "F16"])))


def fit(treatment: Treatment, weight: Tensor) -> Treatment:
    if treatment.scheme is None:
        return treatment
    scheme = fitted(treatment.scheme, weight.shape[1])
    return Treatment.from_dict({**treatment.as_dict(), "scheme": vars(scheme)})


def check_all(weight: Tensor, treatment: Treatment, elements: int, block_tiles: int) -> None:
    expected = whole(weight, treatment)
    if (
        treatment.sparsity == ()
        and treatment.scheme is None
        and treatment.cast in (None, NAMES[weight.dtype])
    ):
        expected = expected[0], 0.0, 0.0  # what is only copied is not measured
    with patch.object(convert, "TILE_ELEMENTS", elements):
        found = in_tiles(weight, treatment, block_tiles)
        assert_same(found, expected)
        assert in_tiles(weight, treatment, 1 << 20) == found, "blocks do not change a bit"
        with patch.dict(os.environ, ALL_ON_TORCH):
            assert_same(in_tiles(weight, treatment, block_tiles), expected)


ELEMENTS = st.sampled_from([8, 1504, 1 << 19])  # whole entries of every dtype
BLOCKS = st.integers(1, 4)


@settings(max_examples=200, deadline=None)
@given(weights(), integer_treatments(), ELEMENTS, BLOCKS)
def test_integers(weight: Tensor, treatment: Treatment, elements: int, block_tiles: int) -> None:
    check_all(weight, fit(treatment, weight), elements, block_tiles)


@settings(max_examples=150, deadline=None)
@given(weights(), other_treatments(), ELEMENTS, BLOCKS)
def test_floats_casts_and_zeroes(
    weight: Tensor, treatment: Treatment, elements: int, block_tiles: int
) -> None:
    check_all(weight, treatment, elements, block_tiles)


def test_the_range_of_a_tensor_is_that_of_what_is_not_zeroed() -> None:
    weight = torch.rand(70, 8, generator=torch.Generator().manual_seed(3)) + 1
    weight[:, ::4] = -0.5
    treatment = Treatment(sparsity=N_M, scheme=resolve(symmetric=False, strategy="tensor"), layout=PACK)
    check_all(weight, treatment, 8, 1)
    assert in_tiles(weight, treatment)[0]["a.weight_zero_point"] == bytes([0x80]), (
        "no negative weight is left"
    )


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A16", "W8A16_ASYM", "W3A16_ASYM"])
def test_presets_in_tiles_of_their_real_size(name: str, dtype: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(300, 4096, generator=generator) * 0.02).to(DTYPES[dtype])
    treatment = Treatment(scheme=SCHEMES[name], layout=PACK)
    assert geometry(dtype, weight.shape, weight.nbytes, treatment).tile_rows == 128
    found, on_torch = in_tiles(weight, treatment), whole(weight, treatment)
    assert_same(found, on_torch)
    with patch.dict(os.environ, ALL_ON_TORCH):
        assert_same(in_tiles(weight, treatment), on_torch)


@pytest.mark.parametrize("shape", [(), (1,), (7, 3, 2), (0, 4)])
@pytest.mark.parametrize("cast", ["BF16", "F16", None])
def test_tensors_of_any_shape_are_cast_and_copied(shape: tuple[int, ...], cast: str | None) -> None:
    values = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) / 3
    with patch.object(convert, "TILE_ELEMENTS", 8):
        found, _, _ = in_tiles(values, Treatment(cast=cast))
    assert found == {"a.weight": raw(values.to(DTYPES[cast or "F32"]))}


def test_bytes_of_every_dtype_are_copied() -> None:
    for dtype, shape, size in (
        ("F8_E4M3", (3, 5), 15),
        ("F4", (3, 6), 9),
        ("BOOL", (), 1),
        ("I64", (2,), 16),
    ):
        data = memoryview(bytes(range(size)))
        cut = geometry(dtype, shape, size, KEPT)
        assert (cut.rows * cut.row_bytes, cut.passes, cut.whole) == (size, 0, False)
        working = converter("a", dtype, shape, KEPT, check=True)
        made = [working.convert(tile) for tile in tiles(data, cut)]
        assert [bytes(part) for tile in made for part in tile.parts] == [bytes(data)]
        assert working.tail() == (b"",)


# ---- values that cannot be converted

BAD = pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
TREATED = {
    "copy": KEPT,
    "kernel": Treatment(scheme=SCHEMES["W4A16"], layout=PACK),
    "smallest error": Treatment(scheme=SCHEMES["W4A16_ASYM"], layout=PACK, method="smallest_error"),
    "tensor": Treatment(scheme=resolve(strategy="tensor"), layout=INT),
    "tensor, zeroed": Treatment(sparsity=UNSTRUCTURED, scheme=resolve(strategy="tensor"), layout=PACK),
    "FP8": Treatment(scheme=SCHEMES["FP8"], layout=FLOAT),
    "FP8 tensor": Treatment(scheme=resolve("FP8", strategy="tensor"), layout=FLOAT),
    "cast": Treatment(cast="F16"),
    "zeroed": Treatment(sparsity=N_M),
    "zeroed by share": Treatment(sparsity=UNSTRUCTURED),
}


@BAD
@pytest.mark.parametrize("treatment", TREATED.values(), ids=list(TREATED))
@pytest.mark.parametrize("environment", [{}, ALL_ON_TORCH], ids=["kernel", "torch"])
def test_what_is_not_finite_is_named(treatment: Treatment, value: float, environment: dict[str, str]) -> None:
    weight = torch.randn(70, 128, generator=torch.Generator().manual_seed(2))
    weight[66, 5] = value
    words = "NaN" if math.isnan(value) else "infinite"
    with (
        patch.dict(os.environ, environment),
        patch.object(convert, "TILE_ELEMENTS", 8),
        pytest.raises(NotFiniteError, match=rf"a\.weight holds {words} values \(1 of the "),
    ):
        in_tiles(weight, treatment)


@BAD
def test_unchecked_tensors_may_hold_anything_unless_they_are_quantized(value: float) -> None:
    """Masks and the like are carried over and cast."""
    weight = torch.ones(4, 128)
    weight[1, 5] = value
    for treatment in (KEPT, Treatment(cast="BF16"), Treatment(sparsity=N_M)):
        made, _, _ = in_tiles(weight, treatment, check=False)
        assert made == whole(weight, treatment)[0]
    for name in ("kernel", "smallest error", "tensor", "FP8", "FP8 tensor"):
        for environment in ({}, ALL_ON_TORCH):
            with (
                patch.dict(os.environ, environment),
                pytest.raises((QuantizationError, NotFiniteError), match=r"a\.weight"),
            ):
                in_tiles(weight, TREATED[name], check=False)


@pytest.mark.parametrize("name", ["kernel", "smallest error", "tensor", "FP8", "FP8 tensor"])
@pytest.mark.parametrize("environment", [{}, ALL_ON_TORCH], ids=["kernel", "torch"])
def test_weights_too_large_to_compute_with_are_named(name: str, environment: dict[str, str]) -> None:
    weight = torch.ones(40, 128)
    weight[33, 3] = 3e38
    with (
        patch.dict(os.environ, environment),
        pytest.raises(
            QuantizationError, match=r"a\.weight: weights up to 3e\+38 overflow torch\.float32; add the layer"
        ),
    ):
        in_tiles(weight, TREATED[name])


def test_a_cast_that_overflows_is_an_error() -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = -70_000
    assert in_tiles(weight, Treatment(cast="BF16"))[0] == {"a.weight": raw(weight.bfloat16())}
    for sparsity in ((), N_M):
        with pytest.raises(
            QuantizationError, match=r"a\.weight: weights up to 7e\+04 overflow F16; add the layer to"
        ):
            in_tiles(weight, Treatment(sparsity=sparsity, cast="F16"))
    weight[1, 2] = 65_519  # the last one that rounds down
    assert in_tiles(weight, Treatment(cast="F16"))[0] == {"a.weight": raw(weight.half())}


# ---- how tensors are cut


@given(st.integers(1, 40_000), st.integers(1, 1 << 22), st.sampled_from(sorted(DTYPES)), integer_treatments())
def test_tiles_of_rows_end_at_whole_words(rows: int, columns: int, dtype: str, treatment: Treatment) -> None:
    size = rows * columns * DTYPES[dtype].itemsize
    cut = geometry(dtype, (rows, columns), size, treatment)
    per_tensor = treatment.scheme is not None and treatment.scheme.strategy == "tensor"
    assert cut.rows * cut.row_bytes == size
    assert cut.rows == rows
    assert cut.whole == (per_tensor and treatment.method == "smallest_error")
    zeroing = measuring_passes(dict(treatment.sparsity), dtype) if treatment.sparsity else 0
    assert cut.passes == zeroing + (per_tensor and not cut.whole)
    if cut.whole:
        assert cut.tile_rows == rows
    else:
        assert cut.tile_rows % 32 == 0
        assert cut.tile_rows == 32 or cut.tile_rows * columns <= convert.TILE_ELEMENTS


def test_what_has_no_rows_is_cut_by_entries_or_bytes() -> None:
    cut = geometry("F32", (10, 3), 120, KEPT)
    assert (cut.rows, cut.row_bytes, cut.passes, cut.whole) == (120, 1, 0, False)
    cut = geometry("F32", (10, 3), 120, Treatment(cast="BF16"))
    assert (cut.rows, cut.row_bytes, cut.passes, cut.whole) == (30, 4, 0, False)
    cut = geometry("F32", (10, 3), 120, Treatment(sparsity=UNSTRUCTURED))
    assert (cut.rows, cut.row_bytes, cut.passes, cut.whole) == (10, 12, 2, False)


# ---- what needs torch


def test_torch_is_for_what_the_kernel_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (64, 256)
    cases: list[tuple[Treatment, bool]] = [
        (KEPT, False),
        (Treatment(cast="BF16"), False),  # it is one already
        (Treatment(cast="F16"), True),
        (TREATED["kernel"], False),
        (Treatment(scheme=SCHEMES["W8A16_ASYM"], layout=INT), False),
        (TREATED["smallest error"], True),
        (TREATED["tensor"], True),
        (TREATED["FP8"], True),
        (TREATED["zeroed"], True),
        (Treatment(sparsity=N_M, scheme=SCHEMES["W4A16"], layout=PACK), True),
    ]
    assert [needs_torch("BF16", shape, treatment) for treatment, _ in cases] == [
        needed for _, needed in cases
    ]
    assert needs_torch("F64", shape, TREATED["kernel"])
    monkeypatch.setenv(*next(iter(ALL_ON_TORCH.items())))
    assert [needs_torch("BF16", shape, treatment) for treatment, _ in cases[:4]] == [False, False, True, True]


TORCH_FREE = """
import sys
from fleetpress.compression.checkpoint.convert import converter, geometry
from fleetpress.compression.scheme import SCHEMES
from fleetpress.compression.treatment import KEPT, PACK, Treatment, stored, quantization_config
for treatment in (KEPT, Treatment(scheme=SCHEMES["W4A16"], layout=PACK)):
    cut = geometry("BF16", (64, 256), 64 * 256 * 2, treatment)
    stored("a.weight", "BF16", (64, 256), treatment)
    working = converter("a.weight", "BF16", (64, 256), treatment, check=True)
    print(len(working.convert(memoryview(bytes(cut.rows * cut.row_bytes))).parts), len(working.tail()))
quantization_config([(treatment, ["Linear"])], [])
print("torch" in sys.modules)
"""


def test_copies_and_the_kernel_do_not_import_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TORCH_FREE], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n")[:3] == ["1 1", "3 3", "False"], done.stderr
