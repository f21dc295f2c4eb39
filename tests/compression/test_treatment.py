"""What treatments make of a tensor, told from its shape: as compressed-tensors does it, and through JSON."""

import json
import math
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import (
    FloatQuantizationCompressor,
    IntQuantizationCompressor,
    PackedQuantizationCompressor,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fleetpress.compression.errors import MethodError, QuantizationError
from fleetpress.compression.scheme import SCHEMES, QuantScheme, bits_per_weight, resolve
from fleetpress.compression.treatment import (
    DENSE,
    FLOAT,
    INT,
    KEPT,
    PACK,
    Stored,
    Treatment,
    fitted,
    matrix_shape,
    quantization_config,
    stored,
    stored_bits,
    treatment_from_config,
    words,
)

COMPRESSORS = {
    PACK: PackedQuantizationCompressor,
    INT: IntQuantizationCompressor,
    FLOAT: FloatQuantizationCompressor,
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
KINDS = {"group": {"group_size": 16}, "channel": {"strategy": "channel"}, "tensor": {"strategy": "tensor"}}
EACH_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def by_the_library(
    dtype: str, shape: tuple[int, int], treatment: Treatment
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes of what the library makes of a weight."""
    scheme = treatment.scheme
    assert scheme is not None
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    args = QuantizationArgs(
        num_bits=scheme.num_bits,
        type=scheme.type,
        symmetric=scheme.symmetric,
        strategy=scheme.strategy,
        group_size=scheme.group_size,
    )
    rows = weight.view(1, -1) if scheme.strategy == "tensor" else weight
    groups = rows.unflatten(1, (-1, scheme.group_size or rows.shape[1]))
    low, high = groups.amin(-1), groups.amax(-1)
    if scheme.strategy == "tensor":
        low, high = low.view(1), high.view(1)
    scale, zero_point = calculate_qparams(low, high, args)
    state = {"weight": weight, "weight_scale": scale}
    if not scheme.symmetric:
        state["weight_zero_point"] = zero_point
    made: dict[str, Tensor] = COMPRESSORS[treatment.layout].compress(
        state, QuantizationScheme(targets=["Linear"], weights=args)
    )
    return {f"a.{name}": (NAMES[value.dtype], tuple(value.shape)) for name, value in made.items()}


@EACH_KIND
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("layout", "num_bits"), [*((PACK, bits) for bits in range(2, 9)), (INT, 4), (INT, 8)]
)
def test_integers_are_stored_as_the_library_does(
    layout: str, num_bits: int, symmetric: bool, dtype: str, kind: dict[str, object]
) -> None:
    treatment = Treatment(scheme=resolve(num_bits=num_bits, symmetric=symmetric, **kind), layout=layout)
    shape = (35, 48)
    parts = stored("a.weight", dtype, shape, treatment)
    expected = by_the_library(dtype, shape, treatment)
    assert {part.name: (part.dtype, part.shape) for part in parts} == expected
    assert parts[0].name == ("a.weight" if layout == INT else "a.weight_packed")


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_floats_are_stored_as_the_library_does(dtype: str, strategy: str) -> None:
    treatment = Treatment(scheme=resolve("FP8", strategy=strategy), layout=FLOAT)
    parts = stored("a.weight", dtype, (35, 48), treatment)
    assert {part.name: (part.dtype, part.shape) for part in parts} == by_the_library(
        dtype, (35, 48), treatment
    )


def test_what_has_no_codes_keeps_its_shape() -> None:
    zeroed = Treatment(sparsity=(("method", "magnitude_n_m"), ("pattern", "2:4")))
    for shape in ((), (0,), (4,), (4, 3, 2)):
        kept = Stored(name="a", dtype="F32", shape=shape)
        assert stored("a", "F32", list(shape), KEPT) == stored("a", "F32", shape, zeroed) == (kept,)
        assert stored("a", "F32", shape, Treatment(cast="BF16")) == (replace(kept, dtype="BF16"),)
        assert stored("a", "F32", shape, replace(zeroed, cast="F16")) == (replace(kept, dtype="F16"),)
    assert KEPT.layout == DENSE


def test_only_what_loses_something_is_measured() -> None:
    zeroed = (("method", "magnitude_unstructured"), ("sparsity", 0.5))
    assert not KEPT.is_measured
    assert not Treatment(cast="BF16").is_measured
    assert Treatment(sparsity=zeroed).is_measured
    assert Treatment(scheme=SCHEMES["W8A16"], layout=PACK).is_measured


# ---- JSON

schemes = st.one_of(
    st.builds(QuantScheme, num_bits=st.integers(2, 8), symmetric=st.booleans()),
    st.builds(QuantScheme, num_bits=st.integers(2, 8), strategy=st.just("tensor")),
    st.builds(
        QuantScheme,
        num_bits=st.integers(2, 8),
        symmetric=st.booleans(),
        strategy=st.just("group"),
        group_size=st.integers(1, 512),
    ),
    st.builds(
        QuantScheme,
        num_bits=st.just(8),
        type=st.just("float"),
        strategy=st.sampled_from(["channel", "tensor"]),
    ),
)
treatments = st.builds(
    Treatment,
    sparsity=st.sampled_from(
        [
            (),
            (("method", "magnitude_n_m"), ("pattern", "2:4")),
            (("method", "magnitude_unstructured"), ("sparsity", 0.3)),
        ]
    ),
    scheme=st.one_of(st.none(), schemes),
    method=st.sampled_from(["round_to_nearest", "smallest_error"]),
    layout=st.sampled_from([PACK, INT, FLOAT, DENSE]),
    cast=st.sampled_from([None, "BF16", "F16"]),
)


@given(treatments)
def test_a_treatment_survives_json(treatment: Treatment) -> None:
    told = json.loads(json.dumps(treatment.as_dict(), allow_nan=False))
    back = Treatment.from_dict(told)
    assert back == treatment
    assert hash(back) == hash(treatment)
    assert back.as_dict() == treatment.as_dict()


@given(schemes)
def test_a_scheme_survives_the_config(scheme: QuantScheme) -> None:
    for layout in (FLOAT,) if scheme.type == "float" else (PACK, INT):
        treatment = Treatment(scheme=scheme, layout=layout)
        config = json.loads(json.dumps(quantization_config([(treatment, ["Linear"])], ["lm_head"])))
        assert (config["format"], config["ignore"]) == (layout, ["lm_head"])
        (group,) = config["config_groups"].values()
        assert treatment_from_config(group, config["format"]) == treatment
        assert treatment_from_config({**group, "format": None}, layout) == treatment


def test_several_layouts_are_told_group_by_group() -> None:
    groups = [
        (Treatment(scheme=SCHEMES["W4A16"], layout=PACK), ["Linear"]),
        (Treatment(scheme=SCHEMES["W8A16"], layout=INT), ["a", "b"]),
    ]
    config = quantization_config(groups, ())
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == [PACK, INT]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"], ["a", "b"]]


@pytest.mark.parametrize(
    ("group", "words_of_it"),
    [
        ({"weights": {"num_bits": 8, "dynamic": True}}, "'dynamic': True"),
        ({"weights": {"num_bits": 8, "actorder": "group"}}, "'actorder': 'group'"),
        ({"weights": {"num_bits": 8}, "format": "marlin-24"}, "the format 'marlin-24' are not supported"),
        ({"weights": {"num_bits": 4, "type": "float", "strategy": "channel"}}, "FP8 codes have 8"),
        ({"weights": {"num_bits": 16}}, "num_bits is 16"),
    ],
)
def test_configs_that_are_not_read(group: dict[str, object], words_of_it: str) -> None:
    with pytest.raises(MethodError, match=words_of_it):
        treatment_from_config(group, PACK)


def test_a_config_may_leave_its_strategy_to_the_group_size() -> None:
    for weights, strategy in (({"num_bits": 4, "group_size": 32}, "group"), ({"num_bits": 8}, "tensor")):
        scheme = treatment_from_config({"weights": weights}, PACK).scheme
        assert scheme is not None
        assert (scheme.strategy, scheme.symmetric, scheme.type) == (strategy, True, "int")


# ---- sizes


@given(st.integers(1, 2000), st.integers(1, 300))
def test_fitted_groups_divide_the_row(columns: int, size: int) -> None:
    own = fitted(QuantScheme(num_bits=4, strategy="group", group_size=size), columns).group_size
    assert own is not None
    assert columns % own == 0
    assert own <= size
    assert not any(columns % larger == 0 for larger in range(own + 1, min(size, columns) + 1))


def test_without_groups_there_is_nothing_to_fit() -> None:
    for scheme in (SCHEMES["W8A16"], SCHEMES["FP8"], resolve(strategy="tensor")):
        assert fitted(scheme, 97) is scheme
    assert fitted(SCHEMES["W4A16"], 256) == SCHEMES["W4A16"]


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_words_hold_every_code(num_bits: int) -> None:
    for count in range(200):
        assert 32 * (words(count, num_bits) - 1) < count * num_bits <= 32 * words(count, num_bits)
    assert words(32, num_bits) == num_bits


@given(schemes, st.integers(1, 60), st.integers(1, 200), st.sampled_from(sorted(DTYPES)))
def test_bits_are_those_of_all_parts_but_the_shape(
    scheme: QuantScheme, rows: int, columns: int, dtype: str
) -> None:
    own = fitted(scheme, columns)
    for layout in (FLOAT,) if scheme.type == "float" else (PACK, INT):
        treatment = Treatment(scheme=own, layout=layout)
        found = stored_bits("a", dtype, (rows, columns), treatment)
        parts = stored("a", dtype, (rows, columns), treatment)
        sizes = {part.name: 8 * part.item_bytes * math.prod(part.shape) for part in parts}
        assert found == sum(sizes.values()) - sizes.get("a_shape", 0)
        exact = bits_per_weight(own, (rows, columns), 8 * DTYPES[dtype].itemsize) * rows * columns
        assert found >= exact - 1e-6, "words are filled up, codes are never fewer"
    assert stored_bits("a", dtype, (rows, columns), KEPT) == 8 * DTYPES[dtype].itemsize * rows * columns


def test_bits_of_whole_words_are_exact() -> None:
    for name in ("W4A16", "W4A16_ASYM", "W8A16", "W3A16_ASYM"):
        treatment = Treatment(scheme=SCHEMES[name], layout=PACK)
        assert treatment.scheme is not None
        exact = bits_per_weight(treatment.scheme, (64, 512), 16) * 64 * 512
        assert stored_bits("a", "BF16", (64, 512), treatment) == exact


# ---- errors


@pytest.mark.parametrize("layout", [PACK, INT, FLOAT])
@pytest.mark.parametrize("shape", [(), (8,), (2, 4, 8)])
def test_only_matrices_have_codes(shape: tuple[int, ...], layout: str) -> None:
    scheme = SCHEMES["FP8" if layout == FLOAT else "W8A16"]
    with pytest.raises(MethodError, match=r"a\.weight: shape .*matrices .* add the layer to `ignore`"):
        stored("a.weight", "F32", shape, Treatment(scheme=scheme, layout=layout))


def test_groups_that_do_not_divide_the_row_are_refused() -> None:
    treatment = Treatment(scheme=SCHEMES["W4A16"], layout=PACK)
    for ask in (stored, stored_bits):
        with pytest.raises(MethodError, match=r"a: group_size 128 does not divide rows of 192, .*take 96"):
            ask("a", "F32", (4, 192), treatment)


@pytest.mark.parametrize("sizes", [[], [4], [4, 0], [-1, 4], [1, 2, 3]])
def test_shapes_that_are_none(sizes: list[int]) -> None:
    assert matrix_shape("a", [3, 4]) == (3, 4)
    with pytest.raises(QuantizationError, match=r"a_shape: \[.*\] is no shape of a matrix"):
        matrix_shape("a", sizes)
